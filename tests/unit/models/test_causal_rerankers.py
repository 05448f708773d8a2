"""Rerankers as sentence-transformers writes them: causal language models, prompts and chat templates.

Tiny random models. What is expected is what that library's CrossEncoder gives for the same directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore, Transformer
from torch import nn
from transformers import PreTrainedTokenizerFast

from raytower.config import make_config
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.export import plan_export
from raytower.models.config import ExportConfig
from raytower.models.content import hash_model
from raytower.models.cross_encoder import CausalCrossEncoder, CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.training.config import TrainRerankerConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.step import TrainingStep
from tests.support.tiny_models import tiny_tokenizer

TEXTS = ["what does a deductible mean?", "a", "的债务由谁", "short one", "a longer text, " * 9, ""]
QUERIES, DOCUMENTS = [text for text in TEXTS for _ in TEXTS], TEXTS * len(TEXTS)
LENGTH = 80
DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma": {"pad_token_id": 0},
    # A tanh lies on its logits, and its layers see a window alternately.
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 0.5},
    "Llama": {},
}
TURN = "{{%- for message in messages if message.role == 'system' %}}{{{{ {system} }}}} | {{% endfor -%}}\
yes or no? q: {{{{ {query} }}}}, d: {{{{ {document} }}}}{{%- if add_generation_prompt %}}.a{{% endif %}}"


def template_of(form: str) -> str:
    """A template of contents that are texts (flat), or lists of parts (structured)."""
    part = "" if form == "flat" else "[0].text"
    picked = "(messages | selectattr('role', 'eq', '{}') | first).content" + part
    return TURN.format(
        system="message.content" + part, query=picked.format("query"), document=picked.format("document")
    )


CHAT = "{% for message in messages %}[CLS]{{ message.role }}: {{ message.content }}[SEP]{% endfor %}"


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.chat_template = template
    tokenizer.model_max_length = LENGTH
    return tokenizer


def build_plain(folder: Path, family: str, template: str | None = None, task: str = "CausalLM") -> Path:
    """A plain Hugging Face directory."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**DECODER, **FAMILIES[family]})
    if task != "CausalLM":
        config.num_labels, config.pad_token_id = 1, 0
    model = getattr(transformers, f"{family}For{task}")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer_of(template).save_pretrained(folder)
    return folder


PROMPT = {"prompts": {"web": "judge by the web", "law": "judge by law"}, "default_prompt_name": "web"}


def build(
    folder: Path, family: str, form: str | None = "flat", *, false: str | None = "no", **settings: Any
) -> Path:
    """A causal reranker as the peer library writes it."""
    plain = build_plain(folder.with_name(f"{folder.name}-plain"), family, form and template_of(form))
    tokenizer = tokenizer_of(None)
    tokens = [None if word is None else tokenizer.convert_tokens_to_ids(word) for word in ("yes", false)]
    rendered = {"chat_template": {"add_generation_prompt": True}} if form else None
    body = Transformer(str(plain), transformer_task="text-generation", processing_kwargs=rendered)
    peer = PeerCrossEncoder(modules=[body, LogitScore(*tokens)], device="cpu", **settings)  # type: ignore[arg-type]
    peer.save(str(folder), create_model_card=False)
    return folder


def build_headed(folder: Path, form: str | None = None, **settings: Any) -> Path:
    """A sequence classifier as the peer library writes it."""
    plain = build_plain(
        folder.with_name(f"{folder.name}-plain"),
        "Qwen3",
        form and template_of(form),
        "SequenceClassification",
    )
    body = Transformer(str(plain), transformer_task="sequence-classification")
    PeerCrossEncoder(modules=[body], device="cpu", **settings).save(str(folder), create_model_card=False)
    return folder


def expected_of(folder: Path, queries: list[str] = QUERIES, documents: list[str] = DOCUMENTS) -> Any:
    """Raw logits of the peer library, three pairs at a time."""
    peer = PeerCrossEncoder(str(folder), device="cpu")
    return peer.predict(list(zip(queries, documents, strict=True)), batch_size=3, activation_fn=nn.Identity())


def change_json(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("causal") / "qwen", "Qwen3", **PROMPT)


@pytest.fixture
def copied(qwen: Path, tmp_path: Path) -> Path:
    shutil.copytree(qwen, tmp_path / "copied")
    return tmp_path / "copied"


