"""`raytower pairs`: pairs for training and for dev from the structure of a corpus, or the passages that they are of.

One pass over the corpus. A document, with all its rows, is dev's, training's or of neither by a hash of its name and
the seed, so that the parts of several calls fit together: dev first, then training `apart_from` it.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from raytower.adapt.config import ColumnsConfig, PairsConfig
from raytower.adapt.rules import (
    Row,
    RowPairs,
    StructurePair,
    clean,
    document_of,
    first_present,
    num_letters,
    pairs_of_rows,
    similarity,
)
from raytower.annotation.rows_out import check_rows_output, open_rows, refuse_name_of_another_type
from raytower.data.pieces import Survey, read_pieces
from raytower.data.pieces import survey as survey_input
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.errors import InputError
from raytower.progress import Progress
from raytower.storage import Location

_PAIRS = ("query", "document", "rule")
_PASSAGES = ("id", "text")
_USUAL = {
    "title": ("title", "law_name", "law", "name", "subject", "标题", "题目", "法律名称"),
    "question": ("question", "query", "问题"),
    "category": ("category", "label", "domain", "类别", "分类", "标签"),
    "document": ("document", "document_id", "doc_id", "doc", "文档"),
}
Ask = Callable[[Sequence[str]], list[list[str]]]
"""Queries for each of some passages."""


class PairFilter:
    """Leaves out pairs that teach nothing, and counts them by the reason. A pair is remembered by 8 bytes of a hash."""

    def __init__(self, config: PairsConfig, others: Iterable[str] = ()) -> None:
        """`others`: texts that may not occur in pairs."""
        self._config = config
        self._others = {_hash(text) for text in others}
        self._seen: set[int] = set()
        self.left_out = dict.fromkeys(("near_empty", "too_alike", "in_dev", "repeated"), 0)

    def keeps(self, pair: StructurePair) -> bool:
        reason = self._reason(pair)
        if reason is not None:
            self.left_out[reason] += 1
        return reason is None

    def _reason(self, pair: StructurePair) -> str | None:
        config = self._config
        if (
            num_letters(pair.query) < config.min_query_letters
            or num_letters(pair.document) < config.min_document_letters
        ):
            return "near_empty"
        if similarity(pair.query, pair.document) > config.max_similarity:
            return "too_alike"
        if self._others and not self._others.isdisjoint((_hash(pair.query), _hash(pair.document))):
            return "in_dev"
        key = _hash(f"{len(pair.query)}:{pair.query}{pair.document}")
        if key in self._seen:
            return "repeated"
        self._seen.add(key)
        return None


def pairs(config: PairsConfig) -> dict[str, Any]:
    """Write the pairs of `part`, each with the rule that made it; of part documents all passages.

    Returns:
        rows, documents (those of the part), pairs, by_rule (pairs of each rule), left_out (pairs by reason:
        near_empty, too_alike, in_dev, repeated), columns (those that were found), rejected_rows, seconds, output; of
        part documents passages in place of what is about pairs.

    Raises:
        InputError: bad rows under on_error fail, a column that the corpus lacks, no such model, or no pair at all.
    """
    start = time.perf_counter()
    survey = _survey(config)
    columns = _columns(survey, config.columns)
    progress = Progress("read", "rows", survey.num_rows)
    rows = pairs_of_rows(_rows(survey, columns, config, progress), config.rules)
    written = _write_passages(config, rows) if config.part == "documents" else _write_pairs(config, rows)
    return {
        "rows": survey.num_rows,
        **written,
        "columns": columns,
        "rejected_rows": survey.num_rejected,
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }


def plan_pairs(config: PairsConfig) -> dict[str, Any]:
    """Rows, and which columns the rules will read; surveys the input."""
    survey = _survey(config)
    return {
        "rows": survey.num_rows,
        "columns": _columns(survey, config.columns),
        "rejected_rows": survey.num_rejected,
    }


def part_of(unit: str, seed: int, dev_share: float, train_share: float) -> str:
    """The part of a document or category: `dev`, `train`, or `neither` of the two. Pure."""
    place = _chance(unit, seed)
    if place < dev_share:
        return "dev"
    return "train" if place < dev_share + train_share * (1 - dev_share) else "neither"


def _survey(config: PairsConfig) -> Survey:
    refuse_output_inside(config.output, config.input.path)
    check_rows_output(config.output, _PAIRS, _PASSAGES)
    refuse_name_of_another_type(config.output, config.file_type)
    # The title stands in a text of its own.
    text_alone = config.input.model_copy(update={"text_fields": config.input.text_fields[-1:]})
    return survey_input(
        text_alone, "corpus", on_error=config.on_error, quarantine=quarantine_of(config.output)
    )


def _columns(survey: Survey, asked: ColumnsConfig) -> dict[str, str | None]:
    """The column of each kind, by its name in the tables. Raises InputError for one that is asked for and not there."""
    there = [name for name in survey.schema.names if name not in ("id", "text")]
    stored = dict(survey.renamed_columns)
    found = {}
    for kind, usual in _USUAL.items():
        name = getattr(asked, kind)
        if name is not None and stored.get(name, name) not in there:
            raise InputError(
                f"columns.{kind} is {name!r}, and the corpus has no such column beside its text, it has "
                f"{', '.join(map(repr, there)) or 'none'}; name one of them, or leave columns.{kind} out"
            )
        found[kind] = first_present(name and stored.get(name, name), usual, there)
    return found


def _rows(
    survey: Survey, columns: dict[str, str | None], config: PairsConfig, progress: Progress
) -> Iterator[Row]:
    # Ids that were made of file and line say nothing of documents.
    separator = None if survey.derived_ids else config.id_separator
    for table in read_pieces(survey.pieces):
        values = {
            kind: table[name].to_pylist() if name is not None else [None] * table.num_rows
            for kind, name in columns.items()
        }
        ids, texts = table["id"].to_pylist(), table["text"].to_pylist()
        for place, (identifier, text) in enumerate(zip(ids, texts, strict=True)):
            own = {kind: "" if found[place] is None else str(found[place]) for kind, found in values.items()}
            document = document_of(identifier, own["document"], separator)
            yield Row(identifier, text, document, own["title"], own["question"], own["category"])
        progress.advance(table.num_rows)


def _write_passages(config: PairsConfig, rows: Iterable[RowPairs]) -> dict[str, Any]:
    seen: set[int] = set()
    documents: set[int] = set()
    with open_rows(Location.of(config.output), config.file_type, _PASSAGES) as writer:
        for each in rows:
            documents.add(_hash(each.row.document))
            for number, passage in enumerate(each.passages):
                if num_letters(passage) and (key := _hash(passage)) not in seen:
                    seen.add(key)
                    identifier = each.row.id if len(each.passages) == 1 else f"{each.row.id}#{number}"
                    writer.write(identifier, passage)
    return {"documents": len(documents), "passages": len(seen)}


def _write_pairs(config: PairsConfig, rows: Iterable[RowPairs]) -> dict[str, Any]:
    kept = PairFilter(config, _texts_of(config))
    counts: Counter[str] = Counter()
    documents: set[int] = set()
    with open_rows(Location.of(config.output), config.file_type, _PAIRS) as writer:
        for pair in _with_generated(config, _of_part(config, rows, documents)):
            if kept.keeps(pair):
                writer.write(pair.query, pair.document, pair.rule)
                counts[pair.rule] += 1
        if not counts:
            raise InputError(_no_pairs(config, len(documents), kept.left_out))
    return {
        "documents": len(documents),
        "pairs": sum(counts.values()),
        "by_rule": dict(sorted(counts.items())),
        "left_out": kept.left_out,
    }


def _of_part(config: PairsConfig, rows: Iterable[RowPairs], documents: set[int]) -> Iterator[RowPairs]:
    """Rows of the part; `documents` gets the hashes of their documents."""
    by_category = config.split_by == "category"
    for each in rows:
        unit = each.row.category if by_category and each.row.category else each.row.document
        if config.part not in ("all", part_of(unit, config.seed, config.dev_share, config.train_share)):
            continue
        documents.add(_hash(each.row.document))
        if config.part == "dev" and not by_category:
            # A category's name trains, in the pairs of other documents.
            own = tuple(pair for pair in each.pairs if pair.rule != "category")
            yield RowPairs(each.row, own, each.passages)
        else:
            yield each


def _with_generated(config: PairsConfig, rows: Iterable[RowPairs]) -> Iterator[StructurePair]:
    """The pairs of rows, and those that a language model writes, a batch of passages at a time."""
    if config.generate is None:
        for each in rows:
            yield from each.pairs
        return
    from raytower.adapt.questions import Asker  # loads torch, which structure alone needs not

    asker = Asker(config.generate, config.seed)
    waiting: list[str] = []
    for each in rows:
        yield from each.pairs
        waiting += [
            passage
            for passage in each.passages
            if num_letters(passage) >= config.min_document_letters
            and _chance(passage, config.seed) < config.generate.share
        ]
        while len(waiting) >= config.generate.batch_size:
            batch, waiting = waiting[: config.generate.batch_size], waiting[config.generate.batch_size :]
            yield from _asked(asker, batch)
    yield from _asked(asker, waiting)


def _asked(ask: Ask, passages: Sequence[str]) -> Iterator[StructurePair]:
    for passage, queries in zip(passages, ask(passages) if passages else [], strict=True):
        for query in queries:
            yield StructurePair(clean(query), passage, "generated")


def _texts_of(config: PairsConfig) -> Iterator[str]:
    if config.apart_from is None:
        return
    for table in read_pieces(survey_input(config.apart_from, "pairs").pieces):
        for name in ("query", "document"):
            yield from table[name].to_pylist()


def _no_pairs(config: PairsConfig, num_documents: int, left_out: dict[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    return (
        f"{config.input.path!r} gives no pair by the rules {', '.join(config.rules)} in {num_documents:,} documents of "
        f"part {config.part}"
        + (f" (left out: {reasons})" if reasons else "")
        + "; name its columns by `columns`, add "
        "the rule lead, which cuts texts, have queries written by `generate`, or, where categories are all that there "
        "is, set split_by to category"
    )


def _chance(text: str, seed: int) -> float:
    """A number from 0 to 1, drawn by the seed for the text."""
    return _hash(f"{seed}:{text}") / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
