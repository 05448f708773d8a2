"""The Serve application: its deployments, and what each of them holds.

`conductor` has generations served by all replicas together. `search` is the HTTP ingress; with layout together it holds
everything, and a search takes one hop. With split the deployment `reranker` holds the rerankers; with sharded each
`shards-N` holds a group of shards. Each replica is a member of the conductor's.

`app_builder` is what a Serve config file names as import_path.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from raytower import __version__
from raytower.config import make_config
from raytower.errors import InputError, RaytowerError
from raytower.index.hits import Hits
from raytower.requirements import ray_options
from raytower.runtime import find_nodes
from raytower.serving.conductor import Report, Served, Wanted
from raytower.serving.config import ServeConfig
from raytower.serving.control import Conducting, Member, SwapRefusedError
from raytower.serving.door import REPLICA_HEADER, Message, Receive, Scope, Send, refuse
from raytower.serving.figures import Figures, FiguresBoard, counted_forwards, keep_reporting
from raytower.serving.keys import StoredKey
from raytower.serving.metrics import Metrics
from raytower.serving.plan import check_start, group_name, num_shard_groups, with_gpus
from raytower.serving.ports import keep_replica_local
from raytower.serving.resolve import newest_version, resolve_settings

INGRESS, CONDUCTOR, RERANKER = "search", "conductor", "reranker"
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
_LOGGER = logging.getLogger("raytower.serving")
# Long polls of members, and what operators ask.
_CONDUCTOR_REQUESTS = 1_000
_STAGE_REQUESTS = 256
# Serve admits so many requests more than the application, so that the application answers 429 and health checks.
_SERVE_HEADROOM = 64
_HEALTH_PERIOD_S = 1.0
_HEALTH_TIMEOUT_S = 10.0
# The conductor is waited for so long by a scrape; without it there are the replica's own figures.
_METRICS_S = 1.0
# Requests that a caller gave the longest time end by then.
_SHUTDOWN_SPARE_S = 3.0


# --- building -------------------------------------------------------------------------------------------------


def app_builder(args: dict[str, Any]) -> serve.Application:
    """The application of a config, for the `import_path` of a Serve config file. `args` are `ServeConfig`'s keys."""
    config = with_gpus(make_config(ServeConfig, args, "args"), find_nodes())
    return build_application(config, *check_start(config))


def build_application(
    config: ServeConfig, active: Mapping[str, Served], keys: list[StoredKey]
) -> serve.Application:
    """The deployments of a config, which begin with serving `active`."""
    settings = replica_settings(config)
    origin = hashlib.sha256(json.dumps([__version__, settings], sort_keys=True).encode()).hexdigest()[:16]
    num_groups = num_shard_groups(config, active)
    required = ray_options(config.resources, config.label_selector)
    roles = [INGRESS, *([RERANKER] if config.layout == "split" else [])]
    roles += [group_name(number) for number in range(num_groups)]
    conductor = _deployment(config, CONDUCTOR, ConductorReplica).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_CONDUCTOR_REQUESTS,
        user_config={"active": {name: item.model_dump(mode="json") for name, item in active.items()}},
    )
    bound = conductor.bind(origin, roles, settings)
    reranker = None
    if config.layout == "split":
        cpus = {"num_cpus": config.rerank_num_cpus, "num_gpus": config.rerank_num_gpus or 0, **required}
        deployment = _deployment(config, RERANKER, RerankerReplica).options(
            num_replicas=config.rerank_replicas,
            ray_actor_options=cpus,
            max_ongoing_requests=_STAGE_REQUESTS,
        )
        reranker = deployment.bind(origin, bound)
    groups = [
        _deployment(config, group_name(number), ShardReplica)
        .options(
            num_replicas=config.shard_replicas,
            ray_actor_options={"num_cpus": config.shard_num_cpus, **required},
            max_ongoing_requests=_STAGE_REQUESTS,
        )
        .bind(origin, number, num_groups, bound)
        for number in range(num_groups)
    ]
    ingress = _deployment(config, INGRESS, serve.ingress(_ServedApp())(Ingress)).options(
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus or 0, **required},
        max_ongoing_requests=config.max_ongoing_requests + _SERVE_HEADROOM,
        max_queued_requests=config.max_queued_requests,
        **_replicas(config),
    )
    return ingress.bind(origin, settings, keys, bound, reranker, *groups)


def _deployment(config: ServeConfig, name: str, cls: Callable[..., Any]) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(
        name=name,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.limits.max_timeout_ms / 1000 + _SHUTDOWN_SPARE_S,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        max_constructor_retry_count=1,
        # Replicas of another config come before those that they replace go.
        max_surge_percent=100,
        logging_config=QUIET,
    )(cls)
    return deployment