class TestScores:
    @pytest.mark.parametrize(
        ("family", "form", "false", "settings"),
        [
            ("Qwen3", "flat", "no", PROMPT),
            ("Qwen3", "structured", None, {}),
            ("Qwen3", None, "no", {}),
            ("Qwen2", "structured", "no", PROMPT),
            ("Qwen2", "flat", "no", {}),
            ("Gemma", None, None, PROMPT),
            ("Gemma", "flat", "no", {}),
            ("Gemma2", "flat", None, PROMPT),
            ("Llama", "flat", "no", {}),
        ],
    )
    def test_they_are_the_peers_and_stay_when_saved(
        self, family: str, form: str | None, false: str | None, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = build(tmp_path / "reranker", family, form, false=false, **settings)
        model = CrossEncoder.load(folder)
        scorer = CrossScorer(model, tokens_per_batch=300)
        ours = scorer.score(QUERIES, DOCUMENTS)
        expected = expected_of(folder)
        assert np.std(expected) > 0.01
        assert np.abs(ours - expected).max() < 1e-6
        alone = [float(scorer.score([q], [d])[0]) for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
        assert np.abs(alone - expected).max() < 1e-6
        assert scorer.score([], []).shape == (0,)
        model.save(tmp_path / "saved")
        again = CrossEncoder.load(tmp_path / "saved")
        assert again.fingerprint == model.fingerprint
        assert np.array_equal(CrossScorer(again, tokens_per_batch=300).score(QUERIES, DOCUMENTS), ours)
        assert np.abs(expected_of(tmp_path / "saved") - expected).max() < 1e-6

    @pytest.mark.parametrize("form", ["flat", "structured"])
    def test_a_row_that_is_cut_ends_as_the_template_does(self, tmp_path: Path, form: str) -> None:
        folder = build(tmp_path / "reranker", "Qwen3", form, **PROMPT)
        model = CrossEncoder.load(folder)
        peer = PeerCrossEncoder(str(folder), device="cpu")
        end = model.tokenizer(".a", add_special_tokens=False)["input_ids"]
        cut = 0
        for query, document in zip(QUERIES, DOCUMENTS, strict=True):
            block = model.tokenise([[query], [document]], model.max_length)
            features = peer.preprocess([(query, document)], prompt="judge by the web")
            assert block.ids.tolist() == features["input_ids"][0].tolist()  # type: ignore[union-attr]
            assert block.ids[-2:].tolist() == end
            cut += int(len(block.ids) == LENGTH)
        assert cut > 5

    def test_logits_are_made_of_the_last_position_alone(self, qwen: Path) -> None:
        model = CrossEncoder.load(qwen)
        shapes = []
        model.model.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape))
        CrossScorer(model).score(QUERIES, DOCUMENTS)
        assert len(shapes) >= 1
        assert sum(shape[0] for shape in shapes) == len(QUERIES)
        assert {tuple(shape[1:]) for shape in shapes} == {(1, DECODER["vocab_size"])}

    def test_an_activation_of_the_directory_is_kept(self, copied: Path, tmp_path: Path) -> None:
        assert CrossEncoder.load(copied).activation == "sigmoid"
        change_json(
            copied / "config_sentence_transformers.json", activation_fn="torch.nn.modules.linear.Identity"
        )
        model = CrossEncoder.load(copied)
        assert model.activation == "identity"
        model.save(tmp_path / "saved")
        assert isinstance(PeerCrossEncoder(str(tmp_path / "saved"), device="cpu").activation_fn, nn.Identity)

    def test_the_length_of_its_modules_counts(self, copied: Path, tmp_path: Path) -> None:
        change_json(copied / "sentence_bert_config.json", max_seq_length=60)
        model = CrossEncoder.load(copied)
        assert model.max_length == 60
        assert np.abs(CrossScorer(model).score(QUERIES, DOCUMENTS) - expected_of(copied)).max() < 1e-6
        model.save(tmp_path / "saved")
        assert np.abs(expected_of(tmp_path / "saved") - expected_of(copied)).max() < 1e-6

    def test_what_makes_the_score_counts_in_the_fingerprint(self, qwen: Path, tmp_path: Path) -> None:
        seen = [CrossEncoder.load(qwen).fingerprint]
        for number, (name, values) in enumerate(
            [
                ("config_sentence_transformers.json", {"default_prompt_name": "law"}),
                ("1_LogitScore/config.json", {"false_token_id": 7}),
                ("sentence_bert_config.json", {"processing_kwargs": {}}),
            ]
        ):
            folder = tmp_path / str(number)
            shutil.copytree(qwen, folder)
            change_json(folder / name, **values)
            seen.append(CrossEncoder.load(folder).fingerprint)
        template = qwen / "chat_template.jinja"
        (folder / "chat_template.jinja").write_text(template.read_text().replace("q:", "r:"))
        seen.append(CrossEncoder.load(folder).fingerprint)
        assert len(set(seen)) == len(seen)

    def test_a_changed_template_is_another_start_of_a_training(self, copied: Path) -> None:
        before = hash_model(str(copied))
        (copied / "chat_template.jinja").write_text(template_of("flat").replace("q:", "r:"))
        assert hash_model(str(copied)) != before


