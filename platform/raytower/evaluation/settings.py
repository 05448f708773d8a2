"""What the retrieval jobs share: how queries are encoded, how models are loaded, and what that needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from raytower.config import Config
from raytower.data.pieces import Survey, read_pieces
from raytower.errors import InputError
from raytower.evaluation.recall import Retriever
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, check_fingerprint
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine, check_max_length
from raytower.models.fusion import Fusion
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.storage import Location

ROWS_PER_PIECE = 8192
# A text with its token ids and the objects around it, in flight; generous.
_BYTES_PER_TEXT_IN_FLIGHT = 8_192
_PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class QueryCompute(Config):
    """How a job runs its models. Null chooses: tokens by device, lengths by model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokens_per_batch: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a query (or text); null is the encoder's own limit."""
    rerank_max_length: int | None = Field(default=None, ge=1)
    """Tokens of a (query, document) pair; null is the reranker's own limit."""
    rows_per_batch: int = Field(default=256, ge=1)
    """Queries in flight at once: encoded, searched and reranked together."""


def load_engine(name: str, compute: QueryCompute) -> ForwardEngine:
    """The encoder of a job, ready to encode."""
    return ForwardEngine(
        Encoder.load(name),
        dtype=compute.dtype,
        tokens_per_batch=compute.tokens_per_batch,
        max_length=compute.max_length,
    )


def load_classifier(name: str, compute: QueryCompute) -> ClassifierEngine:
    """The text classifier of a job, ready to classify."""
    return ClassifierEngine(
        TextClassifier.load(name),
        dtype=compute.dtype,
        tokens_per_batch=compute.tokens_per_batch,
        max_length=compute.max_length,
    )


def load_reranker(
    name: str, compute: QueryCompute, fusion_weight: float | None
) -> tuple[CrossScorer, Fusion | None]:
    """A reranker and how its logits mix with recall scores.

    Args:
        name: reranker directory or hub id.
        compute: precision and batch size.
        fusion_weight: replaces the weight stored with the reranker; null keeps it. A reranker without a stored
            fusion orders by its logit alone.

    Raises:
        InputError: a weight is given and the reranker has no stored means and deviations to use it with.
    """
    scorer = CrossScorer(
        CrossEncoder.load(name),
        dtype=compute.dtype,
        tokens_per_batch=compute.tokens_per_batch,
        max_length=compute.rerank_max_length,
    )
    stored = scorer.fusion
    if fusion_weight is None:
        return scorer, stored
    if stored is None:
        if fusion_weight == 1:
            return scorer, None
        raise InputError(
            f"fusion_weight is {fusion_weight}, but reranker {name!r} stores no fusion, so the scales of recall and "
            "rerank scores are unknown; tune one on dev queries, or set fusion_weight to null (rerank scores alone)"
        )
    return scorer, replace(stored, weight=fusion_weight)


def load_retriever(
    engine: ForwardEngine,
    index: Index,
    compute: QueryCompute,
    *,
    reranker: str | None = None,
    fusion_weight: float | None = None,
    query_prefix: str | None = None,
) -> Retriever:
    """Encoder, index and, where one is named, a reranker, put together as a job's config says.

    Raises:
        InputError: a fusion weight without a reranker, or one that cannot be used (see `load_reranker`).
    """
    prefix = own_or(query_prefix, engine.encoder, "query")
    if reranker is None:
        if fusion_weight is not None:
            raise InputError(
                f"fusion_weight is {fusion_weight}, but there is no reranker; name one, or set it to null"
            )
        return Retriever(engine, index, query_prefix=prefix)
    scorer, fusion = load_reranker(reranker, compute, fusion_weight)
    return Retriever(engine, index, scorer, fusion, query_prefix=prefix)


def open_index_manifest(uri: str, fingerprint: str) -> IndexManifest:
    """The published version's manifest, for plans. Raises FormatError where another encoder made the index."""
    manifest = open_manifest(uri)
    check_fingerprint(manifest, fingerprint)
    return manifest


def own_or(prefix: str | None, encoder: Encoder, role: Literal["query", "document"]) -> str:
    """The configured prefix, or the encoder's own where it is null."""
    return encoder.prefix_for(role) if prefix is None else prefix


def row_batches(survey: Survey, rows_per_batch: int) -> Iterator[pa.Table]:
    """The good rows of an input in file order, a bounded number at a time; one piece is held at once."""
    for table in read_pieces(survey.pieces):
        for start in range(0, table.num_rows, rows_per_batch):
            yield table.slice(start, rows_per_batch)


def quarantine_place(output: str, on_error: str) -> Location | None:
    """Where rejected rows go: beside the output, under its name."""
    if on_error == "fail":
        return None
    place = Location.of(output)
    return place.parent / f"{place.name}.quarantine"


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows, float64 [N]; 0 where a vector is all zeros."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)


def plan_rows(
    rows: int, compute: QueryCompute, encoder_name: str, candidates: int = 0, reranker: str | None = None
) -> dict[str, Any]:
    """What a job over `rows` texts will do: batches, and the memory of weights and of one batch in flight.

    Args:
        rows: texts, queries or pairs.
        compute: precision, length and rows in a batch.
        encoder_name: encoder directory or hub id; loaded to count its parameters.
        candidates: recalled documents held for each row.
        reranker: reranker directory, or None.
    """
    encoder = Encoder.load(encoder_name)
    if compute.max_length is not None:
        check_max_length(compute.max_length, encoder.max_positions)
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    if reranker is not None:
        num_parameters += sum(parameter.numel() for parameter in CrossEncoder.load(reranker).parameters())
    per_row = _BYTES_PER_TEXT_IN_FLIGHT * (1 + candidates) + encoder.dim * 4
    plan = _plan_memory(rows, compute, num_parameters, per_row)
    return {**plan, "fingerprint": encoder.fingerprint}


def plan_classifier_rows(rows: int, compute: QueryCompute, name: str) -> dict[str, Any]:
    """What classifying `rows` texts will do, like `plan_rows`; the classifier is loaded to count its parameters."""
    classifier = TextClassifier.load(name)
    if compute.max_length is not None:
        check_max_length(compute.max_length, classifier.max_positions)
    num_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    # A logit and a probability of each label.
    per_row = _BYTES_PER_TEXT_IN_FLIGHT + classifier.num_labels * 8
    plan = _plan_memory(rows, compute, num_parameters, per_row)
    return {**plan, "labels": classifier.num_labels, "fingerprint": classifier.fingerprint}


def _plan_memory(rows: int, compute: QueryCompute, num_parameters: int, bytes_per_row: int) -> dict[str, Any]:
    in_flight = min(rows, compute.rows_per_batch)
    # While they are loaded, weights are held once as stored in fp32 and once as computed with.
    weights = num_parameters * (4 + _PARAMETER_BYTES[compute.dtype])
    return {
        "rows": rows,
        "batches": -(-rows // compute.rows_per_batch),
        "predicted_memory_bytes": weights + in_flight * bytes_per_row,
    }
