"""Starting or joining Ray. Every job calls `ensure_ray` once; inside `ray job submit` it joins that cluster."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.utils import get_num_cpus
from ray._private.worker import filter_autoscaler_events
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytower import ending
from raytower.collecting import collect_later
from raytower.config import WorkersConfig
from raytower.errors import InputError, RaytowerError, find_cause
from raytower.progress import log
from raytower.storage.errors import one_line
from raytower.worker_output import OUTPUT
from raytower.workers import DRIVER_CPUS_VARIABLE, Node, refuse_without_room

# A signal to the whole group ends Ray's processes in about 0.3 s; asked meanwhile, Ray blocks the whole interpreter.
SIGNALLED_S = 1.0
_abandoned: list[bool] = []
_MIN_LOGICAL_CPUS = 4
# A socket's path has 107 bytes at most; this is the longest that Ray makes below its temporary folder.
_MAX_SOCKET_PATH = 107
_LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
_PRIVATE_FOLDER = "rtray-"
_RAY_FOLDER = "ray"
_JOB_FOLDER = "RAYTOWER_JOB_FOLDER"
# In that time a worker has imported its libraries, and begun to work.
_IMPORTING_S = 10.0
# How often the head of a joined cluster is looked for, and after how long it counts as gone.
_WATCH_S = 2.0
_HEAD_LOST_S = 10.0
_HEAD = "node:__internal_head__"  # a resource that Ray gives the head alone
# What each of Ray's processes finds in its environment, unless the user has set it: no telemetry; and no progress logs
# of Ray Data's own, which would drown ours.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING"}


def ensure_ray(min_cpus: float = 0, secret_variables: Sequence[str] = (), show_workers: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS or a Ray job names, or start a closed one on this machine.

    A local start listens on loopback (SECURITY.md names what does not), and answers only who knows the token that
    is in the environment of this process and its children: a fresh one, unless RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH
    or RAY_AUTH_MODE say otherwise. Its sockets and logs lie in a folder for this user alone, removed at exit; its
    processes get the environment without `secret_variables`, and its workers import nothing from the current
    folder. Telemetry and the dashboard stay off. It asks for at least four logical CPUs, and for one more than
    there are cores: workers that hold every logical CPU would leave none for the tasks that feed them. Of what workers
    write only the lines of `progress.log` are shown, unless `show_workers`.

    Raises:
        InputError: RAY_AUTH_MODE was changed after Ray had read it, or no folder is short enough for Ray's sockets.
        RaytowerError: Ray did not start in its time, or cannot be joined.
    """
    OUTPUT.expect()
    _make_quiet()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # we have our own
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks given up after another has failed
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _take_worker_output(show_workers)
    with _sigterm_kept():
        if _joins_cluster():
            with _loopback_for_this_node() if _listens_on_loopback_only() else nullcontext():
                _init(log_to_driver=True, runtime_env=_environment_in_cluster())
            watch = threading.Thread(
                target=watch_head, args=(ray.get_runtime_context().gcs_address,), daemon=True
            )
            watch.start()
        else:
            _start_local(max(_MIN_LOGICAL_CPUS, _num_cores() + 1, int(min_cpus + 0.999)), secret_variables)


def find_nodes() -> list[Node]:
    """What the nodes of the cluster that a job joins have for workers now; without a cluster, what this machine has.

    A CPU of each node is left to the tasks that feed workers, which a Ray of this machine has beside its cores.

    Raises:
        InputError, RaytowerError: as `ensure_ray`, which joins a cluster.
    """
    if _joins_cluster():
        ensure_ray()
    nodes = _alive_nodes() if ray.is_initialized() else []
    if _joins_cluster():
        return [node for node in nodes if node.cpus > 0]
    import torch

    # Ray counts the GPUs of the machine, and PyTorch those that it was built for.
    here = Node(cpus=_num_cores(), gpus=torch.cuda.device_count(), labels=_labels_here())
    return [
        replace(node, cpus=min(here.cpus, node.cpus), gpus=min(here.gpus, node.gpus)) for node in nodes
    ] or [here]


