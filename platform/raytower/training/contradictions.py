"""Rows that teach the opposite of other rows: a document that is right for a query here and wrong for it there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from raytower.data.pieces import Survey
from raytower.data.plain_texts import plain_text
from raytower.progress import log
from raytower.training.inputs import tables

_ROWS_READ = 100_000
"""Rows that are looked at, from the first on: some seconds and some ten megabytes, however many rows there are."""


def say_contradictions(survey: Survey) -> None:
    """Warn of rows that judge what an earlier row has judged, and otherwise; the first one is named.

    Of pairs with a label it is the label, of triples and candidates right or wrong, of labelled texts their label.
    Texts that differ in case, width or space alone are one.
    """
    said: dict[tuple[str, str], Any] = {}
    count, shown = 0, ""
    for names, verdict in _verdicts(survey):
        key = tuple(map(plain_text, names))
        if said.setdefault((key[0], key[-1]), verdict) != verdict:
            count += 1
            shown = shown or " and ".join(repr(name[:60]) for name in names)
    if count:
        log(
            f"{', '.join(survey.files[:3])}: {count:,} judgements differ from those of an earlier row, the first "
            f"that of {shown}; both are trained, and neither is learned: keep one of them"
        )


def _verdicts(survey: Survey) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What each row says, and of what: a query and a document, or a text."""
    for row in islice((row for table in tables(survey) for row in table.to_pylist()), _ROWS_READ):
        if "text" in row:
            if "label" in row:
                yield (row["text"],), row["label"]
        elif "label" in row:
            yield (row["query"], row["document"]), row["label"]
        elif "documents" in row:
            best = row["scores"][0]
            for document, score in zip(row["documents"], row["scores"], strict=True):
                yield (row["query"], document), score == best
        elif "negative" in row:
            yield (row["query"], row["document"]), True
            yield (row["query"], row["negative"]), False
