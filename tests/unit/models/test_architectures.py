"""Backbones of many families, tiny and random: vectors as the peer library's, a step of training, saved and loaded.

What cannot work is refused with a message.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import processors
from torch import nn

from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.training.config import TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.step import TrainingStep
from raytower.training.task import Task
from tests.support.tiny_models import build_tiny_encoder, tiny_config, tiny_tokenizer

TEXTS = ["what does a deductible mean?", "a", "的债务由谁", "short one", "a longer text, " * 3]
TOKENS = 96  # some families' tokenizers add tokens of their own to the tiny one
USUAL: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {
    **USUAL,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": None,
}
# The name of each family's classes, and its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", USUAL),
    "roberta": ("Roberta", USUAL),
    "xlm_roberta": ("XLMRoberta", USUAL),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": TOKENS,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 66,
        },
    ),
    "mpnet": ("MPNet", USUAL),
    "albert": ("Albert", {**USUAL, "embedding_size": 8}),
    "deberta_v2": (
        "DebertaV2",
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    ),
    "roformer": ("RoFormer", USUAL),
    "longformer": ("Longformer", {**USUAL, "attention_window": [8, 8]}),
    "modernbert": (
        "ModernBert",
        {**USUAL, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "ernie": ("Ernie", {**USUAL, "use_task_id": True}),
    "nomic_bert": ("NomicBert", USUAL),
    "eurobert": ("EuroBert", {**DECODER, "pad_token_id": 0}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", DECODER),
    "mistral": ("Mistral", DECODER),
    "gemma3_text": ("Gemma3Text", {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "t5": (
        "T5",
        {"vocab_size": TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
}
FROZEN = {"roformer": "embed_positions.weight", "longformer": "_global."}


def build(family: str, folder: Path) -> Path:
    """A plain Hugging Face directory of the family."""
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}EncoderModel" if family == "t5" else f"{name}Model")
    model = kind(getattr(transformers, f"{name}Config")(**values))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: build(family, root / family) for family in FAMILIES}


def peer_of(folder: Path, pooling: str = "mean") -> SentenceTransformer:
    body = Transformer(str(folder), max_seq_length=64)
    modules = [body, Pooling(body.get_embedding_dimension(), pooling), Normalize()]  # type: ignore[arg-type]
    return SentenceTransformer(modules=modules, device="cpu")


def change_json(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_peers_and_stay_when_saved(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    encoder = Encoder.load(folders[family])
    assert encoder.dim == 16
    ours = ForwardEngine(encoder).encode(TEXTS)
    assert (ours @ ours.T - np.eye(len(TEXTS))).max() < 0.999, "all texts look alike"
    assert np.abs(ours - peer_of(folders[family]).encode(TEXTS)).max() < 1e-6
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved")
    assert again.fingerprint == encoder.fingerprint
    assert np.array_equal(ForwardEngine(again).encode(TEXTS), ours)
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.abs(ours - peer.encode(TEXTS)).max() < 1e-6


def values_of(start: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(start),
        "train": "rows.tsv",
        "output": "out",
        "batch_size": 2,
        "max_length": 32,
        "dtype": "float32",
        "workers": {"num": 1},
        **changes,
    }


def retriever_task(start: Path, **changes: Any) -> RetrieverTask:
    config = make_config(TrainRetrieverConfig, values_of(start, **changes))
    return RetrieverTask(config, str(start), None, None)


def step_of(task: Task[Any]) -> TrainingStep:
    model = task.build(None).train()
    optimizer = make_optimizer(model, task.config.optimizer)
    return TrainingStep(model, optimizer, make_schedule(optimizer, 4, 0.1))


PAIRS = {"query": TEXTS[:2], "document": TEXTS[2:4]}
JUDGED = {**PAIRS, "label": [1.0, 0.0]}


def without_gradient(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_gives_every_trained_weight_a_gradient(folders: dict[str, Path], family: str) -> None:
    task = retriever_task(folders[family])
    step = step_of(task)
    assert np.isfinite(step.run(0, [PAIRS], task.backward))
    assert without_gradient(step.model) == []
    frozen = {name for name, p in step.model.named_parameters() if not p.requires_grad}
    assert all("pooler" in name or FROZEN.get(family, "-") in name for name in frozen), frozen


@pytest.mark.parametrize("family", ["albert", "longformer", "qwen3", "bert"])
def test_a_step_gives_every_adapter_a_gradient(folders: dict[str, Path], family: str) -> None:
    task = retriever_task(folders[family], lora={"rank": 2})
    step = step_of(task)
    step.run(0, [PAIRS], task.backward)
    assert without_gradient(step.model) == []
    assert any(p.requires_grad for p in step.model.parameters())
    assert not any("pooler" in name and "lora_" in name for name, _ in step.model.named_parameters())


# T5's head reads a decoder, which an encoder alone lacks.
HEADED = [family for family in FAMILIES if family != "t5"]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("family", HEADED)
def test_a_rerankers_step_gives_every_trained_weight_a_gradient(
    folders: dict[str, Path], family: str, lora: dict[str, int] | None
) -> None:
    config = make_config(TrainRerankerConfig, values_of(folders[family], lora=lora))
    task = RerankerTask(config, str(folders[family]), None)
    step = step_of(task)
    assert np.isfinite(step.run(0, [JUDGED], task.backward))
    assert without_gradient(step.model) == []


class TestDecoders:
    def test_none_keeps_a_cache(self, folders: dict[str, Path]) -> None:
        for family in ("qwen3", "gemma3_text", "mistral"):
            backbone = Encoder.load(folders[family]).backbone
            assert backbone(input_ids=torch.tensor([[2, 5, 3]])).past_key_values is None
        head = CrossEncoder.start_from(folders["qwen3"]).model
        assert head(input_ids=torch.tensor([[2, 5, 3]])).past_key_values is None

    @pytest.mark.parametrize("ending", ["[SEP]", "[PAD]"])
    def test_a_reranker_of_one_scores_pairs_in_batches_as_one_by_one(
        self, folders: dict[str, Path], tmp_path: Path, ending: str
    ) -> None:
        """Without a padding token in config.json the head refused more than one row."""
        start = tmp_path / "start"
        shutil.copytree(folders["qwen3"], start)
        assert json.loads((start / "config.json").read_text())["pad_token_id"] is None
        self.end_texts_by(start, ending)
        torch.manual_seed(0)
        CrossEncoder.start_from(start).save(tmp_path / "reranker")
        scorer = CrossScorer(CrossEncoder.load(tmp_path / "reranker"))
        queries, documents = [text for text in TEXTS for _ in TEXTS], TEXTS * len(TEXTS)
        together = scorer.score(queries, documents)
        alone = [float(scorer.score([q], [d])[0]) for q, d in zip(queries, documents, strict=True)]
        assert together == pytest.approx(alone, abs=1e-6)
        assert np.std(together) > 0.01
        peer = PeerCrossEncoder(str(tmp_path / "reranker"), device="cpu", max_length=64)
        expected = peer.predict(list(zip(queries, documents, strict=True)), activation_fn=nn.Identity())
        assert together == pytest.approx(expected, abs=1e-5)

    def test_a_fresh_head_reads_the_token_that_ends_a_text(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        """The end of Qwen3-Embedding's texts is its padding token, which the head would step over."""
        start = tmp_path / "start"
        shutil.copytree(folders["qwen3"], start)
        self.end_texts_by(start, "[PAD]")
        torch.manual_seed(0)
        model = CrossEncoder.start_from(start).eval()
        inputs = model.tokenizer("a", "b", return_tensors="pt")
        ids = inputs["input_ids"]
        last = model.model.model(input_ids=ids).last_hidden_state[:, -1]
        assert ids[0, -1] == 0
        assert model(input_ids=ids).tolist() == pytest.approx(model.model.score(last)[0].tolist(), abs=1e-6)

    def test_one_without_a_padding_token_pads_by_its_end_of_text(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "decoder"
        shutil.copytree(folders["mistral"], folder)
        change_json(folder / "tokenizer_config.json", pad_token=None, eos_token="[SEP]")
        encoder = Encoder.load(folder)
        assert encoder.padding.token == 3
        ours, expected = (ForwardEngine(Encoder.load(f)).encode(TEXTS) for f in (folder, folders["mistral"]))
        assert np.abs(ours - expected).max() < 1e-6

    @staticmethod
    def end_texts_by(folder: Path, token: str) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = "[SEP]"
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single=f"[CLS] $A {token}",
            pair=f"[CLS] $A [SEP] $B {token}",
            special_tokens=[(name, backend.token_to_id(name)) for name in {"[CLS]", "[SEP]", token}],
        )
        tokenizer.save_pretrained(folder)


