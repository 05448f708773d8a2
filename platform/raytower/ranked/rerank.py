"""`raytower rerank`: a file of candidates, scored by a reranker and sorted by query.

Shape legend: C candidates of one query, R rows of a share.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raytower.data.pieces import Survey, read_pieces, survey
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.errors import InputError
from raytower.file_jobs.plan import Share, choose_rows_per_share, shares_between
from raytower.file_jobs.run import FileJob, ShareWorker, Sink, content_of, run_shares, workers_for
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.fusion import Fusion
from raytower.progress import log
from raytower.ranked.config import RerankFileConfig
from raytower.ranked.rows import RankedText, RankedWriter, join_parts, ranked_file_type
from raytower.retrieval.config import RankedFileType
from raytower.retrieval.load import fusion_of, load_scorer
from raytower.retrieval.plans import plan_reranker_rows
from raytower.storage import Location, absolute_if_local

_MAX_PAIRS_PER_SHARE = 8_192
_FREE_KEYS = {"workers", "output", "rows_per_batch", "tokens_per_batch", "on_error", "input"}


def rerank(config: RerankFileConfig) -> dict[str, Any]:
    """Score every candidate with its query, and write the best `k` of each query in order.

    A score is the logit behind the reranker's own activation, a probability for most; where the input has recall scores
    and the reranker a fusion, it is both, mixed as `raytower search` mixes them. Equal scores keep the input's order.

    Returns:
        queries, pairs, written, fused, file_type, rejected_rows, seconds, pairs_per_second (of this run), output.

    Raises:
        InputError: bad rows under on_error fail, rows of a query that do not stand together, no such reranker, a fusion
            weight that cannot be used, an output of something else, a score that is no number, or what
            `RankedWriter.write` refuses.
    """
    start = time.perf_counter()
    file_type, surveyed, starts, has = _prepare(config)
    shares = _shares(surveyed, starts)
    workers = workers_for(config.workers, surveyed.num_rows, 1, len(shares), use_gpus=config.engine != "onnx")
    job = _job(config, file_type, surveyed, shares, has)
    figures, num_done = run_shares(job, workers, partial(join_parts, file_type=file_type))
    seconds = time.perf_counter() - start
    return {
        "queries": len(starts),
        "pairs": surveyed.num_rows,
        "written": sum(part["written"] for part in figures),
        "fused": job.content["fusion"] is not None,
        "file_type": file_type,
        "rejected_rows": surveyed.num_rejected,
        "seconds": round(seconds, 3),
        "pairs_per_second": round(num_done / seconds, 1),
        "output": config.output,
    }


def plan_rerank(config: RerankFileConfig) -> dict[str, Any]:
    """Queries, pairs, parts, workers (1: this process) and predicted memory; surveys the input."""
    file_type, surveyed, starts, _ = _prepare(config)
    shares = _shares(surveyed, starts)
    workers = workers_for(config.workers, surveyed.num_rows, 1, len(shares), use_gpus=config.engine != "onnx")
    return {
        **plan_reranker_rows(
            surveyed.num_rows,
            config,
            config.reranker,
            rows_per_batch=config.rows_per_batch,
            max_length=config.max_length,
        ),
        "queries": len(starts),
        "parts": len(shares),
        "workers": workers.num if workers else 1,
        "on_ray": workers is not None,
        "file_type": file_type,
        "rejected_rows": surveyed.num_rejected,
    }


class RerankWorker:
    """Scores and sorts the candidates of a share, which holds whole queries."""

    def __init__(
        self, config: RerankFileConfig, fusion: Fusion | None, file_type: RankedFileType, titled: bool
    ) -> None:
        """`titled`: whether some candidates have titles, which their rows then have too."""
        self._config = config
        self._scorer = load_scorer(config.reranker, config, config.max_length)
        self._fusion = fusion
        self._file_type = file_type
        self._titled = titled

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """Write the lists of `table` (query, document, score, query_id, document_id, title)."""
        logits_R = self._score(table)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        writer = RankedWriter(sink, self._file_type, reranked=True, titled=self._titled)
        ends = [*_starts_of(table)[1:].tolist(), table.num_rows]
        first = written = 0
        for end in ends:
            ranked = self._sort(
                {name: values[first:end] for name, values in columns.items()}, logits_R[first:end]
            )
            writer.write([ranked])
            written += len(ranked)
            first = end
        writer.close()
        return {"written": written}

    def _score(self, table: pa.Table) -> NDArray[np.float32]:
        parts = []
        for start in range(0, table.num_rows, self._config.rows_per_batch):
            rows = table.slice(start, self._config.rows_per_batch)
            parts.append(self._scorer.score(rows["query"].to_pylist(), rows["document"].to_pylist()))
        return np.concatenate(parts)

    def _sort(self, columns: dict[str, list[Any]], logits_C: NDArray[np.float32]) -> list[RankedText]:
        scores_C = self._scorer.activated(logits_C)
        if self._fusion is not None:
            scores_C = self._fusion.fuse(np.array(columns["score"], dtype=np.float64), logits_C)
            order = np.argsort(-scores_C, kind="stable")
        else:
            # By the logit: a sigmoid makes large ones equal.
            order = np.argsort(-logits_C, kind="stable")
        is_title = _is_title(
            pa.array(columns["title"], pa.string()), pa.array(columns["document"])
        ).to_pylist()
        return [
            RankedText(
                columns["query_id"][place],
                columns["query"][place],
                rank,
                columns["document_id"][place],
                float(scores_C[place]),
                columns["document"][place],
                columns["score"][place],
                float(logits_C[place]),
                columns["title"][place] if is_title[place] else None,
            )
            for rank, place in enumerate(order[: self._config.k].tolist(), start=1)
        ]


def open_worker(
    config: RerankFileConfig, fusion: Fusion | None, file_type: RankedFileType, titled: bool
) -> ShareWorker:
    return RerankWorker(config, fusion, file_type, titled)


@dataclass(frozen=True)
class _Has:
    """What the candidates of an input have."""

    scores: bool
    """Whether all have a recall score."""
    titles: bool
    """Whether some have a title beside their text."""


def _prepare(config: RerankFileConfig) -> tuple[RankedFileType, Survey, NDArray[np.int64], _Has]:
    """Also the row at which each query begins."""
    refuse_output_inside(config.output, config.input.path)
    file_type = ranked_file_type(config.output, config.file_type)
    surveyed = survey(
        config.input, "ranked", on_error=config.on_error, quarantine=quarantine_of(config.output)
    )
    starts, hashes = [], []
    row = missing = num_titles = 0
    last: str | None = None
    for table in read_pieces(surveyed.pieces):
        keys = _keys_of(table)
        for place in _starts_of(table).tolist():
            if place or keys[0] != last:  # the last query of the table before may go on
                starts.append(row + place)
                hashes.append(_hash(keys[place]))
        last = keys[-1]
        row += table.num_rows
        missing += table["score"].null_count
        num_titles += pc.sum(_is_title(table["title"], table["document"])).as_py() or 0
    if len(np.unique(np.array(hashes, dtype=np.uint64))) < len(hashes):
        raise _scattered(surveyed)
    if 0 < missing < row:
        log(f"{missing:,} of {row:,} candidates have no recall score, so none is used")
    return file_type, surveyed, np.array(starts, dtype=np.int64), _Has(not missing, num_titles > 0)


def _is_title(titles: pa.Array, documents: pa.Array) -> pa.Array:
    """Whether each title says something beside the text (C,); where it is all that there is, it is the document."""
    return pc.and_(pc.not_equal(titles, documents), pc.not_equal(titles, ""))


def _keys_of(table: pa.Table) -> list[str]:
    """What tells the queries of rows apart: their ids, or where they have none their texts."""
    ids, queries = table["query_id"].to_pylist(), table["query"].to_pylist()
    return [
        f"id {name}" if name is not None else f"text {text}" for name, text in zip(ids, queries, strict=True)
    ]


def _starts_of(table: pa.Table) -> NDArray[np.int64]:
    """The rows at which another query begins than in the row before; 0 is the first."""
    keys = _keys_of(table)
    return np.array(
        [place for place, key in enumerate(keys) if not place or key != keys[place - 1]], np.int64
    )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _scattered(surveyed: Survey) -> InputError:
    """The error that names the first query which comes back after another one."""
    seen: set[int] = set()
    last = None
    for query, key in _queries(surveyed):
        if key != last and _hash(key) in seen:
            return InputError(
                f"the rows of query {query[:80]!r} do not stand together in the input; sort it by its first column "
                "(`sort -s -t $'\\t' -k1,1`), so that a query is done at once"
            )
        seen.add(_hash(key))
        last = key
    raise AssertionError("two queries have one hash")


def _queries(surveyed: Survey) -> Iterator[tuple[str, str]]:
    for table in read_pieces(surveyed.pieces):
        yield from zip(table["query"].to_pylist(), _keys_of(table), strict=True)


def _shares(surveyed: Survey, starts: NDArray[np.int64]) -> list[Share]:
    return shares_between(surveyed.pieces, starts, choose_rows_per_share(1, _MAX_PAIRS_PER_SHARE))


def _job(
    config: RerankFileConfig,
    file_type: RankedFileType,
    surveyed: Survey,
    shares: Sequence[Share],
    has: _Has,
) -> FileJob:
    """Raises InputError where the reranker or the fusion weight cannot be used, before any worker begins."""
    reranker = CrossEncoder.load(config.reranker)
    if not has.scores and config.fusion_weight not in (None, 1):
        raise InputError(
            f"fusion_weight is {config.fusion_weight}, but not all rows of {config.input.path!r} have a recall score "
            "to mix with; give them as a third column, or set fusion_weight to null"
        )
    fusion = fusion_of(config.reranker, reranker.fusion, config.fusion_weight)
    if fusion is not None and not has.scores:
        log(
            "the reranker stores a fusion with recall scores, which the input has not; the rerank score alone orders"
        )
        fusion = None
    places = {"reranker": absolute_if_local(config.reranker)}
    return FileJob(
        output=Location.of(config.output),
        shares=shares,
        open_worker=open_worker,
        arguments=(config.model_copy(update=places), fusion, file_type, has.titles),
        content={
            "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
            "read_as": config.input.model_dump(mode="json", exclude={"path"}),
            "file_type": file_type,
            "reranker": reranker.fingerprint,
            "fusion": fusion.to_dict() if fusion else None,
            "input": content_of(surveyed),
            "has_titles": True,  # parts of before had none
        },
        verb="scored",
        unit="pairs",
    )
