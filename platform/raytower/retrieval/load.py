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
from raytower.models.engine_choice import graph_directory
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.models.trained_prefixes import own_prefix
from raytower.retrieval.config import EngineConfig, RerankConfig, RetrieverConfig
from raytower.retrieval.retriever import Retriever


def load_engine(name: str, config: EngineConfig) -> ForwardEngine:
    """The encoder of a job, ready to encode."""
    return ForwardEngine(
        Encoder.load(name), **config.engine_settings, directory=graph_directory(name, config.engine)
    )


def load_classifier(name: str, config: EngineConfig) -> ClassifierEngine:
    """The text classifier of a job, ready to classify."""
    model = TextClassifier.load(name)
    return ClassifierEngine(model, **config.engine_settings, directory=graph_directory(name, config.engine))


def load_reranker(name: str, config: RerankConfig) -> CrossScorer:
    """The reranker of a job, ready to score; its stored fusion is in it."""
    return load_scorer(name, config, config.rerank_max_length)


def load_scorer(name: str, config: EngineConfig, max_length: int | None) -> CrossScorer:
    """A reranker that reads so many tokens of a pair; None is its own limit."""
    settings = {**config.engine_settings, "max_length": max_length}
    return CrossScorer(CrossEncoder.load(name), **settings, directory=graph_directory(name, config.engine))


def fusion_of(reranker: str | None, stored: Fusion | None, weight: float | None) -> Fusion | None:
    """How recall scores and rerank logits are mixed; the one rule of search, evaluate and serve.

    Args:
        reranker: the reranker's name, for messages; None where there is none.
        stored: the fusion stored with it; None where it was never tuned.
        weight: replaces the stored weight; None keeps it.

    Returns:
        the fusion, or None where the logit alone orders: nothing is stored, and the weight is None or 1.

    Raises:
        InputError: a weight without a reranker; or a weight, and no stored means and deviations to use it with.
    """
    if weight is None:
        return stored
    if reranker is None:
        raise InputError(f"fusion_weight is {weight}, but there is no reranker; name one, or set it to null")
    if stored is not None:
        return replace(stored, weight=weight)
    if weight == 1:
        return None
    raise InputError(
        f"fusion_weight is {weight}, but reranker {reranker!r} stores no fusion, so the scales of recall and rerank "
        "scores are unknown; tune one on dev queries with `raytower tune-fusion`, or set fusion_weight to null (rerank "
        "scores alone)"
    )


def load_retriever(engine: ForwardEngine, index: Index, config: RetrieverConfig, name: str) -> Retriever:
    """Encoder (called `name`), index and, if the config names one, a reranker, put together as a job's config says.

    Raises:
        InputError: a fusion weight that cannot be used (see `fusion_of`).
    """
    scorer = None if config.reranker is None else load_reranker(config.reranker, config)
    fusion = fusion_of(config.reranker, scorer.fusion if scorer else None, config.fusion_weight)
    prefix = own_or(config.query_prefix, engine.encoder, "query", name)
    return Retriever(engine, index, scorer, fusion, query_prefix=prefix)


def open_index_manifest(uri: str, fingerprint: str) -> IndexManifest:
    """The published version's manifest, for plans. Raises FormatError where another encoder made the index."""
    manifest = open_manifest(uri)
    check_fingerprint(manifest, fingerprint)
    return manifest


def own_or(prefix: str | None, encoder: Encoder, role: Literal["query", "document"], name: str) -> str:
    """The configured prefix, or the own of the encoder `name` where it is null."""
    return own_prefix(encoder, role, name) if prefix is None else prefix
