"""Losses in blocks and sparse known pairs are the dense formulas: values, gradients, precision; memory is linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytower.config import make_config
from raytower.objectives import keys as keys_module
from raytower.objectives.config import (
    GuideSettings,
    HardestNegative,
    InBatchNegatives,
    Matryoshka,
    RandomNegative,
    SimCSE,
)
from raytower.objectives.gradient_cache import backward_cached
from raytower.objectives.keys import NO_KEY, BatchKeys
from raytower.objectives.matryoshka import over_dimensions
from raytower.objectives.targets import EncoderObjective, Guide, Targets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 64 cells: three or four queries of a batch of 17, and a last block that is not full."""
    set_block(monkeypatch, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def set_block(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(keys_module, "CELLS_PER_BLOCK", {"cpu": cells, "cuda": cells})


# Keys.


def random_keys(seed: int, rows: int, num_columns: int, values: int) -> BatchKeys:
    """Each key is NO_KEY or one of `values`, the same values in all three."""
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(0, values + 1, (rows, 3), generator=generator).where(
            torch.rand(rows, 3, generator=generator) < 0.7, NO_KEY
        )
        for _ in range(num_columns + 1)
    ]
    return BatchKeys(query=columns[0], documents=tuple(columns[1:]))


def distinct(rows: int, num_columns: int) -> BatchKeys:
    columns = torch.arange(1, rows * (num_columns + 1) * 3 + 1).reshape(num_columns + 1, rows, 3)
    return BatchKeys(query=columns[0], documents=tuple(columns[1:]))


def one_query(rows: int, num_columns: int) -> BatchKeys:
    keys = distinct(rows, num_columns)
    return BatchKeys(query=torch.ones(rows, 3, dtype=torch.int64), documents=keys.documents)


def no_keys(rows: int, num_columns: int) -> BatchKeys:
    nothing = torch.full((rows, 3), NO_KEY)
    return BatchKeys(query=nothing, documents=(nothing,) * num_columns)


def labelled(rows: int, num_columns: int) -> BatchKeys:
    """Two labels, all texts different."""
    keys = distinct(rows, num_columns)
    for number, column in enumerate((keys.query, *keys.documents)):
        column[:, 1] = NO_KEY
        column[:, 2] = torch.arange(rows) % 2 + 1 if number < 2 else NO_KEY
    return keys


def cases(rows: int, num_columns: int) -> dict[str, BatchKeys]:
    crowded = {
        f"{values} values, seed {seed}": random_keys(seed, rows, num_columns, values)
        for values in (2, 8, 40, 200)
        for seed in range(3)
    }
    return {
        "distinct": distinct(rows, num_columns),
        "one query": one_query(rows, num_columns),
        "no keys": no_keys(rows, num_columns),
        "two labels": labelled(rows, num_columns),
        **crowded,
    }


def dense_known(keys: BatchKeys) -> Tensor:
    """(N, C) by the definition: over all n, query i equals query n, and document n equals document c; or c is none."""

    def equal(left_N3: Tensor, right_C3: Tensor) -> Tensor:
        return ((left_N3[:, None] == right_C3[None]) & (left_N3[:, None] != NO_KEY)).any(-1)

    itself = torch.eye(len(keys.query), dtype=torch.bool)
    asked = equal(keys.query, keys.query) | itself
    known = (asked.double() @ equal(keys.documents[0], torch.cat(keys.documents)).double()) > 0
    known[:, : len(itself)] |= itself
    # A place without a document carries no key, and is nobody's negative.
    return known | (torch.cat(keys.documents) == NO_KEY).all(-1)


@pytest.mark.parametrize("num_columns", [1, 3])
@pytest.mark.parametrize("rows", [1, 17])
def test_known_pairs_are_those_of_the_definition(rows: int, num_columns: int) -> None:
    found = 0
    for name, keys in cases(rows, num_columns).items():
        blocks = list(keys.known.blocks())
        assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
        mask = torch.cat([keys.known.mask(block) for block in blocks])
        expected = dense_known(keys)
        assert mask.tolist() == expected.tolist(), name
        found += int(expected.sum())
    assert rows == 1 or found > 500


# The formulas, dense.


def dense_softmax(
    columns: Sequence[Tensor], keys: BatchKeys, scale: float, margin: float, symmetric: bool = False
) -> Tensor:
    query, *documents = columns
    known = dense_known(keys)
    own = torch.arange(len(query))
    known[own, own] = False
    shift = torch.zeros(known.shape, dtype=query.dtype)
    shift[own, own] = margin
    logits = scale * (query @ torch.cat(documents).T - shift)
    loss = nn.functional.cross_entropy(logits.masked_fill(known, -torch.inf), own)
    if not symmetric:
        return loss
    exchanged = BatchKeys(query=keys.documents[0], documents=(keys.query,))
    return (loss + dense_softmax([documents[0], query], exchanged, scale, margin)) / 2


MORE = ("query_query", "document_document", "document_query")


def dense_more(
    columns: Sequence[Tensor],
    keys: BatchKeys,
    scale: float,
    margin: float,
    more: Sequence[str],
    guide: Guide | None = None,
) -> Tensor:
    """One sum over the documents, and over what `more` names; what the guide finds too similar leaves it."""
    query, *documents = columns
    rows, every = len(query), torch.cat(documents)
    own = torch.eye(rows, dtype=torch.bool)
    own_row = own.repeat(1, len(documents))
    pair = torch.cat([own, torch.zeros(rows, len(every) - rows, dtype=torch.bool)], 1)
    of_query = dense_known(keys)
    of_document = dense_known(BatchKeys(query=keys.documents[0], documents=(keys.query,)))
    sides = {"query": (query, query, of_document, own), "document": (documents[0], every, of_query, pair)}
    seen = {}
    if guide is not None:
        query_seen, *documents_seen = guide.columns
        seen = {"query": (query_seen, query_seen), "document": (documents_seen[0], torch.cat(documents_seen))}
        positive_seen = (query_seen * documents_seen[0]).sum(-1, keepdim=True)
        reach = positive_seen.abs() if guide.settings.relative else 1
        limit = positive_seen - guide.settings.margin * reach
    logits = []
    for name in ("query_document", *more):
        left, right = name.split("_")
        anchor, (_, candidates, known, itself) = sides[left][0], sides[right]
        cosine = anchor @ candidates.T
        left_out = known
        if guide is not None:
            left_out = left_out | (seen[left][0] @ seen[right][1].T > limit)
        if left == right:
            left_out = left_out | (own if right == "query" else own_row)
        else:  # the pair itself stays
            left_out = left_out & ~itself
        part = scale * (cosine - margin * itself.to(cosine))
        logits.append(part.masked_fill(left_out, -torch.inf))
    return nn.functional.cross_entropy(torch.cat(logits, 1), torch.arange(rows))


def dense_hardest(columns: Sequence[Tensor], keys: BatchKeys, margin: float) -> Tensor:
    query, *documents = columns
    cosine = query @ torch.cat(documents).T
    hardest = cosine.masked_fill(dense_known(keys), -torch.inf).amax(-1)
    return torch.relu(margin - (query * documents[0]).sum(-1) + hardest).mean()


def dense_random(columns: Sequence[Tensor], keys: BatchKeys, margin: float) -> Tensor:
    query, document = columns
    known, rows = dense_known(keys).tolist(), len(query)
    total = 0 * query.sum()
    for i in range(rows):
        allowed = [(i + step) % rows for step in range(rows) if not known[i][(i + step) % rows]]
        if allowed:
            total = total + torch.relu(margin - query[i] @ document[i] + query[i] @ document[allowed[0]])
    return total / rows


def dense_matryoshka(columns: Sequence[Tensor], keys: BatchKeys) -> Tensor:
    cut = [
        [column[:, :dim] / column[:, :dim].norm(dim=1, keepdim=True) for column in columns] for dim in (6, 3)
    ]
    return dense_softmax(cut[0], keys, 20, 0, True) + dense_softmax(cut[1], keys, 20, 0, True) / 2


Dense = Callable[[Sequence[Tensor], BatchKeys], Tensor]
OBJECTIVES: dict[str, tuple[int, EncoderObjective, Dense]] = {
    "plain": (1, InBatchNegatives(), lambda c, k: dense_softmax(c, k, 20, 0)),
    "margin": (1, InBatchNegatives(scale=7, margin=0.3), lambda c, k: dense_softmax(c, k, 7, 0.3)),
    "hard negatives": (3, InBatchNegatives(margin=0.1), lambda c, k: dense_softmax(c, k, 20, 0.1)),
    "symmetric": (
        2,
        InBatchNegatives(margin=0.1, symmetric=True),
        lambda c, k: dense_softmax(c, k, 20, 0.1, True),
    ),
    "more negatives": (
        2,
        InBatchNegatives(margin=0.1, more_negatives=MORE),
        lambda c, k: dense_more(c, k, 20, 0.1, MORE),
    ),
    "other queries": (
        1,
        InBatchNegatives(scale=7, more_negatives=("query_query",)),
        lambda c, k: dense_more(c, k, 7, 0, ("query_query",)),
    ),
    "other documents": (
        3,
        InBatchNegatives(more_negatives=("document_document",)),
        lambda c, k: dense_more(c, k, 20, 0, ("document_document",)),
    ),
    "simcse": (1, SimCSE(scale=5), lambda c, k: dense_softmax(c, k, 5, 0)),
    "hardest": (2, HardestNegative(margin=0.5), lambda c, k: dense_hardest(c, k, 0.5)),
    "random": (1, RandomNegative(margin=0.5), lambda c, k: dense_random(c, k, 0.5)),
    "matryoshka": (
        2,
        over_dimensions(Matryoshka(dims=(6, 3), weights=(1, 0.5)), InBatchNegatives(symmetric=True)),
        dense_matryoshka,
    ),
}


def unit_columns(
    rows: int, num_columns: int, dim: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    columns = torch.randn(num_columns + 1, rows, dim, generator=generator, dtype=torch.float64)
    return [column.to(dtype).requires_grad_() for column in nn.functional.normalize(columns, dim=-1)]


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_blocks_give_the_dense_value_and_gradients(name: str) -> None:
    num_columns, objective, dense = OBJECTIVES[name]
    for kind, keys in cases(17, num_columns).items():
        columns = unit_columns(17, num_columns)
        loss, expected = objective(columns, Targets(keys=keys)), dense(columns, keys)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=kind)
        # Three times the loss: what comes back through the graph is multiplied in.
        ours = torch.autograd.grad(3 * loss, columns, allow_unused=True)
        theirs = torch.autograd.grad(3 * expected, columns, allow_unused=True)
        for one, other, column in zip(ours, theirs, columns, strict=True):
            wanted = torch.zeros_like(column) if other is None else other
            torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12, msg=kind)


