"""`raytower mine`: hard negatives for training pairs, from what an index recalls for each query.

Two passes over the pairs: the first remembers which documents are known positives of a query (eight bytes each), the
second searches in batches and samples. A teacher (a cross-encoder) may score what was sampled, for distillation.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.annotation.config import MineConfig
from raytower.annotation.cosines import cosines
from raytower.annotation.rows_in import row_batches, survey_rows
from raytower.annotation.rows_out import RowWriter, open_rows
from raytower.data.pieces import Survey, read_pieces
from raytower.errors import InputError
from raytower.index.hybrid import HybridFusion, check_mode
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.forward import ForwardEngine
from raytower.progress import Progress, log
from raytower.retrieval.load import load_query_engine, load_reranker, open_index_manifest, own_or
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Candidate, PairScorer, Retriever, Vectors, count_wordless
from raytower.storage import Location

_COLUMNS = {
    "triples": ("query", "title", "neg_title"),
    "scored": ("query", "title", "label"),
    "candidates": ("query", "documents", "scores"),
}


@dataclass(frozen=True)
class Pair:
    """A training pair. `number` counts the good rows of the input from 0."""

    number: int
    query: str
    document: str


@dataclass
class MinedCounts:
    """What became of the pairs and the candidates."""

    pairs: int = 0
    negatives: int = 0
    pairs_without_negatives: int = 0
    """Nothing was left to sample; such pairs are not written."""
    pairs_with_fewer: int = 0
    """Written with fewer than num_negatives."""
    dropped_positives: int = 0
    """Recalled documents that are known positives of the query, or the query itself."""
    dropped_likely_positives: int = 0
    """Candidates above max_score_ratio."""
    queries_without_words: int = 0
    """Distinct queries of a batch that share no token with a document: mode hybrid has for them what dense has."""


class KnownPositives:
    """Which documents are positives of a query, by text and by id; eight bytes for each.

    Entries are kept as hashes of 64 bits. Of a thousand million lookups less than one is expected to find a wrong
    entry, and such an error only drops one candidate.
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        """`keys`: the hashes, (entries,), in any order."""
        self._keys = np.unique(keys)

    @staticmethod
    def read(survey: Survey) -> KnownPositives:
        parts = []
        for table in read_pieces(survey.pieces):
            columns = (table[name].to_pylist() for name in ("query", "document", "document_id"))
            keys = []
            for query, document, document_id in zip(*columns, strict=True):
                keys.append(_key(query, "text", document))
                if document_id is not None:
                    keys.append(_key(query, "id", document_id))
            parts.append(np.array(keys, dtype=np.uint64))
        return KnownPositives(np.concatenate(parts))

    def include(self, query: str, candidates: Sequence[Candidate]) -> NDArray[np.bool_]:
        """Whether each candidate is a known positive of `query`, or the query's own text; bool [K]."""
        keys = [(_key(query, "text", item.text), _key(query, "id", item.id)) for item in candidates]
        known = np.isin(np.array(keys, dtype=np.uint64).reshape(-1, 2), self._keys).any(axis=1)
        return known | np.array([item.text == query for item in candidates], dtype=bool)


def mine(config: MineConfig) -> dict[str, Any]:
    """Write each pair with its negatives to `output`, the pair's own document before them.

    Triples are `query title neg_title`, scored pairs `query title label`, candidates `query documents scores` with one
    row for each pair. Labels and scores are 1 and 0, or the teacher's logits.

    Candidates equal to the query, or known positives of it in any row, are never negatives. The sample depends on the
    seed and on a pair's place in the input alone, not on how pairs are batched.

    Returns:
        pairs, negatives, pairs_without_negatives, pairs_with_fewer, dropped_positives, dropped_likely_positives,
        queries_without_words, rejected_rows, index_version, seconds, output.

    Raises:
        InputError: bad rows under on_error fail, an index that another encoder made, for a TSV a text with a tab, or a
            teacher that gives a score that is no number.
    """
    start = time.perf_counter()
    survey = survey_rows(config, "pairs", *_COLUMNS.values())
    engine = load_query_engine(_encoder_name(config), config)
    index = Index.open(config.index, encoder_fingerprint=engine.fingerprint if engine else None)
    check_mode(index.manifest, config.mode)
    teacher = None if config.teacher is None else load_reranker(config.teacher, config)
    miner = Miner(config, engine, index, KnownPositives.read(survey), teacher)
    with open_rows(Location.of(config.output), config.file_type, _COLUMNS[config.format]) as writer:
        miner.run(_pair_batches(survey, config.rows_per_batch), survey.num_rows, writer)
    counts = miner.counts
    if counts.pairs_without_negatives:
        log(
            f"{counts.pairs_without_negatives:,} pairs have no negative left and are not written; raise recall_k"
        )
    return {
        **asdict(counts),
        "rejected_rows": survey.num_rejected,
        "index_version": index.version,
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }


