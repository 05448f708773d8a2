"""Every objective from a config alone, and every setting of the step: trained in this process, without Ray."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers import SentenceTransformer
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoTokenizer, pipeline
from transformers.models.bert.modeling_bert import BertEmbeddings, BertIntermediate

from raytower.config import make_config
from raytower.errors import InputError, RaytowerError
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.text_classifier import TextClassifier
from raytower.models.two_tower import TwoTower
from raytower.training.checkpoint import load_trainable, save_trainable
from raytower.training.classifier import ClassifierTask
from raytower.training.columns import text_columns
from raytower.training.config import (
    ALONE,
    TrainClassifierConfig,
    TrainRerankerConfig,
    TrainRetrieverConfig,
)
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.step import TrainingStep
from tests.support.tiny_models import build_tiny_encoder
from tests.support.tiny_training import (
    answer,
    batches_of,
    other_answer,
    question,
    train_here,
    training_values,
    write_candidates,
    write_labelled,
    write_lines,
    write_pairs,
    write_rows,
    write_scored,
    write_triples,
)

Trained = tuple[Any, Any, list[float]]


def values_of(model: Path, train: Path, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return training_values(model, train, folder, **{"optimizer": {"lr": 2e-3}, **changes})


def train_retriever_here(model: Path, train: Path, folder: Path, steps: int = 16, **changes: Any) -> Trained:
    config = make_config(TrainRetrieverConfig, values_of(model, train, folder, changes))
    surveyed = RetrieverTask.survey(config)
    task = RetrieverTask.prepare(config, surveyed)
    return (task, *train_here(task, config, surveyed, steps))


def fell(losses: list[float], share: float = 0.9) -> bool:
    """Whether the last quarter of the losses lies well below the first one."""
    quarter = len(losses) // 4
    return sum(losses[-quarter:]) < share * sum(losses[:quarter])


@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [
        ("in_batch_negatives", write_pairs, {"scale": 30, "margin": 0.1}),
        ("in_batch_negatives", write_pairs, {"symmetric": True}),
        ("in_batch_negatives", write_triples, {}),
        ("in_batch_negatives", write_candidates, {}),
        ("in_batch_negatives", write_labelled, {}),
        (
            "in_batch_negatives",
            write_triples,
            {"more_negatives": ["query_query", "document_document", "document_query"]},
        ),
        ("hardest_negative", write_pairs, {"margin": 0.2}),
        ("random_negative", write_pairs, {}),
        ("simcse", write_lines, {}),
        ("cosine_embedding", write_scored, {"margin": 0.3}),
        ("cosine_regression", write_scored, {}),
        ("cosent", write_scored, {}),
        ("angle", write_scored, {"scale": 10}),
        ("margin_mse", write_candidates, {"scale": 2.0}),
        ("kl_divergence", write_candidates, {"scale": 10.0}),
    ],
)
def test_every_encoder_objective_trains_from_a_config(
    dummy_encoder_dir: Path,
    tmp_path: Path,
    name: str,
    write: Callable[[Path, int], Path],
    settings: dict[str, Any],
) -> None:
    suffix = {write_candidates: "jsonl", write_lines: "txt"}.get(write, "tsv")
    train = write(tmp_path / f"train.{suffix}", 64)
    task, model, losses = train_retriever_here(
        dummy_encoder_dir, train, tmp_path, objective={"name": name, **settings}
    )
    assert fell(losses), losses
    task.save(model, tmp_path / "saved", {})
    before, after = (load_file(d / "model.safetensors") for d in (dummy_encoder_dir, tmp_path / "saved"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "pooler" not in key}


def test_a_teacher_scores_the_candidates(
    dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    train = write_triples(tmp_path / "train.tsv", 32)
    task, _, losses = train_retriever_here(
        dummy_encoder_dir,
        train,
        tmp_path,
        objective={"name": "margin_mse"},
        teacher=str(dummy_reranker_dir),
    )
    assert fell(losses)
    columns = text_columns({"query": ["a", "b"], "document": ["c", "d"], "negative": ["e", "f"]})
    teacher = PeerCrossEncoder(str(dummy_reranker_dir), device="cpu")
    pairs = [("a", "c"), ("a", "e"), ("b", "d"), ("b", "f")]
    expected = teacher.predict(pairs, activation_fn=torch.nn.Identity()).reshape(2, 2)
    assert task._taught(columns).teacher_BK.numpy() == pytest.approx(expected, abs=1e-5)
    # The scale of the margins is that of a sample: the 95th percentile of what the peer gives.
    rows = [line.split("\t") for line in train.read_text().splitlines()[1:]]
    relevant, other = (
        teacher.predict([(row[0], row[place]) for row in rows], activation_fn=torch.nn.Identity())
        for place in (1, 2)
    )
    largest = np.quantile(np.abs(relevant - other), 0.95)
    assert task.config.objective.scale == pytest.approx(largest, rel=0.051)


@pytest.mark.parametrize("projection_dim", [12, 32])
@pytest.mark.parametrize("cached", [None, 8])
def test_the_vectors_of_a_teacher_are_followed(
    dummy_encoder_dir: Path, tmp_path: Path, projection_dim: int, cached: int | None
) -> None:
    """Over a layer where the teacher's dimension is another one, which is saved for going on and not published."""
    prompts = {"query": "q: ", "document": "d: "}
    teacher = build_tiny_encoder(tmp_path / "teacher", 3, projection_dim, prompts)
    train = write_lists(tmp_path / "train.jsonl", [2, 3] * 16)
    task, model, losses = train_retriever_here(
        dummy_encoder_dir,
        train,
        tmp_path,
        objective={"name": "embedding_distillation"},
        teacher=str(teacher),
        gradient_cache=cached,
        optimizer={"lr": 5e-3},
    )
    assert fell(losses), losses
    assert task.keeps_weights_apart
    assert (model.into_teacher is None) == (projection_dim == 32)
    rows = {"query": ["a"], "documents": [["b", "c"]], "scores": [[1.0, 0.0]]}
    peer = SentenceTransformer(str(teacher), device="cpu")
    expected = [peer.encode(["a"], prompt_name="query"), *(peer.encode([t], prompt="d: ") for t in "bc")]
    given = task._taught(text_columns(rows, 3)).teacher_columns
    assert len(given) == 4
    for own, theirs in zip(given, expected, strict=False):
        assert own.numpy() == pytest.approx(theirs, abs=1e-5)
    assert not given[3].any()
    task.save(model, tmp_path / "saved", {})
    assert SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["x"]).shape == (1, 32)
    # What a checkpoint keeps brings the layer back.
    save_trainable(model, tmp_path)
    again = task.build(None)
    load_trainable(again, tmp_path)
    for name, weights in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights), name


