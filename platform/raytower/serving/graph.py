"""The Serve application: its deployments, and what each of them holds.

`together`: one deployment, the HTTP ingress, holds everything; a search takes one hop. `apart`: one more deployment
for each index shard, and the ingress asks all of them at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import LoggingConfig

from raytower import __version__
from raytower.index.manifest import IndexManifest
from raytower.serving.app import create_app
from raytower.serving.calls import DEFAULT_COLLECTION
from raytower.serving.config import ServeConfig
from raytower.serving.engine import SearchEngine
from raytower.serving.forwards import Forwards
from raytower.serving.models import ModelPool
from raytower.serving.opening import LocalParts
from raytower.serving.ports import keep_replica_local
from raytower.serving.resolve import encoder_for, generation_of
from raytower.storage import absolute_if_local

INGRESS_NAME = "search"
# Serve admits so many requests more than the application, so that the application answers 429 and health checks.
_SERVE_HEADROOM = 64
# Keys that decide where the proxy listens or how many replicas there are, not what a replica does.
_OUTSIDE_KEYS = {"host", "port", "replicas", "api_key_env", "start_timeout_s"}
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
_LOGGER = logging.getLogger("raytower.serving")


class Ingress:
    """A replica of the HTTP ingress: one engine and the application over it."""

    def __init__(self, settings: dict[str, Any], api_key_sha256: str | None) -> None:
        keep_replica_local()
        config = ServeConfig.model_validate(settings)
        self._config = config
        self._api_key_sha256 = bytes.fromhex(api_key_sha256) if api_key_sha256 else None
        self._engine = SearchEngine([DEFAULT_COLLECTION], LocalParts(ModelPool(Forwards())))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the named version. If that fails, a replica that has an older one keeps it: old answers beat none."""
        try:
            generation = await asyncio.to_thread(generation_of, self._config, user_config["version"])
            await self._engine.prepare(generation)
            self._engine.activate(generation.id)
        except Exception:
            if not self._engine.active():
                raise
            _LOGGER.exception("index version %r cannot be served", user_config["version"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._engine, self._config, self._api_key_sha256)


def build_application(config: ServeConfig, manifest: IndexManifest) -> serve.Application:
    """The deployments that serve one index version.

    Raises:
        InputError: the variable that should hold the API key is unset or empty, or no encoder is named.
    """
    settings = config_for_replicas(config, manifest).model_dump(mode="json")
    digest = config.api_key_sha256()
    key = digest.hex() if digest else None
    kept = {name: value for name, value in settings.items() if name not in _OUTSIDE_KEYS}
    # If the code version stays equal, Serve changes running replicas in place through `reconfigure`. By default
    # it gives every run a random one and restarts all replicas.
    identity = json.dumps([__version__, kept, key], sort_keys=True)
    common: dict[str, Any] = {
        "version": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "_internal": True,
        "user_config": {"version": manifest.version},
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": config.timeout_ms / 1000 + 3,
        # Serve replaces a dead process after a failed check; by default it checks every 10 s.
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": 1,
        "logging_config": QUIET,
    }
    ingress = serve.deployment(
        name=INGRESS_NAME,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests + config.max_queued_requests + _SERVE_HEADROOM,
    )(serve.ingress()(Ingress))
    # Only the driver's environment has the key's variable; replicas get the key's digest.
    return ingress.options(**common).bind({**settings, "api_key_env": None}, key)


def config_for_replicas(config: ServeConfig, manifest: IndexManifest) -> ServeConfig:
    """The config with its encoder named, and with paths by which every replica finds the same index and models."""
    names = {"index": config.index, "encoder": encoder_for(config, manifest.encoder)}
    if config.reranker:
        names["reranker"] = config.reranker
    return config.model_copy(update={key: absolute_if_local(name) for key, name in names.items()})


def needed_cpus(config: ServeConfig, num_shards: int) -> float:
    """Logical CPUs that all processes together ask Ray for."""
    apart = num_shards if config.layout == "apart" else 0
    return config.replicas * config.num_cpus + apart * config.shard_num_cpus