class TestPlainDirectories:
    def test_a_template_that_asks_for_yes_or_no_tells_a_reranker(self, tmp_path: Path) -> None:
        for form in ("flat", "structured"):
            folder = build_plain(tmp_path / form, "Qwen3", template_of(form))
            model = CrossEncoder.load(folder)
            assert np.abs(CrossScorer(model).score(QUERIES, DOCUMENTS) - expected_of(folder)).max() < 1e-6
            model.save(tmp_path / f"saved-{form}")
            assert np.abs(expected_of(tmp_path / f"saved-{form}") - expected_of(folder)).max() < 1e-6
            assert isinstance(CrossEncoder.start_from(folder), CausalCrossEncoder)

    @pytest.mark.parametrize(
        "template", [None, CHAT, template_of("flat").replace("yes or no", "1 or 0"), "{{ query document }"]
    )
    def test_any_other_is_refused_and_starts_a_fresh_head(self, tmp_path: Path, template: str | None) -> None:
        folder = build_plain(tmp_path / "plain", "Qwen3", template)
        with pytest.raises(FormatError, match=r"without modules\.json.*LogitScore\(TRUE_TOKEN_ID"):
            CrossEncoder.load(folder)
        started = CrossEncoder.start_from(folder)
        assert not isinstance(started, CausalCrossEncoder)
        assert started.num_labels == 1


def sentence(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "sentence_bert_config.json", **values)


def model(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config_sentence_transformers.json", **values)


def tokens(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "1_LogitScore" / "config.json", **values)


def add_module(kind: str, path: str = "2_Dense") -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        file = folder / "modules.json"
        modules = json.loads(file.read_text())
        file.write_text(json.dumps([*modules, {"idx": 2, "name": "2", "path": path, "type": kind}]))

    return add


def lose_document(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ (messages | selectattr('role', 'eq', 'query') | first).content }}"
    )


