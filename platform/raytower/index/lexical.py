"""Lexical search of an index version: BM25 over the tokens of its documents.

The table holds each document's tokens, and its inverted index finds candidates. Their scores are computed here, from
their tokens and the statistics of the version's own documents: what an inverted index counts lags behind deletions, and
differs from part to part of it.

BM25 as Lucene computes it (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009; `method="lucene"` of
bm25s). Of N documents of L tokens on average, a document of length l that holds a term f times scores, for each term of
the query and as often as it stands there,

    ln(1 + (N - n + 0.5) / (n + 0.5)) · f / (f + k1 · (1 - b + b · l / L)),   n documents holding the term

Shape legend: Q queries, K hits a query, T terms, N documents.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raytower.errors import FormatError
from raytower.index.config import TokensConfig
from raytower.index.hits import Hits, empty_hits
from raytower.index.manifest import LEXICAL_NAME, FileEntry, IndexManifest, LexicalEntry
from raytower.index.rowmap import Rows
from raytower.index.shard import local_file, open_array
from raytower.index.table import TOKENS, DocumentTable
from raytower.index.tokens import tokens
from raytower.storage import Location

K1, B = 1.2, 0.75
# Candidates are scored again, so more are taken than are asked for: the inverted index may order them otherwise.
_CANDIDATES_PER_HIT = 4
_LEAST_CANDIDATES = 50
# Of a longer query, such as a passage, the inverted index is asked for the terms that weigh most: its time grows with
# their number. Scores are of all terms.
_MOST_ASKED = 128
_MOST_TIMES = 4
# A change adds a small file of counts; so many are added up at each opening before they become one.
_MOST_FILES = 16
_ROWS_COUNTED = 65_536
_QUERIES_AT_ONCE = 64
Scores = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TermCounts:
    """How many documents hold each term, and how many tokens they have together.

    `terms` (T,) are hashes of 64 bits, rising as signed integers; `counts` (T,) may be negative in a difference.
    """

    terms: NDArray[np.int64]
    counts: NDArray[np.int64]
    num_tokens: int

    @classmethod
    def of(cls, columns: Iterable[pa.Array]) -> TermCounts:
        """Of the joined tokens of documents, one array (n,) after another."""
        parts: list[TermCounts] = []
        for column in columns:
            parts.append(_counted(column))
            if len(parts) > 16:
                parts = [cls.sum(parts)]
        return cls.sum(parts)

    @classmethod
    def sum(cls, parts: Sequence[TermCounts]) -> TermCounts:
        terms = np.concatenate([np.empty(0, np.int64), *(part.terms for part in parts)])
        counts = np.concatenate([np.empty(0, np.int64), *(part.counts for part in parts)])
        order = np.argsort(terms, kind="stable")
        terms = terms[order]
        first = np.flatnonzero(np.diff(terms, prepend=terms[:1] - 1))
        summed = np.add.reduceat(counts[order], first) if len(first) else counts
        terms = terms[first]
        return cls(terms[summed != 0], summed[summed != 0], sum(part.num_tokens for part in parts))

    def __neg__(self) -> TermCounts:
        return TermCounts(self.terms, -self.counts, -self.num_tokens)

    def of_words(self, words: Sequence[str]) -> NDArray[np.int64]:
        """The count of each word, int64 (n,)."""
        wanted = _hashes(words)
        if not len(self.terms):
            return np.zeros(len(wanted), np.int64)
        places = np.minimum(np.searchsorted(self.terms, wanted), len(self.terms) - 1)
        return np.where(self.terms[places] == wanted, self.counts[places], 0)

    def save(self, index: Location) -> FileEntry:
        """Put the counts into an index, in a file named by what it holds."""
        stream = io.BytesIO()
        np.save(stream, np.stack([self.terms, self.counts]), allow_pickle=False)
        content = stream.getvalue()
        entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        (index / LEXICAL_NAME / f"{entry.sha256}.npy").put_if_absent(content)
        return entry


def counts_place(index: Location, file: FileEntry) -> Location:
    return index / LEXICAL_NAME / f"{file.sha256}.npy"


def first_entry(index: Location, table: DocumentTable, settings: TokensConfig) -> LexicalEntry:
    """The lexical side of a table that has tokens, counted over all of its documents."""
    counts = TermCounts.of(batch.column(0) for batch in table.scan([TOKENS]))
    return LexicalEntry(tokens=settings, num_tokens=counts.num_tokens, counts=(counts.save(index),))


def next_entry(
    index: Location, before: LexicalEntry, earlier: DocumentTable, later: DocumentTable
) -> LexicalEntry:
    """The lexical side of a table after a change, counted over what came and what went."""
    came = TermCounts.of(_tokens_of(later, later.row_map.beyond(earlier.row_map)))
    went = TermCounts.of(_tokens_of(earlier, earlier.row_map.beyond(later.row_map)))
    change = TermCounts.sum([came, -went])
    num_tokens = before.num_tokens + change.num_tokens
    if not len(change.terms):
        return before.model_copy(update={"num_tokens": num_tokens})
    files = (*before.counts, change.save(index))
    if len(files) > _MOST_FILES:
        parts = [_opened_counts(index, file) for file in before.counts]
        files = (TermCounts.sum([*parts, change]).save(index),)
    return before.model_copy(update={"num_tokens": num_tokens, "counts": files})


def _tokens_of(table: DocumentTable, rows: Rows) -> Iterable[pa.Array]:
    for start in range(0, len(rows), _ROWS_COUNTED):
        yield from table.take(rows[start : start + _ROWS_COUNTED], [TOKENS])[TOKENS].chunks


def _opened_counts(index: Location, file: FileEntry) -> TermCounts:
    place = counts_place(index, file)
    try:
        terms, counts = open_array(local_file(place, file))
    except (ValueError, OSError) as error:
        raise FormatError(f"{place} is damaged: {error}; make the lexical side again") from error
    return TermCounts(np.asarray(terms), np.asarray(counts), 0)


class LexicalSide:
    """The lexical side of an opened version. Safe for threads."""

    def __init__(self, table: DocumentTable, settings: TokensConfig, rows: int, counts: TermCounts) -> None:
        self._table = table
        self._settings = settings
        self._rows = rows
        self._counts = counts
        self._mean_length = counts.num_tokens / max(rows, 1)

    @classmethod
    def open(cls, index: Location, manifest: IndexManifest, table: DocumentTable) -> LexicalSide:
        """Raises FormatError where a file of counts is missing or damaged."""
        entry = manifest.lexical
        assert entry is not None
        summed = TermCounts.sum([_opened_counts(index, file) for file in entry.counts])
        counts = TermCounts(summed.terms, summed.counts, entry.num_tokens)
        return cls(table, entry.tokens, manifest.rows, counts)

    def search(
        self,
        queries: Sequence[str],
        k: int,
        where: str | None = None,
        check: Callable[[], None] | None = None,
    ) -> Hits:
        """The best hits (Q, K) of each query among the documents that an SQL condition holds for.

        `check` is called before each query; what it raises ends the search.
        """
        # No more than there are, which a huge k would be no number of Lance's for.
        candidates = min(max(_CANDIDATES_PER_HIT * k, _LEAST_CANDIDATES), max(self._rows, 1))
        parts: list[Hits] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            terms = [self._terms(query) for query in queries[start : start + _QUERIES_AT_ONCE]]
            rows = []
            for of_query in terms:
                if check is not None:
                    check()
                rows.append(self._candidates(of_query, candidates, where))
            if check is not None:
                check()  # scores are of all these queries at once
            parts.append(_best(rows, self._scores(terms, rows), k))
        depth = max((part.rows.shape[1] for part in parts), default=0)
        hits = empty_hits(len(queries), depth)
        for number, part in enumerate(parts):
            place = (
                slice(number * _QUERIES_AT_ONCE, (number + 1) * _QUERIES_AT_ONCE),
                slice(part.rows.shape[1]),
            )
            hits.rows[place], hits.scores[place] = part.rows, part.scores
        return hits

    def scores(self, queries: Sequence[str], rows: Sequence[Rows]) -> list[Scores]:
        """The scores (n,) of each query's rows (n,); 0 where a row holds none of its tokens."""
        return self._scores([self._terms(query) for query in queries], rows)

    def _scores(self, terms: Sequence[_Terms], rows: Sequence[Rows]) -> list[Scores]:
        # Rows of several queries are read together: one by one they would take ten times as long.
        all_rows = np.concatenate([np.empty(0, np.int64), *rows])
        distinct, places = np.unique(all_rows, return_inverse=True)
        texts = self._table.take(distinct, [TOKENS])[TOKENS].combine_chunks()
        bounds = np.cumsum([0, *map(len, rows)])
        return [
            self._scored(of_query, texts.take(pa.array(places[first:last])))
            for of_query, first, last in zip(terms, bounds[:-1], bounds[1:], strict=True)
        ]

    def _terms(self, query: str) -> _Terms:
        """The distinct tokens of a query that some document holds, each with its weight."""
        times = Counter(tokens(query, self._settings))
        words = list(times)
        held = self._counts.of_words(words)
        inverse = np.log1p((self._rows - held + 0.5) / (held + 0.5))
        weights = inverse * np.fromiter(times.values(), np.float64, len(words))
        kept = np.flatnonzero(held > 0)
        held_words = [words[place] for place in kept]
        return _Terms(held_words, [times[word] for word in held_words], weights[kept])

    def _candidates(self, terms: _Terms, depth: int, where: str | None) -> Rows:
        if not terms.words:
            return np.empty(0, np.int64)
        heaviest = np.argsort(-terms.weights, kind="stable")[:_MOST_ASKED]
        asked = [
            terms.words[at] for at in np.sort(heaviest) for _ in range(min(terms.times[at], _MOST_TIMES))
        ]
        return self._table.best_matches(asked, depth, where)

    def _scored(self, terms: _Terms, texts: pa.Array) -> Scores:
        """The scores (n,) of documents by their joined tokens (n,)."""
        words, of_document, lengths = _split(texts)
        if not terms.words or not len(words):
            return np.zeros(len(lengths), np.float32)
        term = pc.index_in(words, value_set=pa.array(terms.words, words.type))
        hit = pc.is_valid(term).to_numpy(zero_copy_only=False)
        cell = of_document[hit] * len(terms.words) + term.drop_null().to_numpy()
        shape = (len(lengths), len(terms.words))
        times = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        spread = K1 * (1 - B + B * lengths / self._mean_length)
        scores: Scores = ((times / (times + spread[:, None])) @ terms.weights).astype(np.float32)
        return scores


