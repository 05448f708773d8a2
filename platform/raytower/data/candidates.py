"""Candidate lists: a query with the documents to compare for it and a score of each, best-scored first.

A document that stands in a row more than once counts once, by its best score. A row comes with Arrow lists of documents
and of scores. A row with several positives (see NUM_POSITIVES) becomes one record per positive, each with all the
negatives, so the number of records is known only after the rows are checked. All rows are processed at once, on their
flattened lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.normalised import normalised
from raytower.data.records import INSTRUCTION
from raytower.data.row_batch import RowBatch, mask_of
from raytower.data.visible import describe_unseen, shows_nothing

NUM_POSITIVES = "num_positives"
"""Column of a batch: how many of a row's first documents are positives. A row with 2 positives and 3 negatives becomes
2 records of 4 documents, one positive and the negatives each. 0: the row gave scores itself and is one record."""


def make_candidates(batch: RowBatch) -> None:
    """Check the lists of each row and make records of them, the highest score first; ties keep their order."""
    counts = _lengths(batch, "documents")
    batch.reject(counts < 2, lambda i: f"documents holds {_count(counts[i], 'text')}, must hold at least 2")
    _check_elements(batch, "documents", _is_null, lambda name, _: f"{name} is null, must be a string")
    _check_elements(
        batch, "documents", shows_nothing, lambda name, text: describe_unseen(name, text).removeprefix("the ")
    )
    documents, scores = _lengths(batch, "documents"), _lengths(batch, "scores")
    batch.reject(
        documents != scores,
        lambda i: f"{documents[i]} documents and {_count(scores[i], 'score')}; each document has one score",
    )
    _check_elements(batch, "scores", _is_null, lambda name, _: f"{name} is null, must be a number")
    _check_elements(
        batch, "scores", _is_not_finite, lambda name, value: f"{name} {str(value)!r} is not a finite number"
    )
    _drop_repeated(batch)
    _split_and_sort(batch)


def _drop_repeated(batch: RowBatch) -> None:
    """Leave each document once in its row, where it scores best; what is left must still hold something to compare.

    A positive among its own negatives would be trained as relevant and as irrelevant at once. Texts that differ in
    case, width or space alone are one, as for objectives/keys.py.
    """
    lengths = _lengths(batch, "documents")
    row = np.repeat(np.arange(len(lengths)), lengths)  # [elements], as all below
    documents, scores = batch.columns["documents"].flatten(), batch.columns["scores"].flatten()
    texts = normalised(documents).dictionary_encode().indices.to_numpy().astype(np.int64)
    best_first = np.lexsort((-scores.to_numpy(), row))  # stable
    key = row * (int(texts.max(initial=0)) + 1) + texts
    _, first = np.unique(key[best_first], return_index=True)
    kept = np.zeros(len(row), dtype=bool)
    kept[best_first[first]] = True
    heads = _num_positives(batch)
    is_head = _count_up(lengths) < heads[row]
    kept_heads = np.bincount(row[kept & is_head], minlength=len(lengths))
    left = np.bincount(row[kept], minlength=len(lengths))
    batch.num_repeated += int((~kept & (left > np.maximum(kept_heads, 1))[row]).sum())
    if kept.all():
        return
    offsets = pa.array(np.concatenate([[0], np.cumsum(left)]), pa.int32())
    for name, values in (("documents", documents), ("scores", scores)):
        batch.columns[name] = pa.ListArray.from_arrays(offsets, values.filter(pa.array(kept)))
    if NUM_POSITIVES in batch.columns:
        batch.columns[NUM_POSITIVES] = pa.array(np.where(heads > 0, kept_heads, 0), pa.int64())
    batch.reject(
        left <= np.maximum(kept_heads, 1),
        lambda i: (
            "every negative is one of its positives; a negative is another text"
            if heads[i]
            else "documents hold one text alone, several times; must hold at least 2 different ones"
        ),
    )


def _check_elements(
    batch: RowBatch, column: str, is_bad: Callable[[pa.Array], np.ndarray], reason: Callable[[str, Any], str]
) -> None:
    """Reject the rows whose list holds a bad element; `reason` gets the name and value of the first one."""
    values = batch.columns[column].flatten()
    bad = np.flatnonzero(is_bad(values))
    rows_of_values = pc.list_parent_indices(batch.columns[column]).to_numpy()
    first_bad = dict(zip(rows_of_values[bad][::-1].tolist(), bad[::-1].tolist(), strict=True))

    def describe(row: int) -> str:
        place = first_bad[row] - int(np.searchsorted(rows_of_values, row))
        return reason(_element_name(batch, column, row, place), values[first_bad[row]].as_py())

    batch.reject(np.isin(np.arange(len(batch.lines)), rows_of_values[bad]), describe)


def _element_name(batch: RowBatch, column: str, row: int, place: int) -> str:
    """The element's name in the words of the input, counted from 1: `negative 2`, or `document 3`."""
    num_positives = _num_positives(batch)[row]
    if not num_positives:
        return f"{column.removesuffix('s')} {place + 1}"
    return f"positive {place + 1}" if place < num_positives else f"negative {place - num_positives + 1}"


def _split_and_sort(batch: RowBatch) -> None:
    """Make one record of each positive of a row, or of the row as it stands, and put its best document first.

    Example: one row of 2 positives and 3 negatives, elements 0 to 4. heads 2, row 0 0, sizes 4 4,
    record 0 0 0 0 1 1 1 1, element 0 2 3 4 1 2 3 4.
    """
    lengths = _lengths(batch, "documents")
    starts = np.cumsum(lengths) - lengths
    # A head is a document that comes first in a record: each head makes one, and the other documents go into all.
    heads = np.maximum(_num_positives(batch), 1)
    row = np.repeat(np.arange(len(lengths)), heads)  # [records]
    sizes = (lengths - heads + 1)[row]  # [records]
    record = np.repeat(np.arange(len(row)), sizes)  # [elements], as all below
    place = _count_up(sizes)
    after_heads = (heads[row] - 1)[record] + place
    element = starts[row][record] + np.where(place == 0, _count_up(heads)[record], after_heads)
    scores = batch.columns["scores"].flatten().to_numpy()[element]
    order = np.lexsort((-scores, record))  # stable: ties keep their order
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    documents = batch.columns["documents"].flatten().take(pa.array(element[order]))
    batch.lines = batch.lines[row]
    instructions = batch.columns.get(INSTRUCTION.name)
    batch.columns = {
        "query": batch.columns["query"].take(pa.array(row)),
        "documents": pa.ListArray.from_arrays(offsets, documents),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[order])),
    }
    if instructions is not None:
        batch.columns[INSTRUCTION.name] = instructions.take(pa.array(row))


def _count_up(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … within each run: [2, 3] gives 0 1 0 1 2."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _num_positives(batch: RowBatch) -> np.ndarray:
    if NUM_POSITIVES not in batch.columns:
        return np.zeros(len(batch.lines), dtype=np.int64)
    return batch.columns[NUM_POSITIVES].to_numpy()


def _lengths(batch: RowBatch, column: str) -> np.ndarray:
    return pc.list_value_length(batch.columns[column]).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_null(values: pa.Array) -> np.ndarray:
    return mask_of(values.is_null())


def _is_not_finite(values: pa.Array) -> np.ndarray:
    return ~np.isfinite(values.to_numpy(zero_copy_only=False))


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
