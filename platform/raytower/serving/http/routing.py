"""Which route a path means. A prefix that a proxy left or stripped, and slashes too many, change nothing."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytower.serving.errors import MethodError, NotFoundError
from raytower.serving.http.answers import HttpAnswer
from raytower.serving.http.exchange import Exchange, Scope
from raytower.serving.http.requests import Request

Handler = Callable[[Exchange], Awaitable[HttpAnswer]]
# A model's name may hold slashes, a collection's may not.
_PARTS = {"collection": "[^/]+", "model": ".+"}


@dataclass(frozen=True, kw_only=True)
class Route:
    """What is answered at a path, by which function, and how openapi.json describes it."""

    method: str
    path: str
    """May hold {collection} or {model}."""
    handler: Handler
    request: type[Request] | None = None
    response: Any = None
    """The type of the answer's JSON; None leaves the route out of openapi.json."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters behind the question mark, and what they are."""
    is_open: bool = False
    """Whether it is answered without a key, and while the server stops."""
    checks_origin: bool = False
    """Whether pages of other sites are refused that security.cors_origins does not name."""

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Found:
    """A route and the parts of the path by their names."""

    route: Route
    parameters: Mapping[str, str]


class Router:
    """Finds the route of a path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._fixed: dict[str, dict[str, Route]] = {}
        patterns: dict[str, dict[str, Route]] = {}
        for route in routes:
            table = patterns if "{" in route.path else self._fixed
            table.setdefault(route.path, {})[route.method] = route
        self._patterns = [(_compile(path), by_method) for path, by_method in patterns.items()]

    def find(self, method: str, path: str) -> Found:
        """Raises NotFoundError, or MethodError where the path has routes of other methods."""
        by_method, parameters = self._at(path)
        # HEAD is GET without its body; the server drops that.
        route = by_method.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join([*by_method, *(["HEAD"] if "GET" in by_method else [])])
            raise MethodError(
                f"{method} is not allowed on {path[:200]!r}; allowed: {allowed}", headers={"Allow": allowed}
            )
        return Found(route, parameters)

    def _at(self, path: str) -> tuple[dict[str, Route], Mapping[str, str]]:
        if path in self._fixed:
            return self._fixed[path], {}
        for pattern, by_method in self._patterns:
            if match := pattern.fullmatch(path):
                return by_method, match.groupdict()
        raise NotFoundError(f"there is no {path[:200]!r} here; see /openapi.json for what there is")


def _compile(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", path)
    return re.compile(
        "".join(
            f"(?P<{part}>{_PARTS[part]})" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )


def path_of(scope: Scope) -> str:
    """A request's path below where the application is mounted, without slashes too many: /v1//search/ is /v1/search.

    A redirect to the right path would need to know the prefix that a proxy stripped, and would send body and key again.
    """
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return "/" + "/".join(part for part in path.split("/") if part)