@dataclass(frozen=True)
class _Terms:
    """Distinct tokens of a query, how often each stands there, and what it weighs, (T,)."""

    words: list[str]
    times: list[int]
    weights: NDArray[np.float64]


def _best(rows: Sequence[Rows], scores: Sequence[Scores], k: int) -> Hits:
    """The best k of each query's candidates, equal scores by row."""
    hits = empty_hits(len(rows), min(max(map(len, rows), default=0), k))
    for number, (of_query, scored) in enumerate(zip(rows, scores, strict=True)):
        order = np.lexsort((of_query, -scored))[:k]
        hits.rows[number, : len(order)], hits.scores[number, : len(order)] = of_query[order], scored[order]
    return hits


def _split(texts: pa.Array) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
    """All tokens of documents, (tokens,); the document of each, (tokens,); and how many each has, (documents,)."""
    lists = pc.split_pattern(texts, " ")
    empty = pc.equal(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    of_document = np.repeat(np.arange(len(lengths)), lengths)
    words = lists.flatten()
    if empty.any():  # splitting gives such a text one empty token
        kept = ~empty[of_document]
        words, of_document = words.filter(pa.array(kept)), of_document[kept]
        lengths[empty] = 0
    return words, of_document, lengths


def _counted(texts: pa.Array) -> TermCounts:
    words, of_document, _ = _split(texts)
    if not len(words):
        return TermCounts(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    coded = words.dictionary_encode()
    pairs = of_document * len(coded.dictionary) + coded.indices.to_numpy()
    held = np.unique(pairs) % len(coded.dictionary)
    counts = np.bincount(held, minlength=len(coded.dictionary))
    terms = _hashes(coded.dictionary.to_pylist())
    order = np.argsort(terms)
    return TermCounts(terms[order], counts[order], len(words))


def _hashes(words: Sequence[str]) -> NDArray[np.int64]:
    array = np.array(words, dtype=object)
    hashed: NDArray[np.int64] = pd.util.hash_array(array, categorize=False).view(np.int64)
    return hashed
