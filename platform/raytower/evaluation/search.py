"""`raytower search`: one question to an index, from the command line."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raytower.config import Config
from raytower.errors import InputError
from raytower.evaluation.recall import Retriever
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine


class SearchConfig(Config):
    """`encoder` null is the one whose path the index recorded; `query_prefix` null is the encoder's own."""

    index: str
    query: str
    k: int = Field(default=10, ge=1)
    encoder: str | None = None
    reranker: str | None = None
    recall_k: int = Field(default=100, ge=1)
    query_prefix: str | None = None


def search(config: SearchConfig) -> dict[str, Any]:
    """The best k documents; fewer where the index holds fewer.

    Raises:
        InputError: an empty query, no such index, an encoder with another fingerprint than the index.
    """
    if not config.query.strip():
        raise InputError("query is empty; give some text with --query TEXT")
    index = Index.open(config.index)
    encoder = Encoder.load(config.encoder or index.manifest.encoder)
    index.check_fingerprint(encoder.fingerprint)
    scorer = CrossScorer(CrossEncoder.load(config.reranker)) if config.reranker else None
    retriever = Retriever(
        ForwardEngine(encoder),
        index,
        scorer,
        scorer.fusion if scorer else None,
        query_prefix=encoder.prefix_for("query") if config.query_prefix is None else config.query_prefix,
    )
    found = retriever.search([config.query], k=config.k, recall_k=config.recall_k)
    return {
        "index_version": index.version,
        "results": [{"id": hit.id, "score": hit.score, "text": hit.text} for hit in found.hits[0]],
    }


def plan_search(config: SearchConfig) -> dict[str, Any]:
    """What would be searched."""
    index = Index.open(config.index, verify="none")
    return {"index_version": index.version, "rows": index.num_rows, "encoder": config.encoder or index.manifest.encoder}


def render_search(result: dict[str, Any]) -> str:
    """Results for people: score, id and text, a line each."""
    lines = [f"{hit['score']:8.4f}  [{hit['id']}]  {hit['text']}" for hit in result["results"]]
    return "\n".join(lines)