def test_texts_alone_are_followed_in_both_roles(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.txt", 64)
    teacher = build_tiny_encoder(tmp_path / "teacher", 3, 12)
    _, _, losses = train_retriever_here(
        dummy_encoder_dir,
        train,
        tmp_path,
        objective={"name": "embedding_distillation", "loss": "mse"},
        teacher=str(teacher),
        optimizer={"lr": 5e-3},
    )
    assert fell(losses), losses


@pytest.mark.parametrize("dims", [None, [32, 8]])
def test_a_guide_tells_false_negatives(still_encoder: Path, tmp_path: Path, dims: list[int] | None) -> None:
    """The first loss is that of the pairs that the guide leaves, by its own vectors."""
    guide = build_tiny_encoder(tmp_path / "guide", 3, 12)
    train = write_pairs(tmp_path / "train.tsv", 16)
    changes = {"matryoshka": dims and {"dims": dims}, "optimizer": {"lr": 1e-12}, "steps": 1}
    settings = {"guide": {"encoder": str(guide), "margin": 0.1}}
    _, _, (guided,) = train_retriever_here(still_encoder, train, tmp_path, **changes, **settings)
    columns = [line.split("\t") for line in train.read_text().splitlines()]
    texts = [[row[place] for row in columns] for place in (0, 1)]
    own, seen = (
        [torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(text)) for text in texts]
        for folder in (still_encoder, guide)
    )
    cosines = seen[0] @ seen[1].T
    left_out = (cosines > cosines.diag()[:, None] - 0.1) & ~torch.eye(16, dtype=torch.bool)
    assert 16 < int(left_out.sum()) < 16 * 15
    expected = 0.0
    for dim in dims or [32]:
        query, document = (torch.nn.functional.normalize(vectors[:, :dim], dim=-1) for vectors in own)
        logits = (20 * query @ document.T).masked_fill(left_out, -torch.inf)
        expected += float(torch.nn.functional.cross_entropy(logits, torch.arange(16)))
    assert guided == pytest.approx(expected, abs=1e-4)


