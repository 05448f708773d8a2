"""`raytower search`: one question, or a whole file of them as a job that goes on after it was killed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from raytower.config import WorkersConfig
from raytower.data.pieces import Survey, survey
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.file_jobs.plan import Share, choose_rows_per_share, shares_of
from raytower.file_jobs.run import FileJob, ShareWorker, Sink, content_of, run_shares, workers_for
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder
from raytower.progress import log
from raytower.ranked.rows import RankedText, RankedWriter, join_parts, ranked_file_type
from raytower.retrieval.config import RankedFileType, SearchConfig
from raytower.retrieval.load import fusion_in, fusion_of, load_encoder_of, own_or
from raytower.retrieval.retriever import Hit
from raytower.retrieval.search import open_search, plan_search, search
from raytower.storage import Location, absolute_if_local

TITLE_COLUMN = "title"
"""Of an index whose documents have titles; their texts may hold them too (`input.text_fields`)."""
_MAX_QUERIES_PER_SHARE = 1_024
# What decides how a search is done, and not what it finds.
_FREE_KEYS = {"workers", "output", "rows_per_batch", "tokens_per_batch", "on_error", "input", "query"}


def search_one_or_many(config: SearchConfig) -> dict[str, Any]:
    """`search` for one query; the hits of every query of an input, written to `output`.

    Returns:
        of an input: queries, hits, queries_without_hits (nothing lets their filter through, the index is empty, or
        in mode lexical no document shares a token with them), queries_without_words (in mode hybrid: no document shares
        a token with them, so they have what mode dense finds), mode, file_type, index_version, rejected_rows, seconds,
        queries_per_second (of this run), output.

    Raises:
        InputError: bad rows under on_error fail, an output of something else, no such index or model, an encoder that
            did not make the index, or what `RankedWriter.write` refuses.
    """
    if config.input is None:
        return search(config)
    start = time.perf_counter()
    file_type, surveyed, shares = _prepare(config)
    workers = _workers(config, surveyed, shares)
    job = _job(config, file_type, surveyed, shares)
    figures, num_done = run_shares(job, workers, partial(join_parts, file_type=file_type))
    seconds = time.perf_counter() - start
    without = sum(part["without_hits"] for part in figures)
    if without:
        log(f"{without:,} queries found nothing")
    wordless = sum(part["without_words"] for part in figures)
    if wordless and config.mode == "hybrid":
        log(f"{wordless:,} queries share no token with a document; they have what mode dense finds")
    return {
        "queries": surveyed.num_rows,
        "hits": sum(part["hits"] for part in figures),
        "queries_without_hits": without,
        "queries_without_words": wordless,
        "mode": config.mode,
        "file_type": file_type,
        "index_version": job.content["index_version"],
        "rejected_rows": surveyed.num_rejected,
        "seconds": round(seconds, 3),
        "queries_per_second": round(num_done / seconds, 1),
        "output": config.output,
    }


def plan_one_or_many(config: SearchConfig) -> dict[str, Any]:
    """The plan of a search; of an input also its queries, parts, workers (1: this process) and pairs to rerank."""
    if config.input is None:
        return plan_search(config)
    file_type, surveyed, shares = _prepare(config)
    workers = _workers(config, surveyed, shares)
    plan = plan_search(config, surveyed.num_rows, config.rows_per_batch)
    return {
        **plan,
        "reranked_pairs": surveyed.num_rows * min(config.recall_k, plan["index_rows"])
        if config.reranker
        else 0,
        "parts": len(shares),
        "workers": workers.num if workers else 1,
        "on_ray": workers is not None,
        "file_type": file_type,
        "rejected_rows": surveyed.num_rejected,
    }


class SearchWorker:
    """Searches for the queries of a share."""

    def __init__(self, config: SearchConfig, version: str, file_type: RankedFileType) -> None:
        index = Index.open(config.index, version)
        if on_gpu := index.use_gpu():
            log(f"{on_gpu} of {len(index.shards)} shards are searched on the GPU")
        self._search = open_search(config, index)
        self._rows_per_batch = config.rows_per_batch
        self._file_type = file_type
        self._reranks = config.reranker is not None
        self._has_titles = TITLE_COLUMN in index.table.schema.names

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """The hits of the queries of `table` (id, text); raises InputError as `RankedWriter.write`."""
        writer = RankedWriter(sink, self._file_type, reranked=self._reranks, titled=self._has_titles)
        counts = {"hits": 0, "without_hits": 0, "without_words": 0}
        for start in range(0, table.num_rows, self._rows_per_batch):
            rows = table.slice(start, self._rows_per_batch)
            ids, queries = rows["id"].to_pylist(), rows["text"].to_pylist()
            result = self._search(queries)
            found = result.hits
            writer.write([_ranked(*each) for each in zip(ids, queries, found, strict=True)])
            counts["hits"] += sum(map(len, found))
            counts["without_hits"] += sum(not hits for hits in found)
            counts["without_words"] += result.num_wordless
        writer.close()
        return counts


def open_worker(config: SearchConfig, version: str, file_type: RankedFileType) -> ShareWorker:
    return SearchWorker(config, version, file_type)


def _ranked(query_id: str, query: str, hits: list[Hit]) -> list[RankedText]:
    return [
        RankedText(
            query_id,
            query,
            hit.rank,
            hit.id,
            hit.score,
            hit.text,
            hit.recall_score,
            hit.rerank_score,
            _title_of(hit),
        )
        for hit in hits
    ]


def _title_of(hit: Hit) -> str | None:
    title = hit.metadata.get(TITLE_COLUMN)
    return None if title is None else str(title)


def _prepare(config: SearchConfig) -> tuple[RankedFileType, Survey, list[Share]]:
    assert config.input is not None
    assert config.output is not None
    refuse_output_inside(config.output, config.input.path)
    file_type = ranked_file_type(config.output, config.file_type)
    surveyed = survey(
        config.input,
        "lines",
        choose_rows_per_share(_texts_per_query(config), _MAX_QUERIES_PER_SHARE),
        on_error=config.on_error,
        quarantine=quarantine_of(config.output),
    )
    return file_type, surveyed, shares_of(surveyed.pieces)


def _workers(config: SearchConfig, surveyed: Survey, shares: Sequence[Share]) -> WorkersConfig | None:
    """As `workers_for`."""
    return workers_for(
        config.workers,
        surveyed.num_rows,
        _texts_per_query(config),
        len(shares),
        use_gpus=config.engine != "onnx",
    )


def _texts_per_query(config: SearchConfig) -> int:
    return 1 + (config.recall_k if config.reranker else 0)


def _job(config: SearchConfig, file_type: RankedFileType, surveyed: Survey, shares: list[Share]) -> FileJob:
    """Raises InputError where models, fusion and index do not go together, before any worker begins."""
    assert config.output is not None
    manifest = open_manifest(config.index)
    name = config.encoder or manifest.encoder
    encoder = load_encoder_of(manifest, config.mode, name)
    reranker = CrossEncoder.load(config.reranker) if config.reranker else None
    fusion = fusion_of(config.reranker, reranker.fusion if reranker else None, config.fusion_weight)
    fusion = fusion_in(config.mode, fusion, config.fusion_weight)
    places = {
        key: absolute_if_local(value)
        for key, value in (("index", config.index), ("encoder", name), ("reranker", config.reranker))
        if value
    }
    return FileJob(
        output=Location.of(config.output),
        shares=shares,
        open_worker=open_worker,
        arguments=(config.model_copy(update=places), manifest.version, file_type),
        content={
            "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
            "read_as": config.input.model_dump(mode="json", exclude={"path"}) if config.input else None,
            "file_type": file_type,
            "index_version": manifest.version,
            "index": manifest.sha256(),
            "encoder": encoder.fingerprint if encoder else None,
            "query_prefix": own_or(config.query_prefix, encoder, "query", name) if encoder else None,
            "reranker": reranker.fingerprint if reranker else None,
            "fusion": fusion.to_dict() if fusion else None,
            "input": content_of(surveyed),
            "has_titles": True,  # parts of before had none
        },
        texts_per_row=_texts_per_query(config),
        verb="searched",
        unit="queries",
    )