class TestPooling:
    @pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
    def test_a_plain_directory_takes_the_one_that_is_asked_for(
        self, folders: dict[str, Path], tmp_path: Path, pooling: str
    ) -> None:
        task = retriever_task(folders["qwen3"], pooling=pooling)
        model = task.build(None)
        task.save(model, tmp_path / "saved", {})
        ours = ForwardEngine(Encoder.load(tmp_path / "saved")).encode(TEXTS)
        assert np.abs(ours - peer_of(folders["qwen3"], pooling).encode(TEXTS)).max() < 1e-6
        # As a checkpoint, from which a worker that is started again builds its model.
        assert task.build(tmp_path / "saved").encoder.settings.pooling == pooling

    def test_a_directory_that_brings_one_refuses_another(self, tmp_path: Path) -> None:
        folder = build_tiny_encoder(tmp_path / "encoder")
        with pytest.raises(InputError, match=r"pooling is 'cls', and model .* brings its own, 'mean'"):
            retriever_task(folder, pooling="cls").build(None)
        assert Encoder.load(folder, pooling="mean").settings.pooling == "mean"

    @pytest.mark.parametrize("stated", ["pooler_output", ["mean", "first"], None, 5, {"mean": True}])
    def test_one_that_is_not_known_is_never_read_as_another(self, tmp_path: Path, stated: object) -> None:
        folder = build_tiny_encoder(tmp_path / "encoder")
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"embedding_dimension": 32, "pooling_mode": stated})
        )
        with pytest.raises(FormatError, match="asks for pooling"):
            Encoder.load(folder)

    @pytest.mark.parametrize(
        "settings",
        [
            {
                "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
                "module_output_name": "token_embeddings",
            },
            {"transformer_task": "fill-mask"},
            {"module_output_name": "sentence_embedding"},
            {
                "modality_config": {
                    "message": {"method": "forward", "method_output_name": "last_hidden_state"}
                }
            },
        ],
    )
    def test_another_output_of_the_transformer_is_refused(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        folder = build_tiny_encoder(tmp_path / "encoder")
        change_json(folder / "sentence_bert_config.json", **settings)
        with pytest.raises(FormatError, match="known is pooling over the transformer's last hidden state"):
            Encoder.load(folder)


class TestPooler:
    """BERT's pooler, by which older two-tower models give their vectors."""

    @staticmethod
    def plain(folder: Path) -> Path:
        torch.manual_seed(0)
        transformers.BertModel(tiny_config()).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    def test_vectors_are_those_of_transformers_and_of_the_peer(self, tmp_path: Path) -> None:
        folder = self.plain(tmp_path / "plain")
        encoder = Encoder.load(folder, pooling="pooler")
        ours = ForwardEngine(encoder).encode(TEXTS)
        bert = transformers.BertModel.from_pretrained(folder).eval()
        rows = tiny_tokenizer()(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            expected = bert(**rows).pooler_output
        assert np.abs(ours - nn.functional.normalize(expected, dim=-1).numpy()).max() < 1e-6
        encoder.save(tmp_path / "saved")
        again = Encoder.load(tmp_path / "saved")
        assert again.fingerprint == encoder.fingerprint != Encoder.load(folder).fingerprint
        assert np.array_equal(ForwardEngine(again).encode(TEXTS), ours)
        peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert np.abs(peer.encode(TEXTS) - ours).max() < 1e-6

    def test_its_weights_train_and_belong_to_the_fingerprint(self, tmp_path: Path) -> None:
        folder = self.plain(tmp_path / "plain")
        task = retriever_task(folder, pooling="pooler", projection_dim=8)
        model = task.build(None)
        pooler = {name: p for name, p in model.named_parameters() if "pooler" in name}
        assert pooler
        assert all(parameter.requires_grad for parameter in pooler.values())
        task.save(model, tmp_path / "saved", {})
        before = Encoder.load(tmp_path / "saved")
        with torch.no_grad():
            next(iter(pooler.values())).add_(0.1)
        task.save(model, tmp_path / "changed", {})
        assert Encoder.load(tmp_path / "changed").fingerprint != before.fingerprint
        peer = SentenceTransformer(str(tmp_path / "changed"), device="cpu")
        ours = ForwardEngine(Encoder.load(tmp_path / "changed")).encode(TEXTS)
        assert ours.shape[1] == 8
        assert np.abs(peer.encode(TEXTS) - ours).max() < 1e-6

    def test_by_onnx(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        folder = self.plain(tmp_path / "plain")
        ours = ForwardEngine(Encoder.load(folder, pooling="pooler")).encode(TEXTS)
        by_graph = ForwardEngine(Encoder.load(folder, pooling="pooler"), engine="onnx").encode(TEXTS)
        assert np.abs(ours - by_graph).max() < 1e-5

    def test_a_model_without_one_is_refused(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="DistilBertModel has none; choose another pooling"):
            Encoder.load(folders["distilbert"], pooling="pooler")
        torch.manual_seed(0)
        transformers.BertModel(tiny_config(), add_pooling_layer=False).save_pretrained(tmp_path / "without")
        tiny_tokenizer().save_pretrained(tmp_path / "without")
        assert Encoder.load(tmp_path / "without").settings.pooling == "mean"
        with pytest.raises(FormatError, match=r"lacks 2 weights, 'pooler"):
            Encoder.load(tmp_path / "without", pooling="pooler")

    def test_a_pooling_behind_it_is_refused(self, tmp_path: Path) -> None:
        Encoder.load(self.plain(tmp_path / "plain"), pooling="pooler").save(tmp_path / "saved")
        modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
        modules.insert(
            1, {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"}
        )
        (tmp_path / "saved" / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(
            FormatError, match="lists Pooling, Normalize behind a Transformer that gives one vector"
        ):
            Encoder.load(tmp_path / "saved")


def test_the_older_layout_loads(tmp_path: Path) -> None:
    """config.json, weights and tokenizer in a folder of their own, as the first module of modules.json says."""
    folder = build_tiny_encoder(tmp_path / "encoder", projection_dim=8)
    expected = ForwardEngine(Encoder.load(folder)).encode(TEXTS)
    below = folder / "0_Transformer"
    below.mkdir()
    for file in [f for f in folder.iterdir() if f.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json", "raytower.json"):
            file.rename(below / file.name)
    (below / "sentence_bert_config.json").rename(below / "sentence_distilbert_config.json")
    change_json(below / "sentence_distilbert_config.json", max_seq_length=48)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = Encoder.load(folder)
    assert encoder.max_length == 48
    assert np.array_equal(ForwardEngine(encoder).encode(TEXTS), expected)
    peer = SentenceTransformer(str(folder), device="cpu")
    assert np.abs(peer.encode(TEXTS) - expected).max() < 1e-6
    assert CrossEncoder.start_from(folder).num_labels == 1
    assert TextClassifier.start_from(folder, ["a", "b"]).labels == ("a", "b")
    (below / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FormatError, match=r"holds a LoRA adapter \(0_Transformer/adapter_config\.json\); merge it"
    ):
        Encoder.load(folder)


def test_the_width_is_that_of_the_vectors(tmp_path: Path) -> None:
    """A model of several parts has no hidden_size of its own."""
    parts = {
        "text_config": {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "vision_config": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        },
    }
    torch.manual_seed(0)
    transformers.Gemma3Model(transformers.Gemma3Config(**parts)).save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    encoder = Encoder.load(tmp_path / "plain")
    assert encoder.dim == 16 == ForwardEngine(encoder).encode(["a"]).shape[1]
    assert encoder.max_positions == 66
    encoder.save(tmp_path / "saved")
    assert Encoder.load(tmp_path / "saved").dim == 16


def test_a_head_that_needs_a_decoder_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(FormatError, match=r"lacks weights of its backbone, 'transformer\.decoder"):
        CrossEncoder.start_from(folders["t5"])
