"""The documentation: what its pages have typed, where links lead, what is made of the code, and the site of it all."""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import raytower
from docs.site import pages, reference
from raytower.cli import COMMANDS, find_reference
from raytower.config import Config, nested_configs
from raytower.errors import InputError
from raytower.serving.http.application import create_app
from raytower.serving.http.security import Key
from raytower.serving.http_config import HttpConfig
from tests.support.doc_pages import PAGES, ROOT, Typed, anchors_of, links_in, typed_in
from tests.support.dummy_engine import DummyEngine

SITE = ROOT / "docs" / "site"
each_page = pytest.mark.parametrize("page", PAGES)
# The command that brings mkdocs stands in CONTRIBUTING.md.
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="mkdocs-material and mkdocstrings, which the extra [docs] brings, are not installed",
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site() -> dict[str, str]:
    """All pages of the site, by where they lie."""
    return pages.pages()


@each_page
def test_every_command_of_a_page_is_one(page: str) -> None:
    for typed in typed_in(text_of(page)):
        try:
            typed.check()
        except (InputError, KeyError, AssertionError) as error:
            pytest.fail(f"{page}, line {typed.line}: {' '.join(typed.words)}: {error}")


def test_all_shapes_of_commands_are_read() -> None:
    page = (
        "Take `raytower index list --curve true`\n\n"
        "```sh\nraytower encode --encoder E \\\n    --input I --output O  # a note\n"
        "cat x | raytower embed E t > y && raytower --help\n"
        "ray job submit -- python jobs/encode_corpus.py --encoder E …\nkubectl -n raytower get pods\n```\n\n"
        "    raytower cluster init\n\n```\nraytower config encode > x.yaml\n```\n\n```python\nraytower no\n```\n"
    )
    assert list(typed_in(page)) == [
        Typed(4, ("raytower", "encode", "--encoder", "E", "--input", "I", "--output", "O"), False),
        Typed(5, ("raytower", "embed", "E", "t"), False),
        Typed(5, ("raytower", "--help"), True),
        Typed(6, ("jobs/encode_corpus.py", "--encoder", "E", "…"), False),
        Typed(14, ("raytower", "config", "encode"), True),
        Typed(11, ("raytower", "cluster", "init"), True),
        Typed(1, ("raytower", "index", "list", "--curve", "true"), False),
    ]
    assert sum(len(list(typed_in(text_of(page)))) for page in PAGES) > 200


@pytest.mark.parametrize(
    "line",
    [
        "raytower encod --input x",
        "raytower encode --inputs x",
        "raytower encode --encoder e --output o",
        "raytower index build --embeddings e --output o --kind flatt",
        "raytower search runs/index query more",
        "raytower config encoding",
        "python jobs/encode_corpus.py --encoders e",
    ],
)
def test_a_command_that_is_none_is_found(line: str) -> None:
    (typed,) = typed_in(f"```sh\n{line}\n```\n")
    with pytest.raises((InputError, KeyError, AssertionError)):
        typed.check()


@each_page
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    """In the repository, where pages are read too."""
    for link in links_in(text_of(page)):
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (ROOT / target).exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors_of(text_of(target)), f"{page} links to {link}"


def test_links_are_read_outside_of_code() -> None:
    page = "[a](b.md) ![c](d.png#e) `[f](g)` [h `i`](j.md)\n```\n[k](l)\n```\n\n    [m](n)\n"
    page += "\n[o](https://p.q) [r](#s)\n"
    assert links_in(page) == ["b.md", "d.png#e", "j.md", "#s"]
    assert anchors_of("# A `b` c!\n## D--e\n## D--e\n```\n# no\n```\n## 中文，f\n") == {
        "a-b-c",
        "d--e",
        "d--e-1",
        "中文f",
    }


