"""Serving under Ray Serve: starting, moving to another index version, stopping, and the job that does all three."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray import serve as ray_serve
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from raytower.ending import Terminated
from raytower.errors import FormatError, InputError, RaytowerError, find_cause
from raytower.index.manifest import IndexManifest
from raytower.index.reader import check_fingerprint
from raytower.index.versions import open_manifest
from raytower.models.directory import resolve_model
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.progress import log
from raytower.runtime import SIGNALLED_S, abandon, ensure_ray, has_ended
from raytower.serving.config import ServeConfig
from raytower.serving.graph import QUIET, build_application, needed_cpus
from raytower.serving.ports import PROXY_ENVIRONMENT
from raytower.serving.resolve import encoder_for

APP_NAME = "raytower"
# It asks this machine, so it ignores a proxy that the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.2
Result = TypeVar("Result")


def start(config: ServeConfig, version: str | None = None) -> str:
    """Serve an index version (None: the published one) and return the base URL once searches are answered.

    Raises:
        InputError: no such index or model, the port is taken, or the API key's variable is empty.
        FormatError: the index was made by another encoder.
        RaytowerError: a replica could not start, or not within `start_timeout_s`.
    """
    manifest = check_parts(config, version)
    config.api_key_sha256()
    secret = [config.api_key_env] if config.api_key_env else []
    cpus = needed_cpus(config, len(manifest.shards)) + 1
    ensure_ray(min_cpus=cpus, secret_variables=secret, show_workers=True)
    if config.host not in ("127.0.0.1", "localhost", "::1") and config.api_key_env is None:
        log(f"warning: listening on {config.host} without a key; set api_key_env, or keep to 127.0.0.1")
    was_running = _is_running()
    try:
        return _within_start_timeout(config, lambda: _bring_up(config, manifest))
    except BaseException:
        if not was_running:
            stop()
        raise


def _bring_up(config: ServeConfig, manifest: IndexManifest) -> str:
    config = _start_proxy(config)
    url = base_url(config)
    _deploy(config, manifest)
    _wait_until_served(url, manifest.version)
    return url


def reload(config: ServeConfig, version: str | None = None) -> str:
    """Move the running server to another index version (None: the published one) without failing a request.

    `config` must be the one that it was started with (with the port that it got).

    Returns:
        The version now served.

    Raises:
        InputError: no such version. FormatError: another encoder made it. The version before stays.
        RaytowerError: a replica could not open it; the version before is put back.
    """
    url = base_url(config)
    before = served_version(url)
    manifest = check_parts(config, version)
    if manifest.version == before:
        return manifest.version
    try:
        _within_start_timeout(config, lambda: _bring_up(config, manifest))
    except RaytowerError:
        if before is not None:
            _deploy(config, check_parts(config, before))
        raise
    return manifest.version


def stop() -> None:
    """Stop serving. Ray Serve itself stops too unless it has other applications. Without a server nothing happens."""
    if not ray.is_initialized() or has_ended():
        return
    try:
        _within(_STOP_TIMEOUT_S, _stop)
    except TimeoutError:
        log("warning: Ray Serve did not stop in order; what is left of it ends with this process")


def _stop() -> None:
    if _is_running():
        ray_serve.delete(APP_NAME)
    if _serve_runs() and not ray_serve.status().applications:
        ray_serve.shutdown()


def _serve_runs() -> bool:
    return _get_global_client(raise_if_no_controller_running=False) is not None


def _is_running() -> bool:
    return _serve_runs() and APP_NAME in ray_serve.status().applications


def serve(config: ServeConfig) -> dict[str, Any]:
    """The job: serve until SIGINT or SIGTERM; SIGHUP moves to the version that is published by then.

    Returns:
        url, index_version (the last one served), seconds.

    Raises:
        InputError, FormatError, RaytowerError: as `start`.
    """
    started = time.monotonic()
    version: str | None = None
    wanted: list[str] = []
    with _reload_on_hangup(wanted):
        try:
            url = start(config)
            config = config.model_copy(update={"port": int(url.rsplit(":", 1)[1])})
            version = served_version(url)
            log(f"serving index version {version} at {url}/ (the search page); stop with Ctrl-C")
            while True:
                time.sleep(_POLL_S)
                if has_ended():
                    raise RaytowerError(
                        "Ray's processes have ended, and the server with them; start it again"
                    )
                if wanted:
                    wanted.clear()
                    version = _reload_or_keep(config, version)
        except (KeyboardInterrupt, Terminated):
            time.sleep(SIGNALLED_S)
            if version is None:
                raise
        finally:
            log("stopping")
            if version is not None:  # else `start` has stopped what it had started
                stop()
    return {"url": url, "index_version": version, "seconds": round(time.monotonic() - started, 3)}


def plan_serve(config: ServeConfig) -> dict[str, Any]:
    """The plan of `serve`: version, rows, shards, bytes of the index in each process, processes, CPUs.

    Raises:
        InputError: no such index or model, or an empty key variable. FormatError: another encoder made the index.
    """
    manifest = check_parts(config, None)
    config.api_key_sha256()
    apart = config.layout == "apart"
    num_bytes = sum(entry.bytes for entry in manifest.shards)
    return {
        "url": base_url(config),
        "index_version": manifest.version,
        "kind": manifest.kind,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "index_bytes": num_bytes,
        "encoder": encoder_for(config, manifest.encoder),
        "reranker": config.reranker,
        "layout": config.layout,
        "processes": config.replicas + (len(manifest.shards) if apart else 0),
        "index_bytes_per_process": num_bytes // len(manifest.shards) if apart else num_bytes,
        "cpus": needed_cpus(config, len(manifest.shards)),
    }


def check_parts(config: ServeConfig, version: str | None) -> IndexManifest:
    """Read the manifest of an index version and check the models against it, before any process is started.

    Raises:
        InputError, FormatError: as the engine would, but in the caller's process and at once.
    """
    manifest = open_manifest(config.index, version)
    name = encoder_for(config, manifest.encoder)
    # A model that raytower did not write records no fingerprint. Loading it takes time, but before anything runs.
    fingerprint = read_encoder_info(resolve_model(name)).get("fingerprint") or Encoder.load(name).fingerprint
    check_fingerprint(manifest, str(fingerprint), name)
    if config.reranker:
        resolve_model(config.reranker)
    return manifest


def base_url(config: ServeConfig) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def served_version(url: str) -> str | None:
    """The index version that a server answers with; None where nothing is ready there."""
    try:
        with DIRECT.open(f"{url}/readyz", timeout=5) as reply:
            return str(json.load(reply)["index_version"])
    except (urllib.error.URLError, OSError, ValueError, KeyError):
        return None


def _deploy(config: ServeConfig, manifest: IndexManifest) -> None:
    try:
        ray_serve.run(build_application(config, manifest), name=APP_NAME, route_prefix="/", blocking=False)
    except Exception as error:
        raise _reason_of(error) from error


def _reason_of(error: Exception) -> RaytowerError:
    """The error that a replica raised. Serve passes it on only as a traceback's text in its status."""
    cause = find_cause(error)
    if isinstance(cause, RaytowerError):
        return cause
    application = ray_serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    for kind, message in re.findall(r"^raytower\.errors\.(\w+): (.+)$", "\n".join(messages), re.MULTILINE):
        return {"InputError": InputError, "FormatError": FormatError}.get(kind, RaytowerError)(message)
    return RaytowerError(f"Ray Serve could not start the application: {error}; its replicas' logs say why")


