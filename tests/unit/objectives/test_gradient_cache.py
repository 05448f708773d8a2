"""Gradient caching gives the loss and the gradients of the whole batch: with dropout, in any chunks, on two workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytower.models.chunks import Chunk
from raytower.models.two_tower import TwoTower
from raytower.objectives import gradient_cache
from raytower.objectives.gradient_cache import backward_cached
from tests.support.objective_cases import (
    BATCH,
    IN_BATCH,
    ROW_BY_ROW,
    Case,
    Gradients,
    assert_as_one_worker,
    assert_same_step,
    backward_whole,
    gradients_of,
    load_tower,
    loss_of,
    plan_case,
    run_cases_on_two_workers,
)

CPU = torch.device("cpu")
TRIPLES = IN_BATCH["hard negatives"]
# A layer into the teacher's space trains inside the chunks too.
CACHED = {**IN_BATCH, "embedding distillation": ROW_BY_ROW["embedding distillation"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a pool that wait for each other on busy cores cost more than these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def backward_in_chunks(
    case: Case,
    model: nn.Module,
    tower: TwoTower,
    rows: slice,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss_scale: float = 1.0,
) -> Tensor:
    """Loss and gradients by caching, in the tower's chunks."""
    chunks = plan_case(case, tower, rows)

    def embed(chunk: Chunk) -> Tensor:
        with autocast():
            vectors: list[Tensor] = model([chunk])
        return vectors[0]

    def backward_loss(vectors: Sequence[Tensor]) -> Tensor:
        loss = loss_of(case, rows, vectors, chunks)
        (loss * loss_scale).backward()
        return loss

    no_sync = model.no_sync if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext
    return backward_cached(embed, chunks, backward_loss, device=CPU, no_sync=no_sync)


def backward_on_a_worker(case: Case, model: nn.Module, tower: TwoTower, rows: slice) -> Tensor:
    """In chunks of which the two workers have unequal numbers."""
    tower.rows_per_batch = 3
    tower.tokens_per_batch = 24
    return backward_in_chunks(case, model, tower, rows)


Step = tuple[Tensor, Gradients]


def step_with_dropout(folder: Path, seed: int, cached: bool, rows_per_batch: int = 5) -> Step:
    tower = load_tower(folder, rows_per_batch=rows_per_batch).train()
    torch.manual_seed(seed)
    loss = (backward_in_chunks if cached else backward_whole)(TRIPLES, tower, tower, BATCH)
    return loss, gradients_of(tower)


def largest_difference(one: Gradients, other: Gradients) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("rows_per_batch", [1, 5, 24])
def test_dropout_draws_the_same_masks_in_both_passes(dummy_encoder_dir: Path, rows_per_batch: int) -> None:
    whole = step_with_dropout(dummy_encoder_dir, 7, cached=False, rows_per_batch=rows_per_batch)
    after_whole = torch.get_rng_state()
    cached = step_with_dropout(dummy_encoder_dir, 7, cached=True, rows_per_batch=rows_per_batch)
    assert_same_step(*cached, *whole)
    # What is drawn next is the same as well.
    assert torch.equal(torch.get_rng_state(), after_whole)


