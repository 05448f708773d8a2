"""The keys of a config, one by one: what help, example configs and completion are written from."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from raytower.config import Config, nested_configs, to_json

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", ByteSize: "SIZE", Any: "VALUE"}


@dataclass(frozen=True)
class Key:
    """One key of a config, or a section of several."""

    path: str
    """Dotted."""
    kind: str
    """What it takes: a type, or its choices."""
    default: str | None
    """As it would be written; None where the key is required."""
    meaning: str
    choices: tuple[str, ...] = ()
    is_section: bool = False
    is_text: bool = False
    """Plain text: `null` and `123` mean themselves."""
    is_switch: bool = False
    is_mapping: bool = False
    """A mapping written as JSON, and perhaps a text besides."""
    shorthand: str | None = None
    """Of a section: the key that a single value means."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Of a section: other names of its keys."""
    chosen_by: str | None = None
    """The `name` that gives a section this key, where a name chooses among several sets of keys."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def keys_of(config_class: type[Config], prefix: str = "", chosen_by: str | None = None) -> Iterator[Key]:
    """Every key of a config class in the order of its fields, a section before its own keys.

    A section whose `name` chooses among classes gives `name` once, then the keys of each class.
    """
    for name, info in config_class.model_fields.items():
        path = f"{prefix}{name}"
        nested = nested_configs(info.annotation)
        if not nested:
            yield _leaf(path, info, chosen_by)
            continue
        default = _default(info)
        names = [str(choice.model_fields["name"].default) for choice in nested] if len(nested) > 1 else []
        yield Key(
            path,
            "SECTION",
            _shown_section(info, default),
            _meaning(info) or _first_sentence(nested[0]),
            choices=tuple(names),
            is_section=True,
            shorthand=nested[0].shorthand if len(nested) == 1 else "name",
            aliases=nested[0].aliases,
        )
        if len(nested) == 1:
            yield from keys_of(nested[0], f"{path}.", chosen_by)
            continue
        named = str(getattr(default, "name", ""))
        yield Key(f"{path}.name", "|".join(names), named, "Which of these it is.", choices=tuple(names))
        for choice, chosen in zip(nested, names, strict=True):
            for key in keys_of(choice, f"{path}.", chosen):
                if key.path != f"{path}.name":
                    yield key


def _leaf(path: str, field: FieldInfo, chosen_by: str | None) -> Key:
    default = None if field.is_required() else shown_value(_default(field))
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    kind = " ".join([kind_of(field.annotation), *bounds])
    return Key(
        path,
        kind,
        default,
        _meaning(field),
        choices=_choices(field.annotation),
        is_text=field.annotation is str,
        is_switch=field.annotation is bool,
        is_mapping="JSON" in kind_of(field.annotation),
        chosen_by=chosen_by,
    )


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a key that takes no others; none where it takes any."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return tuple(map(str, arguments))
    if origin in (Union, types.UnionType):
        parts = [_choices(argument) for argument in arguments]
        return tuple(itertools.chain(*parts)) if all(parts) else ()
    if annotation is type(None):
        return ("null",)
    return ("true", "false") if annotation is bool else ()


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _first_sentence(config_class: type[Config]) -> str:
    """What a section is, by its class."""
    words = " ".join((config_class.__doc__ or "").split())
    return words.partition(". ")[0].rstrip(".") + "."


def _shown_section(field: FieldInfo, default: Any) -> str | None:
    if field.is_required():
        return None
    return "null" if default is None else "its keys' defaults"


def shown_value(value: Any) -> str:
    """A default as it is written in a config: sizes with their unit, text without quotes, the rest as JSON."""
    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else to_json(value)


def kind_of(annotation: Any) -> str:
    """An annotation in words: `INT`, `auto|flat|hnsw`, `list of TEXT`, `NUMBER or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        kinds = [kind_of(argument) for argument in arguments if argument is not type(None)]
        return "|".join(kinds) + (" or null" if type(None) in arguments else "")
    if origin in (list, tuple, set):
        return f"list of {kind_of(arguments[0])}"
    if origin is dict or annotation is dict:
        return "JSON"
    return _WORDS.get(annotation, "VALUE")
