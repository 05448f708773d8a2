"""Texts in, a served search page out: encode and index what is new, then serve.

The first call encodes and builds, and goes on where it was stopped; a later one encodes what changed since.
"""

from __future__ import annotations

import os
from typing import Any

from raytower.data.sources import is_glob
from raytower.encoding import job as encoding
from raytower.encoding.config import EncodeConfig
from raytower.errors import InputError
from raytower.index.build import build_index
from raytower.index.change_config import IndexSyncConfig
from raytower.index.config import IndexBuildConfig
from raytower.index.sync import plan_sync, sync_index
from raytower.index.versions import version_names
from raytower.models.directory import resolve_model
from raytower.progress import log
from raytower.serving.config import ServeConfig
from raytower.serving.job import serve
from raytower.serving.listening import check_port
from raytower.storage import Location, output_folder
from raytower.up.config import UpConfig

# Small, Chinese and English among its hundred languages, MIT.
DEFAULT_MODEL = "intfloat/multilingual-e5-small"
_EMBEDDINGS, _INDEX = "embeddings", "index"


def up(config: UpConfig) -> dict[str, Any]:
    """Encode and index what the index lacks, then serve it until SIGINT or SIGTERM.

    Returns:
        What `serve` returns, and `index`.

    Raises:
        InputError: bad rows under on_error fail, no such model, another encoder than that of the index, a port that is
            taken. RaytowerError: another job works on the same folder, or a worker was lost for good.
    """
    _check(config)
    index = _index_of(config)
    if _is_built(index):
        done = sync_index(_sync_config(config, index))
        if not (done["added"] or done["changed"] or done["set"] or done["deleted"]):
            log("the index holds these texts already")
    else:
        encoding.encode(_encode_config(config))
        build_index(_build_config(config))
    return {"index": str(index), **serve(_serve_config(config))}


def plan_up(config: UpConfig) -> dict[str, Any]:
    """What `up` would do first: `encode` all texts, or `sync` an index that is there."""
    _check(config)
    index = _index_of(config)
    if _is_built(index):
        return {"step": "sync", "index": str(index), **plan_sync(_sync_config(config, index))}
    return {"step": "encode", "index": str(index), **encoding.plan(_encode_config(config))}


def _check(config: UpConfig) -> None:
    """Find before the texts are encoded what would keep them from being written, or the server from starting.

    Raises:
        InputError: the output is a file or holds something else, the port is taken or the address is not this
            machine's, or there is no such reranker.
    """
    output_folder(str(_folder(config)) if config.output is None else config.output, _EMBEDDINGS, _INDEX)
    if config.reranker is not None:
        resolve_model(config.reranker)
    check_port(config.host, config.port)


def _folder(config: UpConfig) -> Location:
    if config.output is not None:
        return Location.of(config.output)
    path, question, options = config.input.path.partition("?")
    if is_glob(config.input.path):
        raise InputError(
            f"input is {config.input.path!r}, a pattern, which gives the index no name; give --output FOLDER"
        )
    name = path.rstrip("/")
    if name.rpartition("/")[2] in (".", "..", "~"):  # a folder by another name than its own
        name = os.path.abspath(os.path.expanduser(name)).rstrip("/")
    if not name:
        raise InputError(f"input is {path!r}, which has no name; give --output, a folder for the index")
    return Location.of(f"{name}.raytower{question}{options}")


def _index_of(config: UpConfig) -> Location:
    return _folder(config) / _INDEX


def _is_built(index: Location) -> bool:
    return index.exists() and bool(version_names(index))


def _encode_config(config: UpConfig) -> EncodeConfig:
    return EncodeConfig(
        encoder=config.model or DEFAULT_MODEL,
        input=config.input,
        output=str(_folder(config) / _EMBEDDINGS),
        on_error=config.on_error,
    )


def _build_config(config: UpConfig) -> IndexBuildConfig:
    return IndexBuildConfig(embeddings=str(_folder(config) / _EMBEDDINGS), output=str(_index_of(config)))


def _sync_config(config: UpConfig, index: Location) -> IndexSyncConfig:
    return IndexSyncConfig(
        index=str(index),
        input=config.input,
        encoder=config.model,
        gone=config.gone,
        max_gone=config.max_gone,
        on_error=config.on_error,
    )


def _serve_config(config: UpConfig) -> ServeConfig:
    return ServeConfig(
        index=str(_index_of(config)),
        encoder=config.model,
        reranker=config.reranker,
        host=config.host,
        port=config.port,
    )