def guide_of(rows: int, num_columns: int, margin: float, relative: bool, dtype: torch.dtype) -> Guide:
    columns = [column.detach() for column in unit_columns(rows, num_columns, dim=3, dtype=dtype)]
    return Guide(settings=GuideSettings(encoder="x", margin=margin, relative=relative), columns=columns)


@pytest.mark.parametrize("more", [None, MORE])
@pytest.mark.parametrize(("margin", "relative"), [(0, False), (0.3, False), (0.3, True)])
def test_a_guide_in_blocks_is_the_dense_formula(
    more: tuple[str, ...] | None, margin: float, relative: bool
) -> None:
    guide = guide_of(17, 2, margin, relative, torch.float64)
    objective = make_config(InBatchNegatives, {"margin": 0.1, "more_negatives": more})
    for kind, keys in cases(17, 2).items():
        columns = unit_columns(17, 2)
        loss = objective(columns, Targets(keys=keys, guide=guide))
        expected = dense_more(columns, keys, 20, 0.1, more or (), guide)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=kind)
        ours, theirs = torch.autograd.grad(loss, columns), torch.autograd.grad(expected, columns)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=kind)


def test_a_guide_may_leave_nothing_but_the_pair() -> None:
    """Its margin is larger than any difference of cosines: no negatives, no loss, no gradient."""
    columns, guide = unit_columns(9, 1), guide_of(9, 1, 2, False, torch.float64)
    loss = InBatchNegatives(more_negatives=MORE[:2])(columns, Targets(keys=distinct(9, 1), guide=guide))
    loss.backward()
    assert loss.item() == 0
    for column in columns:
        assert column.grad is not None
        assert not column.grad.any()