def _replicas(config: ServeConfig) -> dict[str, Any]:
    if config.autoscaling is None:
        return {"num_replicas": config.replicas}
    scaling = config.autoscaling
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min,
            "initial_replicas": scaling.min,
            "max_replicas": scaling.max,
            "target_ongoing_requests": scaling.target_requests,
        }
    }


def replica_settings(config: ServeConfig) -> dict[str, Any]:
    """What replicas do, without what decides only where the proxy listens and how many there are."""
    outside = {"port", "replicas", "autoscaling", "start_timeout_s", "drain_s", "end_s"}
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in outside}


# --- replicas -------------------------------------------------------------------------------------------------


class ConductorReplica:
    """The conductor in a replica of its own, which holds no model."""

    def __init__(self, origin: str, roles: Sequence[str], settings: dict[str, Any]) -> None:
        keep_replica_local()
        config = ServeConfig.model_validate(settings)
        self._origin = origin
        self._figures = FiguresBoard()
        self._conducting = Conducting(
            origin,
            roles,
            _resolve_in_task,
            newest_version,
            watch_s=config.watch_s,
            linger_s=config.limits.max_timeout_ms / 1000 + 5,
            prepare_timeout_s=max(config.start_timeout_s, 60),
        )
        self._starting: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Begin with what the deployment resolved; a repeated deployment of the same config moves to what it did."""
        active = {name: Served.model_validate(item) for name, item in user_config["active"].items()}
        if self._starting is None:
            self._starting = asyncio.create_task(self._conducting.start(active))
        else:
            await self._conducting.move_to(active)

    async def poll(self, origin: str, report: Report, wait_s: float) -> Wanted:
        return await self._conducting.poll(origin, report, wait_s)

    async def put_metrics(self, origin: str, process: str, text: bytes) -> None:
        """Take a process's metrics. Those of a former config's are not joined to those of this one."""
        if origin == self._origin:
            self._figures.put(process, text)

    async def metrics_of_others(self, process: str) -> dict[str, Figures]:
        return self._figures.others(process)

    async def drain(self) -> None:
        await self._conducting.drain()

    async def control(self, name: str, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An operator's call, its answer under `answer`; or, under `error`, why it was refused, under `kind` how."""
        try:
            method = getattr(self._conducting, name)
            return {"answer": await (method() if wanted is None else method(wanted))}
        except RaytowerError as error:
            kinds = {SwapRefusedError: "refused", InputError: "input"}
            kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "busy")
            return {"error": str(error), "kind": kind}


async def _resolve_in_task(collection: str, settings: Mapping[str, Any], version: str | None) -> Served:
    """In a worker of its own: reading a model's directory imports torch, which the conductor does without."""
    try:
        answer = await _resolve_remote.remote(collection, dict(settings), version)
    except ray.exceptions.RayError as error:
        raise RaytowerError(f"{collection!r} could not be resolved: {error}") from error
    if isinstance(answer, str):
        raise InputError(answer)
    return Served.model_validate(answer)


@ray.remote(num_cpus=0)
def _resolve_remote(collection: str, settings: dict[str, Any], version: str | None) -> Any:
    try:
        return resolve_settings(collection, settings, version).model_dump(mode="json")
    except RaytowerError as error:
        return str(error)


class _Replica:
    """A process that holds parts of generations, as the conductor's member."""

    _member: Member
    _reporting: asyncio.Task[None]

    def _join(
        self, origin: str, role: str, holder: Any, conductor: DeploymentHandle, metrics: Metrics
    ) -> None:
        async def poll(report: Report, wait_s: float) -> Wanted:
            wanted: Wanted = await conductor.poll.remote(origin, report, wait_s)
            return wanted

        async def put(process: str, text: bytes) -> None:
            await conductor.put_metrics.remote(origin, process, text)

        self._member = Member(_own_name(), role, holder, poll)
        self._member.start()
        self._reporting = asyncio.create_task(keep_reporting(metrics, put))


def _own_name() -> str:
    """This replica's name, unlike that of every other process of the server."""
    return str(serve.get_replica_context().replica_id.unique_id)


class RerankerReplica(_Replica):
    """The rerankers of all generations that are served or prepared."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, origin: str, conductor: DeploymentHandle
    ) -> None:
        keep_replica_local()
        from raytower.serving.models import ModelPool
        from raytower.serving.placements import Reranker

        metrics = Metrics(_own_name())
        self._reranker = Reranker(ModelPool(counted_forwards(metrics)))
        self._join(origin, RERANKER, self._reranker, conductor, metrics)
        await self._member.ready()

    async def describe(self, generation_id: str) -> Any:
        return self._reranker.describe(generation_id)

    async def score(self, *arguments: Any) -> Any:
        return await self._reranker.score(*arguments)


class ShardReplica(_Replica):
    """One group of shards of all generations that are served or prepared."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, origin: str, number: int, num_groups: int, conductor: DeploymentHandle
    ) -> None:
        keep_replica_local()
        from raytower.serving.shards import ShardGroup

        self._group = ShardGroup(number, num_groups)
        self._join(origin, group_name(number), self._group, conductor, Metrics(_own_name()))
        await self._member.ready()

    async def counts(self, generation_id: str) -> dict[int, int]:
        return self._group.counts(generation_id)

    async def search(self, *arguments: Any) -> Hits:
        return await self._group.search(*arguments)