def plan_mine(config: MineConfig) -> dict[str, Any]:
    """Pairs, batches and predicted memory; surveys the input."""
    survey = survey_rows(config, "pairs", *_COLUMNS.values())
    plan = plan_rows(
        survey.num_rows,
        config,
        None if config.mode == "lexical" else _encoder_name(config),
        rows_per_batch=config.rows_per_batch,
        candidates=config.recall_k,
        reranker=config.teacher,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], config.mode)
    # Up to two keys a pair, held twice while they are sorted.
    plan["predicted_memory_bytes"] += survey.num_rows * 2 * 8 * 2
    if config.teacher is not None:
        plan["teacher_pairs"] = survey.num_rows * (1 + config.num_negatives)
    return {**plan, "rejected_rows": survey.num_rejected, "index_rows": manifest.rows}


def _encoder_name(config: MineConfig) -> str:
    return config.encoder or open_manifest(config.index).encoder


class Miner:
    """Finds, scores and writes the negatives of batches of pairs, and counts what became of them."""

    def __init__(
        self,
        config: MineConfig,
        engine: ForwardEngine | None,
        index: Index,
        positives: KnownPositives,
        teacher: PairScorer | None = None,
    ) -> None:
        self._config = config
        self._teacher = teacher
        prefix = own_or(config.query_prefix, engine.encoder, "query", index.encoder) if engine else ""
        self._retriever = Retriever(
            engine,
            index,
            query_prefix=prefix,
            mode=config.mode,
            hybrid=HybridFusion.of(index.manifest, config.hybrid),
        )
        self._manifest = index.manifest
        # A positive is compared with candidates, so it is encoded as they were.
        self._document_engine = engine and ForwardEngine(
            engine.encoder,
            dtype=config.dtype,
            tokens_per_batch=config.tokens_per_batch,
            max_length=index.manifest.max_length,
        )
        self._positives = positives
        self.counts = MinedCounts()

    def run(self, batches: Iterator[list[Pair]], total: int, writer: RowWriter) -> None:
        """Mine `total` pairs and write what is found."""
        progress = Progress("mined", "pairs", total)
        for batch in batches:
            negatives = self.negatives(batch)
            lists = [
                [pair.document, *(item.text for item in items)] if items else []
                for pair, items in zip(batch, negatives, strict=True)
            ]
            for pair, documents, scores in zip(batch, lists, self.scores(batch, lists), strict=True):
                self._write(pair, documents, scores, writer)
            progress.advance(len(batch))

    def negatives(self, batch: Sequence[Pair]) -> list[list[Candidate]]:
        """The sampled negatives of each pair, nearest first."""
        queries = list(dict.fromkeys(pair.query for pair in batch))
        encoded = self._retriever.encode(queries)
        found = self._retriever.recall(encoded, self._config.recall_k)
        self.counts.queries_without_words += count_wordless(found, self._config.mode)
        recalled = dict(zip(queries, found, strict=True))
        limits = self._limits(batch, encoded.vectors, {query: row for row, query in enumerate(queries)})
        return [
            self._sample(pair, recalled[pair.query], limit) for pair, limit in zip(batch, limits, strict=True)
        ]

    def scores(self, batch: Sequence[Pair], lists: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each document in the list of each pair: the teacher's logit, or 1 for the first and 0 after it.

        Raises:
            InputError: the teacher's logit is infinite or no number.
        """
        if self._teacher is None:
            return [[1, *[0] * (len(documents) - 1)] if documents else [] for documents in lists]
        queries = [pair.query for pair, documents in zip(batch, lists, strict=True) for _ in documents]
        logits = self._teacher.score(queries, [text for documents in lists for text in documents])
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            raise InputError(
                f"teacher {self._config.teacher!r} scores query {queries[bad[0]][:80]!r} with {logits[bad[0]]}; scores "
                "must be finite; set dtype to float32, or name another teacher"
            )
        ends = np.cumsum([len(documents) for documents in lists])[:-1]
        return [part.tolist() for part in np.split(logits, ends)]

    def _limits(
        self, batch: Sequence[Pair], vectors: Vectors | None, rows: dict[str, int]
    ) -> NDArray[np.float64]:
        """The dense score above which a candidate of each pair is too near to be a negative, float64 [pairs]."""
        if self._config.max_score_ratio is None:
            return np.full(len(batch), np.inf)
        assert vectors is not None, "the config refuses max_score_ratio in mode lexical"
        assert self._document_engine is not None, "the config refuses max_score_ratio in mode lexical"
        documents = self._document_engine.encode([pair.document for pair in batch], self._manifest.prefix)
        own = vectors[[rows[pair.query] for pair in batch]]
        if self._manifest.metric == "cosine":
            scores = cosines(own, documents)
        else:
            scores = np.einsum("nd,nd->n", own.astype(np.float64), documents.astype(np.float64))
        return scores * self._config.max_score_ratio

    def _sample(self, pair: Pair, candidates: Sequence[Candidate], limit: float) -> list[Candidate]:
        known = self._positives.include(pair.query, candidates)
        self.counts.dropped_positives += int(known.sum())
        first = self._config.skip_top
        left = [
            item for item, positive in zip(candidates[first:], known[first:], strict=True) if not positive
        ]
        far = [item for item in left if item.dense_score is None or item.dense_score <= limit]
        self.counts.dropped_likely_positives += len(left) - len(far)
        by_text: dict[str, Candidate] = {}
        for item in far:
            by_text.setdefault(item.text, item)
        distinct = list(by_text.values())
        generator = np.random.default_rng([self._config.seed, pair.number])
        num_taken = min(self._config.num_negatives, len(distinct))
        if not num_taken:
            return []
        chosen = generator.choice(len(distinct), size=num_taken, replace=False)
        return [distinct[place] for place in sorted(chosen.tolist())]

    def _write(
        self, pair: Pair, documents: Sequence[str], scores: Sequence[float], writer: RowWriter
    ) -> None:
        """Write the pair with `documents`: its own, then its negatives; none where it has no negative."""
        num_negatives = max(len(documents) - 1, 0)
        self.counts.pairs += 1
        self.counts.negatives += num_negatives
        self.counts.pairs_without_negatives += not num_negatives
        self.counts.pairs_with_fewer += 0 < num_negatives < self._config.num_negatives
        if self._config.format == "triples":
            for text in documents[1:]:
                writer.write(pair.query, pair.document, text)
        elif self._config.format == "scored":
            for text, score in zip(documents, scores, strict=True):
                writer.write(pair.query, text, score)
        elif documents:
            writer.write(pair.query, documents, scores)


def _pair_batches(survey: Survey, rows_per_batch: int) -> Iterator[list[Pair]]:
    number = 0
    for table in row_batches(survey, rows_per_batch):
        rows = zip(table["query"].to_pylist(), table["document"].to_pylist(), strict=True)
        yield [Pair(number + offset, query, document) for offset, (query, document) in enumerate(rows)]
        number += table.num_rows


def _key(query: str, kind: str, value: str) -> int:
    # Lengths part the fields, so that no two triples of strings feed the same bytes.
    content = f"{kind}{len(query)}:{query}{value}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
