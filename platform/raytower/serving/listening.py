"""Where a server listens, before it does. Imports no Ray."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from raytower.errors import InputError
from raytower.serving.config import ServeConfig


def check_host(host: str) -> None:
    """Raises InputError where this machine has no address of this name."""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"host {host!r} is no address of this machine: {error}; name an address alone, such as 127.0.0.1 or ::1"
        ) from error


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


def base_url(config: ServeConfig) -> str:
    """Where this machine reaches the proxy."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def shown_versions(versions: Mapping[str, str | None]) -> str:
    """What is served, in a line for people: index versions by collection."""
    if len(versions) == 1:
        return f"index version {next(iter(versions.values()))}"
    return ", ".join(f"{name} {version}" for name, version in versions.items())