def test_gradients_agree_with_finite_differences() -> None:
    objective, keys = InBatchNegatives(scale=3, margin=0.2, symmetric=True), random_keys(1, 5, 2, 8)
    assert torch.autograd.gradcheck(
        lambda *columns: objective(columns, Targets(keys=keys)), unit_columns(5, 2, dim=3)
    )


@pytest.mark.parametrize(
    "name", ["hard negatives", "symmetric", "more negatives", "hardest", "random", "matryoshka"]
)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.float32, torch.bfloat16, 3e-2),
        (torch.float32, torch.float16, 4e-3),
        (torch.bfloat16, None, 3e-2),
    ],
)
def test_half_precision_is_within_its_rounding(
    name: str, dtype: torch.dtype, autocast: torch.dtype | None, tolerance: float
) -> None:
    """Beside the dense formula in float64 of the same rounded columns; one part of `tolerance` of the largest."""
    num_columns, objective, dense = OBJECTIVES[name]
    columns, keys = unit_columns(17, num_columns, dtype=dtype), random_keys(3, 17, num_columns, 40)
    exact = [column.detach().double().requires_grad_() for column in columns]
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        loss = objective(columns, Targets(keys=keys))
    loss.backward()
    expected = dense(exact, keys)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for column, other in zip(columns, exact, strict=True):
        if other.grad is None:
            continue
        assert column.grad is not None
        assert column.grad.dtype == dtype
        error = (column.grad.double() - other.grad).abs().max()
        assert float(error) <= 2 * tolerance * float(other.grad.abs().max())


