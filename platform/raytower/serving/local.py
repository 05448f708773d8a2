"""An engine and the application over it, as every server puts them together. Imports no Ray."""

from __future__ import annotations

from typing import Any

from raytower.serving.app import create_app
from raytower.serving.config import ServeConfig
from raytower.serving.control import Control
from raytower.serving.engine import EngineLimits, OpenParts, SearchEngine
from raytower.serving.generation import Generation


def make_engine(config: ServeConfig, open_parts: OpenParts) -> SearchEngine:
    """The engine of a server's collections, which has nothing to serve yet."""
    return SearchEngine(
        list(config.served_collections()),
        open_parts,
        limits=EngineLimits(max_requests=config.max_ongoing_requests),
    )


def make_app(config: ServeConfig, engine: SearchEngine, key_digest: str | None, control: Control) -> Any:
    """The ASGI application over an engine."""
    return create_app(engine, config, bytes.fromhex(key_digest) if key_digest else None)


class EngineHolder:
    """An engine as the conductor's member holds generations in it."""

    def __init__(self, engine: SearchEngine) -> None:
        self._engine = engine

    async def prepare(self, generation: Generation) -> None:
        await self._engine.prepare(generation)

    def held(self) -> frozenset[str]:
        active = {generation.id for generation in self._engine.active().values()}
        return frozenset(active | self._engine.prepared().keys())

    def activate(self, generation_id: str) -> None:
        self._engine.activate(generation_id)

    def drop(self, generation_id: str) -> None:
        self._engine.drop(generation_id)