def check_room(worker: WorkersConfig) -> None:
    """Called once Ray runs: refuse workers that would wait for ever (see `workers.refuse_without_room`).

    Raises:
        InputError: no node has room for one of them, and the nodes were joined by hand, so that none comes by itself.
    """
    refuse_without_room(worker, _alive_nodes())


def run_tasks(
    start: Callable[[int], Any], numbers: Sequence[int], at_once: int, job: str
) -> Generator[tuple[int, Any]]:
    """Run tasks, `at_once` side by side; the number and the result of each, as they end.

    Args:
        start: starts the task of a number, and returns Ray's reference to its result.
        numbers: the tasks, in the order in which they are started.
        at_once: how many may run at a time.
        job: whose tasks they are, for the message of a failure: `the index job`.

    Raises:
        RaytowerError: the first failure, as it was raised where that was meant for the user; other tasks are cancelled.
    """
    waiting = list(numbers)
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number = waiting.pop(0)
                running[start(number)] = number
            finished, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(finished[0]), ray.get(finished[0])
    except Exception as error:
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from None
        raise RaytowerError(f"a task of {job} failed: {cause}") from error
    finally:  # also where whoever takes the results has failed
        for reference in running:
            ray.cancel(reference, force=True)


def hold_on_head() -> None:
    """Called once Ray runs: have the head hold what Ray Data and Ray Train keep for all jobs of a cluster.

    Left to itself Ray starts these actors on the node of the first driver that needs them, and never ends them. A node
    that came for a submitted pipeline would be busy with them for ever, and other jobs would lose them with it.
    """
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    if not heads or heads[0] == ray.get_runtime_context().get_node_id():
        return
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    try:
        ray.get(ray.remote(num_cpus=0)(_start_kept_actors).options(scheduling_strategy=there).remote())
    except RayError as error:
        log(
            "warning: what Ray Data keeps for all jobs could not be started on the head "
            f"({one_line(error)}); it is held by this node, which does not go by itself then"
        )


def _start_kept_actors() -> None:
    """Start them, where they are not there yet, on the node of this process: Ray has no setting for their place."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


def _alive_nodes() -> list[Node]:
    held = float(os.environ.get(DRIVER_CPUS_VARIABLE, 0))
    own = ray.get_runtime_context().get_node_id() if held else None
    return [
        _node_of(node["Resources"], node.get("Labels") or {}, held if node.get("NodeID") == own else 0)
        for node in ray.nodes()
        if node["Alive"]
    ]


def _labels_here() -> dict[str, str]:
    """The labels that a Ray of this machine gives itself, such as the kind of its GPUs."""
    return ResourceAndLabelSpec().resolve(is_head=True).labels or {}


def _node_of(resources: dict[str, float], labels: dict[str, str], held: float = 0) -> Node:
    """A node of which a submitted job's own process holds some CPUs for as long as it waits for its workers."""
    cpus = max(resources.get("CPU", 0.0) - held, 0.0)
    return Node(
        cpus=cpus - 1 if cpus > 1 else cpus,
        gpus=resources.get("GPU", 0.0),
        labels=labels,
        resources=resources,
    )


def _num_cores() -> int:
    """Those that this process may use, which in a container are fewer than the machine has."""
    return max(int(get_num_cpus(override_docker_cpu_warning=True)), 1)


def _joins_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def _init(**settings: Any) -> None:
    """`ray.init`. Raises RaytowerError for whatever it raises, which has no class of its own and no remedy."""
    try:
        ray.init(logging_level=logging.WARNING, **settings)
    except Exception as error:
        address = os.environ.get("RAY_ADDRESS")
        what = f"the Ray at {address} (RAY_ADDRESS) cannot be joined" if address else "Ray did not start"
        raise RaytowerError(
            f"{what}: {one_line(error)}; run the command again, where time ran out when the machine is less busy"
        ) from error