# What it costs.


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that anything inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("kind", [distinct, labelled, one_query])
@pytest.mark.parametrize(
    "name", ["hard negatives", "symmetric", "more negatives", "hardest", "random", "matryoshka"]
)
def test_the_largest_tensor_grows_with_the_rows_not_with_their_square(
    name: str, kind: Callable[[int, int], BatchKeys], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(monkeypatch, 2048)
    num_columns, objective, _ = OBJECTIVES[name]
    largest = []
    for rows in (64, 256):
        columns, targets = unit_columns(rows, num_columns), Targets(keys=kind(rows, num_columns))
        with _Largest() as seen:
            objective(columns, targets).backward()
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]


def test_a_guide_holds_no_matrix_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_block(monkeypatch, 2048)
    largest = []
    for rows in (64, 256):
        guide = guide_of(rows, 1, 0.1, False, torch.float64)
        targets = Targets(keys=distinct(rows, 1), guide=guide)
        with _Largest() as seen:
            InBatchNegatives(more_negatives=MORE)(unit_columns(rows, 1), targets).backward()
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]


def test_gradient_caching_holds_no_matrix_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 queries or 4 documents: what the loss holds grows with the rows."""
    set_block(monkeypatch, 2048)
    largest = []
    for rows in (64, 256):
        model = nn.Linear(6, 6).double()
        texts = [column.detach() for column in unit_columns(rows, 1)]
        chunks = [chunk for column in texts for chunk in column.split(4)]
        targets = Targets(keys=distinct(rows, 1))

        def backward_loss(vectors: Sequence[Tensor], targets: Targets = targets) -> Tensor:
            half = len(vectors) // 2
            loss = InBatchNegatives()([torch.cat(vectors[:half]), torch.cat(vectors[half:])], targets)
            loss.backward()
            return loss

        with _Largest() as seen:
            backward_cached(model, chunks, backward_loss, device=CPU)
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]


def test_keys_are_compared_once_for_all_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions: comparing gathers the keys of all workers."""
    num_columns, objective, _ = OBJECTIVES["matryoshka"]
    gathered = []
    monkeypatch.setattr(keys_module, "gather_constants", lambda rows: gathered.append(rows) or rows)
    objective(unit_columns(9, num_columns), Targets(keys=distinct(9, num_columns)))
    assert len(gathered) == (1 + 2) + (1 + 1)
