"""Many judged queries of an index, measured in shares: as Ray tasks or in this process, and kept by a killed job.

A share searches its queries and counts what one pass over all would count of them. Parts of run.trec are joined, and
figures are made of all values, so that they are those of one pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from raytower.config import WorkersConfig, to_json
from raytower.data.qrels import OURS
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.judgements import Judgements
from raytower.evaluation.measured import Measured
from raytower.evaluation.measures import Measures
from raytower.evaluation.passes import depth_of, nothing_yet, search_batch
from raytower.evaluation.reports import RUN_NAME, RunWriter
from raytower.file_jobs.plan import NUMBER, choose_rows_per_share, shares_of_rows
from raytower.file_jobs.run import FileJob, ShareWorker, Sink, join_bytes, run_shares, workers_for
from raytower.index.hybrid import HybridFusion
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder
from raytower.progress import log
from raytower.retrieval.load import (
    fusion_in,
    fusion_of,
    load_encoder_of,
    load_query_engine,
    load_retriever,
    own_or,
)
from raytower.storage import Location, absolute_if_local

_MAX_QUERIES_PER_SHARE = 1_024
# What decides how an evaluation is done and drawn, and not what is measured.
_FREE_KEYS = {
    "workers",
    "output",
    "rows_per_batch",
    "tokens_per_batch",
    "queries",
    "plots",
    "figures",
    "seed",
}


def has_shares(config: EvaluateConfig, num_queries: int) -> bool:
    """Whether so many queries are measured in shares, and not by one pass over them all.

    Parts need an output to lie in. Of stages the exact search would read all vectors for each share.
    """
    if config.output is None or config.stages:
        return False
    return num_queries > _rows_per_share(config) or config.workers.num is not None


def plan_shares(config: EvaluateConfig, num_queries: int) -> dict[str, Any]:
    """`parts`, `workers` (1: this process) and whether they are `on_ray`."""
    if not has_shares(config, num_queries):
        return {"parts": 1, "workers": 1, "on_ray": False}
    workers = _workers(config, num_queries)
    parts = len(shares_of_rows(num_queries, _rows_per_share(config)))
    return {"parts": parts, "workers": workers.num if workers else 1, "on_ray": workers is not None}


@dataclass(frozen=True)
class Together:
    """The models and the index of an evaluation, which go together."""

    encoder: str
    """Its name."""
    manifest: IndexManifest
    settings: Mapping[str, Any]
    """What decided the figures beside the config: prefix, fusions, and which index it was."""
    identity: Mapping[str, Any]
    """Fingerprints of the models, and the index's."""


def put_together(config: EvaluateConfig, manifest: IndexManifest, encoder_name: str) -> Together:
    """Raises InputError and FormatError where models, fusion and index do not go together, before any work."""
    encoder = load_encoder_of(manifest, config.mode, encoder_name)
    reranker = CrossEncoder.load(config.reranker) if config.reranker else None
    fusion = fusion_of(config.reranker, reranker.fusion if reranker else None, config.fusion_weight)
    fusion = fusion_in(config.mode, fusion, config.fusion_weight)
    hybrid = HybridFusion.of(manifest, config.hybrid)
    settings = {
        "query_prefix": own_or(config.query_prefix, encoder, "query", encoder_name) if encoder else "",
        "fingerprint": manifest.fingerprint,
        "index_version": manifest.version,
        "index_rows": manifest.rows,
        "fusion": fusion.to_dict() if fusion else None,
        "hybrid": asdict(hybrid) if config.mode == "hybrid" else None,
    }
    identity = {
        "encoder": encoder.fingerprint if encoder else None,
        "reranker": reranker.fingerprint if reranker else None,
        "index": manifest.sha256(),
    }
    return Together(encoder_name, manifest, settings, identity)


def measure_in_shares(
    config: EvaluateConfig, together: Together, judgements: Judgements, measures: Measures
) -> tuple[Measured, int]:
    """Search and measure what is missing, and write run.trec; also how many queries were searched now.

    Raises:
        InputError, RaytowerError: as `run_shares`.
    """
    job = _job(config, together, judgements)
    figures, num_done = run_shares(job, _workers(config, job.num_rows), join_bytes)
    measured = nothing_yet(config, measures, judgements, depth_of(config, measures))
    for part in figures:
        measured.add_counted(part)
    return measured, num_done


class EvaluateWorker:
    """Searches and measures the queries of a share."""

    def __init__(self, config: EvaluateConfig, version: str, judgements: Judgements) -> None:
        """`version` of the index; all judged queries, of which a share has the numbers."""
        assert config.index is not None
        assert config.encoder is not None
        engine = load_query_engine(config.encoder, config)
        index = Index.open(config.index, version, encoder_fingerprint=engine.fingerprint if engine else None)
        if on_gpu := index.use_gpu():
            log(f"{on_gpu} of {len(index.shards)} shards are searched on the GPU")
        self._config = config
        self._judgements = judgements
        self._measures = Measures(config.metrics, config.k)
        self._retriever = load_retriever(engine, index, config, config.encoder)

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        """Write the lists of the queries whose numbers `table` holds; returns what `Measured.counted` says of them."""
        config, judgements = self._config, self._judgements
        measured = nothing_yet(config, self._measures, judgements, depth_of(config, self._measures))
        writer = RunWriter(sink, OURS)
        first, last = table[NUMBER][0].as_py(), table[NUMBER][-1].as_py()
        for start in range(first, last + 1, config.rows_per_batch):
            part = slice(start, min(start + config.rows_per_batch, last + 1))
            ranked = search_batch(self._retriever, part, config, measured, None)
            for query_id, hits in zip(judgements.ids[part], ranked, strict=True):
                writer.write(query_id, [(hit.id, hit.score) for hit in hits])
        return measured.counted()


def open_worker(config: EvaluateConfig, version: str, judgements: Judgements) -> ShareWorker:
    return EvaluateWorker(config, version, judgements)


def _job(config: EvaluateConfig, together: Together, judgements: Judgements) -> FileJob:
    assert config.output is not None
    names = {"index": config.index, "encoder": together.encoder, "reranker": config.reranker}
    places = {key: absolute_if_local(name) for key, name in names.items() if name is not None}
    prefix = together.settings["query_prefix"] if together.identity["encoder"] else None
    everywhere = config.model_copy(update={**places, "query_prefix": prefix})
    return FileJob(
        output=Location.of(config.output) / RUN_NAME,
        shares=shares_of_rows(len(judgements.ids), _rows_per_share(config)),
        open_worker=open_worker,
        arguments=(everywhere, together.manifest.version, judgements),
        content={
            "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
            **together.settings,
            **together.identity,
            "judgements": hashlib.sha256(to_json(asdict(judgements)).encode()).hexdigest(),
        },
        texts_per_row=_texts_per_query(config),
        verb="evaluated",
        unit="queries",
    )


def _workers(config: EvaluateConfig, num_queries: int) -> WorkersConfig | None:
    return workers_for(
        config.workers,
        num_queries,
        _texts_per_query(config),
        len(shares_of_rows(num_queries, _rows_per_share(config))),
        use_gpus=config.engine != "onnx",
    )


def _rows_per_share(config: EvaluateConfig) -> int:
    return choose_rows_per_share(_texts_per_query(config), _MAX_QUERIES_PER_SHARE)


def _texts_per_query(config: EvaluateConfig) -> int:
    return 1 + (config.recall_k if config.reranker else 0)
