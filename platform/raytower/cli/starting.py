"""Configs to start from: a command's example as YAML, with every other key commented out beside its meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from raytower.cli.keys import Key, keys_of
from raytower.commands import COMMANDS, find_reference
from raytower.examples import EXAMPLES

_WIDTH = 110


@dataclass(frozen=True)
class _Margin:
    """Where a line stands: how deep in sections, and from which depth on all is commented out."""

    depth: int = 0
    off: int | None = None

    def line(self, text: str) -> str:
        if self.off is None:
            return "  " * self.depth + text
        return "  " * self.off + "# " + "  " * (self.depth - self.off) + text

    def below(self) -> _Margin:
        return _Margin(self.depth + 1, self.off)

    def switched_off(self) -> _Margin:
        return self if self.off is not None else _Margin(self.depth, self.depth)


def starting_config(name: str) -> str:
    """The YAML of `raytower config NAME`, which `load_config` reads as the example of that command."""
    example = EXAMPLES[name]
    keys = list(keys_of(find_reference(COMMANDS[name].config)))
    words = textwrap.wrap(f"raytower {name}: {COMMANDS[name].help}. {example.comment}".strip(), _WIDTH)
    lines = [f"# {line}" for line in words]
    return "\n".join([*lines, *_write(keys, "", example.values, _Margin())]) + "\n"


def _write(keys: Sequence[Key], section: str, values: Mapping[str, Any], margin: _Margin) -> Iterator[str]:
    """The keys of one section, each below its meaning."""
    for key in keys:
        if key.path.rpartition(".")[0] != section:
            continue
        if not margin.depth:
            yield ""
        for line in textwrap.wrap(_explain(key), _WIDTH - 2 * margin.depth - 2):
            yield margin.line(f"# {line}")
        if key.is_section:
            yield from _write_section(keys, key, values.get(key.name), margin)
        elif key.name in values:
            for line in _dump({key.name: values[key.name]}):
                yield margin.line(line)
        else:
            shown = "" if key.default is None else f" {_quoted(key.default)}"
            yield margin.switched_off().line(f"{key.name}:{shown}")


def _write_section(keys: Sequence[Key], section: Key, given: Any, margin: _Margin) -> Iterator[str]:
    if given is not None and not isinstance(given, Mapping):
        yield from map(margin.line, _dump({section.name: given}))
        return
    margin = margin if given is not None else margin.switched_off()
    names = [key.default for key in keys if key.path == f"{section.path}.name"]
    chosen = (given or {}).get("name", names[0] if names else None)
    yield margin.line(f"{section.name}:")
    own = [key for key in keys if key.chosen_by in (None, chosen)]
    yield from _write(own, section.path, given or {}, margin.below())


def _explain(key: Key) -> str:
    if key.is_section:
        return key.meaning
    default = "required" if key.default is None else f"default {key.default}"
    return f"{key.meaning} {key.kind}; {default}.".strip()


def _dump(values: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=_WIDTH).splitlines()


def _quoted(default: str) -> str:
    """A default as YAML would read it back: text that reads as something else gets quotes."""
    return default if yaml.safe_load(default) is not None or default == "null" else f"'{default}'"
