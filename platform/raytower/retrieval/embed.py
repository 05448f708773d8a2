"""`raytower embed`: the vectors of a few texts, on standard output."""

from __future__ import annotations

from typing import Any

from raytower.config import to_json
from raytower.retrieval.config import EmbedConfig
from raytower.retrieval.load import load_engine, own_or
from raytower.retrieval.plans import plan_rows


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Vectors as `raytower encode` makes them of documents, or every search of a query.

    Returns:
        vectors (of each text in order, D numbers), dim, prefix, fingerprint, encoder.

    Raises:
        InputError: no such model, or one that is no encoder.
    """
    engine = load_engine(config.encoder, config)
    prefix = own_or(config.prefix, engine.encoder, config.role, config.encoder)
    return {
        "vectors": engine.encode(config.text, prefix).tolist(),
        "dim": engine.dim,
        "prefix": prefix,
        "fingerprint": engine.fingerprint,
        "encoder": config.encoder,
    }


def plan_embed(config: EmbedConfig) -> dict[str, Any]:
    """Texts and predicted memory."""
    return plan_rows(len(config.text), config, config.encoder, rows_per_batch=len(config.text))


def render_embed(result: dict[str, Any]) -> str:
    """JSON for people too: numbers of a vector are copied, not looked at."""
    return to_json(result)
