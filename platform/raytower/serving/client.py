"""The commands that speak to a running server: reload, rollback, status. Imports neither Ray nor models."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from raytower.errors import InputError, RaytowerError
from raytower.serving.config import (
    ServerConfig,
    ServeReloadConfig,
    ServeRollbackConfig,
    ServeStatusConfig,
)
from raytower.storage import absolute_if_local

# Keys that name something that lies somewhere; `none` names nothing.
_PLACES = ("index", "encoder", "reranker", "classifier")
_NONE = "none"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def reload_server(config: ServeReloadConfig) -> dict[str, Any]:
    """Have a server move a collection; returns what it serves then. Paths of this machine are sent as absolute ones.

    Raises:
        InputError: the server cannot serve what is asked for. RaytowerError: it refuses, or cannot be reached.
    """
    outside = set(ServerConfig.model_fields)
    changes = config.model_dump(mode="json", exclude=outside, exclude_none=True)
    # A section of which nothing is given changes nothing.
    changes = {name: value for name, value in changes.items() if value != {}}
    # The server may run in another folder.
    places = {
        name: absolute_if_local(value)
        for name, value in changes.items()
        if name in _PLACES and value != _NONE and "://" not in value
    }
    return _ask(config, "reload", {**changes, **places})


def roll_server_back(config: ServeRollbackConfig) -> dict[str, Any]:
    """Have a server move a collection back. Raises as `reload_server`."""
    return _ask(config, "rollback", {} if config.collection is None else {"collection": config.collection})


def server_status(config: ServeStatusConfig) -> dict[str, Any]:
    """What a server serves, its members and its last swap. Raises as `reload_server`."""
    return _ask(config, "status", None)


def _ask(config: ServerConfig, what: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{config.url.rstrip('/')}/v1/admin/{what}",
        None if body is None else json.dumps(body).encode(),
        {"Accept": "application/json", "Content-Type": "application/json", **_authorisation(config)},
    )
    try:
        with _opener(config.url).open(request, timeout=config.timeout_s) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        raise _refusal(config, error) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RaytowerError(f"the server at {config.url} cannot be reached: {reason}") from error


def _authorisation(config: ServerConfig) -> dict[str, str]:
    if config.key_env is None:
        return {}
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise InputError(f"key_env names {config.key_env!r}, which is unset or empty; export the key in it")
    return {"Authorization": f"Bearer {key}"}


def _opener(url: str) -> urllib.request.OpenerDirector:
    # This machine's own server is not asked through a proxy that the environment names.
    local = urllib.parse.urlsplit(url).hostname in _LOOPBACK
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _refusal(config: ServerConfig, error: urllib.error.HTTPError) -> RaytowerError:
    """What a server's refusal means for whoever gave the command."""
    raw = error.read(65_536)
    try:
        message = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = raw[:200].decode("utf-8", "replace").strip()
    if error.code in (401, 403):
        return InputError(f"{config.url} asks for another key ({message}); name its variable as key_env")
    kind = InputError if error.code in (400, 404, 422) else RaytowerError
    return kind(f"{config.url} says {error.code}: {message}")
