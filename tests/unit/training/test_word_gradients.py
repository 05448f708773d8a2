"""Word embeddings whose gradient is collected row by row, against autograd's dense one, without Ray.

Autograd, torch's data parallelism and the same optimizer are the independent implementation; a step with `words` must
leave the same weights and moments. Vocabulary of 3,000, of which the texts read some forty rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from raytower.config import make_config
from raytower.models import chunks
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.static_embedding import StaticBackbone, StaticConfig
from raytower.training.batches import Rows
from raytower.training.config import TrainJobConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.step import TrainingStep, data_parallel
from raytower.training.word_gradients import WordGradients
from tests.support.tiny_models import tiny_config, tiny_tokenizer
from tests.support.tiny_training import batches_of, training_values, worker_slice, write_pairs
from tests.support.warm import in_two_processes
from tests.support.worker_group import end_worker, join_group

VOCABULARY = 3_000
Job = tuple[TrainJobConfig, Any, list[list[Rows]]]
Weights = dict[str, Tensor]


def bert_config(**changes: object) -> BertConfig:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_config(vocab_size=VOCABULARY, initializer_range=0.2, **still, **changes)


@pytest.fixture(scope="session")
def wide_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    torch.manual_seed(0)
    backbone = BertModel(bert_config())
    Encoder(backbone, tiny_tokenizer(), EncoderSettings(max_length=64)).eval().save(folder)
    return folder


@pytest.fixture(scope="session")
def wide_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide-reranker"
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=1))
    CrossEncoder(model, tiny_tokenizer(), max_length=64).eval().save(folder)
    return folder


def make_job(model: Path, folder: Path, changes: dict[str, Any], num_steps: int = 3) -> Job:
    optimizer = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1e9}
    values = {"workers": {"num": 2}, "optimizer": optimizer, **changes}
    train = write_pairs(folder / "train.tsv", 128)
    config = make_config(TrainRetrieverConfig, training_values(model, train, folder, **values))
    surveyed = RetrieverTask.survey(config)
    batches = batches_of(surveyed, config)
    steps = [list(islice(batches, config.accumulate_batches)) for _ in range(num_steps)]
    return config, RetrieverTask.prepare(config, surveyed), steps


def make_step(job: Job, *, dense: bool, is_parallel: bool = False) -> TrainingStep:
    config, task, steps = job
    torch.manual_seed(0)
    model = task.build(None).train()
    words = None if dense else WordGradients.of(model)
    assert dense or words is not None
    optimizer = make_optimizer(model, config.optimizer)
    return TrainingStep(
        model,
        optimizer,
        make_schedule(optimizer, len(steps), config.optimizer.warmup_ratio),
        dtype=getattr(torch, config.dtype),
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        parallel=data_parallel(model, words) if is_parallel else None,
        words=words,
    )


def state_of(step: TrainingStep) -> Weights:
    """Weights, moments and the last gradients, the biases of attention keys aside: their gradients are noise."""
    state: Weights = {}
    for name, parameter in step.model.named_parameters():
        if name.endswith("key.bias") or not parameter.requires_grad:
            continue
        moments = step.optimizer.state[parameter]
        state[name] = parameter.detach().clone()
        state[f"{name} gradient"] = parameter.grad.clone() if parameter.grad is not None else torch.zeros(())
        state |= {f"{name} {key}": moments[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    return state


def largest_difference(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def run(job: Job, step: TrainingStep, rank: int | None = None) -> list[float]:
    _, task, steps = job
    share = (lambda rows: rows) if rank is None else (lambda rows: worker_slice(rows, rank, 2))
    return [
        step.run(number, [share(rows) for rows in batches], task.backward)
        for number, batches in enumerate(steps)
    ]


class WholeTables(TorchDispatchMode):
    """Counts gradients of a lookup that are as large as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), names: Any = None
    ) -> Any:
        result = function(*arguments, **(names or {}))
        if "embedding_dense_backward" in str(function) and len(result) == VOCABULARY:
            self.count += 1
        return result


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_batches": 2},
    "cached": {"accumulate_batches": 2, "gradient_cache": 4},
    "clipped": {"optimizer": {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.05}},
    "recomputed": {"recompute": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "gradient_cache": 4},
}
# Some processors round a row's sum otherwise when it lies in another place: by what a few last digits are of losses
# of 2, and of gradients in 16 bits. A row that is wrong differs by a step, 1e-3.
TOLERANCE = {"float16": 5e-4}


