"""Dev rows that lie among the training rows too, so that dev metrics would flatter the model. No Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raytower.data.normalised import normalised
from raytower.data.pieces import Survey, read_piece
from raytower.data.survey_notes import counted
from raytower.progress import log
from raytower.training.config import DevConfig

# Between the two texts of a pair; normalised texts hold no line break.
_BETWEEN = "\n"


def say_overlap(surveyed: Survey, dev: DevConfig | None, columns: Sequence[Sequence[str]]) -> None:
    """Log how many dev rows of a file lie among the training rows; silent where none does."""
    if dev is None or not dev.places:  # rows that were set aside are no training rows
        return
    count = count_overlap(surveyed, columns)
    if count:
        log(
            f"warning: {count:,} of {len(columns[0]):,} rows of {dev.origin} are training rows too (the same texts but "
            f"for case and spaces), so dev.metric {dev.metric} flatters the model; take them out of either file, or "
            "let dev.share set rows aside"
        )


def count_overlap(surveyed: Survey, columns: Sequence[Sequence[str]]) -> int:
    """How many dev rows have the texts of a training row, but for case, spaces and the forms of a letter.

    A text is compared with the texts of the training rows; a pair with each pair that a row trains, negatives too.
    One pass over the training rows, once for a content of both; memory holds the dev rows.

    Args:
        surveyed: the training rows.
        columns: the dev texts; or their queries, and the document of each.
    """
    dev_keys = _join(*(pa.array(column, pa.string()) for column in columns)).to_pylist()
    digest = hashlib.sha256("\0".join(dev_keys).encode()).hexdigest()
    what = f"overlap {len(columns)} {digest}"
    return int(counted(surveyed, what, lambda: _count(surveyed, dev_keys, is_pairs=len(columns) == 2)))


def _count(surveyed: Survey, dev_keys: Sequence[str], *, is_pairs: bool) -> int:
    wanted = set(dev_keys)
    found: set[str] = set()
    for table in map(read_piece, surveyed.pieces):
        for keys in _pairs(table) if is_pairs else [normalised(table["text"])]:
            found |= wanted.intersection(keys.to_pylist())
    return sum(key in found for key in dev_keys)


def _pairs(table: pa.Table) -> Iterator[pa.ChunkedArray | pa.Array]:
    """The keys of the pairs that the rows train: one for each document column, or one for all candidates."""
    names = table.column_names
    if "documents" in names:
        documents = table["documents"].combine_chunks()
        yield _join(table["query"].take(pc.list_parent_indices(documents)), documents.flatten())
    elif "text" in names and "label" in names:
        yield _join(table["text"], table["label"])
    else:
        for name in {"document", "negative"}.intersection(names):
            yield _join(table["query"], table[name])


def _join(*columns: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return pc.binary_join_element_wise(*map(normalised, columns), _BETWEEN)
