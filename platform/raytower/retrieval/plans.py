"""Plans of jobs over rows of text: batches, and predicted memory. Models are loaded to count their parameters."""

from __future__ import annotations

from typing import Any

from raytower.models.compute import PARAMETER_BYTES, check_max_length
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.models.text_classifier import TextClassifier
from raytower.retrieval.config import EngineConfig

# A generous estimate for a text with its token ids and the objects around it.
_BYTES_PER_TEXT_IN_FLIGHT = 8_192


def plan_rows(
    rows: int,
    config: EngineConfig,
    encoder_name: str | None,
    *,
    rows_per_batch: int,
    candidates: int = 0,
    reranker: str | None = None,
) -> dict[str, Any]:
    """The plan of a job over `rows` texts: batches, and the memory of weights and of one batch in flight.

    Args:
        rows: texts, queries or pairs.
        config: precision and length.
        encoder_name: encoder directory or hub id; loaded to count its parameters. None where none is needed.
        rows_per_batch: rows in flight at once.
        candidates: recalled documents held for each row.
        reranker: reranker directory, or None.
    """
    num_parameters, dim, fingerprint = 0, 0, None
    if encoder_name is not None:
        encoder = Encoder.load(encoder_name)
        if config.max_length is not None:
            check_max_length(config.max_length, encoder.max_positions)
        num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        dim, fingerprint = encoder.dim, encoder.fingerprint
    if reranker is not None:
        num_parameters += sum(parameter.numel() for parameter in CrossEncoder.load(reranker).parameters())
    per_row = _BYTES_PER_TEXT_IN_FLIGHT * (1 + candidates) + dim * 4
    plan = _plan_memory(rows, rows_per_batch, num_parameters, config.dtype, per_row)
    return {**plan, "fingerprint": fingerprint}


def plan_reranker_rows(
    rows: int, config: EngineConfig, name: str, *, rows_per_batch: int, max_length: int | None
) -> dict[str, Any]:
    """The plan of scoring `rows` pairs of `max_length` tokens, like `plan_rows`."""
    reranker = CrossEncoder.load(name)
    if max_length is not None:
        check_max_length(max_length, reranker.max_positions)
    num_parameters = sum(parameter.numel() for parameter in reranker.parameters())
    plan = _plan_memory(rows, rows_per_batch, num_parameters, config.dtype, 2 * _BYTES_PER_TEXT_IN_FLIGHT)
    return {**plan, "fingerprint": reranker.fingerprint}


def plan_classifier_rows(
    rows: int, config: EngineConfig, name: str, *, rows_per_batch: int
) -> dict[str, Any]:
    """The plan of classifying `rows` texts, like `plan_rows`; the classifier is loaded to count its parameters."""
    classifier = TextClassifier.load(name)
    if config.max_length is not None:
        check_max_length(config.max_length, classifier.max_positions)
    num_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    # A logit and a probability of each label.
    per_row = _BYTES_PER_TEXT_IN_FLIGHT + classifier.num_labels * 8
    plan = _plan_memory(rows, rows_per_batch, num_parameters, config.dtype, per_row)
    return {**plan, "labels": classifier.num_labels, "fingerprint": classifier.fingerprint}


def _plan_memory(
    rows: int, rows_per_batch: int, num_parameters: int, dtype: str, bytes_per_row: int
) -> dict[str, Any]:
    in_flight = min(rows, rows_per_batch)
    # During loading, memory holds the weights twice: in fp32 as stored, and in the precision of the forward pass.
    weights = num_parameters * (4 + PARAMETER_BYTES[dtype])
    return {
        "rows": rows,
        "batches": -(-rows // rows_per_batch),
        "predicted_memory_bytes": weights + in_flight * bytes_per_row,
    }
