"""What serving would take, and what can be refused before anything starts. Imports no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from raytower.config import WorkersConfig
from raytower.index.versions import open_manifest
from raytower.progress import log
from raytower.serving import observe
from raytower.serving.conductor import Served
from raytower.serving.config import ServeConfig
from raytower.serving.generation import Generation
from raytower.serving.keys import StoredKey, keys_of
from raytower.serving.listening import base_url, check_host, check_port
from raytower.serving.resolve import absolute_places, resolve_all
from raytower.workers import Node, gpu_share


def check_start(config: ServeConfig) -> tuple[dict[str, Served], list[StoredKey]]:
    """Refuse what can be refused at once; returns what is to be served, and the keys to ask for, hashed.

    Raises:
        InputError: an empty key variable, no key on an address that others reach, no such index or model, and others.
        FormatError: the index was made by another encoder.
    """
    keys = keys_of(config)
    observe.check(config.observe)
    check_host(config.host)
    return resolve_all(config), keys


def joins_cluster() -> bool:
    """Whether the environment names a cluster, whose Serve may hold the port already."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def plan_serve(config: ServeConfig) -> dict[str, Any]:
    """The plan of `serve`: collections, processes, CPUs, bytes of the indexes in each process.

    Raises:
        InputError, FormatError: as `start`, before Ray starts.
    """
    active, _ = check_start(config)
    if not joins_cluster():
        check_port(config.host, config.port)
    groups = num_shard_groups(config, active)
    sizes = {name: _index_bytes(item.generation) for name, item in active.items()}
    replicas = _most_replicas(config)
    reranking = config.rerank_replicas if config.layout == "split" else 0
    total = sum(sizes.values())
    return {
        "url": base_url(config) + config.route_prefix.rstrip("/"),
        "server": config.server,
        "layout": config.layout,
        "collections": {name: _planned(item, sizes[name]) for name, item in active.items()},
        "processes": 1
        if config.server == "uvicorn"
        else 1 + replicas + reranking + groups * config.shard_replicas,
        "index_bytes": total,
        "index_bytes_per_process": total // groups if groups else total,
        "cpus": needed_cpus(config, groups),
    }


def _planned(served: Served, num_bytes: int) -> dict[str, Any]:
    generation = served.generation
    manifest = open_manifest(generation.index, generation.index_version)
    return {
        "generation": generation.id,
        "index_version": generation.index_version,
        "kind": manifest.kind,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "index_bytes": num_bytes,
        "encoder": generation.encoder.uri,
        "reranker": generation.reranker and generation.reranker.uri,
    }


def _index_bytes(generation: Generation) -> int:
    return sum(entry.bytes for entry in open_manifest(generation.index, generation.index_version).shards)


def num_shard_groups(config: ServeConfig, active: Mapping[str, Served]) -> int:
    """How many groups the shards of all collections are dealt out to; 0 where they lie in the ingress."""
    if config.layout != "sharded":
        return 0
    most = max(
        len(open_manifest(item.generation.index, item.generation.index_version).shards)
        for item in active.values()
    )
    return min(config.shard_groups or max(most, 1), max(most, 1))


def group_name(number: int) -> str:
    return f"shards-{number}"


def needed_cpus(config: ServeConfig, num_groups: int) -> float:
    """Logical CPUs that all processes together ask Ray for."""
    cpus = _most_replicas(config) * config.num_cpus
    cpus += num_groups * config.shard_replicas * config.shard_num_cpus
    return cpus + (config.rerank_replicas * config.rerank_num_cpus if config.layout == "split" else 0)


def replica_needs(config: ServeConfig) -> WorkersConfig:
    """What a replica asks of its node, as that of a job's worker."""
    return WorkersConfig(
        num=1,
        num_cpus=max(config.num_cpus, 0.01),  # a replica may ask for none
        num_gpus=config.num_gpus or 0,
        resources=config.resources,
        label_selector=config.label_selector,
    )


def _most_replicas(config: ServeConfig) -> int:
    return config.autoscaling.max if config.autoscaling else config.replicas


def with_gpus(config: ServeConfig, nodes: Sequence[Node]) -> ServeConfig:
    """`config` with the GPUs of each process that it leaves to the machines, and a line of log where they have any."""
    processes = {"num_gpus": _most_replicas(config)}
    if config.layout == "split":
        processes["rerank_num_gpus"] = config.rerank_replicas
    left = {name: number for name, number in processes.items() if getattr(config, name) is None}
    gpus = sum(int(node.gpus) for node in nodes)
    taken = sum((getattr(config, name) or 0) * number for name, number in processes.items())
    is_torch = any(collection.engine != "onnx" for collection in config.served_collections().values())
    free = max(int(gpus - taken), 0) if is_torch else 0
    if not left or not free:
        return config
    share = gpu_share(sum(left.values()), free)
    log(
        f"{sum(left.values())} processes with models, each with {share:g} of {gpus} GPUs "
        f"({', '.join(left)} say otherwise)"
    )
    return config.model_copy(update=dict.fromkeys(left, share))


# --- for clusters that are told by a file ---------------------------------------------------------------------

_FILE_COMMENT = """\
# A Serve config file, for `serve deploy` and for a RayService. Serve's proxies put raytower's door before the
# application where Ray was started with this in its environment:
#   RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=raytower.serving.ports.open_door
# Keys are read from the variables that api_key_env or security name, in the cluster.
"""


def serve_file(config: ServeConfig) -> dict[str, Any]:
    """The Serve config file that deploys what `serve` would serve."""
    given = config.model_dump(mode="json", exclude_unset=True)
    outside = {"port", "server", "name", "route_prefix", "replace", "drain_s", "end_s", "start_timeout_s"}
    args = absolute_places({name: value for name, value in given.items() if name not in outside})
    if "collections" in args:
        args["collections"] = {name: absolute_places(own) for name, own in args["collections"].items()}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": config.name,
                "route_prefix": config.route_prefix,
                "import_path": "raytower.serving.graph:app_builder",
                "args": args,
            }
        ],
    }


def render_serve_file(result: dict[str, Any]) -> str:
    """The file's text."""
    return _FILE_COMMENT + yaml.safe_dump(result, sort_keys=False, allow_unicode=True).rstrip()