# --- proxy and readiness --------------------------------------------------------------------------------------


def _start_proxy(config: ServeConfig) -> ServeConfig:
    """Have the HTTP proxy listen where `config` says; returns it with the port that was picked for 0.

    Raises:
        InputError: the port is taken, or Serve already listens elsewhere in this cluster.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        running = client.http_config
        if (running.host, running.port) != (config.host, config.port or running.port):
            raise InputError(
                f"Ray Serve already runs in this cluster on {running.host}:{running.port}; serve there by setting host "
                f"and port to those, or stop it first (asked for: {config.host}:{config.port})"
            )
        return config.model_copy(update={"port": running.port})
    port = check_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this module logs what matters of it
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=port),
        logging_config=QUIET,
        controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
    )
    return config.model_copy(update={"port": port})


def check_port(host: str, port: int) -> int:
    """Bind the port and let it go. Returns the port; for 0 the one that the system picked.

    Raises:
        InputError: it is taken, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another host or port, 0 picks a "
                "free one"
            ) from error
        return int(probe.getsockname()[1])


def _wait_until_served(url: str, version: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    found = None
    while time.monotonic() < deadline:
        found = served_version(url)
        if found == version:
            return
        time.sleep(0.1)
    raise RaytowerError(f"{url} serves index version {found!r}, not {version!r}; the replicas' logs say why")


# --- signals of the job ---------------------------------------------------------------------------------------


def _reload_or_keep(config: ServeConfig, version: str | None) -> str | None:
    try:
        version = reload(config)
        log(f"serving index version {version}")
    except RaytowerError as error:
        log(f"still serving index version {version}: {error}")
    return version


@contextmanager
def _reload_on_hangup(wanted: list[str]) -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, lambda number, frame: wanted.append("reload"))
    try:
        yield
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
