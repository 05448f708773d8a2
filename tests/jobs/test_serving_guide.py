"""Every curl line of docs/serving.md, as it is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raytower
from raytower.serving.http.application import create_app
from raytower.serving.http_config import HttpConfig
from tests.support.dummy_engine import DummyEngine
from tests.support.guide import Block, Served, check_shape, read_blocks, run_block
from tests.support.real_server import serving
from tests.support.reverse_proxies import PROXIES

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = read_blocks(GUIDE)
INSIDE = ("/metrics", "/v1/admin/")
KEY = "key-of-the-test"
ROWS: list[dict[str, Any]] = [
    {"id": "a7", "text": "如何申请微粒贷", "year": 2024},
    {"id": "b2", "text": "花呗怎么还款", "year": 2021},
    {"id": "c9", "text": "借呗逾期一天多少利息", "year": 2019},
]
# Other names of routes that have lines.
ALIASES = {"/embed", "/v1/embed", "/models", "/infinity/rerank", "/infinity/embeddings", "/", "/openapi.json"}

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
each_block = pytest.mark.parametrize("block", BLOCKS, ids=[f"line {block.line}" for block in BLOCKS])


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path, dummy_reranker_dir: Path
) -> Iterator[Served]:
    """The server itself, as `Served` describes it: an index of `ROWS`, a reranker, labels."""
    folder = tmp_path_factory.mktemp("guide")
    rows = [{**row, "label": "loans"} for row in ROWS]
    raytower.index_texts(rows, str(dummy_encoder_dir), str(folder / "index"))
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / "keys.yaml").write_text(json.dumps([{"name": "reader", "sha256": digest, "admin": True}]))
    faq = {
        "index": str(folder / "index"),
        "reranker": str(dummy_reranker_dir),
        "classify_modes": ["votes", "labels"],
    }
    common: dict[str, Any] = {"collections": {"faq": faq}, "timeout_ms": 60_000}
    keyed = {**common, "security": {"keys_file": str(folder / "keys.yaml")}}
    with serving(**common) as url, serving(**keyed) as keyed_url:
        # A newer version, so that there is one to move to and one to go back to.
        newer = [*rows, {"id": "d4", "text": "花呗额度", "label": "loans", "year": 2025}]
        raytower.index_texts(newer, str(dummy_encoder_dir), str(folder / "index"))
        yield Served(url, keyed_url, KEY)


def test_the_guide_has_a_line_for_every_route() -> None:
    assert len(BLOCKS) >= 15
    assert sum(block.shown is not None for block in BLOCKS) >= 8
    typed = "\n".join(block.code for block in BLOCKS)
    paths = {route.path for route in create_app(DummyEngine(), HttpConfig()).routes}
    assert paths >= ALIASES - {"/openapi.json"}
    for path in paths - ALIASES:
        if "{" not in path:
            assert f'"$URL{path}"' in typed, path
    assert '"$URL/v1/faq/search"' in typed


@each_block
def test_a_line_is_answered(block: Block, served: Served, tmp_path: Path) -> None:
    answer = run_block(block, served, tmp_path)
    if block.shown is not None:
        check_shape(block.shown, json.loads(answer))


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_lines_are_answered_behind_a_reverse_proxy(name: str, served: Served, tmp_path: Path) -> None:
    start = PROXIES[name]
    with (
        start(tmp_path, served.url.removeprefix("http://")) as proxy,  # type: ignore[attr-defined]
    ):
        behind = Served(proxy.plain, served.keyed_url, KEY)
        outside = [block for block in BLOCKS if not any(path in block.code for path in INSIDE)]
        assert len(outside) >= len(BLOCKS) - 3
        for block in outside:
            answer = run_block(block, behind, tmp_path)
            if block.shown is not None:
                check_shape(block.shown, json.loads(answer))


JSON = "-H 'content-type: application/json'"


@pytest.mark.parametrize(
    "line",
    [
        'curl "$URL/v1/serach" -d "{}"',
        'curl "$URL/v1/search" -d \'{"query": "q", "kk": 3}\'',
        'curl "$URL/v1/search" -d "{"',
        'curl "$URL/v1/search" -d \'{"query": 3}\'',
        'curl "$URL/v1/collections"; curl -H "authorization: Bearer $KEY-" "$URL/v1/collections"; true',
        "curl http://127.0.0.1:1/ | cat; true",
    ],
)
def test_a_line_that_does_not_work_is_found(line: str, served: Served, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="line 7 of the guide failed"):
        run_block(Block(7, line.replace("curl", f"curl {JSON}", 1), None), served, tmp_path)


def test_an_answer_that_is_not_as_shown_is_found() -> None:
    shown = {"results": [{"rank": 1, "text": "t", "score": 1.0}]}
    check_shape(shown, {"results": [{"rank": 9, "text": None, "score": 2, "more": 1}], "more": 1})
    for answer in (
        {"results": []},
        {"results": [{"rank": 1}]},
        {"results": [{"rank": "1", "text": "t", "score": 1}]},
        [],
    ):
        with pytest.raises(AssertionError, match="the guide shows"):
            check_shape(shown, answer)


def test_its_python_lines_compile() -> None:
    blocks = GUIDE.split("```python\n")[1:]
    assert len(blocks) >= 4
    for block in blocks:
        compile(block.partition("```")[0], "docs/serving.md", "exec")
