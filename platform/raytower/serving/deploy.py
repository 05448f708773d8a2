"""Serving under Ray Serve: starting, watching over the application, stopping; and the job that does it all."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import serve as ray_serve
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from raytower.ending import Terminated
from raytower.errors import FormatError, InputError, RaytowerError, find_cause
from raytower.progress import log
from raytower.runtime import SIGNALLED_S, abandon, check_room, ensure_ray, find_nodes, has_ended
from raytower.serving.config import ServeConfig
from raytower.serving.door import DoorSettings
from raytower.serving.graph import (
    CONDUCTOR,
    QUIET,
    answer_of,
    build_application,
)
from raytower.serving.listening import base_url, check_port, shown_versions
from raytower.serving.plan import (
    check_start,
    joins_cluster,
    needed_cpus,
    num_shard_groups,
    replica_needs,
    with_gpus,
)
from raytower.serving.ports import proxy_environment

# It asks this machine, so it ignores a proxy that the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_READY_TIMEOUT_S = 60.0
# Serve's own processes end in that time once no request is under way.
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.2
# Looked at so often: whether the application is still there.
_WATCH_S = 2.0
_STATUS_TIMEOUT_S = 10.0
# Left alone, Serve kills a proxy that has not started within 15 seconds, which a busy machine needs for its imports.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
_ANY_ADDRESS = ("0.0.0.0", "::")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Server:
    """An application that this process has deployed."""

    name: str
    url: str
    """Where its routes are, with the route prefix and without a last slash."""
    collections: tuple[str, ...]
    started_serve: bool
    """Whether Serve was started for it."""
    drain_s: float
    end_s: float
    """How long requests under way may take once it stops."""


def start(config: ServeConfig) -> Server:
    """Serve what a config names; returns once searches are answered.

    Raises:
        InputError: what cannot be served, a taken port, an empty key variable, no key on an address that others
            reach, an application of this name. All that can be is refused before Ray starts.
        FormatError: the index was made by another encoder.
        RaytowerError: a replica could not start, or not within `start_timeout_s`.
    """
    if not (joins_cluster() or ray.is_initialized()):  # a cluster's Serve may hold the port already
        config = config.model_copy(update={"port": check_port(config.host, config.port)})
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
    active, keys = check_start(config)
    secret = [name for name in (config.security.key_env, config.security.admin_key_env) if name]
    cpus = needed_cpus(config, num_shard_groups(config, active)) + 1
    ensure_ray(min_cpus=cpus, secret_variables=secret, show_workers=True)
    config = with_gpus(config, find_nodes())
    check_room(replica_needs(config))
    application = build_application(config, active, keys)
    return _within_start_timeout(config, lambda: _bring_up(config, application))


def _bring_up(config: ServeConfig, application: ray_serve.Application) -> Server:
    others = ray_serve.status()
    if config.name in others.applications and not config.replace:
        found = others.applications[config.name]
        raise InputError(
            f"an application {config.name!r} is served in this cluster already ({found.status.value.lower()}); if its "
            "command was killed, it has no owner any more: set replace to take its place, or choose another name and "
            "route_prefix"
        )
    started_serve = not others.proxies
    config = _start_proxy(config) if started_serve else _find_proxy(config)
    server = Server(
        name=config.name,
        url=base_url(config) + config.route_prefix.rstrip("/"),
        collections=tuple(config.served_collections()),
        started_serve=started_serve,
        drain_s=config.drain_s,
        end_s=config.end_s,
    )
    try:
        _deploy(config, application)
        _wait_until_served(server.url)
    except BaseException:
        stop(server)
        raise
    return server


def stop(server: Server) -> None:
    """Stop an application that this process has deployed; Serve too, if it was started for it and serves nothing else.

    It says first that it stops: readyz and new requests are answered 503, while requests under way end.
    """
    if not ray.is_initialized() or has_ended():
        return
    try:
        _within(server.drain_s + server.end_s + _STOP_TIMEOUT_S, lambda: _stop(server))
    except TimeoutError:
        log("warning: Ray Serve did not stop in order; what is left of it ends with this process")


def _stop(server: Server) -> None:
    if server.name in ray_serve.status().applications:
        _say_that_it_stops(server)
        time.sleep(server.drain_s)
        ray_serve.delete(server.name)
    if server.started_serve and not ray_serve.status().applications:
        ray_serve.shutdown()


def _say_that_it_stops(server: Server) -> None:
    """From now on readyz and new requests are answered 503."""
    if has_ended():
        return
    try:
        _conductor(server).drain.remote().result(timeout_s=_STATUS_TIMEOUT_S / 2)
    except Exception as error:  # it may be what has failed
        log(f"warning: the server could not say that it stops: {type(error).__name__}")


def reload(server: Server, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Have a server's replicas move to another generation together, as `Control.reload`.

    Raises:
        InputError: what cannot be served. RaytowerError: a replica refused it, or another change is under way; all stay
            on what they serve.
    """
    return answer_of(_conductor(server).control.remote("reload", dict(wanted or {})).result())


