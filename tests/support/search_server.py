"""A server that answers as the search page's server does, from a few documents and without models.

It also does what a server or a gateway may do to the page: be late, refuse, answer in part or in HTML.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raytower.serving.page import load_page
from tests.support.http_server import listening

FIRST_NUMBER = 9007199254740993
"""2^53 + 1, which JavaScript reads as 2^53."""

_TEXTS = (
    "Renters insurance covers your furniture, clothes and electronics after theft or fire.",
    "Car insurance pays for the damage after a collision, less the deductible.",
    "汽车保险在发生碰撞事故后赔付车辆的损失。",
    "A policy can be cancelled at any time; policies of a year give the premium back by the day.",
    "租房保险可以赔付家具、衣物和电器的损失。",
    "Life insurance pays a sum to the people that you name.",
    "医疗保险报销住院和手术的费用。",
    "An umbrella policy adds liability cover beyond home and car.",
    "Travel cover ends thirty days after the day of departure.",
    "旅行保险从出发之日起三十天后终止。",
    "Flood damage needs a policy of its own; home insurance leaves it out. " * 15,
    "<b>Pets</b> & vets: <img src=x onerror=alert(1)> insurance for animals.",
)
# The reranker's order of the rows: the fourth comes first, the first second.
_RERANKED = (3, 0, 1, 5, 2, 4, 6, 7, 8, 9, 10, 11)


def make_collection(name: str = "insurance", **changes: Any) -> dict[str, Any]:
    """What GET /v1/collections says of one collection."""
    plain = {
        "name": name,
        "default": True,
        "index_version": "v000003",
        "generation": "7f3a",
        "rows": 27413,
        "kind": "hnsw",
        "metric": "cosine",
        "dim": 384,
        "recall": 0.9873,
        "encoder": {"name": "all-MiniLM-L6-v2", "max_length": 256},
        "reranker": {"name": "ms-marco-tiny", "max_length": 512},
        "classifier": {"name": "topics", "max_length": 256},
        "classify_modes": ["classifier", "votes"],
        "columns": {"doc_no": "int64", "lang": "string", "year": "int32"},
        "modes": ["dense", "lexical", "hybrid"],
    }
    return plain | changes


@dataclass
class Asked:
    path: str
    raw: str
    headers: dict[str, str]

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class SearchServer:
    """`change` is merged into every answer to a search; `instead`, where set, answers in place of the routes."""

    prefix: str = ""
    collections: list[dict[str, Any]] = field(default_factory=lambda: [make_collection()])
    key: str = ""
    change: dict[str, Any] = field(default_factory=dict)
    delays_s: dict[str, float] = field(default_factory=dict)
    instead: Callable[[Request], Response | None] = lambda request: None
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def searches(self) -> list[Any]:
        """Bodies of the searches, in order."""
        return [asked.body for asked in self.asked if asked.path.endswith("/search")]

    def app(self) -> Starlette:
        routes = [
            Route(f"{self.prefix}/v1/{path}", self._guarded(handler), methods=[method])
            for method, path, handler in (
                ("GET", "collections", self._collections),
                ("POST", "search", self._search),
                ("POST", "{collection}/search", self._search),
                ("POST", "similarity", self._similarity),
                ("POST", "{collection}/similarity", self._similarity),
                ("POST", "classify", self._classify),
                ("POST", "{collection}/classify", self._classify),
            )
        ]
        pages = {self.prefix or "/", f"{self.prefix}/"}
        return Starlette(routes=[*(Route(path, self._page) for path in pages), *routes])

    async def _page(self, request: Request) -> Response:
        page = load_page("Questions about insurance")
        return Response(page.content, media_type="text/html; charset=utf-8", headers=page.headers)

    def _guarded(self, handler: Callable[[Request, Any], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            raw = (await request.body()).decode()
            self.asked.append(Asked(request.url.path, raw, dict(request.headers)))
            instead = self.instead(request)
            if instead is not None:
                return instead
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "missing or wrong API key")
            return await handler(request, json.loads(raw) if raw else None)

        return guarded

    async def _collections(self, request: Request, body: None) -> Response:
        return JSONResponse({"object": "list", "data": self.collections})

    async def _search(self, request: Request, body: dict[str, Any]) -> Response:
        await asyncio.sleep(self.delays_s.get(body["query"], 0))
        rerank = body.get("rerank", True)
        recalled = list(range(len(_TEXTS)))
        order = list(_RERANKED) if rerank else recalled
        hits = [
            make_hit(row, rank, rerank, bool(body.get("explain")))
            for rank, row in enumerate(order[: body["k"]], 1)
        ]
        answer = {
            "collection": request.path_params.get("collection", "insurance"),
            "index_version": "v000003",
            "generation": "7f3a",
            "partial": False,
            "missing_shards": [],
            "mode": body.get("mode", "dense"),
            "reranked": rerank,
            "reranked_k": len(order) if rerank else 0,
            "usage": {"prompt_tokens": 9, "total_tokens": 9, "truncated": 0},
            "timings_ms": {
                "encode": 5.25,
                "recall": 1.5,
                "fetch": 0.75,
                "rerank": 12.5 if rerank else 0.0,
                "total": 21.0 if rerank else 8.0,
            },
            "results": [hits],
        }
        return JSONResponse(answer | self.change)

    async def _similarity(self, request: Request, body: dict[str, Any]) -> Response:
        same = [1.0 if first == second else 0.8125 for first, second in body["pairs"]]
        usage = {"prompt_tokens": 9, "total_tokens": 9, "truncated": 0}
        return JSONResponse({"scores": same, "model": "all-MiniLM-L6-v2", "usage": usage})

    async def _classify(self, request: Request, body: dict[str, Any]) -> Response:
        labels = [{"label": "home##renters", "score": 0.75}, {"label": "car", "score": 0.125}]
        mode = body.get("mode", "classifier")
        return JSONResponse({"mode": mode, "model": "topics", "results": [labels[: body["top_k"]]]})


def make_hit(row: int, rank: int, reranked: bool, explain: bool) -> dict[str, Any]:
    hit = {
        "id": f"doc-{row}",
        "text": _TEXTS[row],
        "metadata": {
            "doc_no": FIRST_NUMBER + 2 * row,
            "lang": "en" if _TEXTS[row].isascii() else "zh",
            "year": 2000 + row,
        },
        "recall_score": 0.9 - row / 32,
        "rerank_score": 6.5 - rank if reranked else None,
        "score": 2.5 - rank / 8 if reranked else 0.9 - row / 32,
        "rank": rank,
    }
    if explain:
        hit["explain"] = {"recall_rank": row + 1, "moved": row + 1 - rank}
    return hit


def refusal(status: int, message: str, **headers: str) -> Response:
    error = {"error": {"message": message, "type": "invalid_request_error", "code": None}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(error, status_code=status, headers=named)


@contextlib.contextmanager
def served(server: SearchServer) -> Iterator[SearchServer]:
    """The server on a free port of this machine, in a thread of this process."""
    with listening(server.app()) as port:
        server.url = f"http://127.0.0.1:{port}"
        yield server
