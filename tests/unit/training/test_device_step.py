"""What a step asks of an accelerator, tested without one: who waits for whom, which precision, what is copied."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from raytower.config import make_config
from raytower.models.ahead import Ahead
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.device import multiply_fast
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.objectives import (
    classification,
    cosent,
    cosine_embedding,
    cosine_regression,
    keys,
    lambda_loss,
    pointwise_cross_entropy,
    pointwise_regression,
    targets,
)
from raytower.objectives.keys import text_keys
from raytower.training.backbone import narrow_base
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.live_engine import LiveEngine
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.step import TrainingStep
from raytower.training.word_gradients import WordGradients
from tests.support.tiny_training import (
    answer,
    batches_of,
    question,
    training_values,
    write_candidates,
    write_labelled,
    write_lines,
    write_pairs,
    write_scored,
    write_triples,
)

# What reads a value, or a size that depends on values, from an accelerator. `mask[places]` is a nonzero, too.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
    "equal",
    "is_nonzero",
    "bincount",
}

FINDING_WRONG = (
    classification,
    cosent,
    cosine_embedding,
    cosine_regression,
    lambda_loss,
    pointwise_cross_entropy,
    pointwise_regression,
    targets,
)

TASKS: dict[str, tuple[Any, Any]] = {
    "retriever": (TrainRetrieverConfig, RetrieverTask),
    "reranker": (TrainRerankerConfig, RerankerTask),
    "classifier": (TrainClassifierConfig, ClassifierTask),
}


class Waits(TorchDispatchMode):
    """Counts the operations after which the host goes on only once the device has come to them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))

    def counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.seen[method.__name__] += 1
            return method(*arguments)

        return call


