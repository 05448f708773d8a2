"""What a model directory says of its modules is followed as sentence-transformers does, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
    WordWeights,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from raytower.errors import FormatError, InputError
from raytower.models.chunks import in_row_order
from raytower.models.config import LoraConfig
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.lora import add_adapters
from raytower.models.two_tower import TwoTower
from raytower.training.config import TrainRetrieverConfig
from raytower.training.live_engine import LiveEngine
from raytower.training.retriever import RetrieverTask
from tests.support.tiny_models import build_tiny_encoder, tiny_tokenizer

TEXTS = ["a", "the moon is round", "大地在我家的时 come", "", "zz zz zz zz", "the moon"]
Modules = Callable[[], list[nn.Module]]


def word_weights() -> WordWeights:
    vocabulary = tiny_tokenizer().get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    return WordWeights(words, {word: 0.1 + index % 7 for index, word in enumerate(words)})


# Stacks behind a transformer of width 32 that the encoder does not compute by itself.
STACKS: dict[str, tuple[Modules, int]] = {
    "two poolings": (lambda: [Pooling(32, ("mean", "max"))], 64),
    "weighted mean": (lambda: [Pooling(32, "weightedmean"), Normalize()], 32),
    "mean by root": (lambda: [Pooling(32, "mean_sqrt_len_tokens")], 32),
    "dense behind normalize": (lambda: [Pooling(32), Normalize(), Dense(32, 8)], 8),
    "dense on tokens": (
        lambda: [Dense(32, 12, module_input_name="token_embeddings"), Pooling(12, "max")],
        12,
    ),
    "residual dense": (lambda: [Pooling(32), Dense(32, 8, use_residual=True), Normalize()], 8),
    "other activation": (lambda: [Pooling(32), Dense(32, 8, activation_function=nn.SiLU())], 8),
    "layer norm": (lambda: [Pooling(32, "cls"), LayerNorm(32), Normalize()], 32),
    "dropout": (lambda: [Pooling(32), Dropout(0.5)], 32),
    "word weights": (lambda: [word_weights(), Pooling(32)], 32),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("modules") / "plain")


def save_stack(plain: Path, folder: Path, stack: list[nn.Module], **settings: Any) -> Path:
    torch.manual_seed(1)
    modules = [Transformer(str(plain), max_seq_length=64), *stack]
    SentenceTransformer(modules=modules, device="cpu", **settings).save(str(folder), create_model_card=False)
    return folder


def encoded(folder: Path) -> np.ndarray:
    return ForwardEngine(Encoder.load(folder)).encode(TEXTS)


def by_peer(folder: Path) -> np.ndarray:
    vectors: np.ndarray = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    return vectors


def change_json(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_of_other_modules_gives_the_peer_s_vectors_and_is_saved_as_it_was(
    plain: Path, tmp_path: Path, name: str
) -> None:
    make, dim = STACKS[name]
    folder = save_stack(plain, tmp_path / "model", make())
    encoder = Encoder.load(folder)
    assert encoder.dim == dim
    vectors = ForwardEngine(encoder).encode(TEXTS)
    assert np.abs(vectors - by_peer(folder)).max() < 1e-6
    assert encoder.normalised == np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    encoder.save(tmp_path / "saved")
    assert np.array_equal(encoded(tmp_path / "saved"), vectors)
    assert Encoder.load(tmp_path / "saved").fingerprint == encoder.fingerprint
    assert np.abs(by_peer(tmp_path / "saved") - vectors).max() < 1e-6


def test_the_order_and_settings_of_modules_enter_the_fingerprint(plain: Path, tmp_path: Path) -> None:
    dense = Dense(32, 32)
    stacks = {
        "a": [Pooling(32), Normalize(), dense],
        "b": [Pooling(32), dense, LayerNorm(32)],
        "c": [Pooling(32, "weightedmean"), Normalize(), dense],
    }
    found = {
        Encoder.load(save_stack(plain, tmp_path / name, stack)).fingerprint for name, stack in stacks.items()
    }
    assert len(found) == 3


def test_such_an_encoder_trains_what_it_serves(plain: Path, tmp_path: Path) -> None:
    folder = save_stack(plain, tmp_path / "model", [Pooling(32), LayerNorm(32), Dense(32, 8)])
    config = TrainRetrieverConfig(
        model=str(folder), train="rows.tsv", output="out", batch_size=2, max_length=32
    )
    model = RetrieverTask(config, str(folder), None, None).build(None)
    tower = next(module for module in model.modules() if isinstance(module, TwoTower))
    before = {name: value.clone() for name, value in tower.encoder.library.state_dict().items()}  # type: ignore[union-attr]
    block = tower.tokenise(TEXTS[:3], "")
    vectors = torch.cat(tower(tower.plan_chunks([block])))
    vectors[:, 0].sum().backward()
    torch.optim.SGD(tower.parameters(), 1.0).step()
    after = tower.encoder.library.state_dict()  # type: ignore[union-attr]
    assert all(not torch.equal(before[name], after[name]) for name in before)
    tower.encoder.save(tmp_path / "trained")
    assert np.abs(by_peer(tmp_path / "trained") - encoded(tmp_path / "trained")).max() < 1e-6


def test_projection_of_another_stack_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = save_stack(plain, tmp_path / "model", [Pooling(32), LayerNorm(32)])
    config = TrainRetrieverConfig(
        model=str(folder), train="rows.tsv", output="out", batch_size=2, max_length=32, projection_dim=8
    )
    with pytest.raises(InputError, match=r"projection_dim is 8.*modules of its own"):
        RetrieverTask(config, str(folder), None, None).build(None)


def test_a_dot_product_model_is_published_as_it_was_trained(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_stack(plain, tmp_path / "model", [Pooling(32)], similarity_fn_name="dot")
    assert Encoder.load(folder).settings.similarity == "dot"
    config = TrainRetrieverConfig(
        model=str(folder), train="rows.tsv", output="out", batch_size=2, max_length=32
    )
    model = RetrieverTask(config, str(folder), None, None).build(None)
    tower = next(module for module in model.modules() if isinstance(module, TwoTower)).eval()
    assert "published with Normalize and similarity cosine" in capsys.readouterr().err
    trained = torch.cat(tower(tower.plan_chunks([tower.tokenise([TEXTS[1]], "")])))
    tower.encoder.save(tmp_path / "saved")
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert peer.similarity_fn_name == "cosine"
    assert np.abs(peer.encode([TEXTS[1]]) - trained.detach().numpy()).max() < 1e-6


@pytest.mark.parametrize("stack", ["plain", "library"])
def test_truncate_dim_is_followed(plain: Path, tmp_path: Path, stack: str) -> None:
    modules = [Pooling(32), Normalize()] if stack == "plain" else [Pooling(32), LayerNorm(32), Normalize()]
    folder = save_stack(plain, tmp_path / "model", modules, truncate_dim=8)
    encoder = Encoder.load(folder)
    assert (encoder.dim, encoder.normalised) == (8, False)
    assert np.abs(encoded(folder) - by_peer(folder)).max() < 1e-6
    encoder.save(tmp_path / "saved")
    assert by_peer(tmp_path / "saved").shape == (len(TEXTS), 8)
    whole = save_stack(plain, tmp_path / "whole", modules)
    assert Encoder.load(whole).fingerprint != encoder.fingerprint


# As INSTRUCTOR's: the prompt is read and not pooled. The last two are the library's modules, the others our own.
PROMPT_LEFT_OUT: dict[str, Modules] = {
    "mean": lambda: [Pooling(32, "mean", include_prompt=False), Normalize()],
    "cls": lambda: [Pooling(32, "cls", include_prompt=False)],
    "max": lambda: [Pooling(32, "max", include_prompt=False)],
    "last": lambda: [Pooling(32, "lasttoken", include_prompt=False)],
    "dense": lambda: [Pooling(32, "mean", include_prompt=False), Dense(32, 8), Normalize()],
    "two poolings": lambda: [Pooling(32, ("mean", "weightedmean"), include_prompt=False)],
    "word weights": lambda: [word_weights(), Pooling(32, "mean", include_prompt=False), Normalize()],
}


@pytest.mark.parametrize("name", PROMPT_LEFT_OUT)
def test_a_prompt_that_is_not_pooled_is_left_out_as_the_peer_leaves_it_out(
    plain: Path, tmp_path: Path, name: str
) -> None:
    folder = save_stack(plain, tmp_path / "model", PROMPT_LEFT_OUT[name](), prompts={"query": "the home: "})
    engine = ForwardEngine(Encoder.load(folder))
    peer = SentenceTransformer(str(folder), device="cpu")
    for prompt in ("the home: ", "在", ""):
        expected = peer.encode(TEXTS, prompt=prompt)
        assert np.abs(engine.encode(TEXTS, prompt) - expected).max() < 1e-6, prompt
    with_prompt = engine.encode(TEXTS, "the home: ")
    assert np.abs(with_prompt - by_peer(folder)).max() > 1e-3
    # The prompt's tokens are read all the same: it is not as if there were none of them.
    pooled = Pooling.load(str(next(folder.glob("*_Pooling"))))
    pooled.include_prompt = True
    pooled.save(str(next(folder.glob("*_Pooling"))))
    other = Encoder.load(folder)
    assert other.fingerprint != engine.fingerprint
    if name != "last":
        assert np.abs(ForwardEngine(other).encode(TEXTS, "the home: ") - with_prompt).max() > 1e-3
    engine.encoder.save(tmp_path / "saved")
    assert Encoder.load(tmp_path / "saved").fingerprint == engine.fingerprint
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.abs(saved.encode_query(TEXTS) - with_prompt).max() < 1e-6


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_a_text_cut_to_its_prompt_is_pooled_as_by_the_peer(plain: Path, tmp_path: Path, mode: str) -> None:
    """64 tokens are kept, and the prompt has more: nothing is left to pool."""
    folder = save_stack(plain, tmp_path / "model", [Pooling(32, mode, include_prompt=False)])  # type: ignore[arg-type]
    prompt = "the moon " * 80
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt=prompt)
    assert np.abs(ForwardEngine(Encoder.load(folder)).encode(TEXTS, prompt) - expected).max() < 1e-6


@pytest.mark.parametrize("name", ["mean", "cls", "two poolings"])
def test_queries_and_documents_of_one_chunk_leave_out_their_own_prompts(
    plain: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytower.models.chunks.tokens_per_launch", lambda _: 1_000_000)  # one costs least
    folder = save_stack(plain, tmp_path / "model", PROMPT_LEFT_OUT[name]())
    tower = TwoTower(Encoder.load(folder), 64, 10_000)
    blocks = [tower.tokenise(TEXTS, prompt) for prompt in ("the home: ", "", "在")]
    chunks = tower.plan_chunks(blocks)
    # Chunks are cut by cost; one at least holds texts of all three.
    assert any(len({row // len(TEXTS) for row in chunk.rows.tolist()}) == 3 for chunk in chunks)
    with torch.no_grad():
        found = in_row_order(tower(chunks), chunks).numpy()
    peer = SentenceTransformer(str(folder), device="cpu")
    expected = [
        peer.encode(TEXTS, prompt=prompt, normalize_embeddings=True) for prompt in ("the home: ", "", "在")
    ]
    assert np.abs(found - np.concatenate(expected)).max() < 1e-6


@pytest.mark.parametrize("name", ["mean", "cls", "two poolings"])
def test_texts_behind_prompts_of_their_own_leave_these_out(plain: Path, tmp_path: Path, name: str) -> None:
    """In a step and in a dev measurement; every third text has no prompt."""
    folder = save_stack(plain, tmp_path / "model", PROMPT_LEFT_OUT[name]())
    prompts = [("the home: ", "", "在")[place % 3] for place in range(len(TEXTS))]
    peer = SentenceTransformer(str(folder), device="cpu")
    expected = np.stack(
        [
            peer.encode(text, prompt=prompt, normalize_embeddings=True)
            for text, prompt in zip(TEXTS, prompts, strict=True)
        ]
    )
    encoder = Encoder.load(folder)
    tower = TwoTower(encoder, 64, 10_000)
    chunks = tower.plan_chunks([tower.tokenise(TEXTS, prompts)])
    with torch.no_grad():
        assert np.abs(in_row_order(tower(chunks), chunks).numpy() - expected).max() < 1e-6
        engine = LiveEngine(encoder.eval(), dtype="float32", max_length=64)
        live = torch.nn.functional.normalize(engine.encode(TEXTS, prompts), dim=-1)
        assert np.abs(live.numpy() - expected).max() < 1e-6
        one = torch.nn.functional.normalize(engine.encode(TEXTS, "the home: "), dim=-1)
    expected = peer.encode(TEXTS, prompt="the home: ", normalize_embeddings=True)
    assert np.abs(one.numpy() - expected).max() < 1e-6


def test_a_graph_leaves_the_prompt_out_too(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph gives hidden states alone, and both engines pool them by the same code."""
    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    folder = save_stack(plain, tmp_path / "model", PROMPT_LEFT_OUT["dense"]())
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt="the home: ")
    by_graph = ForwardEngine(Encoder.load(folder), engine="onnx").encode(TEXTS, "the home: ")
    assert np.abs(by_graph - expected).max() < 1e-5


