"""Encoders and cross-encoders: the directory contract with the peer library, and vectors free of their neighbours."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers import SentenceTransformer

from raytower.errors import FormatError, InputError
from raytower.models.batch_planner import plan_batches, plan_chunks
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.forward import ForwardEngine
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker

TEXTS = [
    "What does a deductible mean?",
    "a",
    "  spaces around, and a trailing line\n",
    "个体工商户的债务由谁偿还",
    'Tabs\tand "quotes" are data. ' * 12,
    "UPPER and lower",
    "我要开通微粒贷",
]


@given(
    lengths=st.lists(st.integers(min_value=0, max_value=600), max_size=200),
    budget=st.integers(min_value=1, max_value=4096),
)
def test_batch_plan_holds_every_text_once_and_keeps_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_batches(lengths, budget)
    rows = [int(row) for batch in plan.batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in plan.batches:
        width = max(max(lengths[row] for row in batch), 1)
        assert len(batch) == 1 or width * len(batch) <= budget
    widths = [max(lengths[row] for row in batch) for batch in plan.batches]
    assert widths == sorted(widths, reverse=True)
    assert plan.num_tokens == sum(lengths)


def test_padding_is_counted_against_the_longest_text_of_each_batch() -> None:
    plan = plan_batches([10, 2, 9, 3], tokens_per_batch=20)
    assert [batch.tolist() for batch in plan.batches] == [[0, 2], [3, 1]]
    assert plan.num_padded_tokens == 20 + 6


def test_chunks_of_two_lengths_by_hand() -> None:
    """One chunk of six rows of 9 costs 54 + 10; two, of 9 9 and 1 1 1 1, cost 18 + 4 and two launches."""
    lengths = [9, 1, 1, 9, 1, 1]
    apart, together = plan_chunks(lengths, 100, 10), plan_chunks(lengths, 100, 33)
    assert [batch.tolist() for batch in apart.batches] == [[0, 3], [1, 2, 4, 5]]
    assert [batch.tolist() for batch in together.batches] == [[0, 3, 1, 2, 4, 5]]
    assert (apart.num_padded_tokens, together.num_padded_tokens, apart.num_tokens) == (22, 54, 22)
    assert plan_chunks([], 100, 10).batches == []


@given(
    lengths=st.lists(st.integers(min_value=0, max_value=12), min_size=1, max_size=9),
    budget=st.integers(min_value=1, max_value=40),
    launch=st.integers(min_value=0, max_value=30),
    rows=st.none() | st.integers(min_value=1, max_value=5),
)
def test_chunks_cost_least_of_all_ways_to_cut(
    lengths: list[int], budget: int, launch: int, rows: int | None
) -> None:
    """Of all ways to cut the sorted lengths that keep to the bounds, tried one by one."""
    widths = sorted((max(length, 1) for length in lengths), reverse=True)
    costs = []
    for cuts in product([False, True], repeat=len(widths) - 1):
        ends = [place + 1 for place, cut in enumerate(cuts) if cut] + [len(widths)]
        parts = [widths[begin:end] for begin, end in pairwise([0, *ends])]
        most = rows or len(widths)
        if all(len(part) == 1 or (part[0] * len(part) <= budget and len(part) <= most) for part in parts):
            costs.append(sum(part[0] * len(part) + launch for part in parts))
    plan = plan_chunks(lengths, budget, launch, rows)
    assert sorted(int(row) for batch in plan.batches for row in batch) == list(range(len(lengths)))
    padded = sum(max(max(lengths[row] for row in batch), 1) * len(batch) for batch in plan.batches)
    assert plan.num_padded_tokens == padded
    assert padded + launch * len(plan.batches) == min(costs)
    assert all(len(batch) <= (rows or len(batch)) for batch in plan.batches)


def test_chunks_of_a_large_batch_keep_the_bounds() -> None:
    """Where cuts lie at multiples of a few rows: no chunk beyond the budget, and little more than the least cost."""
    lengths = np.random.default_rng(0).integers(1, 512, 20_000)
    plan = plan_chunks(lengths, 65_536, 4096)
    assert np.array_equal(np.sort(np.concatenate(plan.batches)), np.arange(20_000))
    assert all(lengths[batch].max() * len(batch) <= 65_536 for batch in plan.batches)
    # Of n equal steps between the lengths each wastes half a step, at most as much as launches cost.
    assert plan.num_padded_tokens < 1.05 * plan.num_tokens


def test_minilm_gives_the_peers_vectors_and_so_does_our_copy(minilm_dir: Path, tmp_path: Path) -> None:
    peer = SentenceTransformer(str(minilm_dir), device="cpu").encode(TEXTS)
    encoder = Encoder.load(minilm_dir)
    ours = ForwardEngine(encoder).encode(TEXTS)
    assert np.abs(ours - peer).max() < 1e-5
    encoder.save(tmp_path / "copy")
    copied = SentenceTransformer(str(tmp_path / "copy"), device="cpu").encode(TEXTS)
    assert np.abs(copied - peer).max() < 1e-5
    again = Encoder.load(tmp_path / "copy")
    assert again.fingerprint == encoder.fingerprint
    assert again.max_length == encoder.max_length == 256


@pytest.mark.parametrize("projection_dim", [None, 8])
def test_tiny_encoder_with_projection_and_prompts_agrees_with_the_peer(
    tmp_path: Path, projection_dim: int | None
) -> None:
    folder = build_tiny_encoder(
        tmp_path / "encoder",
        projection_dim=projection_dim,
        prompts={"query": "query: ", "passage": "passage: "},
    )
    encoder = Encoder.load(folder)
    assert (encoder.prefix_for("query"), encoder.prefix_for("document")) == ("query: ", "passage: ")
    ours = ForwardEngine(encoder).encode(TEXTS, prefix=encoder.prefix_for("query"))
    peer = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name="query")
    assert ours.shape == (len(TEXTS), projection_dim or 32)
    assert np.abs(ours - peer).max() < 1e-5


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_every_pooling_mode_agrees_with_the_peer(tmp_path: Path, mode: str) -> None:
    encoder = Encoder.load(build_tiny_encoder(tmp_path / "first"))
    encoder.settings = EncoderSettings(pooling=mode, max_length=64)  # type: ignore[arg-type]
    encoder.save(tmp_path / "second")
    peer = SentenceTransformer(str(tmp_path / "second"), device="cpu").encode(TEXTS)
    ours = ForwardEngine(Encoder.load(tmp_path / "second")).encode(TEXTS)
    assert np.abs(ours - peer).max() < 1e-5


def test_a_directory_written_by_the_peer_loads_here(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu")
    peer.save_pretrained(str(tmp_path / "peer"))
    ours = ForwardEngine(Encoder.load(tmp_path / "peer")).encode(TEXTS)
    assert np.abs(ours - peer.encode(TEXTS)).max() < 1e-5
    assert Encoder.load(tmp_path / "peer").fingerprint == Encoder.load(dummy_encoder_dir).fingerprint


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 5e-4)])
def test_a_vector_does_not_depend_on_its_neighbours(minilm_dir: Path, dtype: str, limit: float) -> None:
    """Defect of an older system: vectors that changed with the batch they were encoded in."""
    alone = ForwardEngine(Encoder.load(minilm_dir), dtype=dtype, tokens_per_batch=1)  # type: ignore[arg-type]
    together = ForwardEngine(Encoder.load(minilm_dir), dtype=dtype, tokens_per_batch=100_000)  # type: ignore[arg-type]
    texts = TEXTS * 3
    cosine = (alone.encode(texts).astype(np.float64) * together.encode(texts[::-1])[::-1]).sum(1)
    assert (1 - cosine).max() < limit


def test_bfloat16_stays_close_to_float32(minilm_dir: Path) -> None:
    exact = ForwardEngine(Encoder.load(minilm_dir)).encode(TEXTS)
    fast = ForwardEngine(Encoder.load(minilm_dir), dtype="bfloat16").encode(TEXTS)
    assert (exact * fast).sum(1).min() >= 0.999


def test_the_fingerprint_tells_weights_pooling_and_projection_apart(tmp_path: Path) -> None:
    first = Encoder.load(build_tiny_encoder(tmp_path / "a", seed=0))
    prints = {
        first.fingerprint,
        Encoder.load(build_tiny_encoder(tmp_path / "b", seed=1)).fingerprint,
        Encoder.load(build_tiny_encoder(tmp_path / "c", seed=0, projection_dim=8)).fingerprint,
        Encoder(first.backbone, first.tokenizer, EncoderSettings(pooling="cls")).fingerprint,
        Encoder(first.backbone, first.tokenizer, EncoderSettings(normalise=False)).fingerprint,
    }
    assert len(prints) == 5


@pytest.mark.parametrize("num_labels", [1, 2])
def test_reranker_scores_like_the_peer(tmp_path: Path, num_labels: int) -> None:
    folder = build_tiny_reranker(tmp_path / "reranker", num_labels=num_labels)
    pairs = [(a, b) for a in TEXTS[:3] for b in TEXTS]
    scorer = CrossScorer(CrossEncoder.load(folder), tokens_per_batch=256)
    ours = scorer.score([a for a, _ in pairs], [b for _, b in pairs])
    peer = PeerCrossEncoder(str(folder), device="cpu", max_length=64).predict(pairs)
    if num_labels == 1:
        assert np.abs(1 / (1 + np.exp(-ours)) - peer).max() < 1e-5
    else:
        assert np.abs(ours - (peer[:, 1] - peer[:, 0])).max() < 1e-5


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_the_peer_puts_on_the_logit_what_training_meant(tmp_path: Path, activation: str) -> None:
    reranker = CrossEncoder.load(build_tiny_reranker(tmp_path / "first"))
    reranker.activation = activation  # type: ignore[assignment]
    reranker.save(tmp_path / "second")
    again = CrossEncoder.load(tmp_path / "second")
    assert again.activation == activation
    again.save(tmp_path / "third")
    pairs = [(a, b) for a in TEXTS[:2] for b in TEXTS]
    logits = CrossScorer(again).score(*zip(*pairs, strict=True))
    peer = PeerCrossEncoder(str(tmp_path / "third"), device="cpu", max_length=64).predict(pairs)
    expected = 1 / (1 + np.exp(-logits)) if activation == "sigmoid" else logits
    assert np.abs(expected - peer).max() < 1e-5
    assert np.abs(1 / (1 + np.exp(-logits)) - logits).max() > 0.1


@pytest.mark.parametrize(("module", "name"), [(torch.nn.Identity, "identity"), (torch.nn.Sigmoid, "sigmoid")])
def test_a_rerankers_activation_is_read_from_what_the_peer_wrote(
    dummy_reranker_dir: Path, tmp_path: Path, module: type[torch.nn.Module], name: str
) -> None:
    peer = PeerCrossEncoder(str(dummy_reranker_dir), device="cpu", activation_fn=module())
    peer.save_pretrained(str(tmp_path / "peer"))
    assert CrossEncoder.load(tmp_path / "peer").activation == name


def test_an_unknown_activation_is_refused(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dummy_reranker_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"]["activation_fn"] = "torch.nn.modules.activation.Tanh"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"activation\.Tanh' on its logit; known are"):
        CrossEncoder.load(folder)


def test_an_encoder_is_refused_as_reranker_but_starts_one(dummy_encoder_dir: Path) -> None:
    with pytest.raises(FormatError, match=r"is an encoder .* it is no reranker"):
        CrossEncoder.load(dummy_encoder_dir)
    assert CrossScorer(CrossEncoder.start_from(dummy_encoder_dir)).score(["a"], ["b"]).shape == (1,)


def test_training_sees_every_logit_and_search_one(dummy_encoder_dir: Path) -> None:
    model = CrossEncoder.start_from(dummy_encoder_dir, num_labels=2).eval()
    inputs = dict(model.tokenizer(TEXTS[:3], TEXTS[3:6], padding=True, truncation=True, return_tensors="pt"))
    logits, relevance = model.logits(**inputs), model(**inputs)
    assert logits.shape == (3, 2)
    assert torch.equal(relevance, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_finished_reranker_goes_on_with_its_head(tmp_path: Path, num_labels: int) -> None:
    folder = build_tiny_reranker(tmp_path / "reranker", num_labels=num_labels)
    finished = CrossEncoder.load(folder)
    finished.activation = "identity" if num_labels == 1 else "sigmoid"
    fusion = {"weight": 0.5, "recall_mean": 0.0, "recall_std": 1.0, "rerank_mean": 0.0, "rerank_std": 1.0}
    finished.save(folder, {"fusion": fusion, "history": [{"step": 1}]})
    started = CrossEncoder.start_from(folder, num_labels)
    assert CrossScorer(started).score(["a"], ["b"]) == CrossScorer(finished).score(["a"], ["b"])
    assert (started.activation, started.max_length) == (finished.activation, 64)
    assert started.info == {}  # a fusion tuned for other weights would mislead
    other = 3 - num_labels
    with pytest.raises(InputError, match=f"num_labels {num_labels}, and the objective trains {other}"):
        CrossEncoder.start_from(folder, other)


class TestRefusals:
    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            Encoder.load(tmp_path / "nothing")

    def test_unreachable_hub_id(self) -> None:
        with pytest.raises(InputError, match="could not be fetched from the hub"):
            Encoder.load("no-such-org-here/no-such-model")

    def test_directory_without_weights(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(dummy_encoder_dir, folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(FormatError, match=r"no model\.safetensors"):
            Encoder.load(folder)
        torch.save({}, folder / "model.pt")
        with pytest.raises(FormatError, match=r"no pytorch_model\.bin \(it has model\.pt, which is not read"):
            Encoder.load(folder)

    def test_weights_of_another_model(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(dummy_encoder_dir, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        with pytest.raises(FormatError, match="lacks"):
            Encoder.load(folder)

    def test_unknown_module(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(dummy_encoder_dir, folder)
        modules = json.loads((folder / "modules.json").read_text())
        modules.append({"idx": 9, "name": "9", "path": "9_LSTM", "type": "sentence_transformers.models.LSTM"})
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(FormatError, match=r"models\.LSTM"):
            Encoder.load(folder)

    def test_max_length_beyond_the_positions(self, dummy_encoder_dir: Path) -> None:
        with pytest.raises(InputError, match="max_length is 65"):
            ForwardEngine(Encoder.load(dummy_encoder_dir), max_length=65)


def test_no_texts_give_an_empty_matrix(dummy_encoder_dir: Path) -> None:
    assert ForwardEngine(Encoder.load(dummy_encoder_dir)).encode([]).shape == (0, 32)