class TestOneProcess:
    @pytest.fixture(autouse=True)
    def in_one_chunk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sums over several chunks round in another order; those of accumulated and of cached batches are tested."""
        monkeypatch.setattr(chunks, "tokens_per_launch", lambda _: 10_000)

    @pytest.mark.parametrize("name", list(CASES))
    def test_three_steps_leave_what_dense_gradients_leave(
        self, wide_encoder: Path, tmp_path: Path, name: str
    ) -> None:
        job = make_job(wide_encoder, tmp_path, CASES[name])
        dense, collected = make_step(job, dense=True), make_step(job, dense=False)
        before = {key: p.detach().clone() for key, p in dense.model.named_parameters()}
        with WholeTables() as tables:
            losses = run(job, dense)
        assert tables.count >= 3
        with WholeTables() as tables:
            assert run(job, collected) == pytest.approx(losses, abs=5e-6)
        assert tables.count == 0
        assert largest_difference(state_of(collected), state_of(dense)) < TOLERANCE.get(name, 5e-6)
        words = "encoder.backbone.embeddings.word_embeddings.weight"
        moved = (collected.model.get_parameter(words).detach() - before[words]).abs().amax(1)
        assert int((moved > 1e-3).sum()) > 20  # read
        # Decay alone moves the others, by lr * 0.1 of what they are.
        assert 0 < float(moved.median()) < 1e-3

    def test_a_reranker_too(self, wide_reranker: Path, tmp_path: Path) -> None:
        lines = "".join(f"q{n % 7}\ttitle {n}\t{n % 2}\n" for n in range(48))
        (tmp_path / "train.tsv").write_text("query\ttitle\tlabel\n" + lines, encoding="utf-8")
        values = {
            "model": str(wide_reranker),
            "train": {"path": str(tmp_path / "train.tsv")},
            "output": str(tmp_path / "out"),
            "batch_size": 16,
            "max_length": 32,
            "dtype": "float32",
            "optimizer": {"lr": 1e-3},
        }
        config = make_config(TrainRerankerConfig, values)
        surveyed = RerankerTask.survey(config)
        steps = [[rows] for rows in islice(batches_of(surveyed, config), 3)]
        job = (config, RerankerTask.prepare(config, surveyed), steps)
        dense, collected = make_step(job, dense=True), make_step(job, dense=False)
        assert run(job, collected) == pytest.approx(run(job, dense), abs=5e-6)
        assert largest_difference(state_of(collected), state_of(dense)) < 5e-6

    def test_a_gradient_that_is_no_number_leaves_nothing_behind(
        self, wide_encoder: Path, tmp_path: Path
    ) -> None:
        """A norm of NaN is multiplied into every row of the table, those that nobody reads as well."""
        job = make_job(wide_encoder, tmp_path, {"dtype": "float16"})
        step = make_step(job, dense=False)
        assert step.words is not None
        weight = step.model.get_parameter("encoder.backbone.encoder.layer.1.output.dense.weight")
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
        _, task, steps = job
        step.run(0, steps[0], task.backward)
        hook.remove()
        step.run(1, steps[1], task.backward)
        assert all(bool(p.isfinite().all()) for p in step.model.parameters())
        gradient = step.words.weight.grad
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert int((gradient.abs().sum(1) > 0).sum()) < 100

    def test_the_model_is_as_it_was_between_steps(self, wide_encoder: Path, tmp_path: Path) -> None:
        """Copies for evaluation and checkpoints would else take the table's gradient along."""
        job = make_job(wide_encoder, tmp_path, {})
        step = make_step(job, dense=False)
        run(job, step)
        assert step.words is not None
        (lookup,) = step.words.lookups
        assert type(lookup) is nn.Embedding
        assert "forward" not in vars(lookup)


def test_a_padding_row_gets_no_gradient() -> None:
    """Rows 1 and 2 are read, 2 twice: gradients [1, 1] + [3, 3] and [0.5, 0.5]; padding is row 0."""
    embedding = nn.Embedding(4, 2, padding_idx=0)
    words = WordGradients([embedding])
    weights_14 = torch.tensor([[1.0, 0.5, 3.0, 7.0]])
    with words.collecting():
        vectors_142 = embedding(torch.tensor([[2, 1, 2, 0]]))
    (vectors_142 * weights_14.unsqueeze(2)).sum().backward()
    assert embedding.weight.grad is None
    words.finish()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[0, 0], [0.5, 0.5], [4, 4], [0, 0]]
    embedding.weight.grad = None
    words.begin()
    with words.collecting():
        embedding(torch.tensor([3])).sum().backward()
    words.finish()
    assert embedding.weight.grad.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


