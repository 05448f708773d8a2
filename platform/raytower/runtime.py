"""Starting or joining Ray. Every job calls `ensure_ray` once; inside `ray job submit` it joins that cluster."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import ray

_MIN_LOGICAL_CPUS = 4


def ensure_ray(min_cpus: float = 0) -> None:
    """Join the cluster that RAY_ADDRESS or a Ray job names, or start one on this machine.

    A local start asks for at least four logical CPUs: workers that hold every logical CPU would leave none for
    the tasks that feed them. Telemetry and the dashboard stay off, everything listens on loopback.
    """
    if ray.is_initialized():
        return
    # Set explicitly: left unset, a local start writes a token into the home directory and a later job submit
    # without the same mode fails.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    environment = {"env_vars": worker_environment(), "worker_process_setup_hook": "raytower.runtime.quieten"}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # The submitted job brings its own runtime environment; it must not be set twice.
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
        return
    # "local": left open, Ray joins whatever `ray start` left on this machine, and refuses num_cpus there.
    cpus = max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1, int(min_cpus + 0.999))
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env=environment,
        _node_ip_address="127.0.0.1",
    )


def worker_environment() -> dict[str, str]:
    """Environment of local workers: the source root on the path, so that a checkout needs no install."""
    source_root = str(Path(__file__).resolve().parents[1])
    paths = [source_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def quieten() -> None:
    """Keep Ray's own progress logs out of ours; warnings still show. Run in the driver and in each local worker."""
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Without a dashboard this monitor warns once a second that it cannot ask it; it works all the same.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(
        logging.ERROR
    )


def log(message: str) -> None:
    """A line of progress for people. It goes to stderr: stdout belongs to the result."""
    # Not print(): Ray Train's workers patch it and show each line twice.
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
