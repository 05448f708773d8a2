"""Loads the parts of a retrieval job: encoder, classifier, reranker, retriever, an index's manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from raytower.errors import InputError
from raytower.index.hybrid import HybridFusion, check_mode
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index, check_fingerprint
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.engine_choice import graph_directory
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.models.search_mode import SearchMode
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.models.trained_prefixes import own_prefix
from raytower.progress import log
from raytower.retrieval.config import EngineConfig, ModeConfig, RerankConfig, RetrieverConfig
from raytower.retrieval.retriever import Retriever


def load_engine(name: str, config: EngineConfig) -> ForwardEngine:
    """The encoder of a job, ready to encode."""
    return ForwardEngine(
        Encoder.load(name), **config.engine_settings, directory=graph_directory(name, config.engine)
    )


def load_query_engine(name: str, config: ModeConfig) -> ForwardEngine | None:
    """The encoder of a job's queries; None where they are searched for by their words alone."""
    return None if config.mode == "lexical" else load_engine(name, config)


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


def fusion_in(mode: SearchMode, fusion: Fusion | None, weight: float | None) -> Fusion | None:
    """A fusion that serves a mode; None, where the logit alone orders.

    Recall scores of different modes have different scales, so a fusion serves the mode that it was tuned in.

    Raises:
        InputError: a weight is asked for (see `fusion_of`), and it would mix scores of another mode.
    """
    if fusion is None or fusion.mode == mode:
        return fusion
    if weight is not None and weight != 1:
        raise InputError(
            f"fusion_weight is {weight} and mode is {mode}, but the reranker's fusion was tuned on recall scores of "
            f"mode {fusion.mode}, which have another scale; tune it again with `raytower tune-fusion --mode {mode}`, "
            "or set fusion_weight to null (rerank scores alone)"
        )
    log(f"the reranker's fusion was tuned in mode {fusion.mode}; in mode {mode} its score alone orders")
    return None


def load_retriever(
    engine: ForwardEngine | None, index: Index, config: RetrieverConfig, name: str
) -> Retriever:
    """Encoder (called `name`), index and, if the config names one, a reranker, put together as a job's config says.

    Raises:
        InputError: a fusion weight that cannot be used (see `fusion_of`), or a mode that the index does not have.
    """
    check_mode(index.manifest, config.mode)
    scorer = None if config.reranker is None else load_reranker(config.reranker, config)
    fusion = fusion_of(config.reranker, scorer.fusion if scorer else None, config.fusion_weight)
    return Retriever(
        engine,
        index,
        scorer,
        fusion_in(config.mode, fusion, config.fusion_weight),
        query_prefix=own_or(config.query_prefix, engine.encoder, "query", name) if engine else "",
        mode=config.mode,
        hybrid=HybridFusion.of(index.manifest, config.hybrid),
    )


def open_index_manifest(
    uri: str, fingerprint: str | None, mode: SearchMode = "dense", encoder: str | None = None
) -> IndexManifest:
    """The published version's manifest, for plans; without a fingerprint no encoder is looked at.

    Raises:
        FormatError: another encoder made the index. InputError: a mode that it does not have.
    """
    manifest = open_manifest(uri)
    check_mode(manifest, mode)
    if fingerprint is not None:
        check_fingerprint(manifest, fingerprint, encoder)
    return manifest


def load_encoder_of(manifest: IndexManifest, mode: SearchMode, name: str) -> Encoder | None:
    """The encoder `name` of queries to an index version; None in mode lexical, which needs none.

    Raises:
        InputError: there is no such model, or the version cannot be searched in this mode.
        FormatError: the index was made by another encoder.
    """
    check_mode(manifest, mode)
    if mode == "lexical":
        return None
    encoder = Encoder.load(name)
    check_fingerprint(manifest, encoder.fingerprint, name)
    return encoder


def own_or(prefix: str | None, encoder: Encoder, role: Literal["query", "document"], name: str) -> str:
    """The configured prefix, or the own of the encoder `name` where it is null."""
    return own_prefix(encoder, role, name) if prefix is None else prefix