def status(server: Server) -> dict[str, Any]:
    """What `Control.status` gives."""
    return answer_of(_conductor(server).control.remote("status").result(timeout_s=_STATUS_TIMEOUT_S))


def _conductor(server: Server) -> Any:
    return ray_serve.get_deployment_handle(CONDUCTOR, app_name=server.name)


def serve_on_ray(config: ServeConfig) -> dict[str, Any]:
    """The job with `server: ray`: serve until SIGINT or SIGTERM; SIGHUP moves collections on.

    Returns:
        url, collections with the index versions served last, seconds.

    Raises:
        InputError, FormatError, RaytowerError: as `start`; the application was deleted by somebody, or has failed.
    """
    started = time.monotonic()
    server: Server | None = None
    versions: dict[str, str | None] = {}
    with hangups() as wanted:
        try:
            server = start(config)
            versions = served_versions(server, versions)
            log(f"serving {shown_versions(versions)} at {server.url}/ (the search page); stop with Ctrl-C")
            watch = _Watch(server)
            while True:
                time.sleep(_POLL_S)
                watch.look()
                if wanted:
                    wanted.clear()
                    _reload_all(server)
                    versions = served_versions(server, versions)
                    log(f"serving {shown_versions(versions)}")
        except (KeyboardInterrupt, Terminated):
            if server is None:
                raise
            if not has_ended():
                # Watched indexes may have moved on.
                versions = served_versions(server, versions)
                _say_that_it_stops(server)
            time.sleep(SIGNALLED_S)
        finally:
            if server is not None:
                log("stopping")
                stop(server)
    default = next(iter(versions.values()), None)
    return {
        "url": server.url,
        "index_version": default,
        "collections": versions,
        "seconds": round(time.monotonic() - started, 3),
    }