def test_instructor_s_own_directories_do_not_say_that_they_leave_it_out(plain: Path, tmp_path: Path) -> None:
    """The peer library knows it by their names on the hub."""
    folder = save_stack(plain, tmp_path / "hkunlp" / "instructor-base", [Pooling(32), Normalize()])
    other = save_stack(plain, tmp_path / "hkunlp" / "instructor-based", [Pooling(32), Normalize()])
    assert not Encoder.load(folder).settings.include_prompt
    assert Encoder.load(other).settings.include_prompt
    Encoder.load(folder).save(tmp_path / "saved")
    assert not Encoder.load(tmp_path / "saved").settings.include_prompt


def test_what_is_not_known_of_the_settings_survives(plain: Path, tmp_path: Path) -> None:
    folder = save_stack(
        plain,
        tmp_path / "model",
        [Pooling(32), Normalize()],
        prompts={"sts": "s: ", "query": "q: "},
        default_prompt_name="sts",
    )
    change_json(folder / "config_sentence_transformers.json", ours={"a": 1})
    change_json(folder / "sentence_bert_config.json", unpad_inputs=False)
    Encoder.load(folder).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert (saved["ours"], saved["default_prompt_name"], saved["prompts"]["sts"]) == ({"a": 1}, "sts", "s: ")
    assert json.loads((tmp_path / "saved" / "sentence_bert_config.json").read_text())["unpad_inputs"] is False
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    ours = ForwardEngine(Encoder.load(folder))
    assert (
        np.abs(peer.encode_query(TEXTS) - ours.encode(TEXTS, ours.encoder.prefix_for("query"))).max() < 1e-6
    )
    assert np.abs(peer.encode(TEXTS) - ours.encode(TEXTS, "s: ")).max() < 1e-6


