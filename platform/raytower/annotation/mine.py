"""`raytower mine`: hard negatives for training pairs, from what an index recalls for each query.

Two passes over the pairs: the first remembers which texts are known positives of each other, the second searches in
batches and samples. The first is done by one process, since any pair may forbid what another would take; the second in
shares of pairs. A cross-encoder may screen what is sampled, and a teacher score it, for distillation.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytower.annotation.config import MineConfig
from raytower.annotation.cosines import cosines
from raytower.annotation.negatives import KnownPositives, distinct_texts, draw_order, score_limits
from raytower.annotation.rows_in import survey_rows
from raytower.annotation.rows_out import RowWriter, header_of
from raytower.data.beir import is_beir
from raytower.data.pieces import Survey, read_pieces
from raytower.data.sources import refuse_several_splits
from raytower.file_jobs.plan import NUMBER, choose_rows_per_share, shares_of
from raytower.file_jobs.run import FileJob, ShareWorker, Sink, content_of, join_bytes, run_shares, workers_for
from raytower.index.hybrid import HybridFusion
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.compute import PARAMETER_BYTES
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.forward import ForwardEngine
from raytower.progress import log
from raytower.retrieval.load import (
    load_encoder_of,
    load_query_engine,
    load_reranker,
    open_index_manifest,
    own_or,
)
from raytower.retrieval.plans import plan_rows
from raytower.retrieval.retriever import Candidate, PairScorer, Retriever, Vectors, count_wordless
from raytower.storage import Location, absolute_if_local

_COLUMNS = {
    "triples": ("query", "title", "neg_title"),
    "scored": ("query", "title", "label"),
    "candidates": ("query", "documents", "scores"),
}
# Of as many drawn candidates as negatives are wanted, most pass; the second half makes up for those that do not.
_SCREENED_FIRST = 2
_MAX_PAIRS_PER_SHARE = 8_192
# What decides how negatives are found, and not which.
_FREE_KEYS = {"workers", "output", "rows_per_batch", "tokens_per_batch", "on_error", "input"}


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
    """Recalled documents that are known positives of the query or of its document, or one of the two."""
    dropped_likely_positives: int = 0
    """Candidates above max_score_ratio or max_score_margin."""
    screened_out: int = 0
    """Drawn candidates that the cross-encoder of `screen` takes for positives."""
    queries_without_words: int = 0
    """Distinct queries of a batch that share no token with a document: mode hybrid has for them what dense has."""

    @classmethod
    def sum(cls, parts: Iterable[Mapping[str, int]]) -> MinedCounts:
        """Of the counts of shares, as `asdict` gives them."""
        total = cls()
        for part in parts:
            for name, count in part.items():
                setattr(total, name, getattr(total, name) + count)
        return total


def mine(config: MineConfig) -> dict[str, Any]:
    """Write each pair with its negatives to `output`, the pair's own document before them.

    Triples are `query title neg_title`, scored pairs `query title label`, candidates `query documents scores` with one
    row for each pair. Labels and scores are 1 and 0, or the teacher's logits.

    Candidates equal to the query or its document, or known positives of either in any row and direction, are never
    negatives. The sample depends on the seed and on a pair's place in the input alone, not on how pairs are batched.

    Returns:
        pairs, negatives, pairs_without_negatives, pairs_with_fewer, dropped_positives, dropped_likely_positives,
        screened_out, queries_without_words, rejected_rows, index_version, seconds, output.

    Raises:
        InputError: bad rows under on_error fail, an index that another encoder made, for a TSV a text with a tab, or a
            teacher that gives a score that is no number.
    """
    start = time.perf_counter()
    survey = _survey(config)
    job = _job(config, survey)
    workers = workers_for(
        config.workers, survey.num_rows, job.texts_per_row, len(job.shares), use_gpus=config.engine != "onnx"
    )
    head = header_of(config.file_type, _COLUMNS[config.format])
    figures, _ = run_shares(job, workers, partial(join_bytes, head=head))
    counts = MinedCounts.sum(figures)
    if counts.pairs_without_negatives:
        log(
            f"{counts.pairs_without_negatives:,} pairs have no negative left and are not written; raise recall_k"
        )
    return {
        **asdict(counts),
        "rejected_rows": survey.num_rejected,
        "index_version": job.content["index_version"],
        "seconds": round(time.perf_counter() - start, 3),
        "output": config.output,
    }


def plan_mine(config: MineConfig) -> dict[str, Any]:
    """Pairs, batches, parts, workers (1: this process) and the predicted memory of each; surveys the input."""
    survey = _survey(config)
    workers = workers_for(
        config.workers,
        survey.num_rows,
        _texts_per_pair(config),
        len(survey.pieces),
        use_gpus=config.engine != "onnx",
    )
    plan = plan_rows(
        survey.num_rows,
        config,
        None if config.mode == "lexical" else _encoder_name(config),
        rows_per_batch=config.rows_per_batch,
        candidates=config.recall_k,
        reranker=config.teacher,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"], config.mode)
    # Up to four keys a pair, held twice while they are sorted.
    plan["predicted_memory_bytes"] += survey.num_rows * 4 * 8 * 2
    if config.teacher is not None:
        plan["teacher_pairs"] = survey.num_rows * (1 + config.num_negatives)
    if config.screen is not None:
        # As many as are scored first; where too few pass, the others of recall_k follow.
        plan["screened_pairs"] = survey.num_rows * (1 + config.num_negatives * _SCREENED_FIRST)
        if config.screen.reranker != config.teacher:
            weights = sum(p.numel() for p in CrossEncoder.load(config.screen.reranker).parameters())
            plan["predicted_memory_bytes"] += weights * (4 + PARAMETER_BYTES[config.dtype])
    return {
        **plan,
        "parts": len(survey.pieces),
        "workers": workers.num if workers else 1,
        "on_ray": workers is not None,
        "rejected_rows": survey.num_rejected,
        "index_rows": manifest.rows,
    }


class MineWorker:
    """Mines the pairs of a share."""

    def __init__(self, config: MineConfig, version: str, positives: KnownPositives) -> None:
        """`version` of the index; `positives` of the whole input."""
        engine = load_query_engine(_encoder_name(config), config)
        index = Index.open(config.index, version, encoder_fingerprint=engine.fingerprint if engine else None)
        teacher = None if config.teacher is None else load_reranker(config.teacher, config)
        screen = None
        if config.screen is not None:
            same = config.screen.reranker == config.teacher
            screen = teacher if same else load_reranker(config.screen.reranker, config)
        self._config = config
        self._miner = Miner(config, engine, index, positives, teacher, screen)

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """Write the pairs of a numbered share with their negatives; returns MinedCounts. Raises as `Miner.mine`."""
        config = self._config
        writer = RowWriter(sink, config.file_type, _COLUMNS[config.format], has_header=False)
        self._miner.counts = MinedCounts()
        for start in range(0, table.num_rows, config.rows_per_batch):
            rows = table.slice(start, config.rows_per_batch)
            columns = (rows[name].to_pylist() for name in (NUMBER, "query", "document"))
            self._miner.mine([Pair(*row) for row in zip(*columns, strict=True)], writer)
        return asdict(self._miner.counts)


def open_worker(config: MineConfig, version: str, positives: KnownPositives) -> ShareWorker:
    return MineWorker(config, version, positives)


class Miner:
    """Finds, scores and writes the negatives of batches of pairs, and counts what became of them."""

    def __init__(
        self,
        config: MineConfig,
        engine: ForwardEngine | None,
        index: Index,
        positives: KnownPositives,
        teacher: PairScorer | None = None,
        screen: PairScorer | None = None,
    ) -> None:
        self._config = config
        self._teacher = teacher
        self._screen = screen
        prefix = own_or(config.query_prefix, engine.encoder, "query", _encoder_name(config)) if engine else ""
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

    def mine(self, batch: Sequence[Pair], writer: RowWriter) -> None:
        """Write the pairs with what is found for them.

        Raises:
            InputError: a logit that is infinite or no number, or for a TSV a text with a tab or a line break.
        """
        negatives = self.negatives(batch)
        lists = [
            [pair.document, *(item.text for item in items)] if items else []
            for pair, items in zip(batch, negatives, strict=True)
        ]
        for pair, documents, scores in zip(batch, lists, self.scores(batch, lists), strict=True):
            self._write(pair, documents, scores, writer)

    def negatives(self, batch: Sequence[Pair]) -> list[list[Candidate]]:
        """The sampled negatives of each pair, nearest first."""
        queries = list(dict.fromkeys(pair.query for pair in batch))
        encoded = self._retriever.encode(queries)
        found = self._retriever.recall(encoded, self._config.recall_k)
        self.counts.queries_without_words += count_wordless(found, self._config.mode)
        recalled = dict(zip(queries, found, strict=True))
        limits = self._limits(batch, encoded.vectors, {query: row for row, query in enumerate(queries)})
        drawn = [
            self._draw(pair, recalled[pair.query], limit) for pair, limit in zip(batch, limits, strict=True)
        ]
        taken = self._pass_screen(batch, drawn)
        return [sorted(items, key=lambda item: -item.score) for items in taken]

    def scores(self, batch: Sequence[Pair], lists: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each document in the list of each pair: the teacher's logit, or 1 for the first and 0 after it.

        Raises:
            InputError: the teacher's logit is infinite or no number.
        """
        if self._teacher is None:
            return [[1, *[0] * (len(documents) - 1)] if documents else [] for documents in lists]
        return self._logits(self._teacher, [pair.query for pair in batch], lists)

    @staticmethod
    def _logits(
        scorer: PairScorer, queries: Sequence[str], lists: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The logit of each document in the list of each query; one call scores all pairs.

        Raises:
            InputError: a logit is infinite or no number.
        """
        flat = [query for query, documents in zip(queries, lists, strict=True) for _ in documents]
        texts = [text for documents in lists for text in documents]
        logits = scorer.score(flat, texts)
        ends = np.cumsum([len(documents) for documents in lists])[:-1]
        return [part.tolist() for part in np.split(logits, ends)]

    def _limits(
        self, batch: Sequence[Pair], vectors: Vectors | None, rows: dict[str, int]
    ) -> NDArray[np.float64]:
        """The dense score above which a candidate of each pair is too near to be a negative, float64 [pairs]."""
        ratio, margin = self._config.max_score_ratio, self._config.max_score_margin
        if ratio is None and margin is None:
            return score_limits(np.zeros(len(batch)), None, None)
        assert vectors is not None, "the config refuses limits of scores in mode lexical"
        assert self._document_engine is not None, "the config refuses limits of scores in mode lexical"
        documents = self._document_engine.encode([pair.document for pair in batch], self._manifest.prefix)
        own = vectors[[rows[pair.query] for pair in batch]]
        if self._manifest.metric == "cosine":
            scores = cosines(own, documents)
        else:
            scores = np.einsum("nd,nd->n", own.astype(np.float64), documents.astype(np.float64))
        return score_limits(scores, ratio, margin)

    def _draw(self, pair: Pair, candidates: Sequence[Candidate], limit: float) -> list[Candidate]:
        """The candidates that may be negatives of the pair, in the order in which they are taken."""
        known = self._positives.include(pair.query, candidates)
        known |= self._positives.include(pair.document, candidates)
        self.counts.dropped_positives += int(known.sum())
        first = self._config.skip_top
        left = [
            item for item, positive in zip(candidates[first:], known[first:], strict=True) if not positive
        ]
        far = [item for item in left if item.dense_score is None or item.dense_score <= limit]
        self.counts.dropped_likely_positives += len(left) - len(far)
        distinct = distinct_texts(far)
        order = draw_order(
            [item.score for item in distinct],
            self._config.sampling,
            self._config.sampling_temperature,
            np.random.default_rng([self._config.seed, pair.number]),
        )
        return [distinct[place] for place in order.tolist()]

    def _pass_screen(self, batch: Sequence[Pair], drawn: Sequence[list[Candidate]]) -> list[list[Candidate]]:
        """The first `num_negatives` of each pair's drawn candidates that pass the screen; without one, the first.

        A cross-encoder scores little more than it has to: first a few of each pair, then, of pairs that too few are
        left of, twice as many each time. The result is that of scoring all.
        """
        wanted, screen = self._config.num_negatives, self._config.screen
        if screen is None or self._screen is None:
            return [items[:wanted] for items in drawn]
        own = self._logits(self._screen, [pair.query for pair in batch], [[pair.document] for pair in batch])
        limits = [screen.limit(score) for (score,) in own]
        taken: list[list[Candidate]] = [[] for _ in batch]
        rest = [list(items) for items in drawn]
        num_scored = wanted * _SCREENED_FIRST
        while lacking := [place for place, items in enumerate(taken) if len(items) < wanted and rest[place]]:
            looked_at = [rest[place][:num_scored] for place in lacking]
            num_scored *= 2
            queries = [batch[place].query for place in lacking]
            texts = [[item.text for item in items] for items in looked_at]
            for place, items, scores in zip(
                lacking, looked_at, self._logits(self._screen, queries, texts), strict=True
            ):
                passed = [score < limits[place] for score in scores]
                self.counts.screened_out += passed.count(False)
                taken[place] += [item for item, passes in zip(items, passed, strict=True) if passes]
                rest[place] = rest[place][len(items) :]
        return [items[:wanted] for items in taken]

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


def _survey(config: MineConfig) -> Survey:
    rows = choose_rows_per_share(_texts_per_pair(config), _MAX_PAIRS_PER_SHARE)
    if not is_beir(config.input):
        refuse_several_splits(config.input.path, config.input.format)
    return survey_rows(config, "pairs", *_COLUMNS.values(), rows_per_piece=rows)


def _texts_per_pair(config: MineConfig) -> int:
    """Texts and pairs of texts that pass through models for each pair."""
    limits = config.max_score_ratio is not None or config.max_score_margin is not None
    taught = 1 + config.num_negatives if config.teacher is not None else 0
    screened = 1 + config.num_negatives * _SCREENED_FIRST if config.screen is not None else 0
    return 1 + limits + taught + screened


def _encoder_name(config: MineConfig) -> str:
    return config.encoder or open_manifest(config.index).encoder


def _job(config: MineConfig, survey: Survey) -> FileJob:
    """Raises InputError and FormatError where models and index do not go together, before any worker begins."""
    manifest = open_manifest(config.index)
    name = config.encoder or manifest.encoder
    encoder = load_encoder_of(manifest, config.mode, name)
    rerankers = {
        key: place
        for key, place in (
            ("teacher", config.teacher),
            ("screen", config.screen.reranker if config.screen else None),
        )
        if place is not None
    }
    prefix = own_or(config.query_prefix, encoder, "query", name) if encoder else None
    keys = [KnownPositives.keys_of(table) for table in read_pieces(survey.pieces)]
    everywhere = _found_by_workers(config, name, prefix)
    return FileJob(
        output=Location.of(config.output),
        shares=shares_of(survey.pieces, are_numbered=True),
        open_worker=open_worker,
        arguments=(everywhere, manifest.version, KnownPositives(np.concatenate(keys))),
        content={
            "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
            "read_as": config.input.model_dump(mode="json", exclude={"path"}),
            "index_version": manifest.version,
            "index": manifest.sha256(),
            "encoder": encoder.fingerprint if encoder else None,
            "query_prefix": prefix,
            **{key: CrossEncoder.load(place).fingerprint for key, place in rerankers.items()},
            "input": content_of(survey),
        },
        texts_per_row=_texts_per_pair(config),
        verb="mined",
        unit="pairs",
    )


def _found_by_workers(config: MineConfig, encoder: str, prefix: str | None) -> MineConfig:
    """The config with names by which other processes find the same things, and what null meant of the others."""
    screen = config.screen
    if screen is not None:
        screen = screen.model_copy(update={"reranker": absolute_if_local(screen.reranker)})
    return config.model_copy(
        update={
            "encoder": absolute_if_local(encoder),
            "index": absolute_if_local(config.index),
            "teacher": None if config.teacher is None else absolute_if_local(config.teacher),
            "screen": screen,
            "query_prefix": prefix,
        }
    )