class _ServedApp:
    """The ASGI application of whichever replica this is: what `serve.ingress` is given is copied into all of them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # it begins before Serve tells which replica this is
            await _live(receive, send)
            return
        ingress = cast(Ingress, serve.get_replica_context().servable_object)
        await ingress.served_app(scope, receive, send)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


class Ingress(_Replica):
    """A replica of the HTTP ingress: one engine and the application over it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        origin: str,
        settings: dict[str, Any],
        keys: list[StoredKey],
        conductor: DeploymentHandle,
        reranker: DeploymentHandle | None,
        *groups: DeploymentHandle,
    ) -> None:
        keep_replica_local()
        from raytower.serving.local import EngineHolder, Serving
        from raytower.serving.placements import GroupCalls, PlacedParts, RerankerCalls

        config = ServeConfig.model_validate(settings)
        loop = asyncio.get_running_loop()
        open_parts = partial(
            PlacedParts,
            reranker=None
            if reranker is None
            else RerankerCalls(
                describe=_blocking_call(loop, reranker.describe), score=_async_call(reranker.score)
            ),
            groups=[
                GroupCalls(counts=_blocking_call(loop, group.counts), search=_async_call(group.search))
                for group in groups
            ],
            shard_timeout_ms=config.shard_timeout_ms,
            copies=max(config.shard_replicas if groups else 1, config.rerank_replicas if reranker else 1),
            patience_s=config.start_timeout_s,
        )
        others = _others_metrics(loop, conductor)
        self._serving = Serving(config, keys, HandleControl(conductor), open_parts, _own_name(), others)
        self._engine = self._serving.engine
        self._prefix = config.route_prefix.encode()
        self._app = self._serving.app
        self._join(origin, INGRESS, EngineHolder(self._engine), conductor, self._serving.metrics)
        await self._member.ready()

    def __del__(self) -> None:
        if hasattr(self, "_serving"):
            self._serving.close()

    async def check_health(self) -> None:
        """A query through every collection to its JSON. A replica that fails leaves rotation and is replaced."""
        if not self._member.draining:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S - 1):
                await self._engine.check()

    async def served_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with the mark by which the door knows a replica's answer from the proxy's."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (REPLICA_HEADER, self._prefix)]}
            await send(message)

        if scope["type"] == "http" and self._member.draining and not scope["path"].endswith("/healthz"):
            message = "the server is stopping; ask another one"
            await refuse(marked, 503, message, "server_error", "draining", retry=True)
            return
        await self._app(scope, receive, marked)


class HandleControl:
    """What operators ask, passed on to the conductor. It implements `control.Control`."""

    def __init__(self, conductor: DeploymentHandle) -> None:
        self._conductor = conductor

    async def status(self) -> dict[str, Any]:
        return answer_of(await self._conductor.control.remote("status"))

    async def reload(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return answer_of(await self._conductor.control.remote("reload", dict(wanted)))

    async def rollback(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return answer_of(await self._conductor.control.remote("rollback", dict(wanted)))


def answer_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's answer. Raises what `Control` raises."""
    if "error" in result:
        kinds: dict[str, type[RaytowerError]] = {"refused": SwapRefusedError, "input": InputError}
        raise kinds.get(result["kind"], RaytowerError)(result["error"])
    answer: dict[str, Any] = result["answer"]
    return answer


def _others_metrics(
    loop: asyncio.AbstractEventLoop, conductor: DeploymentHandle
) -> Callable[[], Mapping[str, Figures]]:
    """For threads: what the other processes have handed to the conductor; nothing where it does not answer soon."""
    process = _own_name()

    async def ask() -> Mapping[str, Figures]:
        try:
            async with asyncio.timeout(_METRICS_S):
                found: Mapping[str, Figures] = await conductor.metrics_of_others.remote(process)
                return found
        except (TimeoutError, ray.exceptions.RayError) as error:
            _LOGGER.warning("/metrics lacks the other replicas: %s: %s", type(error).__name__, error)
            return {}

    return lambda: asyncio.run_coroutine_threadsafe(ask(), loop).result()


def _async_call(method: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(*arguments: Any) -> Any:
        response = method.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    return call


def _blocking_call(loop: asyncio.AbstractEventLoop, method: Any) -> Callable[..., Any]:
    """A handle's call for threads, which wait for its answer; the loop is the replica's."""

    def call(*arguments: Any) -> Any:
        async def wait() -> Any:
            return await method.remote(*arguments)

        return asyncio.run_coroutine_threadsafe(wait(), loop).result()

    return call