def test_dropout_is_large_enough_to_be_noticed(
    dummy_encoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would fail if the random state were not restored."""
    _, gradients = step_with_dropout(dummy_encoder_dir, 7, cached=True)
    _, other_seed = step_with_dropout(dummy_encoder_dir, 8, cached=False)
    assert largest_difference(gradients, other_seed) > 1e-2

    @contextmanager
    def left_as_it_is(state: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(gradient_cache._RandomState, "restored", left_as_it_is)
    _, unrestored = step_with_dropout(dummy_encoder_dir, 7, cached=True)
    assert largest_difference(gradients, unrestored) > 1e-2


@pytest.mark.parametrize("rows_per_batch", [1, 5, 7, 24, 100])  # of 24 texts
@pytest.mark.parametrize("name", ["symmetric", "hardest with hard negatives", "matryoshka"])
def test_chunks_of_any_size_equal_one_forward_pass(
    dummy_encoder_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows_per_batch: int
) -> None:
    # Nothing but the rows asks for a cut.
    monkeypatch.setattr("raytower.models.chunks.tokens_per_launch", lambda _: 10_000)
    tower = load_tower(dummy_encoder_dir, tokens_per_batch=10_000)
    assert len(plan_case(IN_BATCH[name], tower, BATCH)) == 1
    whole = backward_whole(IN_BATCH[name], tower, tower, BATCH), gradients_of(tower)

    tower = load_tower(dummy_encoder_dir, tokens_per_batch=10_000, rows_per_batch=rows_per_batch)
    assert len(plan_case(IN_BATCH[name], tower, BATCH)) == -(-24 // rows_per_batch)
    cached = backward_in_chunks(IN_BATCH[name], tower, tower, BATCH), gradients_of(tower)
    assert_same_step(*cached, *whole)


@pytest.fixture(scope="module")
def from_two_workers(
    dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("two") / "results.pt"
    return run_cases_on_two_workers(CACHED, backward_on_a_worker, dummy_encoder_dir, out)


@pytest.mark.processes
@pytest.mark.parametrize("name", list(CACHED))
def test_two_workers_with_caching_equal_one_without(
    name: str, from_two_workers: dict[str, dict[str, Tensor]], dummy_encoder_dir: Path
) -> None:
    assert_as_one_worker(CACHED[name], from_two_workers[name], dummy_encoder_dir)


def test_the_two_workers_have_unequal_numbers_of_chunks(dummy_encoder_dir: Path) -> None:
    """Else the proof above would not show that each worker exchanges gradients once."""
    tower = load_tower(dummy_encoder_dir, tokens_per_batch=24, rows_per_batch=3)
    first, second = (plan_case(TRIPLES, tower, rows) for rows in (slice(0, 4), slice(4, 8)))
    assert len(first) > 1
    assert len(second) > 1
    assert len(first) != len(second)


def test_bfloat16_stays_close_and_reaches_every_weight(dummy_encoder_dir: Path) -> None:
    def run(cached: bool, dtype: torch.dtype) -> Step:
        def autocast() -> AbstractContextManager[Any]:
            return torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)

        tower = load_tower(dummy_encoder_dir, rows_per_batch=5)
        if cached:
            loss = backward_in_chunks(TRIPLES, tower, tower, BATCH, autocast=autocast)
        else:
            chunks = plan_case(TRIPLES, tower, BATCH)
            with autocast():
                vectors = tower(chunks)
            loss = loss_of(TRIPLES, BATCH, vectors, chunks)
            loss.backward()
        return loss.detach(), gradients_of(tower)

    (loss, cached), (whole_loss, whole), (exact_loss, exact) = (
        run(True, torch.bfloat16),
        run(False, torch.bfloat16),
        run(False, torch.float32),
    )
    assert float(loss) == pytest.approx(float(whole_loss), abs=1e-5)  # the same forward pass
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.05)
    assert float(loss) != float(exact_loss)
    assert cached.keys() == whole.keys() == exact.keys()
    assert relative_distance(cached, whole) < 0.02
    assert relative_distance(cached, exact) < 0.1


def relative_distance(one: Gradients, other: Gradients) -> float:
    distance = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return float((distance / sum(float(gradient.square().sum()) for gradient in other.values())) ** 0.5)


def test_gradients_are_added_and_scaled(dummy_encoder_dir: Path) -> None:
    tower = load_tower(dummy_encoder_dir, rows_per_batch=5)
    once_loss, once = backward_in_chunks(TRIPLES, tower, tower, BATCH), gradients_of(tower)
    scaled_loss = backward_in_chunks(TRIPLES, tower, tower, BATCH, loss_scale=8.0)
    assert float(scaled_loss) == pytest.approx(float(once_loss), abs=1e-6)
    assert not scaled_loss.requires_grad
    assert once.keys() == gradients_of(tower).keys()
    for name, gradient in gradients_of(tower).items():
        assert torch.allclose(gradient, 9 * once[name], rtol=1e-4, atol=1e-5), name


def test_the_activations_of_one_chunk_are_held_at_a_time(dummy_encoder_dir: Path) -> None:
    """The point of it all: counted in tensors that autograd keeps for the backward pass."""
    tower = load_tower(dummy_encoder_dir, tokens_per_batch=10_000, rows_per_batch=4)
    assert len(plan_case(TRIPLES, tower, BATCH)) == 6
    peaks = []
    for backward in (backward_whole, backward_in_chunks):
        saved = _SavedTensors()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            backward(TRIPLES, tower, tower, BATCH)
        peaks.append(saved.peak)
    assert peaks[1] < peaks[0] / 5


class _SavedTensors:
    """Counts what autograd keeps."""

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> _Kept:
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        return _Kept(tensor, self)

    @staticmethod
    def unpack(kept: _Kept) -> Tensor:
        return kept.tensor


@dataclasses.dataclass(eq=False)
class _Kept:
    tensor: Tensor
    counter: _SavedTensors

    def __del__(self) -> None:
        self.counter.alive -= 1
