"""Loads the parts of a retrieval job: encoder, classifier, reranker, retriever, an index's manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from raytower.errors import InputError
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, check_fingerprint
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.retrieval.config import EngineConfig, RerankConfig, RetrieverConfig
from raytower.retrieval.retriever import Retriever


def load_engine(name: str, config: EngineConfig) -> ForwardEngine:
    """The encoder of a job, ready to encode."""
    return ForwardEngine(Encoder.load(name), **config.engine_settings)


def load_classifier(name: str, config: EngineConfig) -> ClassifierEngine:
    """The text classifier of a job, ready to classify."""
    return ClassifierEngine(TextClassifier.load(name), **config.engine_settings)


def load_reranker(
    name: str, config: RerankConfig, fusion_weight: float | None
) -> tuple[CrossScorer, Fusion | None]:
    """A reranker and the fusion of its logits with recall scores.

    Args:
        name: reranker directory or hub id.
        config: precision, length and batch size.
        fusion_weight: replaces the weight stored with the reranker; null keeps it. A reranker without a stored
            fusion orders by its logit alone.

    Raises:
        InputError: a weight is given and the reranker has no stored means and deviations to use it with.
    """
    settings = {**config.engine_settings, "max_length": config.rerank_max_length}
    scorer = CrossScorer(CrossEncoder.load(name), **settings)
    return scorer, fusion_of(name, scorer.fusion, fusion_weight)


def fusion_of(reranker: str, stored: Fusion | None, weight: float | None) -> Fusion | None:
    """How a reranker's logits mix with recall scores; None orders by the logit alone.

    Raises:
        InputError: a weight is given and the reranker has no stored means and deviations to use it with.
    """
    if weight is None:
        return stored
    if stored is not None:
        return replace(stored, weight=weight)
    if weight == 1:
        return None
    raise InputError(
        f"fusion_weight is {weight}, but reranker {reranker!r} stores no fusion, so the scales of recall and "
        "rerank scores are unknown; tune one on dev queries, or set fusion_weight to null (rerank scores alone)"
    )


def load_retriever(engine: ForwardEngine, index: Index, config: RetrieverConfig) -> Retriever:
    """Encoder, index and, if the config names one, a reranker, put together as a job's config says.

    Raises:
        InputError: a fusion weight without a reranker, or one that cannot be used (see `load_reranker`).
    """
    prefix = own_or(config.query_prefix, engine.encoder, "query")
    if config.reranker is None:
        if config.fusion_weight is not None:
            raise InputError(
                f"fusion_weight is {config.fusion_weight}, but there is no reranker; name one, or set it to null"
            )
        return Retriever(engine, index, query_prefix=prefix)
    scorer, fusion = load_reranker(config.reranker, config, config.fusion_weight)
    return Retriever(engine, index, scorer, fusion, query_prefix=prefix)


def open_index_manifest(uri: str, fingerprint: str) -> IndexManifest:
    """The published version's manifest, for plans. Raises FormatError where another encoder made the index."""
    manifest = open_manifest(uri)
    check_fingerprint(manifest, fingerprint)
    return manifest


def own_or(prefix: str | None, encoder: Encoder, role: Literal["query", "document"]) -> str:
    """The configured prefix, or the encoder's own where it is null."""
    return encoder.prefix_for(role) if prefix is None else prefix
