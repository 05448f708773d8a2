"""The job of `raytower serve`, on Ray or without it."""

from __future__ import annotations

from typing import Any

from raytower.serving.config import ServeConfig


def serve(config: ServeConfig) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; SIGHUP moves every collection to its newest index version.

    Returns:
        url, index_version (of the default collection), collections with their index versions, seconds.

    Raises:
        InputError, FormatError: what cannot be served, a taken port, an empty key variable. RaytowerError: the server
            could not start, or has ended by itself.
    """
    if config.server == "uvicorn":
        from raytower.serving.uvicorn_server import serve_here

        return serve_here(config)
    from raytower.serving.deploy import serve_on_ray

    return serve_on_ray(config)
