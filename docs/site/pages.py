"""The pages of the site: the Markdown files of the repository, and those that are made of the code.

They are made when the site is built and are not committed: every branch that adds a key would change a page and its
neighbours', and what is committed can be stale. In the repository `raytower COMMAND --help`, `raytower config COMMAND`
and `GET /openapi.json` say the same.

This needs no mkdocs, so the suite tests it where mkdocs is not installed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import raytower
from docs.site import http_api, reference

ROOT = Path(__file__).resolve().parents[2]
# Files outside of docs/, and the one whose name is that of a site's first page.
ELSEWHERE = {
    "README.md": "index.md",
    "docs/index.md": "indexes.md",
    "deploy/kuberay/README.md": "kubernetes.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
# Names of keys in tables are not broken.
_TABLES = ".md-typeset td:first-child code { white-space: nowrap; word-break: normal; }\n"
_COMMANDS_MARK = "<!-- the table of commands -->"
_LINK = r"!?\[(?P<label>[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\((?P<target>[^()\s]+)\)"
_CODE = r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)(?!`)"
_MENTION = r"(?<![\w/.-])(?P<mention>(?:docs|deploy|benchmarks)/[\w/-]+\.md)\b"
_INLINE = re.compile(f"{_LINK}|{_CODE}|{_MENTION}", re.DOTALL)
# Blocks of code: fenced, or four spaces in behind an empty line.
_FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$|(?<=\n\n)(?: {4}.*\n?)+", re.MULTILINE | re.DOTALL)


def sources() -> dict[str, str]:
    """Where each Markdown file of the repository lies on the site: `docs/results/kinds.md` is `results/kinds.md`."""
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return {
        path: ELSEWHERE.get(path, path.removeprefix("docs/")) for path in sorted(inside | ELSEWHERE.keys())
    }


def pages() -> dict[str, str]:
    """All pages of the site and the files that belong to them, each text by where it lies."""
    places = sources()
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in places}
    titles = {path: title_of(text) for path, text in texts.items()}
    made = {places[path]: _moved(text, path, places, titles) for path, text in texts.items()}
    made["command-line.md"] = made["command-line.md"].replace(_COMMANDS_MARK, reference.command_table())
    more = {"reference/python.md": python_page(), "tables.css": _TABLES}
    return {**made, **reference.command_pages(), **http_api.pages(), **more}


def title_of(text: str) -> str:
    """The heading of the first level, without the marks of code."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].replace("`", "") if found else ""


def python_page() -> str:
    """What `import raytower` offers, which mkdocstrings writes from the docstrings without importing anything."""
    names = [name for name in raytower.__all__ if name != "__version__"]
    # A package's names by what they are for: functions, then the classes that they give, then errors.
    names.sort(key=lambda name: (name.endswith("Error"), name[0].isupper(), name))
    return "\n\n".join(
        [
            "# The Python API",
            "What `import raytower` offers, from the docstrings; [the guide](../python.md) shows it at work. All else "
            "in the package may change without notice.",
            *(f"::: raytower.{name}" for name in names),
            "",
        ]
    )


def _moved(text: str, source: str, places: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """A file's text with its links as they are on the site.

    A page that is only named, such as `docs/search.md`, becomes a link by its title. A link to a file that is not on
    the site becomes the file's name.
    """

    def inline(found: re.Match[str]) -> str:
        if found["target"]:
            return _moved_link(found, source, places)
        name = found["mention"] or found["code"]
        # A name without a folder may be that of another file: a model has a README.md too.
        if name not in places or name == source or "/" not in name:
            return found[0]
        return f"[{titles[name]}]({relative(places[name], places[source])})"

    return outside_code(text, lambda part: _INLINE.sub(inline, part))


def _moved_link(found: re.Match[str], source: str, places: Mapping[str, str]) -> str:
    path, mark, anchor = found["target"].partition("#")
    if ":" in path or not path:
        return found[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    place = places.get(target)
    if place is None and target.startswith("docs/"):  # images and configs go along as they are
        place = target.removeprefix("docs/")
    if place is None:
        return f"{found['label']} (`{target}`)"
    start = found[0][: found.start("target") - found.start()]
    return f"{start}{relative(place, places[source])}{mark}{anchor})"


def relative(place: str, seen_from: str) -> str:
    """A page's path as a link from another page has it."""
    return posixpath.relpath(place, posixpath.dirname(seen_from) or ".")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` made of everything but blocks of code."""
    parts, end = [], 0
    for block in _FENCE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])