def watch_head(address: str) -> None:
    """Say that the head of a joined cluster is gone; returns when this process leaves the cluster.

    Ray ends a process whose head is gone after a minute (RAY_gcs_rpc_server_reconnect_timeout_s), by code 1 and without
    a word of what to do.
    """
    host, _, port = address.rpartition(":")
    lost_at: float | None = None
    is_said = False
    while ray.is_initialized() and not ending.has_begun():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_WATCH_S).close()
            if is_said:
                log("the cluster's head answers again")
            lost_at, is_said = None, False
        except OSError:
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if not is_said and now - lost_at >= _HEAD_LOST_S:
                is_said = True
                log(
                    f"warning: the cluster's head at {address} has not answered for {_HEAD_LOST_S:g} s; unless it "
                    "comes back, Ray ends this process within a minute: start the cluster anew and run the same "
                    "command again, which goes on where its output stands"
                )
        time.sleep(_WATCH_S)


def _make_quiet() -> None:
    """Set `_QUIET` for this process and its children."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Ray Data reads its level when it is imported, which may have happened before.
    logging.getLogger("ray.data").setLevel(os.environ["RAY_DATA_LOG_LEVEL"])


def _environment_in_cluster() -> dict[str, dict[str, str]]:
    """`_QUIET` for workers of a cluster that was there before, which do not inherit from this process.

    A submitted job brings an environment of its own, and Ray refuses a variable that is set twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    brought = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {"env_vars": {name: os.environ[name] for name in _QUIET if name not in brought}}


def _start_local(num_cpus: int, secret_variables: Sequence[str]) -> None:
    _require_token()
    for place in {_short_place(), tempfile.gettempdir()}:
        ending.remove_left_behind(Path(place), _PRIVATE_FOLDER)
    private = Path(tempfile.mkdtemp(prefix=_PRIVATE_FOLDER, dir=_short_place()))
    ending.remove_at_end(private)
    # Objects that do not fit into memory go where the user wants large temporary files.
    spilled = private
    if private.parent != Path(tempfile.gettempdir()):
        spilled = Path(tempfile.mkdtemp(prefix=_PRIVATE_FOLDER))
        ending.remove_at_end(spilled)
    ending.call_at_end(_shut_down)  # before the folders go: what runs at exit runs in reverse
    environment = {
        "env_vars": worker_environment(),
        "worker_process_setup_hook": "raytower.runtime.set_up_worker",
    }
    with _without(secret_variables), _loopback_for_this_node(), _current_folder(private):
        _init(
            address="local",  # left open, Ray joins whatever `ray start` left on this machine, and refuses num_cpus
            num_cpus=num_cpus,
            include_dashboard=False,
            runtime_env=environment,
            object_spilling_directory=str(spilled),
            # Not the private folder itself: Ray makes this one, and all below it, writable for everybody.
            _temp_dir=str(private / _RAY_FOLDER),
        )


