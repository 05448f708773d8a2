"""What is served: collections, models, single documents; whether the server is well; and the admin routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from raytower.serving.calls import ServedCollection, ServedModel
from raytower.serving.errors import (
    ApiError,
    NotConfiguredError,
    NotFoundError,
    NotReadyError,
    UnprocessableError,
)
from raytower.serving.http.answers import HttpAnswer, json_answer, json_value
from raytower.serving.http.exchange import Control, Exchange, Parts
from raytower.serving.http.requests import check_text
from raytower.serving.http.security import require_admin

_LOGGER = logging.getLogger("raytower.serving")
_READY_SECONDS = 1.0
_ModelKind = Literal["encoder", "reranker", "classifier"]


class ModelFacts(BaseModel):
    name: str
    max_length: int | None = Field(
        description="tokens; longer texts are cut. Null of an encoder that no request has needed yet"
    )
    dim: int | None = None
    dimensions: list[int] = Field(default=[], description="shorter vectors that it was trained for")
    labels: list[str] = []


class CollectionFacts(BaseModel):
    name: str
    default: bool
    generation: str
    index_version: str
    rows: int
    kind: str
    metric: str
    dim: int | None
    recall: float | None = Field(description="measured share of the exact nearest neighbours that are found")
    encoder: ModelFacts
    reranker: ModelFacts | None
    classifier: ModelFacts | None
    columns: dict[str, str] = Field(description="columns of documents and their types")
    modes: list[str]
    classify_modes: list[str]


class CollectionsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[CollectionFacts]


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: _ModelKind
    max_length: int | None
    dim: int | None = None
    dimensions: list[int] = []
    collections: list[str]


class ModelsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class DocumentResponse(BaseModel):
    id: str
    text: str
    metadata: dict[str, Any]
    index_version: str
    generation: str


class StatusResponse(BaseModel):
    status: str
    index_version: str | None = None
    generation: str | None = None


async def collections(exchange: Exchange) -> HttpAnswer:
    """What each collection serves now; those that are still being loaded are left out."""
    names = exchange.engine.collections
    found = _all_served(exchange)
    return json_answer(
        {
            "object": "list",
            "data": [_collection_facts(served, default=served.name == names[0]) for served in found],
        }
    )


def _all_served(exchange: Exchange) -> list[ServedCollection]:
    found = []
    for name in exchange.engine.collections:
        try:
            found.append(exchange.engine.served(name))
        except NotReadyError:
            continue
    if not found:
        raise NotReadyError("no index is loaded yet; try again", headers={"Retry-After": "1"})
    return found


def _collection_facts(served: ServedCollection, default: bool) -> dict[str, Any]:
    return {
        "name": served.name,
        "default": default,
        "generation": served.generation,
        "index_version": served.index_version,
        "rows": served.rows,
        "kind": served.kind,
        "metric": served.metric,
        "dim": served.encoder.dim,
        "recall": json_value(served.recall),
        "encoder": _model_facts(served.encoder),
        "reranker": _model_facts(served.reranker),
        "classifier": _model_facts(served.classifier),
        "columns": dict(served.columns),
        "modes": list(served.modes),
        "classify_modes": list(served.classify_modes),
    }


def _model_facts(model: ServedModel | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {
        "name": model.name,
        "max_length": model.max_length,
        "dim": model.dim,
        "dimensions": list(model.dimensions),
        "labels": list(model.labels),
    }


async def models(exchange: Exchange) -> HttpAnswer:
    """The models, in OpenAI's shape."""
    return json_answer({"object": "list", "data": _model_entries(exchange)})


async def model(exchange: Exchange) -> HttpAnswer:
    """One model by its name."""
    entries = _model_entries(exchange)
    name = exchange.parameters["model"]
    for entry in entries:
        if entry["id"] == name:
            return json_answer(entry)
    known = ", ".join(dict.fromkeys(entry["id"] for entry in entries))
    raise NotFoundError(f"there is no model {name[:80]!r}; there are {known}")


def _model_entries(exchange: Exchange) -> list[dict[str, Any]]:
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for served in _all_served(exchange):
        kinds: Mapping[_ModelKind, ServedModel | None] = {
            "encoder": served.encoder,
            "reranker": served.reranker,
            "classifier": served.classifier,
        }
        for kind, found in kinds.items():
            if found is None:
                continue
            facts = {
                "id": found.name,
                "object": "model",
                "created": 0,
                "owned_by": "raytower",
                "kind": kind,
                "max_length": found.max_length,
                "dim": found.dim,
                "dimensions": list(found.dimensions),
                "collections": [],
            }
            entries.setdefault((kind, found.name), facts)["collections"].append(served.name)
    return list(entries.values())