class Refused:
    """Changes to a directory of [Pooling, Dense, LayerNorm, Normalize], and what is said of each."""

    @staticmethod
    def retype(folder: Path, number: int, name: str) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[number]["type"] = name
        (folder / "modules.json").write_text(json.dumps(modules))

    @staticmethod
    def drop(folder: Path, *numbers: int) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(
            json.dumps([module for number, module in enumerate(modules) if number not in numbers])
        )


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "own code": (
        lambda f: Refused.retype(f, 1, "custom_st.Pooling"),
        "'custom_st.Pooling', which is code of the",
    ),
    "its own transformer": (
        lambda f: Refused.retype(f, 0, "custom_st.Transformer"),
        "'custom_st.Transformer'",
    ),
    "other package": (lambda f: Refused.retype(f, 2, "torch.nn.Linear"), "'torch.nn.Linear', which is code"),
    "not carried": (lambda f: Refused.retype(f, 2, "sentence_transformers.models.LSTM"), "carried are Dense"),
    "no such module": (
        lambda f: Refused.retype(f, 2, "sentence_transformers.nowhere.Dense"),
        "which sentence-transformers [0-9.]+ does not have",
    ),
    "no transformer": (lambda f: Refused.drop(f, 0), "begins with .*Pooling.*known is a Transformer"),
    "nothing behind": (lambda f: Refused.drop(f, 1, 2, 3, 4), "a Transformer alone"),
    "no pooling": (
        lambda f: Refused.drop(f, 1),
        "a pass through its modules Dense, LayerNorm, Normalize: KeyError",
    ),
    "foreign activation": (
        lambda f: change_json(f / "2_Dense" / "config.json", activation_function="os.system"),
        "activation 'os.system', code of",
    ),
    "no such pooling": (
        lambda f: change_json(f / "1_Pooling" / "config.json", pooling_mode="median"),
        "1_Pooling.*median",
    ),
    "no safetensors": (
        lambda f: (f / "3_LayerNorm" / "model.safetensors").rename(f / "3_LayerNorm" / "pytorch_model.bin"),
        "3_LayerNorm.*has no model.safetensors",
    ),
    "huge": (
        lambda f: change_json(f / "3_LayerNorm" / "config.json", dimension=10**12),
        r"states the sizes \(1000000000000,\) in config.json, and its weights have \(32,\)",
    ),
    "weights of another": (
        lambda f: save_file({"linear.weight": torch.zeros(32, 9)}, f / "2_Dense" / "model.safetensors"),
        r"states the sizes \(32, 32\) in config.json, and its weights have \(32, 9\)",
    ),
    "manhattan": (
        lambda f: change_json(f / "config_sentence_transformers.json", similarity_fn_name="manhattan"),
        "similarity_fn_name 'manhattan'",
    ),
    "no default": (
        lambda f: change_json(f / "config_sentence_transformers.json", default_prompt_name="sts"),
        r"default_prompt_name 'sts', and its prompts are \[",
    ),
    "truncated to nothing": (
        lambda f: change_json(f / "config_sentence_transformers.json", truncate_dim=0),
        "truncate_dim 0",
    ),
    "another kind": (
        lambda f: change_json(f / "config_sentence_transformers.json", model_type="SparseEncoder"),
        "this is a SparseEncoder",
    ),
    "other tokens": (
        lambda f: change_json(
            f / "sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}}
        ),
        "processing_kwargs of text {'add_special_tokens': False}",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_followed_is_refused(plain: Path, tmp_path: Path, name: str) -> None:
    stack = [Pooling(32), Dense(32, 32), LayerNorm(32), Normalize()]
    folder = save_stack(plain, tmp_path / "model", stack)
    encoded(folder)
    change, said = REFUSALS[name]
    change(folder)
    with pytest.raises(FormatError, match=said):
        Encoder.load(folder)


def test_pooling_of_such_a_directory_is_its_own(plain: Path, tmp_path: Path) -> None:
    folder = save_stack(plain, tmp_path / "model", [Pooling(32, "weightedmean")])
    with pytest.raises(InputError, match=r"pooling is 'cls', and model .*Pooling, which its vectors"):
        Encoder.load(folder, pooling="cls")


class TestStatic:
    """StaticEmbedding: the mean of token vectors, without a transformer."""

    @staticmethod
    def save(folder: Path, *others: nn.Module, **settings: Any) -> Path:
        torch.manual_seed(2)
        static = StaticEmbedding(tiny_tokenizer(), embedding_dim=16)
        SentenceTransformer(modules=[static, *others], device="cpu", **settings).save(
            str(folder), create_model_card=False
        )
        return folder

    @pytest.mark.parametrize("others", [[], [Normalize()], [Dense(16, 4), Normalize()]], ids=len)
    def test_vectors_are_the_peer_s(self, tmp_path: Path, others: list[nn.Module]) -> None:
        folder = self.save(tmp_path / "model", *others)
        # The peer adds 10,000 vectors one after the other in float32, and loses four digits.
        texts, bounds = [*TEXTS, "moon " * 2000], [*[1e-6] * len(TEXTS), 1e-3]

        def differs(vectors: np.ndarray, others: np.ndarray) -> bool:
            return bool((np.abs(vectors - others).max(1) > bounds).any())

        engine = ForwardEngine(Encoder.load(folder))
        vectors = engine.encode(texts)
        peer = SentenceTransformer(str(folder), device="cpu").encode(texts)
        assert not differs(vectors, peer)
        engine.encoder.save(tmp_path / "saved")
        again = Encoder.load(tmp_path / "saved")
        assert again.fingerprint == engine.fingerprint
        assert np.array_equal(ForwardEngine(again).encode(texts), vectors)
        assert not differs(vectors, SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts))

    def test_the_tokenizer_s_own_truncation_holds(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path / "model")
        rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
        rules.enable_truncation(4)
        rules.save(str(folder / "tokenizer.json"))
        assert np.abs(encoded(folder) - by_peer(folder)).max() < 1e-6
        Encoder.load(folder).save(tmp_path / "saved")
        assert np.abs(by_peer(tmp_path / "saved") - by_peer(folder)).max() < 1e-6

    def test_the_first_token_stays_an_ordinary_one(self, tmp_path: Path) -> None:
        vocabulary = {"the": 0, "there": 1, "re": 2, "[UNK]": 3}
        rules = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        rules.pre_tokenizer = Whitespace()
        folder = tmp_path / "model"
        SentenceTransformer(modules=[StaticEmbedding(rules, embedding_dim=16)], device="cpu").save(
            str(folder), create_model_card=False
        )
        texts = ["there", "the re", "there the there"]
        peer = SentenceTransformer(str(folder), device="cpu").encode(texts)
        engine = ForwardEngine(Encoder.load(folder))
        assert np.abs(engine.encode(texts) - peer).max() < 1e-6
        engine.encoder.save(tmp_path / "saved")
        assert (
            np.abs(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts) - peer).max()
            < 1e-6
        )

    def test_it_has_no_layer_for_adapters(self, tmp_path: Path) -> None:
        backbone = Encoder.load(self.save(tmp_path / "model")).backbone
        with pytest.raises(
            InputError, match="a StaticBackbone has no linear layer that takes an adapter; remove"
        ):
            add_adapters(backbone, LoraConfig())

    def test_model2vec_s_form(self, tmp_path: Path) -> None:
        """Rows shared by a mapping, a weight a token; config.json is model2vec's own."""
        folder = self.save(tmp_path / "model", Normalize())
        table = load_file(folder / "model.safetensors")["embedding.weight"]
        mapping = torch.arange(len(table)) % 7
        weights = torch.linspace(0.5, 2, len(table), dtype=torch.float64)
        shared = table[:7].half()
        save_file(
            {"embeddings": shared, "mapping": mapping.int(), "weights": weights}, folder / "model.safetensors"
        )
        change_json(folder / "config.json", model_type="model2vec", normalize=True)
        vectors = encoded(folder)
        ids = tiny_tokenizer()("the moon", add_special_tokens=False)["input_ids"]
        expected = np.mean([shared[mapping[i]].double().numpy() * weights[i].item() for i in ids], axis=0)
        assert np.abs(vectors[-1] - expected / np.linalg.norm(expected)).max() < 1e-6

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            ({"mapping": [0, 7]}, "maps a token to row 7 of its embeddings, which have 7 rows"),
            ({"mapping": [-1, 6]}, "maps a token to row -1 of its embeddings, which have 7 rows"),
            ({"weights": [0.5, 1.0]}, r"has weights of shape \(2,\) for \d+ tokens"),
            ({"embeddings": [0.5, 1.0]}, r"has a table of shape \(\d+,\); it must have two dimensions, a"),
        ],
    )
    def test_a_table_whose_parts_do_not_fit_is_refused(
        self, tmp_path: Path, spoil: dict[str, list[float]], message: str
    ) -> None:
        folder = self.save(tmp_path / "model", Normalize())
        table = load_file(folder / "model.safetensors")["embedding.weight"]
        tensors = {"embeddings": table[:7].clone(), "mapping": torch.arange(len(table)) % 7}
        changes = {name: torch.tensor(values) for name, values in spoil.items()}
        if "embeddings" in changes:
            tensors["mapping"] %= 2
        save_file({**tensors, **changes}, folder / "model.safetensors")
        with pytest.raises(FormatError, match=message) as refused:
            Encoder.load(folder)
        assert "model.safetensors" in str(refused.value)

    def test_it_trains(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path / "model", Normalize())
        config = TrainRetrieverConfig(
            model=str(folder), train="rows.tsv", output="out", batch_size=2, max_length=32
        )
        model = RetrieverTask(config, str(folder), None, None).build(None)
        tower = next(module for module in model.modules() if isinstance(module, TwoTower))
        torch.cat(tower(tower.plan_chunks([tower.tokenise(TEXTS[:3], "")])))[:, 0].sum().backward()
        assert tower.encoder.backbone.embedding.weight.grad.abs().sum() > 0

    def test_a_table_that_lacks_tokens_is_refused(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path / "model")
        table = load_file(folder / "model.safetensors")["embedding.weight"]
        save_file({"embedding.weight": table[:-1].contiguous()}, folder / "model.safetensors")
        with pytest.raises(FormatError, match=r"has \d+ tokens, and the table \d+ rows"):
            Encoder.load(folder)

    def test_other_modules_behind_it_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            FormatError, match="LayerNorm behind a StaticEmbedding that gives one vector a text; known"
        ):
            Encoder.load(self.save(tmp_path / "model", LayerNorm(16)))


@pytest.mark.processes
def test_a_plain_stack_does_not_import_the_library(plain: Path) -> None:
    script = (
        "import sys; from raytower.models.encoder import Encoder; Encoder.load(sys.argv[1]); "
        "print('sentence_transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(plain)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