def test_pages_that_are_only_named_are_there() -> None:
    """`docs/search.md` in a page, a config, a comment or a message."""
    seen = 0
    for folder in ("platform", "docs", "deploy", "jobs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".yml") and path != Path(__file__):
                for name in re.findall(r"(?<![\w/.-])docs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                    assert (ROOT / name).is_file(), f"{path} names {name}"
                    seen += 1
    assert seen > 40


class TestSite:
    def test_links_hold_between_pages(self, site: dict[str, str]) -> None:
        anchors = {page: anchors_of(text) for page, text in site.items()}
        links = 0
        for page, text in site.items():
            for link in links_in(text) if page.endswith(".md") else ():
                path, _, anchor = link.partition("#")
                target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
                assert target in site or (ROOT / "docs" / target).is_file(), f"{page} links to {link}"
                assert not anchor or anchor in anchors[target], f"{page} links to {link}"
                links += 1
        assert links > 200

    def test_a_page_that_is_named_is_linked_by_its_title(self) -> None:
        places = {"README.md": "index.md", "docs/index.md": "indexes.md", "docs/results/a.md": "results/a.md"}
        titles = {"README.md": "home", "docs/index.md": "Indexes", "docs/results/a.md": "A"}
        text = (
            "See `docs/index.md` and (docs/results/a.md), a `README.md`, `docs/none.md`, [x](docs/index.md#y), "
            "[p](docs/images/p.png), [code](platform/a.py), [out](https://a.b).\n\n```sh\ncat docs/index.md\n```\n"
        )
        assert pages._moved(text, "README.md", places, titles) == (
            "See [Indexes](indexes.md) and ([A](results/a.md)), a `README.md`, `docs/none.md`, [x](indexes.md#y), "
            "[p](images/p.png), code (`platform/a.py`), [out](https://a.b).\n\n```sh\ncat docs/index.md\n```\n"
        )
        assert pages._moved("[x](../index.md) docs/index.md", "docs/results/a.md", places, titles) == (
            "[x](../indexes.md) [Indexes](../indexes.md)"
        )

    def test_the_navigation_has_every_page(self, site: dict[str, str]) -> None:
        described = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))
        named = [*leaves(described["nav"]), *map(reference.page_name, COMMANDS)]
        assert sorted(named) == sorted(page for page in site if page.endswith(".md"))

    def test_every_command_has_a_page_of_its_keys(self, site: dict[str, str]) -> None:
        """The keys are those of the classes, counted here without the code that lists them for help."""
        total = 0
        for name, command in COMMANDS.items():
            page = site[reference.page_name(name)]
            assert page.startswith(f"# raytower {name}\n")
            assert f"raytower {name}" in site["command-line.md"]
            assert f"({reference.page_name(name)})" in site["command-line.md"]
            for path in leaf_paths(find_reference(command.config)):
                assert re.search(rf'<a id="{re.escape(path)}(\.\w+)?"></a>`{path.split(".")[-1]}`', page), (
                    f"{name} has no {path}"
                )
                total += 1
        assert total > 500

    def test_a_key_with_its_type_bounds_default_unit_and_meaning(self, site: dict[str, str]) -> None:
        serve, build = site["reference/serve.md"], site["reference/index-build.md"]
        assert re.search(
            r'<a id="port"></a>`port` \| INT ≥ 0 ≤ 65535 \| `8000` \| Port to listen on', serve
        ), serve
        assert re.search(
            r'<a id="limits.max_body_bytes"></a>`max_body_bytes` \| SIZE ≥ 1024 \(bytes, with a unit\)', serve
        )
        assert re.search(r'<a id="timeout_ms"></a>`timeout_ms` \| INT[^|]*\(milliseconds\)', serve)
        assert re.search(r'<a id="embeddings"></a>`embeddings` \| TEXT \| required \|', build)
        assert re.search(r'<a id="kind"></a>`kind` \| `auto`, `flat`, `hnsw`, .*? \| `auto` \|', build)
        assert "`input: VALUE`, means `input: {path: VALUE}`" in site["reference/encode.md"]
        assert "### objective: in_batch_negatives" in site["reference/train-retriever.md"]

    def test_the_page_of_routes_is_what_a_server_with_keys_answers(self, site: dict[str, str]) -> None:
        key = Key(name="k", sha256="0" * 64)
        app: Any = create_app(DummyEngine(), HttpConfig(), [key])
        document = json.loads(app._description)
        assert json.loads(site["reference/openapi.json"]) == document
        page = site["reference/http.md"]
        for route in app.routes:
            assert f"### {route.method} {route.path}\n" in page or f"`{route.path}`" in page, route.path
        for name, schema in document["components"]["schemas"].items():
            assert f"### {name}\n" in page
            for field in schema.get("properties", ()):
                assert f"| `{field}` |" in page, f"{name} has no {field}"
        for status in document["paths"]["/v1/search"]["post"]["responses"]:
            assert status == "200" or f"\n| {status} | " in page
        assert "| `k` | integer ≥ 1 ≤ 1000 or null |" in page

    def test_the_page_of_python_names_what_the_package_offers(self, site: dict[str, str]) -> None:
        named = re.findall(r"^::: raytower\.(\w+)$", site["reference/python.md"], re.MULTILINE)
        assert sorted([*named, "__version__"]) == sorted(raytower.__all__)


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for item in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(item)]


def leaf_paths(config_class: type[Config], prefix: str = "") -> list[str]:
    paths = []
    for name, field in config_class.model_fields.items():
        nested = nested_configs(field.annotation)
        paths += [] if nested else [f"{prefix}{name}"]
        paths += [path for inner in nested for path in leaf_paths(inner, f"{prefix}{name}.")]
    return paths


class Outside(HTMLParser):
    """Collects what a page would fetch: addresses of scripts, styles, images and frames that are not the site's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        address = given.get("href") if tag == "link" else given.get("src")
        if tag in ("link", "script", "img", "iframe", "source") and "//" in (address or ""):
            self.found.append(str(address))


@needs_mkdocs
@pytest.mark.processes
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            str(SITE / "mkdocs.yml"),
            "-d",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    built = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.html")}
    assert {"index.html", "indexes/index.html", "reference/index-build/index.html"} <= built.keys()
    for name, path in built.items():
        reader = Outside()
        reader.feed(path.read_text(encoding="utf-8"))
        assert reader.found == [], name
    # The docstrings are there, not only the names.
    python = built["reference/python/index.html"].read_text(encoding="utf-8")
    assert "The cosine of each query with each document." in python
    assert not list(tmp_path.rglob("*.py"))
    assert not (tmp_path / "site").exists()


def test_make_docs_builds_strictly() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "mkdocs build --strict -f docs/site/mkdocs.yml" in makefile
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert any(line.startswith("mkdocs-material") for line in extras["docs"])
