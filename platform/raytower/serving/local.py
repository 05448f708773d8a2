"""What one serving process holds: an engine, the application over it, and what they are seen by. Imports no Ray."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

from raytower.serving import observe
from raytower.serving.access_log import AccessLog, RequestFacts
from raytower.serving.config import ServeConfig
from raytower.serving.control import Control
from raytower.serving.engine import EngineLimits, OpenParts, SearchEngine
from raytower.serving.figures import AllMetrics, Figures, counted_forwards
from raytower.serving.generation import Generation
from raytower.serving.http.admin import AdminRoutes
from raytower.serving.http.application import create_app
from raytower.serving.http.search import render
from raytower.serving.keys import StoredKey, read_keys
from raytower.serving.metrics import Metrics
from raytower.serving.models import ModelPool


class Serving:
    """The engine and the application of a process.

    `replica` tells its metrics and spans from those of others. `others` gives the metrics of the other processes, where
    there are any; it may block.
    """

    def __init__(
        self,
        config: ServeConfig,
        keys: Sequence[StoredKey],
        control: Control,
        open_parts: Callable[[ModelPool], OpenParts],
        replica: str = "0",
        others: Callable[[], Mapping[str, Figures]] = dict,
    ) -> None:
        # torch and transformers leave half a million objects; everybody waits while a full collection looks at them.
        # What is loaded from now on comes and goes with generations.
        gc.freeze()
        self.metrics = Metrics(replica)
        self._forwards = counted_forwards(self.metrics)
        self.engine = SearchEngine(
            list(config.served_collections()),
            open_parts(ModelPool(self._forwards)),
            limits=EngineLimits(max_requests=config.max_ongoing_requests, max_wait_ms=config.max_wait_ms),
            render=render,
            metrics=self.metrics,
        )
        self._telemetry = observe.install(config.observe, replica)
        self._log = AccessLog(config.access_log) if config.access_log.path else None
        observers: list[Callable[[RequestFacts], None]] = [self._telemetry.record]
        if self._log is not None:
            observers.append(self._log.record)
        told = AllMetrics(self.metrics, others)
        self.app = create_app(self.engine, config, read_keys(keys), told, AdminRoutes(control), observers)

    def close(self) -> None:
        """Write and send what waits; no more passes are computed."""
        self._forwards.close()
        self._telemetry.close()
        if self._log is not None:
            self._log.close()


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