def message(**values: Any) -> dict[str, Any]:
    return {"modality_config": {"message": {"method": "forward", "method_output_name": "logits", **values}}}


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another module": (add_module("sentence_transformers.models.Dense"), r"modules\.json' has the modules .*Dense"),
    "model type": (model(model_type="SentenceTransformer"), "names the module LogitScore.*set it to CrossEncoder"),
    "default prompt": (model(default_prompt_name="none"), "default_prompt_name 'none', which is none of its prompts"),
    "prompts": (model(prompts=["a"]), "must be an object of names and texts"),
    "task": (sentence(transformer_task="any-to-any"), "has transformer_task 'any-to-any'"),
    "output": (sentence(module_output_name="scores"), "has module_output_name 'scores'"),
    "lower case": (sentence(do_lower_case=True), "has do_lower_case True"),
    "length": (sentence(max_seq_length=0), "has max_seq_length 0"),
    "processing": (sentence(processing_kwargs={"text": {"padding": "max_length"}}), r"processing_kwargs\.text"),
    "rendering": (sentence(processing_kwargs={"chat_template": {"max_length": 9}}), r"chat_template\.max_length 9"),
    "form": (sentence(**message()), "has format of message None"),
    "hidden state": (sentence(**message(method_output_name="x", format="flat")), "config of message .*'x'"),
    "token": (tokens(true_token_id="yes"), "has true_token_id 'yes'"),
    "token beyond": (tokens(true_token_id=96), "takes the logit of token 96 for its score, and"),
    "input": (tokens(module_input_name="scores"), "module_input_name 'scores'"),
    "template": (lose_document, "leaves the text of the document out"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "cannot be rendered with a query and a document"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_with_its_file(copied: Path, name: str) -> None:
    change, words = REFUSED[name]
    change(copied)
    with pytest.raises(FormatError, match=words):
        CrossEncoder.load(copied)


def test_a_model_that_makes_all_logits_is_refused(copied: Path) -> None:
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    other = transformers.TrOCRForCausalLM(transformers.TrOCRConfig(vocab_size=96, **shape))
    (copied / "model.safetensors").unlink()
    other.save_pretrained(copied)
    with pytest.raises(FormatError, match="TrOCRForCausalLM, which makes the logits of every position"):
        CrossEncoder.load(copied)


class TestTexts:
    def test_what_is_no_text_is_named(self, qwen: Path) -> None:
        scorer = CrossScorer(CrossEncoder.load(qwen))
        with pytest.raises(InputError, match=r"documents\[1\] is 5, of type int"):
            scorer.score(["a", "b"], ["c", 5])  # type: ignore[list-item]
        with pytest.raises(InputError, match=r"queries\[0\] has a lone surrogate"):
            scorer.score(["a\ud800"], ["c"])

    def test_a_length_without_room_beside_the_template_is_refused(self, qwen: Path) -> None:
        scorer = CrossScorer(CrossEncoder.load(qwen), max_length=20)
        with pytest.raises(
            InputError, match="max_length is 20, and this reranker's chat template puts 37 tokens"
        ):
            scorer.score(["a"], ["b"])


class TestHeads:
    @pytest.mark.parametrize(
        ("form", "settings"), [(None, PROMPT), (None, {"prompts": PROMPT["prompts"]}), ("flat", PROMPT)]
    )
    def test_prompts_and_templates_of_a_classifier_are_followed(
        self, tmp_path: Path, form: str | None, settings: dict[str, Any]
    ) -> None:
        folder = build_headed(tmp_path / "reranker", form, **settings)
        model = CrossEncoder.load(folder)
        ours = CrossScorer(model).score(QUERIES, DOCUMENTS)
        assert np.std(ours) > 0.01
        assert np.abs(ours - expected_of(folder)).max() < 1e-6
        CrossEncoder.start_from(folder).save(tmp_path / "saved")
        again = CrossEncoder.load(tmp_path / "saved")
        assert again.fingerprint == model.fingerprint
        assert again.pairs.prompts == PROMPT["prompts"]
        assert np.abs(CrossScorer(again).score(QUERIES, DOCUMENTS) - ours).max() < 1e-6
        assert np.abs(expected_of(tmp_path / "saved") - ours).max() < 1e-6

    @pytest.mark.parametrize("num_labels", [1, 2])
    def test_a_head_on_a_model_with_a_chat_template_is_read_alike_by_the_peer(
        self, tmp_path: Path, num_labels: int
    ) -> None:
        """The template is for something else: without modules.json the peer put pairs by it, or raised."""
        torch.manual_seed(0)
        plain = build_plain(tmp_path / "plain", "Qwen3", CHAT)
        CrossEncoder.start_from(plain, num_labels).save(tmp_path / "saved")
        ours = CrossScorer(CrossEncoder.load(tmp_path / "saved")).score(QUERIES, DOCUMENTS)
        expected = expected_of(tmp_path / "saved")
        if num_labels == 2:
            expected = expected[:, 1] - expected[:, 0]
            peer = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
            assert isinstance(peer.activation_fn, nn.Identity), "two logits have none"
        assert np.abs(expected - ours).max() < 1e-6

    def test_the_prompt_of_an_encoder_is_not_that_of_the_reranker_on_it(self, tmp_path: Path) -> None:
        folder = build_plain(tmp_path / "plain", "Qwen3")
        encoder = Encoder.load(folder)
        encoder.prompts = {"query": "q: "}
        encoder.save(tmp_path / "encoder")
        assert CrossEncoder.start_from(tmp_path / "encoder").pairs.prompts == {}


def test_neither_is_an_encoder_but_one_may_start_from_it(qwen: Path, tmp_path: Path) -> None:
    for folder in (qwen, build_headed(tmp_path / "reranker", **PROMPT)):
        with pytest.raises(FormatError, match="it is no encoder, and as one it would lose its head"):
            Encoder.load(folder)
        encoder = Encoder.load(folder, from_classifier=True)
        assert encoder.prompts == {}
        assert encoder.dim == 16


class TestTraining:
    ROWS: ClassVar[dict[str, Any]] = {
        "query": ["what does it mean?", "a"],
        "document": ["a text about it", "c"],
        "label": [1.0, 0.0],
    }
    LISTS: ClassVar[dict[str, Any]] = {
        "query": ["what does it mean?", "a"],
        "documents": [["a text about it", "c"], ["b", "a longer text, " * 9]],
        "scores": [[1.0, 0.0], [1.0, 0.0]],
    }

    @staticmethod
    def task(start: Path, **changes: Any) -> RerankerTask:
        values = {
            "model": str(start),
            "train": "rows.tsv",
            "output": "out",
            "batch_size": 2,
            "max_length": 60,
            "dtype": "float32",
            "workers": {"num": 1},
            "optimizer": {"lr": 0.002, "warmup_ratio": 0.0},
            **changes,
        }
        return RerankerTask(make_config(TrainRerankerConfig, values), str(start), None)

    @pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
    @pytest.mark.parametrize("family", ["Qwen3", "Gemma"])
    @pytest.mark.parametrize("objective", ["pointwise_regression", "listwise_softmax"])
    def test_what_is_trained_is_read_alike_by_both(
        self, tmp_path: Path, family: str, objective: str, lora: dict[str, int] | None
    ) -> None:
        start = build(tmp_path / "start", family, **PROMPT)
        task = self.task(start, lora=lora, objective=objective)
        rows = self.ROWS if objective == "pointwise_regression" else self.LISTS
        whole = task.build(None)
        optimizer = make_optimizer(whole, task.config.optimizer)
        step = TrainingStep(whole, optimizer, make_schedule(optimizer, 4, 0.0))
        losses = [step.run(number, [rows], task.backward) for number in range(2)]
        assert losses[1] < losses[0]
        assert [n for n, p in whole.named_parameters() if p.requires_grad and p.grad is None] == []
        if lora:
            assert not any("lora_" not in n for n, p in whole.named_parameters() if p.requires_grad)
        task.save(whole, tmp_path / "trained", {})
        trained = CrossEncoder.load(tmp_path / "trained")
        assert trained.max_length == LENGTH
        ours = CrossScorer(trained).score(QUERIES, DOCUMENTS)
        assert np.abs(ours - expected_of(start)).max() > 0.001
        assert np.abs(ours - expected_of(tmp_path / "trained")).max() < 1e-6
        # As a checkpoint, from which a worker that is started again builds its model.
        assert isinstance(task.build(tmp_path / "trained"), nn.Module)

    def test_the_first_loss_is_that_of_the_peers_logits(self, qwen: Path) -> None:
        task = self.task(qwen, max_length=LENGTH)
        whole = task.build(None)
        optimizer = make_optimizer(whole, task.config.optimizer)
        loss = TrainingStep(whole, optimizer, make_schedule(optimizer, 4, 0.0)).run(
            0, [self.ROWS], task.backward
        )
        logits = torch.tensor(expected_of(qwen, self.ROWS["query"], self.ROWS["document"]))
        expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(self.ROWS["label"]))
        assert loss == pytest.approx(float(expected), abs=1e-6)

    def test_two_classes_are_refused(self, qwen: Path) -> None:
        with pytest.raises(InputError, match="gives one logit a pair, and the objective trains 2"):
            self.task(qwen, objective="pointwise_cross_entropy").build(None)


class TestGraphs:
    def test_there_is_none(self, qwen: Path, tmp_path: Path) -> None:
        config = make_config(ExportConfig, {"reranker": str(qwen), "output": str(tmp_path / "out")})
        with pytest.raises(
            RaytowerError, match="causal language model has no ONNX graph here; use engine torch"
        ):
            plan_export(config)
        pytest.importorskip("onnxruntime")
        with pytest.raises(RaytowerError, match="no ONNX graph here"):
            CrossScorer(CrossEncoder.load(qwen), engine="onnx")
        assert CrossScorer(CrossEncoder.load(qwen), engine="auto", device="cpu").settled.engine == "torch"
