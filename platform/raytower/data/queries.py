"""Evaluation queries with what is relevant to each, from pairs or from a BEIR folder."""

from __future__ import annotations

from dataclasses import dataclass

from raytower.data import beir
from raytower.data.config import InputConfig, NamedInput, QueryFormat
from raytower.data.layouts import Source
from raytower.data.pieces import read_pieces, survey
from raytower.errors import InputError


@dataclass(frozen=True)
class QuerySet:
    """Queries in file order. Exactly one of `relevant` and `relevant_texts` is given, parallel to `ids`."""

    ids: list[str]
    texts: list[str]
    relevant: list[dict[str, float]] | None
    """BEIR: document id → score above 0, for each query."""
    relevant_texts: list[list[str]] | None
    """Pairs: the distinct second columns of the query's rows. Documents with such a text are relevant."""
    num_without_relevant: int = 0
    """Judged queries that are left out because no document has a score above 0."""

    def __len__(self) -> int:
        return len(self.ids)


def read_queries(path: str, format: QueryFormat = "auto", split: str = "test") -> QuerySet:
    """Read the queries at `path`. Auto: a BEIR folder is one, everything else holds pairs.

    Pairs with the same first column make one query, whose id is its first row's query_id, or `<file stem>:<line>`.

    Raises:
        InputError: nothing there, a row breaks a rule, a judged query has no text, or no query has anything relevant.
    """
    if format == "beir" or (format == "auto" and beir.is_beir(InputConfig(path=path))):
        return _read_beir(path, split)
    return _read_pairs(path)


def _read_beir(path: str, split: str) -> QuerySet:
    texts = beir.read_queries(path)
    qrels = beir.read_qrels(path, split)
    unknown = next((identifier for identifier in qrels if identifier not in texts), None)
    if unknown is not None:
        raise InputError(
            f"{path}: qrels of split {split!r} judge query-id {unknown!r}, which queries.jsonl does not have"
        )
    judged = [
        (query, {doc: score for doc, score in qrels.get(query, {}).items() if score > 0}) for query in texts
    ]
    relevant = {query: documents for query, documents in judged if documents}
    if not relevant:
        raise InputError(f"{path}: no judgement of split {split!r} has a score above 0; give another split")
    return QuerySet(
        ids=list(relevant),
        texts=[texts[query] for query in relevant],
        relevant=list(relevant.values()),
        relevant_texts=None,
        num_without_relevant=len(qrels) - len(relevant),
    )


def _read_pairs(path: str) -> QuerySet:
    surveyed = survey(NamedInput(path=path), "pairs")
    ids: dict[str, str] = {}
    relevant: dict[str, dict[str, None]] = {}
    for piece, table in zip(surveyed.pieces, read_pieces(surveyed.pieces), strict=True):
        assert isinstance(piece.source, Source)
        columns = [table.column(name).to_pylist() for name in ("query", "document", "query_id")]
        # No row was rejected, so the lines of a piece follow one another.
        for line, (query, document, query_id) in enumerate(
            zip(*columns, strict=True), piece.extent.first_line
        ):
            identifier = query_id or f"{piece.source.file.stem}:{line}"
            if query_id and ids.setdefault(query, identifier) != identifier:
                raise InputError(
                    f"{piece.source.file}:{line}: query {query[:80]!r} has query_id {query_id!r}, but {ids[query]!r} "
                    "in an earlier row; a query has one id"
                )
            ids.setdefault(query, identifier)
            relevant.setdefault(query, {})[document] = None
    if len(set(ids.values())) != len(ids):
        raise InputError(f"{path}: two different queries have one query_id; ids must be unique")
    return QuerySet(
        ids=list(ids.values()),
        texts=list(ids),
        relevant=None,
        relevant_texts=[list(documents) for documents in relevant.values()],
    )