async def document(exchange: Exchange) -> HttpAnswer:
    """One document by its id."""
    given = exchange.query()
    if "id" not in given:
        raise UnprocessableError("id: is required, as in /v1/documents?id=d1")
    return json_answer(*await read_document(exchange, given["id"]))


async def read_document(exchange: Exchange, id: str) -> tuple[dict[str, Any], Any]:
    """A document as JSON has it, and the engine's answer. Raises NotFoundError."""
    check_text("id", id, exchange.config.limits.max_query_characters)
    try:
        id.encode()
    except UnicodeEncodeError as error:
        raise UnprocessableError("id: must be valid Unicode") from error
    deadline = exchange.deadline()
    exchange.served()
    answer = await exchange.ask(exchange.engine.document, id, deadline)
    if answer.text is None and answer.metadata is None:
        raise NotFoundError(f"there is no document {id[:200]!r} in collection {exchange.collection!r}")
    value = {
        "id": answer.id,
        "text": answer.text or "",
        "metadata": json_value(answer.metadata or {}),
        "index_version": answer.index_version,
        "generation": answer.generation,
    }
    return value, answer


# --- health ---------------------------------------------------------------------------------------------------


class Readiness:
    """Answers readyz by a query through the engine; askers share one while it runs, and for a second."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._check: asyncio.Task[None] | None = None
        self._begun = 0.0

    async def check(self) -> None:
        """Raises NotReadyError: the query failed or took too long."""
        task = self._check
        # A slow query is not begun anew: its askers would be answered nothing, and no query would ever end.
        if task is None or (task.done() and time.monotonic() - self._begun > _READY_SECONDS):
            self._begun = time.monotonic()
            task = self._check = asyncio.create_task(self._query())
        # One asker that leaves must not end the query of the others.
        await asyncio.shield(task)

    async def _query(self) -> None:
        timeout_s = self._parts.config.timeout_ms / 1000
        try:
            await asyncio.wait_for(self._parts.engine.check(), timeout_s)
        except NotReadyError:
            raise
        except TimeoutError as error:
            raise NotReadyError(f"a query was not answered within {timeout_s:g} s") from error
        except ApiError as error:
            raise NotReadyError(f"a query failed: {error}") from error
        except Exception as error:
            _LOGGER.exception("the query that tells readiness failed")
            raise NotReadyError("a query failed; the server's log says why") from error


async def healthz(exchange: Exchange) -> HttpAnswer:
    """The process is alive."""
    return json_answer({"status": "ok"})


def readyz(readiness: Readiness) -> Callable[[Exchange], Awaitable[HttpAnswer]]:
    """The route that answers whether searches are answered."""

    async def answer(exchange: Exchange) -> HttpAnswer:
        """A query went through encoder, index and reranker."""
        await readiness.check()
        served = _all_served(exchange)[0]
        return json_answer(
            {"status": "ready", "index_version": served.index_version, "generation": served.generation}
        )

    return answer


async def metrics(exchange: Exchange) -> HttpAnswer:
    """Metrics for Prometheus."""
    if exchange.parts.metrics is None:
        raise NotConfiguredError("this server keeps no metrics")
    body, content_type = await asyncio.to_thread(exchange.parts.metrics.render)
    return HttpAnswer(body, content_type=content_type)


# --- admin ----------------------------------------------------------------------------------------------------


def _control(exchange: Exchange) -> Control:
    require_admin(exchange.access)
    if exchange.parts.control is None:
        raise NotConfiguredError("this server cannot be told to reload")
    return exchange.parts.control


async def admin_status(exchange: Exchange) -> HttpAnswer:
    """What every member of the server serves and has prepared."""
    control = _control(exchange)
    return json_answer(json_value(dict(await control.status())))


async def admin_reload(exchange: Exchange) -> HttpAnswer:
    """Swap to another generation on all members, or on none."""
    control = _control(exchange)
    return json_answer(json_value(dict(await control.reload(await _wanted(exchange)))))


async def admin_rollback(exchange: Exchange) -> HttpAnswer:
    """Swap back to the generation before."""
    control = _control(exchange)
    return json_answer(json_value(dict(await control.rollback(await _wanted(exchange)))))


async def _wanted(exchange: Exchange) -> Mapping[str, Any]:
    if not exchange.body:
        return {}
    value = await exchange.value()
    if not isinstance(value, dict):
        raise UnprocessableError("the body must be a JSON object")
    return {name: item for name, item in value.items() if item is not None}