def _take_worker_output(show_all: bool) -> None:
    """Have Ray hand over what workers write and what it has to say of them, rather than print it (errors to stdout)."""

    def take(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        if data.get("pid") == "autoscaler":  # whose whole log comes this way
            data = {**data, "lines": list(filter_autoscaler_events(data["lines"]))}
        OUTPUT.take(data)

    OUTPUT.show_all = show_all
    ray._private.worker.print_to_stdstream = take


def _shut_down() -> None:
    # A thread that was left in a call to Serve would start another Ray, which is not closed, in place of this one.
    ray.init = _refuse_to_start
    if ending.has_begun():
        time.sleep(SIGNALLED_S)
    node = ray._private.worker.global_worker.node  # None once `ray.shutdown` was called
    if node is not None and (node.dead_processes() or _abandoned):
        # Nothing is left to be ended in order, and Ray would wait a minute for its GCS.
        node.kill_all_processes(check_alive=False)
        ending.leave()
    ray.shutdown(_exiting_interpreter=True)


def _refuse_to_start(*arguments: object, **settings: object) -> NoReturn:
    raise RaytowerError("this process ends, and starts no Ray any more")


def abandon() -> None:
    """A thread was left in a call to Ray that does not return: a local Ray is killed at exit, not asked to end."""
    node = ray._private.worker.global_worker.node
    if node is not None and node.is_head():
        _abandoned.append(True)


def has_ended() -> bool:
    """Whether the Ray that this process started has lost a process, so that calls to it wait without an end."""
    node = ray._private.worker.global_worker.node
    return node is not None and bool(node.dead_processes())


def _require_token() -> None:
    """Have Ray ask for a token wherever it listens: the user's, or a fresh one that no file ever holds.

    Raises:
        InputError: RAY_AUTH_MODE is not what this process's Ray goes by.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and (mode.lower() == "token") != is_token_auth_enabled():
        raise InputError(
            f"RAY_AUTH_MODE was set to {mode!r} after Ray had been imported, which does not see it any more; set it "
            "before Python starts, or leave it unset (a local Ray then takes a token of its own)"
        )
    if mode is not None and mode.lower() != "token":
        log(
            f"warning: RAY_AUTH_MODE={mode}: whoever reaches the ports of this job can run commands through them"
        )
        return
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if named or (mode is not None and (Path.home() / ".ray" / "auth_token").exists()):
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # With a token and no mode Ray turns to tokens by itself, even if it was imported before; it warns that it does.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def _short_place() -> str:
    """Where a private folder may lie so that the paths of Ray's sockets are not too long.

    Raises:
        InputError: neither RAY_TMPDIR nor TMPDIR nor /tmp will do.
    """
    below = len(f"/{_PRIVATE_FOLDER}12345678/{_RAY_FOLDER}{_LONGEST_SOCKET}")
    places = [os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir(), "/tmp"]
    for place in filter(None, places):
        if len(os.fsencode(place)) + below <= _MAX_SOCKET_PATH and os.access(place, os.W_OK | os.X_OK):
            return place
    raise InputError(
        f"Ray's sockets need a folder that can be written and whose path has {_MAX_SOCKET_PATH - below} bytes at most; "
        f"none of {', '.join(filter(None, places))} is one: name one in RAY_TMPDIR"
    )


def _listens_on_loopback_only() -> bool:
    """Whether RAY_ADDRESS names a closed local Ray, which Ray would look for at the machine's reachable address."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=2).close()
    except OSError:
        return True
    return False


@contextmanager
def _loopback_for_this_node() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this node's address, and so listen there alone, as it does on a Mac.

    `_node_ip_address="127.0.0.1"` does not: on Linux Ray puts the reachable address in its place.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _current_folder(folder: Path) -> Iterator[None]:
    """Be in an empty folder: Ray puts the current one in front of every worker's import path."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Take variables out of the environment that child processes inherit."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back after Ray has set its own, which aborts with a native stack dump."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, ending.raise_terminated if before in (signal.SIG_DFL, None) else before)


def worker_environment() -> dict[str, str]:
    """Environment of local workers: the source root on the path, so that a checkout needs no install."""
    source_root = str(Path(__file__).resolve().parents[1])
    paths = [
        source_root,
        *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
    ]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Training workers of one machine exchange gradients over loopback; left to itself gloo takes an outer address.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        _JOB_FOLDER: os.getcwd(),
    }


def set_up_worker() -> None:
    """Run in each local worker when it starts."""
    collect_later(_IMPORTING_S)
    # Paths are relative to the folder that the job was started from; it is on no import path (see _current_folder).
    os.chdir(os.environ[_JOB_FOLDER])
    # Ray Train's monitor would look for the cluster among all that run on the machine, and fail where there are two.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    logging.getLogger("raytower").addHandler(_Marked(logging.WARNING))
    quieten()


class _Marked(logging.Handler):
    """Shows the warnings of our own loggers in the driver, as lines of `progress.log`."""

    def emit(self, record: logging.LogRecord) -> None:
        log(f"{record.levelname.lower()}: {record.getMessage()}")


def quieten() -> None:
    """Keep Ray's own progress logs out of ours; warnings still show."""
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Without a dashboard this monitor warns once a second that it cannot ask it; it works all the same.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(
        logging.ERROR
    )