def _on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What never touches the device, as another test shows, and is not counted."""

    def call(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return call


def make_task(kind: str, model: Path, train: Path, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    config_class, task_class = TASKS[kind]
    config = make_config(config_class, training_values(model, train, folder, **changes))
    surveyed = task_class.survey(config)
    return config, task_class.prepare(config, surveyed), surveyed


def make_step(task: Any, config: Any, model: nn.Module | None = None) -> TrainingStep:
    model = task.build(None) if model is None else model
    optimizer = make_optimizer(model.train(), config.optimizer)
    return TrainingStep(
        model,
        optimizer,
        make_schedule(optimizer, 100, 0.0),
        dtype=getattr(torch, config.dtype),
        seed=config.seed,
        words=WordGradients.of(model),
    )


@pytest.mark.parametrize(
    ("kind", "write", "changes"),
    [
        ("retriever", write_pairs, {}),
        ("retriever", write_pairs, {"dtype": "bfloat16"}),
        ("retriever", write_pairs, {"dtype": "float16"}),
        ("retriever", write_pairs, {"gradient_cache": 4, "accumulate_batches": 2}),
        ("retriever", write_candidates, {"objective": {"symmetric": True}, "matryoshka": {"dims": [32, 8]}}),
        ("retriever", write_triples, {"objective": "hardest_negative"}),
        ("retriever", write_pairs, {"objective": "random_negative"}),
        ("retriever", write_lines, {"objective": "simcse"}),
        ("retriever", write_scored, {"objective": "cosent"}),
        ("retriever", write_scored, {"objective": "angle"}),
        ("retriever", write_scored, {"objective": "cosine_embedding"}),
        ("retriever", write_scored, {"objective": "cosine_regression"}),
        ("retriever", write_candidates, {"objective": {"name": "margin_mse", "scale": 2.0}}),
        ("retriever", write_candidates, {"objective": "kl_divergence"}),
        ("reranker", write_scored, {}),
        ("reranker", write_scored, {"objective": "pointwise_cross_entropy"}),
        ("reranker", write_candidates, {"objective": "listwise_softmax"}),
        ("reranker", write_candidates, {"objective": "lambda_loss"}),
        ("reranker", write_triples, {"objective": "pairwise_margin"}),
        ("classifier", write_labelled, {"objective": {"class_weights": "balanced"}}),
    ],
)
def test_a_step_waits_for_the_device_once(
    dummy_encoder_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    write: Callable[[Path, int], Path],
    changes: dict[str, Any],
) -> None:
    """All else is queued: an accelerator that is asked in between stands still until the answer has come back.

    What is known of the batch's keys lies in the host's memory, and is worked out there while the device computes.
    """
    train = write(tmp_path / f"train.{'jsonl' if write is write_candidates else 'tsv'}", 64)
    config, task, surveyed = make_task(kind, dummy_encoder_dir, train, tmp_path, **changes)
    step = make_step(task, config)
    for module in FINDING_WRONG:  # which costs nothing in the host's memory, and is left out elsewhere
        monkeypatch.setattr(module, "found_wrong", lambda _: False)
    for place, name in ((keys, "known_relevant"), (keys.KnownRelevant, "pairs")):
        monkeypatch.setattr(place, name, _on_the_host(getattr(place, name)))
    batches = batches_of(surveyed, config, task.num_documents)
    for number in range(2):  # the second begins with what the first has left
        rows = list(islice(batches, config.accumulate_batches))
        loaded = [task.load_batch(step, each) for each in rows]
        with Waits() as waits, monkeypatch.context() as patched:
            for name in ("tolist", "cpu", "numpy"):  # what no operation shows in the host's memory
                patched.setattr(Tensor, name, waits.counting(getattr(Tensor, name)))
            step.run(number, loaded, task.propagate)
        assert waits.seen == {"tolist": 1}


def test_what_is_known_of_keys_is_worked_out_in_the_hosts_memory() -> None:
    """For a loss on another device, on which nothing can be computed: only the places arrive there."""
    texts = text_keys(["a", "b", "a"])
    known = keys.BatchKeys(query=texts, documents=(text_keys(["p", "q", "r"]), text_keys(["q", None, "s"])))
    elsewhere = known.to(torch.device("meta"))
    assert elsewhere.to(torch.device("meta")) is elsewhere
    rows, documents = elsewhere.known.pairs(slice(0, 3))
    here_rows, here_documents = known.known.pairs(slice(0, 3))
    assert {tensor.device.type for tensor in (rows, documents, elsewhere.known.own_B)} == {"meta"}
    assert (rows.shape, documents.shape) == (here_rows.shape, here_documents.shape)
    # Queries 0 and 2 are equal, and find each other's documents; q is asked by query 1 and stands in row 0 again.
    pairs = set(zip(here_rows.tolist(), here_documents.tolist(), strict=True))
    assert {(0, 2), (2, 0), (1, 3)} <= pairs
    assert elsewhere.known.missing_M.shape == (1,)
    assert known.known.missing_M.tolist() == [4]


def test_batches_loaded_ahead_make_the_same_steps(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """With dropout, which the thread does not disturb."""
    train = write_pairs(tmp_path / "train.tsv", 128)
    config, task, surveyed = make_task("retriever", dummy_encoder_dir, train, tmp_path)
    losses = []
    for is_ahead in (False, True):
        torch.manual_seed(config.seed)
        step = make_step(task, config)
        batches = islice(batches_of(surveyed, config), 6)
        if is_ahead:
            with Ahead(lambda rows, step=step: task.load_batch(step, rows), batches) as ahead:
                losses.append([step.run(n, [loaded], task.propagate) for n, loaded in enumerate(ahead)])
        else:
            losses.append([step.run(n, [rows], task.backward) for n, rows in enumerate(batches)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_float32_multiplies_by_tf32_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for dtype in (torch.float32, torch.bfloat16):
        for device in ("cpu", "cuda"):
            multiply_fast(dtype, torch.device(device))
    assert asked == ["high"]


class TestNarrowWeightsUnderAdapters:
    @pytest.fixture
    def job(self, dummy_encoder_dir: Path, tmp_path: Path) -> tuple[Any, Any, Any]:
        train = write_pairs(tmp_path / "train.tsv", 64)
        changes = {"dtype": "bfloat16", "lora": {"rank": 4}, "optimizer": {"lr": 1e-2}}
        return make_task("retriever", dummy_encoder_dir, train, tmp_path, **changes)

    def losses(self, job: tuple[Any, Any, Any], is_narrow: bool) -> tuple[TrainingStep, list[float]]:
        config, task, surveyed = job
        torch.manual_seed(0)
        model = task.build(None)
        if is_narrow:
            narrow_base(model, config)
        step = make_step(task, config, model)
        batches = islice(batches_of(surveyed, config), 4)
        return step, [step.run(number, [rows], task.backward) for number, rows in enumerate(batches)]

    def test_the_losses_are_those_of_wide_ones(self, job: tuple[Any, Any, Any]) -> None:
        """To the last bit: autocast would have narrowed the same weights in each forward pass."""
        narrow, losses = self.losses(job, is_narrow=True)
        wide, expected = self.losses(job, is_narrow=False)
        assert losses == expected
        assert len(set(losses)) == 4
        trained = [name for name, p in narrow.model.named_parameters() if p.requires_grad]
        assert trained
        for name in trained:
            assert "lora_" in name
            assert narrow.model.get_parameter(name).dtype is torch.float32
            assert torch.equal(narrow.model.get_parameter(name), wide.model.get_parameter(name))
        linear = {
            f"{name}.weight" for name, module in wide.model.named_modules() if type(module) is nn.Linear
        }
        halved = {name for name, p in narrow.model.named_parameters() if p.dtype is torch.bfloat16}
        assert {name for name in halved if name.endswith("weight")} == linear - set(trained)
        assert any(name.endswith("query.base_layer.weight") for name in halved)

    def test_what_is_saved_is_what_was_trained_in_float32(
        self, job: tuple[Any, Any, Any], tmp_path: Path, dummy_encoder_dir: Path
    ) -> None:
        """By hand: each adapted weight is its narrow base and scale · B · A, which bfloat16 would round away."""
        step, _ = self.losses(job, is_narrow=True)
        job[1].save(step.model, tmp_path / "saved", {})
        saved, start = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", dummy_encoder_dir))
        assert all(weight.dtype is torch.float32 for weight in saved.values())
        name = "encoder.layer.0.attention.self.query"
        layer = step.model.get_submodule(f"encoder.backbone.{name}")
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (16 / 4)
        expected = start[f"{name}.weight"].bfloat16().float() + product
        assert torch.allclose(saved[f"{name}.weight"], expected, atol=1e-7)
        assert float((saved[f"{name}.weight"] - saved[f"{name}.weight"].bfloat16().float()).abs().max()) > 0
        table = "embeddings.word_embeddings.weight"
        assert torch.equal(saved[table], start[table])
        assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("dtype") in (None, "float32")

    def test_nothing_is_narrowed_in_float32_or_without_adapters(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        train = write_pairs(tmp_path / "train.tsv", 64)
        for changes in ({"lora": {"rank": 4}}, {"dtype": "bfloat16"}):
            config, task, _ = make_task("retriever", dummy_encoder_dir, train, tmp_path, **changes)
            model = task.build(None)
            narrow_base(model, config)
            assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestLiveEngine:
    """Dev rows are measured with the model that trains, against the engines that take a copy over."""

    TEXTS = tuple(question(number) for number in range(40))
    ANSWERS = tuple(answer(number) for number in range(40))

    @pytest.mark.parametrize("lora", [None, {"rank": 4}])
    def test_vectors_are_those_of_the_encoder(
        self, dummy_encoder_dir: Path, tmp_path: Path, lora: dict[str, int] | None
    ) -> None:
        """With adapters: of the directory that they are merged in."""
        train = write_pairs(tmp_path / "train.tsv", 64)
        config, task, surveyed = make_task("retriever", dummy_encoder_dir, train, tmp_path, lora=lora)
        step = make_step(task, config)
        step.run(0, [next(batches_of(surveyed, config))], task.backward)
        task.save(step.model, tmp_path / "saved", {})
        step.model.eval()
        engine = LiveEngine(step.model.encoder, dtype="float32", max_length=32)
        engine.block_rows = 16
        vectors_ND = engine.encode(self.TEXTS, "q: ")
        assert isinstance(vectors_ND, Tensor)
        expected = ForwardEngine(Encoder.load(tmp_path / "saved"), max_length=32).encode(self.TEXTS, "q: ")
        assert vectors_ND.numpy() == pytest.approx(expected, abs=1e-5)
        assert engine.encode([]).shape == (0, 32)

    def test_logits_are_those_of_the_reranker(self, dummy_reranker_dir: Path, tmp_path: Path) -> None:
        train = write_scored(tmp_path / "train.tsv", 64)
        _, task, _ = make_task("reranker", dummy_reranker_dir, train, tmp_path)
        model = task.build(None).eval()
        scorer = CrossScorer(CrossEncoder.load(dummy_reranker_dir), max_length=32)
        logits_NC = LiveEngine(model.inner, dtype="float32", max_length=32).logits(self.TEXTS, self.ANSWERS)
        assert logits_NC[:, 0].numpy() == pytest.approx(scorer.score(self.TEXTS, self.ANSWERS), abs=1e-5)

    @pytest.mark.parametrize("kind", list(TASKS))
    @pytest.mark.parametrize("lora", [None, {"rank": 4}])
    def test_a_measurement_copies_and_hashes_no_weight(
        self,
        dummy_encoder_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        lora: dict[str, int] | None,
    ) -> None:
        """And training goes on behind it as if it had not been."""
        write = {"retriever": write_pairs, "reranker": write_scored, "classifier": write_labelled}[kind]
        train = write(tmp_path / "train.tsv", 64)
        changes: dict[str, Any] = {"dev": {"path": str(train)}, "lora": lora, "dtype": "bfloat16"}
        config, task, surveyed = make_task(kind, dummy_encoder_dir, train, tmp_path, **changes)
        undisturbed, measured = (make_step(task, config) for _ in range(2))
        rows = list(islice(batches_of(surveyed, config), 2))
        losses = [undisturbed.run(number, [rows[number]], task.backward) for number in range(2)]
        assert measured.run(0, [rows[0]], task.backward) == losses[0]
        with monkeypatch.context() as patched:
            for place, name in ((copy, "deepcopy"), (nn.Module, "state_dict"), (nn.Module, "to")):
                patched.setattr(place, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
            measured.model.eval()
            assert 0 <= task.evaluate(measured.model)[task.dev.metric] <= 1
            measured.model.train()
        assert measured.run(1, [rows[1]], task.backward) == losses[1]
