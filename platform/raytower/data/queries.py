"""Evaluation queries with what is relevant to each, from pairs, a BEIR folder or TREC qrels."""

from __future__ import annotations

from dataclasses import dataclass

from raytower.data import beir
from raytower.data.config import InputConfig, NamedInput, QueryFormat
from raytower.data.layouts import Source
from raytower.data.pieces import read_pieces, say_unread, survey
from raytower.data.qrels import is_trec_qrels, parted, read_trec_qrels
from raytower.errors import InputError


@dataclass(frozen=True)
class QuerySet:
    """Queries in file order. Exactly one of `relevant` and `relevant_texts` is given, parallel to `ids`."""

    ids: list[str]
    texts: list[str]
    """Of TREC qrels the ids, since there are no texts."""
    relevant: list[dict[str, float]] | None
    """BEIR and TREC: document id → score above 0, for each query."""
    relevant_texts: list[list[str]] | None
    """Pairs: the distinct second columns of the query's rows. Documents with such a text are relevant."""
    num_without_relevant: int = 0
    """Judged queries that are left out because no document has a score above 0."""
    unwanted: list[dict[str, float]] | None = None
    """BEIR and TREC: document id → score of 0 or less, for each query: judged, and not relevant."""
    has_texts: bool = True
    """Whether the queries can be searched for; TREC qrels judge ids alone."""

    def __len__(self) -> int:
        return len(self.ids)


def read_queries(
    path: str, format: QueryFormat = "auto", split: str = "test", *, need_texts: bool = True
) -> QuerySet:
    """Read the queries at `path`. Auto: a BEIR folder is one, so is a file of TREC qrels, everything else holds pairs.

    Pairs with the same first column make one query, whose id is its first row's query_id, or `<file stem>:<line>`.

    Raises:
        InputError: nothing there, a row breaks a rule, a judged query has no text, no query has anything relevant, or
            TREC qrels where the queries are to be searched for (`need_texts`).
    """
    if format == "trec" or (format == "auto" and is_trec_qrels(path)):
        if need_texts:
            raise InputError(
                f"{path} holds TREC qrels, which judge ids and have no texts to search for; give a BEIR folder or "
                "pairs, or name the run file that they judge by run"
            )
        return _read_trec(path)
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
    queries = _by_id([*texts], qrels, texts)
    if not queries.ids:
        raise InputError(f"{path}: no judgement of split {split!r} has a score above 0; give another split")
    return queries


def _read_trec(path: str) -> QuerySet:
    qrels = read_trec_qrels(path)
    queries = _by_id([*qrels], qrels, None)
    if not queries.ids:
        raise InputError(
            f"{path}: no judgement is above 0, so nothing is relevant to any query; check the file"
        )
    return queries


def _by_id(order: list[str], qrels: dict[str, dict[str, float]], texts: dict[str, str] | None) -> QuerySet:
    """The judged queries in `order` to which anything is relevant."""
    judged = {query: parted(qrels[query]) for query in order if query in qrels}
    ids = [query for query, (relevant, _) in judged.items() if relevant]
    return QuerySet(
        ids=ids,
        texts=[query if texts is None else texts[query] for query in ids],
        relevant=[judged[query][0] for query in ids],
        relevant_texts=None,
        num_without_relevant=len(qrels) - len(ids),
        unwanted=[judged[query][1] for query in ids],
        has_texts=texts is not None,
    )


def _read_pairs(path: str) -> QuerySet:
    surveyed = survey(NamedInput(path=path), "pairs")
    say_unread(path, "pairs", surveyed)
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