class _Watch:
    """Notices that an application has gone."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._next = time.monotonic() + _WATCH_S
        self._said: str | None = None

    def look(self) -> None:
        """Raises RaytowerError where Ray has ended, or the application has been deleted or has failed."""
        if has_ended():
            raise RaytowerError("Ray's processes have ended, and the server with them; start it again")
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _WATCH_S
        try:
            found = _within(_STATUS_TIMEOUT_S, ray_serve.status).applications.get(self._server.name)
        except (TimeoutError, RayServeException, ray.exceptions.RayError) as error:
            log(f"warning: Ray Serve does not say how the server is: {type(error).__name__}")
            return
        if found is None:
            raise RaytowerError(
                f"application {self._server.name!r} was deleted by another command, so nothing is served here any more"
            )
        state = found.status.value
        if state == "DEPLOY_FAILED":
            raise RaytowerError(f"application {self._server.name!r} has failed: {found.message}")
        if state != self._said:
            if state == "UNHEALTHY":
                log(f"warning: the server has lost replicas, and starts others: {found.message}")
            elif self._said == "UNHEALTHY":
                log("all replicas are well again")
            self._said = state


# --- proxy and readiness --------------------------------------------------------------------------------------


def _start_proxy(config: ServeConfig) -> ServeConfig:
    """Start Serve, with its HTTP proxy where `config` says; returns it with the port that was picked for 0.

    Raises:
        InputError: the port is taken.
    """
    port = check_port(config.host, config.port)
    limits = config.limits
    door = DoorSettings(
        timeout_ms=config.timeout_ms,
        max_timeout_ms=limits.max_timeout_ms,
        body_timeout_ms=limits.body_timeout_ms,
        max_body_bytes=int(limits.max_body_bytes),
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this module logs what matters of it
    ray_serve.start(
        proxy_location="EveryNode" if config.host in _ANY_ADDRESS else "HeadOnly",
        http_options=HTTPOptions(host=config.host, port=port),
        logging_config=QUIET,
        controller_options={"runtime_env": {"env_vars": proxy_environment(door)}},
    )
    return config.model_copy(update={"port": port})


def _find_proxy(config: ServeConfig) -> ServeConfig:
    """Serve runs in this cluster: its proxy is the only one there can be.

    Raises:
        InputError: it is not where `config` says.
    """
    url = f"{base_url(config)}/-/healthz"
    try:
        with DIRECT.open(url, timeout=5) as reply:
            if reply.read(64) == b"success":
                return config
    except OSError:
        pass
    raise InputError(
        f"Ray Serve already runs in this cluster, and does not listen on {config.host}:{config.port}; serve there by "
        "setting host and port to where it does, with a name and a route_prefix of your own"
    )


def _deploy(config: ServeConfig, application: ray_serve.Application) -> None:
    try:
        ray_serve.run(application, name=config.name, route_prefix=config.route_prefix, blocking=False)
    except Exception as error:
        raise _reason_of(config.name, error) from error


def _reason_of(name: str, error: Exception) -> RaytowerError:
    """The error that a replica raised. Serve passes it on only as a traceback's text in its status."""
    cause = find_cause(error)
    if isinstance(cause, RaytowerError):
        return cause
    if isinstance(error, RayServeException) and "route_prefix" in str(error):
        return InputError(str(error))
    application = ray_serve.status().applications.get(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    for kind, message in re.findall(r"^raytower\.errors\.(\w+): (.+)$", "\n".join(messages), re.MULTILINE):
        return {"InputError": InputError, "FormatError": FormatError}.get(kind, RaytowerError)(message)
    return RaytowerError(f"Ray Serve could not start the application: {error}; its replicas' logs say why")


def _wait_until_served(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    said = ""
    while time.monotonic() < deadline:
        try:
            with DIRECT.open(f"{url}/readyz", timeout=5) as reply:
                if reply.status == 200:
                    return
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.read(200)!r}"
        except OSError as error:
            said = str(error)
        time.sleep(0.1)
    raise RaytowerError(f"{url}/readyz says {said}; the replicas' logs say why")


def served_version(url: str) -> str | None:
    """The index version that a server answers with; None where nothing is ready there."""
    try:
        with DIRECT.open(f"{url}/readyz", timeout=5) as reply:
            return str(json.load(reply)["index_version"])
    except (urllib.error.URLError, OSError, ValueError, KeyError):
        return None


def served_versions(server: Server, before: Mapping[str, str | None]) -> dict[str, str | None]:
    """The index version of each collection; where the conductor does not say, what it was `before`."""
    try:
        found = status(server)["collections"]
    except (RaytowerError, TimeoutError, RayServeException, ray.exceptions.RayError) as error:
        log(f"warning: the server does not say what it serves: {type(error).__name__}")
        found = {}
    return {
        name: found[name]["index_version"] if name in found else before.get(name)
        for name in server.collections
    }


# --- signals of the job ---------------------------------------------------------------------------------------


def _reload_all(server: Server) -> None:
    for name in server.collections:
        try:
            reload(server, {"collection": name})
        except RaytowerError as error:
            log(f"warning: {error}")


@contextmanager
def hangups() -> Iterator[list[str]]:
    """A list that grows with each SIGHUP."""
    wanted: list[str] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: wanted.append("reload"))
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGHUP, before)


# --- limits of time -------------------------------------------------------------------------------------------


def _within_start_timeout(config: ServeConfig, work: Callable[[], Result]) -> Result:
    try:
        return _within(config.start_timeout_s, work)
    except TimeoutError:
        used, total = get_used_memory() / 2**30, get_system_memory() / 2**30
        raise RaytowerError(
            f"the server did not start within start_timeout_s = {config.start_timeout_s} s. {used:.1f} of {total:.1f} "
            "GiB of memory are used; if memory is short, Ray kills the server's processes again and again: give it "
            "more. Raise start_timeout_s if the index or a model takes longer to load"
        ) from None


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of `work`. After `seconds` its thread is left to itself.

    Serve's calls wait for ever for a controller that was killed or cannot start.

    Raises:
        TimeoutError: `work` took longer, or Ray has ended. Also what `work` raises.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not has_ended():
        if wait([done], timeout=_POLL_S).done:
            return done.result()
    abandon()
    raise TimeoutError