def write_lists(path: Path, lengths: list[int]) -> Path:
    """Candidates with so many documents each, numbered; the first is the relevant one."""
    rows = [
        {
            "query": question(i),
            "documents": [answer(i), *(f"{other_answer(i)} {k}" for k in range(1, length))],
            "scores": [1.0, *[0.0] * (length - 1)],
        }
        for i, length in enumerate(lengths)
    ]
    return write_rows(path, [json.dumps(row) for row in rows])


class TestListsOfUnequalLength:
    def test_a_short_list_does_not_cut_the_others(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        """One row of two documents among 63 of eight: the others train with all of theirs."""
        train = write_lists(tmp_path / "train.jsonl", [8] * 31 + [2])
        config = make_config(TrainRetrieverConfig, values_of(dummy_encoder_dir, train, tmp_path, {}))
        surveyed = RetrieverTask.survey(config)
        task = RetrieverTask.prepare(config, surveyed)
        assert task.num_documents == 8
        rows = next(
            batches_of(
                surveyed,
                make_config(
                    TrainRetrieverConfig, values_of(dummy_encoder_dir, train, tmp_path, {"batch_size": 32})
                ),
                task.num_documents,
            )
        )
        assert sorted(map(len, rows["documents"])) == [2] + [8] * 31
        columns = text_columns(rows, task.num_documents)
        assert len(columns.documents) == 8
        assert len(columns.present_documents) == 31 * 8 + 2

    @pytest.mark.parametrize("name", ["in_batch_negatives", "margin_mse", "kl_divergence"])
    @pytest.mark.parametrize("cached", [None, 4])
    def test_encoders_train_from_them(
        self, dummy_encoder_dir: Path, tmp_path: Path, name: str, cached: int | None
    ) -> None:
        train = write_lists(tmp_path / "train.jsonl", [2, 5, 3, 2] * 8)
        _, _, losses = train_retriever_here(
            dummy_encoder_dir, train, tmp_path, objective={"name": name}, gradient_cache=cached
        )
        assert fell(losses)

    @pytest.mark.parametrize(
        "name", ["listwise_softmax", "pairwise_margin", "rank_net", "lambda_loss", "pointwise_regression"]
    )
    def test_the_loss_of_a_reranker_is_that_of_its_lists(
        self, still_encoder: Path, tmp_path: Path, name: str
    ) -> None:
        lengths = [2, 5, 3, 2]
        train = write_lists(tmp_path / "train.jsonl", lengths)
        changes = {"objective": {"name": name}, "batch_size": 4, "optimizer": {"lr": 1e-12}}
        config = make_config(TrainRerankerConfig, values_of(still_encoder, train, tmp_path, changes))
        surveyed = RerankerTask.survey(config)
        task = RerankerTask.prepare(config, surveyed)
        model, (loss,) = train_here(task, config, surveyed, 1)
        assert task.num_documents == 5
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        scorer = CrossScorer(model.inner.eval(), max_length=32)
        logits = [
            torch.from_numpy(scorer.score([row["query"]] * len(row["documents"]), row["documents"]))
            for row in rows
        ]
        # By torch's own functions, one list after the other.
        if name == "listwise_softmax":
            losses = [-row.log_softmax(0)[0] for row in logits]
        elif name == "pairwise_margin":
            losses = [(0.1 - row[0].sigmoid() + row[1:].sigmoid()).clamp(min=0).mean() for row in logits]
        elif name == "rank_net":
            losses = [torch.nn.functional.softplus(row[1:] - row[0]).mean() for row in logits]
        elif name == "lambda_loss":
            losses = [self.lambda_loss(row) for row in logits]
        else:
            labels = torch.tensor([score for row in rows for score in row["scores"]])
            every = torch.nn.functional.binary_cross_entropy_with_logits
            losses = [every(torch.cat(logits), labels)]
        assert loss == pytest.approx(float(sum(losses)) / len(losses), abs=1e-5)

    def lambda_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Of a list whose first document alone is relevant: its gain is 1, and the best DCG is 1."""
        place = 1 + logits.argsort(descending=True).argsort()
        apart = (place[1:] - place[0]).abs()
        weight = 10 * (1 / torch.log2(1.0 + apart) - 1 / torch.log2(2.0 + apart))
        weight += (1 / torch.log2(1.0 + place[1:]) - 1 / torch.log2(1.0 + place[0])).abs()
        return (weight * torch.log2(1 + (logits[1:] - logits[0]).exp())).sum()

    def test_workers_with_unequal_lists_make_the_step_of_one(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their mean loss is the mean over all pairs, though one worker holds 4 of them and the other 8."""
        train = write_lists(tmp_path / "train.jsonl", [2, 2, 3, 5])
        changes = {"batch_size": 4, "optimizer": {"lr": 1e-12}}
        config = make_config(TrainRerankerConfig, values_of(still_encoder, train, tmp_path, changes))
        surveyed = RerankerTask.survey(config)
        task = RerankerTask.prepare(config, surveyed)
        rows = [json.loads(line) for line in train.read_text().splitlines()]

        def loss_of(some: list[dict[str, Any]]) -> float:
            batch = {name: [row[name] for row in some] for name in rows[0]}
            monkeypatch.setattr("tests.support.tiny_training.batches_of", lambda *_: iter([batch]))
            return train_here(task, config, surveyed, 1)[1][0]

        whole = loss_of(rows)
        monkeypatch.setattr("raytower.training.reranker.gather_constants", lambda _: torch.tensor([4.0, 8.0]))
        assert (loss_of(rows[:2]) + loss_of(rows[2:])) / 2 == pytest.approx(whole, abs=1e-6)

    def test_more_than_all_rows_have(
        self, dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train = write_lists(tmp_path / "train.jsonl", [3, 2] * 8)
        changes = {"train": {"path": str(train), "num_documents": 4}}
        config = make_config(TrainRetrieverConfig, values_of(dummy_encoder_dir, train, tmp_path, changes))
        assert RetrieverTask.prepare(config, RetrieverTask.survey(config)).num_documents == 3
        told = capsys.readouterr().err
        assert "train.num_documents is 4, and no row has more than 3" in told
        assert "8 of 16 rows have fewer than 3 documents (down to 2)" in told


def test_three_stages_continue_from_each_other(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """SimCSE, then in-batch negatives, then hard negatives: three configs, each started from the last one's output."""
    stages = [
        (write_lines(tmp_path / "texts.txt", 32), "simcse"),
        (write_pairs(tmp_path / "pairs.tsv", 32), "in_batch_negatives"),
        (write_triples(tmp_path / "triples.tsv", 32), "in_batch_negatives"),
    ]
    start = dummy_encoder_dir
    for number, (train, name) in enumerate(stages):
        task, model, _ = train_retriever_here(
            dummy_encoder_dir,
            train,
            tmp_path,
            steps=2,
            init_from=str(start),
            objective={"name": name},
            projection_dim=8,
        )
        assert task.start == str(start)
        if number:
            assert task.build(None).encoder.compute_fingerprint() == Encoder.load(start).fingerprint
        start = tmp_path / f"stage{number}"
        task.save(model, start, {})
        assert len(Encoder.load(start).projections) == 1


def test_a_projection_is_saved_as_the_dense_module(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 32)
    task, model, _ = train_retriever_here(
        dummy_encoder_dir, train, tmp_path, steps=2, projection_dim=16, matryoshka={"dims": [16, 8]}
    )
    task.save(model, tmp_path / "saved", {})
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["what is aaa 0?"])
    assert peer.shape == (1, 16)
    tower = TwoTower(Encoder.load(tmp_path / "saved"), 32, 1024).eval()
    (ours,) = tower(tower.plan_chunks([tower.tokenise(["what is aaa 0?"], "")]))
    assert ours.detach().numpy() == pytest.approx(peer, abs=1e-5)


class TestSettingsOfTheStep:
    """Each setting gives what the plain step gives: the same losses, or the same within its precision."""

    @pytest.fixture(scope="class")
    def plain(self, dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
        folder = tmp_path_factory.mktemp("plain")
        return self.losses(dummy_encoder_dir, folder)

    def losses(self, model: Path, folder: Path, **changes: Any) -> list[float]:
        train = write_pairs(folder / "train.tsv", 64)
        return train_retriever_here(model, train, folder, steps=6, **changes)[2]

    def test_the_same_seed_gives_the_same_curve_and_another_one_does_not(
        self, plain: list[float], dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        assert self.losses(dummy_encoder_dir, tmp_path) == pytest.approx(plain, abs=1e-6)
        other = self.losses(dummy_encoder_dir, tmp_path, seed=1)
        assert max(abs(a - b) for a, b in zip(other, plain, strict=True)) > 1e-3

    def test_recomputation_happens_and_changes_nothing(
        self, plain: list[float], dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        """With dropout on: the masks of the second forward pass are those of the first."""
        passes: Counter[type] = Counter()
        with register_module_forward_pre_hook(lambda m, _: passes.update([type(m)] if m.training else [])):
            losses = self.losses(dummy_encoder_dir, tmp_path, recompute=True)
        assert losses == pytest.approx(plain, abs=1e-5)
        # On the way back the inside of both layers is computed once more, the embeddings are not. Hooks of a layer
        # itself stay outside what is recomputed.
        assert passes[BertIntermediate] == 2 * 2 * passes[BertEmbeddings] > 0

    @pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
    def test_mixed_precision_is_used_and_stays_close(
        self,
        still_encoder: Path,
        tmp_path: Path,
        dtype: str,
        tolerance: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Defect of an older system: a mixed-precision flag that was parsed and never used."""
        # At the usual scale a step of this model overflows in float16 and is left out, as it should be.
        scaler = partial(torch.amp.GradScaler, init_scale=1024.0)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        exact = self.losses(still_encoder, tmp_path)
        mixed = self.losses(still_encoder, tmp_path, dtype=dtype)
        assert mixed == pytest.approx(exact, abs=tolerance)
        assert mixed != pytest.approx(exact, abs=1e-6)

    def test_accumulated_batches_are_averaged(self, still_encoder: Path, tmp_path: Path) -> None:
        """Two batches accumulated: the loss is their mean, and the weights move as by the mean gradient."""
        train = write_pairs(tmp_path / "train.tsv", 64)
        _, _, accumulated = train_retriever_here(
            still_encoder, train, tmp_path, steps=1, accumulate_batches=2
        )
        still = {"optimizer": {"lr": 1e-12}}
        _, _, single = train_retriever_here(still_encoder, train, tmp_path, steps=2, **still)
        assert accumulated[0] == pytest.approx(sum(single) / 2, abs=1e-5)

    def test_gradients_of_accumulated_batches_are_the_mean(self, still_encoder: Path, tmp_path: Path) -> None:
        train = write_scored(tmp_path / "train.tsv", 64)
        mean = {"objective": {"name": "cosine_embedding"}, "optimizer": {"lr": 1e-2, "max_grad_norm": 1e9}}
        # A loss that is a mean over pairs does not care how its rows are cut into batches.
        _, whole, _ = train_retriever_here(still_encoder, train, tmp_path, steps=1, batch_size=32, **mean)
        _, parts, _ = train_retriever_here(
            still_encoder, train, tmp_path, steps=1, accumulate_batches=2, **mean
        )
        for (name, left), right in zip(whole.named_parameters(), parts.parameters(), strict=True):
            if left.grad is not None:
                assert right.grad is not None
                assert torch.allclose(left.grad, right.grad, atol=1e-6), name

    def test_lora_trains_adapters_only_and_saves_them_merged(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        train = write_pairs(tmp_path / "train.tsv", 64)
        task, model, losses = train_retriever_here(
            dummy_encoder_dir, train, tmp_path, steps=24, lora={"rank": 4}, optimizer={"lr": 1e-2}
        )
        assert fell(losses)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        task.save(model, tmp_path / "saved", {})
        before, after = (load_file(d / "model.safetensors") for d in (dummy_encoder_dir, tmp_path / "saved"))
        assert before.keys() == after.keys()
        assert not torch.equal(
            before["encoder.layer.0.attention.self.query.weight"],
            after["encoder.layer.0.attention.self.query.weight"],
        )
        assert torch.equal(
            before["embeddings.word_embeddings.weight"], after["embeddings.word_embeddings.weight"]
        )
        model.eval()
        saved = TwoTower(Encoder.load(tmp_path / "saved"), 32, 1024).eval()
        chunks = saved.plan_chunks([saved.tokenise(["what is aaa 0?"], "")])
        assert torch.allclose(model(chunks)[0], saved(chunks)[0], atol=1e-5)

    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_a_compiled_backbone_gives_the_same_losses(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
    ) -> None:
        """Traced as for every backend; to write C++ and translate it takes inductor a minute."""
        if backend == "inductor" and shutil.which("g++") is None:
            pytest.skip("torch.compile on a CPU needs a C++ compiler")
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        plain = self.losses(still_encoder, tmp_path)
        counters.clear()
        assert self.losses(still_encoder, tmp_path, compile=True) == pytest.approx(plain, abs=1e-4)
        assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.parametrize(
    ("objective", "write"),
    [
        ({"name": "pointwise_cross_entropy"}, write_scored),
        ({"name": "pointwise_cross_entropy"}, write_triples),
        ({"name": "pointwise_regression", "loss": "bce"}, write_scored),
        ({"name": "pointwise_regression", "loss": "mse"}, write_scored),
        ({"name": "pairwise_margin"}, write_triples),
        ({"name": "listwise_softmax"}, write_triples),
        ({"name": "listwise_softmax"}, write_candidates),
        ({"name": "rank_net"}, write_candidates),
        ({"name": "rank_net"}, write_triples),
        ({"name": "lambda_loss", "k": 2}, write_candidates),
    ],
)
def test_every_cross_encoder_objective_trains_from_a_config(
    dummy_encoder_dir: Path, tmp_path: Path, objective: dict[str, Any], write: Callable[[Path, int], Path]
) -> None:
    train = write(tmp_path / ("train.jsonl" if write is write_candidates else "train.tsv"), 64)
    changes = {"objective": objective, "optimizer": {"lr": 3e-3}}
    config = make_config(TrainRerankerConfig, values_of(dummy_encoder_dir, train, tmp_path, changes))
    surveyed = RerankerTask.survey(config)
    task = RerankerTask.prepare(config, surveyed)
    model, losses = train_here(task, config, surveyed, 80)
    assert fell(losses, 0.97), losses
    task.save(model, tmp_path / "saved", {})
    saved = CrossEncoder.load(tmp_path / "saved")
    assert saved.num_labels == (2 if objective["name"] == "pointwise_cross_entropy" else 1)
    assert saved.activation == config.objective.activation


@pytest.mark.parametrize("kind", ["reranker", "classifier"])
def test_a_published_model_keeps_its_own_length(dummy_encoder_dir: Path, tmp_path: Path, kind: str) -> None:
    """Trained at 32 tokens, its backbone has positions for 64: transformers reads on up to those."""
    config_class, task_class, write = {
        "reranker": (TrainRerankerConfig, RerankerTask, write_scored),
        "classifier": (TrainClassifierConfig, ClassifierTask, write_labelled),
    }[kind]
    train = write(tmp_path / "train.tsv", 16)
    config: Any = make_config(config_class, values_of(dummy_encoder_dir, train, tmp_path, {}))
    task: Any = task_class.prepare(config, task_class.survey(config))
    task.save(task.build(None), tmp_path / "saved", {})
    continued = task.build(tmp_path / "saved")
    assert continued.inner.max_length == 64
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 64


def test_two_classes_of_a_reranker_keep_their_names(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """Given by the config, and kept by a training that goes on from there and gives none."""
    train = write_scored(tmp_path / "train.tsv", 16)
    changes = {"objective": "pointwise_cross_entropy", "labels": ["other", "same"]}
    for folder, more in (("first", changes), ("second", {**changes, "labels": None})):
        start = tmp_path / "first" if folder == "second" else dummy_encoder_dir
        config = make_config(TrainRerankerConfig, values_of(start, train, tmp_path, more))
        task = RerankerTask.prepare(config, RerankerTask.survey(config))
        task.save(task.build(None), tmp_path / folder, {})
        saved = AutoConfig.from_pretrained(tmp_path / folder)
        assert saved.id2label == {0: "other", 1: "same"}
        assert saved.label2id == {"other": 0, "same": 1}
    assert PeerCrossEncoder(str(tmp_path / "second"), device="cpu").num_labels == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["other", "same"]}, "objective pointwise_regression has no classes to name"),
        ({"labels": ["same", "same"], "objective": "pointwise_cross_entropy"}, "give two different names"),
    ],
)
def test_labels_that_name_nothing_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        make_config(TrainRerankerConfig, values_of(tmp_path, tmp_path, tmp_path, changes))


def test_adapters_of_a_cross_encoder_leave_its_head_trainable(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    """The pooler is fresh where the encoder was published without one: frozen, it would stay random."""
    train = write_scored(tmp_path / "train.tsv", 32)
    values = values_of(dummy_encoder_dir, train, tmp_path, {"lora": {"rank": 2}})
    config = make_config(TrainRerankerConfig, values)
    model = RerankerTask.prepare(config, RerankerTask.survey(config)).build(None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {
        "inner.model.bert.pooler.dense.weight",
        "inner.model.bert.pooler.dense.bias",
        "inner.model.classifier.weight",
        "inner.model.classifier.bias",
    }


def test_no_duplicates_looks_at_what_tells(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    def columns(rows: Path, **changes: Any) -> tuple[str, ...]:
        changes |= {"sampler": "no_duplicates"}
        config = make_config(TrainRetrieverConfig, values_of(dummy_encoder_dir, rows, tmp_path, changes))
        return RetrieverTask.prepare(config, RetrieverTask.survey(config)).distinct_columns

    scored = write_scored(tmp_path / "scored.tsv", 16)
    assert columns(scored, objective={"name": "cosine_embedding"}) == ("query", "document")
    assert columns(write_candidates(tmp_path / "c.jsonl", 16)) == ("query", "documents")
    labelled = {"path": str(write_labelled(tmp_path / "labelled.tsv", 16)), "format": "labelled"}
    assert columns(tmp_path / "labelled.tsv", train=labelled) == ("text", "label")


@pytest.mark.parametrize("objective", [{"name": "cross_entropy"}, {"name": "focal", "gamma": 1.0}])
@pytest.mark.parametrize("weights", [None, "balanced", {"topics##a": 2.0}])
def test_classifiers_train_from_a_config(
    dummy_encoder_dir: Path, tmp_path: Path, objective: dict[str, Any], weights: object
) -> None:
    train = write_labelled(tmp_path / "train.tsv", 64)
    changes = {
        "objective": {**objective, "class_weights": weights},
        "optimizer": {"lr": 5e-3},
        "dev": {"path": str(train), "metric": "f1"},
    }
    config = make_config(TrainClassifierConfig, values_of(dummy_encoder_dir, train, tmp_path, changes))
    surveyed = ClassifierTask.survey(config)
    task = ClassifierTask.prepare(config, surveyed)
    model, losses = train_here(task, config, surveyed, 48)
    assert fell(losses)
    model.eval()
    measured = task.evaluate(model)
    assert measured["accuracy"] > 0.5
    assert 0 < measured["f1"] <= 1
    task.save(model, tmp_path / "saved", {})
    assert TextClassifier.load(tmp_path / "saved").labels == tuple(f"topics##{topic}" for topic in "abcdefgh")


def test_a_reranker_of_two_classes_observes_the_accuracy_on_its_rows(
    still_encoder: Path, tmp_path: Path
) -> None:
    """Of the weights before the step; transformers predicts the same classes."""
    train = write_scored(tmp_path / "train.tsv", 16)
    changes = {"objective": "pointwise_cross_entropy", "labels": ["0", "1"]}
    config = make_config(TrainRerankerConfig, values_of(still_encoder, train, tmp_path, changes))
    surveyed = RerankerTask.survey(config)
    task = RerankerTask.prepare(config, surveyed)
    model = task.build(None).train()
    task.save(model, tmp_path / "saved", {})
    optimizer = make_optimizer(model, config.optimizer)
    step = TrainingStep(model, optimizer, make_schedule(optimizer, 100, 0.0))
    batch = next(batches_of(surveyed, config))
    step.run(0, [batch], task.backward)
    peer = pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu")
    columns = zip(batch["query"], batch["document"], batch["label"], strict=True)
    hits = [peer({"text": q, "text_pair": d})["label"] == str(int(label)) for q, d, label in columns]
    assert step.observed == {"accuracy": pytest.approx(sum(hits) / len(hits))}


def test_scored_dev_pairs_measure_an_encoder(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_scored(tmp_path / "train.tsv", 64)
    dev = {"path": str(train), "metric": "f1", "threshold": 0.5}
    task, model, _ = train_retriever_here(
        dummy_encoder_dir, train, tmp_path, steps=24, objective={"name": "cosine_embedding"}, dev=dev
    )
    model.eval()
    measured = task.evaluate(model)
    dev_pairs = task.dev_sets[ALONE].rows
    tower = TwoTower(model.encoder, 32, 4096).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.cat([tower(tower.plan_chunks([tower.tokenise([text], "")]))[0] for text in texts])

    left, right = embed(dev_pairs.queries), embed(dev_pairs.documents)
    predicted = ((left * right).sum(1) >= 0.5).tolist()
    right_ones = sum(p == bool(label) for p, label in zip(predicted, dev_pairs.labels, strict=True))
    assert measured["accuracy"] == pytest.approx(right_ones / 64)
    assert measured["threshold"] == 0.5


def test_a_loss_that_is_no_number_stops_before_the_weights_move(still_encoder: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 64)
    with pytest.raises(RaytowerError, match=r"is (nan|inf)"):
        train_retriever_here(still_encoder, train, tmp_path, steps=8, optimizer={"lr": 1e30})


def test_a_classifiers_step_observes_the_accuracy_on_its_rows(still_encoder: Path, tmp_path: Path) -> None:
    """Of the weights before the step, over both accumulated batches; transformers predicts the same labels."""
    train = write_labelled(tmp_path / "train.tsv", 64)
    changes = {"optimizer": {"lr": 5e-3, "warmup_ratio": 0.0}, "accumulate_batches": 2}
    config = make_config(TrainClassifierConfig, values_of(still_encoder, train, tmp_path, changes))
    surveyed = ClassifierTask.survey(config)
    task = ClassifierTask.prepare(config, surveyed)
    model = task.build(None).train()
    optimizer = make_optimizer(model, config.optimizer)
    step = TrainingStep(model, optimizer, make_schedule(optimizer, 100, 0.0))
    batches = batches_of(surveyed, config)
    for number in range(10):
        pair = [next(batches), next(batches)]
        if number == 9:
            task.save(model, tmp_path / "saved", {})
        step.run(number, pair, task.backward)
    peer = pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu")
    texts, labels = ([*chain.from_iterable(batch[name] for batch in pair)] for name in ("text", "label"))
    hits = [found["label"] == label for found, label in zip(peer(texts), labels, strict=True)]
    assert step.observed == {"accuracy": pytest.approx(sum(hits) / 32)}
    assert 0.2 < sum(hits) / 32 < 1
