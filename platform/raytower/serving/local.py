"""An engine and the application over it, as every server puts them together. Imports no Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.serving.app import create_app
from raytower.serving.config import ServeConfig
from raytower.serving.control import Control
from raytower.serving.engine import EngineLimits, OpenParts, SearchEngine
from raytower.serving.generation import Generation
from raytower.serving.keys import StoredKey
from raytower.serving.schemas import ApiError, UnprocessableError


def make_engine(config: ServeConfig, open_parts: OpenParts) -> SearchEngine:
    """The engine of a server's collections, which has nothing to serve yet."""
    return SearchEngine(
        list(config.served_collections()),
        open_parts,
        limits=EngineLimits(max_requests=config.max_ongoing_requests),
    )


def make_app(config: ServeConfig, engine: SearchEngine, keys: Sequence[StoredKey], control: Control) -> Any:
    """The ASGI application over an engine."""
    return create_app(engine, config, bytes.fromhex(keys[0]["sha256"]) if keys else None)


class ConflictError(ApiError):
    """A change that was refused, or that came during another one; nothing has changed."""

    status, type, code = 409, "invalid_request_error", "not_changed"


class ApiControl:
    """Operators' calls behind the admin routes: what `control` raises becomes an answer's status."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self) -> Mapping[str, Any]:
        return await _told(self._control.status())

    async def reload(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return await _told(self._control.reload(wanted))

    async def rollback(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return await _told(self._control.rollback(wanted))


async def _told(call: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Raises UnprocessableError, ConflictError."""
    try:
        return await call
    except ApiError:
        raise
    except (InputError, FormatError) as error:
        raise UnprocessableError(str(error)) from error
    except RaytowerError as error:
        raise ConflictError(str(error)) from error


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