class TiedJob:
    """Masked words: the output layer is the table of embeddings, so that the loss gives every row a gradient."""

    @staticmethod
    def make_step(*, dense: bool, is_parallel: bool = False) -> TrainingStep:
        torch.manual_seed(0)
        model = BertForMaskedLM(bert_config())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        words = None if dense else WordGradients.of(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        schedule = make_schedule(optimizer, 3, 0.0)
        parallel = data_parallel(model, words) if is_parallel else None
        return TrainingStep(model, optimizer, schedule, max_grad_norm=1.0, parallel=parallel, words=words)

    @staticmethod
    def batches() -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [[torch.randint(1, 40, (4, 9), generator=generator)] for _ in range(3)]

    @staticmethod
    def backward(step: TrainingStep, ids_rL: Tensor) -> Tensor:
        return step.propagate(
            lambda: nn.functional.cross_entropy(step.parallel(ids_rL).logits.flatten(0, 1), ids_rL.flatten())
        )

    @classmethod
    def run(cls, step: TrainingStep, rows: slice = slice(None)) -> list[float]:
        return [
            step.run(number, [ids[rows] for ids in batches], cls.backward)
            for number, batches in enumerate(cls.batches())
        ]


def test_a_tied_output_layer_adds_to_the_same_gradient() -> None:
    dense, collected = TiedJob.make_step(dense=True), TiedJob.make_step(dense=False)
    assert TiedJob.run(collected) == pytest.approx(TiedJob.run(dense), abs=1e-6)
    assert largest_difference(state_of(collected), state_of(dense)) < 1e-6


def _gemma() -> PreTrainedModel:
    return Gemma3TextModel(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
        )
    )


def _frozen() -> PreTrainedModel:
    model = BertModel(bert_config())
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("build", [_gemma, _frozen, lambda: nn.Linear(2, 2)])
def test_what_is_more_than_a_lookup_is_left_to_autograd(build: Callable[[], nn.Module]) -> None:
    """Gemma's embeddings are scaled; a frozen table (adapters) has no gradient; not every model has one."""
    assert WordGradients.of(build()) is None


def test_two_modules_over_one_table_are_one() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config)
    words = WordGradients.of(model)
    assert words is not None
    ids = torch.tensor([[5, 6, 5, 1]])
    model(input_ids=ids).last_hidden_state.square().sum().backward()
    assert words.weight.grad is not None
    expected = words.weight.grad.clone()
    words.weight.grad = None
    with words.collecting():
        model(input_ids=ids).last_hidden_state.square().sum().backward()
    assert words.weight.grad is None
    words.finish()
    assert torch.allclose(words.weight.grad, expected, atol=1e-6)


PARALLEL_CASES = ["accumulated", "cached", "clipped", "bfloat16"]


def _worker(rank: int, jobs: dict[str, Job], folder: Path) -> None:
    join_group(folder, rank)
    exchanged: list[int] = []
    all_reduce = dist.all_reduce

    def watched(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        exchanged.append(tensor.numel())
        return all_reduce(tensor, *arguments, **named)

    results: dict[str, Any] = {}
    for name, job in jobs.items():
        dense, collected = (make_step(job, dense=dense, is_parallel=True) for dense in (True, False))
        losses = run(job, dense, rank)
        dist.all_reduce = watched
        found = run(job, collected, rank)
        dist.all_reduce = all_reduce
        difference = largest_difference(state_of(collected), state_of(dense))
        results[name] = {"losses": losses, "found": found, "difference": difference}
    results["largest exchange"] = max(exchanged)
    rows = slice(rank * 2, rank * 2 + 2)
    dense, collected = (TiedJob.make_step(dense=dense, is_parallel=True) for dense in (True, False))
    losses, found = TiedJob.run(dense, rows), TiedJob.run(collected, rows)
    difference = largest_difference(state_of(collected), state_of(dense))
    results["tied"] = {"losses": losses, "found": found, "difference": difference}
    torch.save(results, folder / f"results{rank}.pt")
    end_worker()


@pytest.mark.processes
def test_two_workers_exchange_the_rows_that_were_read_and_no_more(wide_encoder: Path, tmp_path: Path) -> None:
    """Three steps with the gradients of torch's data parallelism, and three without the table among them."""
    jobs = {name: make_job(wide_encoder, tmp_path, CASES[name]) for name in PARALLEL_CASES}
    in_two_processes(_worker, jobs, tmp_path)
    for rank in range(2):
        results = torch.load(tmp_path / f"results{rank}.pt", weights_only=True)
        for name in [*PARALLEL_CASES, "tied"]:
            assert results[name]["found"] == pytest.approx(results[name]["losses"], abs=1e-6), name
            assert results[name]["difference"] < 1e-6, name
        # Rows of 32 of some forty characters, and a byte for each row of the vocabulary.
        assert results["largest exchange"] <= VOCABULARY


def test_a_table_alone_is_not_wrapped_for_several_workers() -> None:
    """Of a StaticEmbedding nothing is left to torch's data parallelism, which refuses to wrap nothing."""
    model = StaticBackbone(StaticConfig(vocab_size=5, hidden_size=4))
    words = WordGradients.of(model)
    assert words is not None
    assert data_parallel(model, words) is model
