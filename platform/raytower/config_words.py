"""What is wrong with a config's values, in our own words: the key, its value, the rule and the remedy.

The rule is read from the field's type and bounds, so that all of pydantic's own wordings become one, and what it says
of the branches of a union becomes one line. Only what our own validators say is passed on.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ByteSize, ValidationError
from pydantic.fields import FieldInfo

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    ByteSize: "a size",
    Any: "a value",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Problem:
    """One key that is wrong: its path, and what is to be said of it."""

    path: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class _Found:
    """Where an error lies: the dotted path, and the type and bounds that hold there."""

    path: tuple[str, ...]
    annotation: Any
    bounds: tuple[Any, ...] = ()
    has_default: bool = False
    in_list: bool = False


def problems_of(config_class: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Every key that pydantic refuses, once."""
    found: dict[tuple[str, ...], str] = {}
    for detail in error.errors():
        problem = _problem_of(config_class, detail)
        found.setdefault(problem.path, problem.message)
    # Of a union's branches the one that is wrong further inside says more.
    return [
        Problem(path, message)
        for path, message in found.items()
        if not any(len(other) > len(path) > 0 and other[: len(path)] == path for other in found)
    ]


def shown(value: Any) -> str:
    """A value for a message, as a config would say it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


def must_be(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """A type and its bounds in words: `a whole number ≥ 1, or null`."""
    annotation, inner = _unwrapped(annotation)
    branches = _branches(annotation)
    others = [branch for branch in branches if branch is not type(None)]
    configs = [branch for branch in others if _is_config(branch)]
    if len(configs) > 1:
        names = _listed(repr(branch.model_fields["name"].default) for branch in configs)
        words = f"{names}, or a mapping with this name and its settings"
    else:
        # The last of the branches takes the bounds: a choice such as auto has none.
        words = ", or ".join(
            _one(branch, [*bounds, *inner] if branch is others[-1] else []) for branch in others
        )
    return f"{words}, or null" if len(others) < len(branches) else words


def _problem_of(config_class: type[BaseModel], detail: Any) -> Problem:
    found = _find(config_class, detail["loc"])
    where, value, kind = ".".join(found.path), detail.get("input"), detail["type"]
    if kind == "missing":
        option = "" if found.in_list else f" or with --{where} VALUE"
        return Problem(found.path, f"{where} is required and not given; set it in the config file{option}")
    if kind == "value_error":
        said = detail["msg"].removeprefix("Value error, ")
        # Of a section, what is said names the keys itself.
        is_whole = not where or isinstance(value, (Mapping, BaseModel))
        return Problem(found.path, said if is_whole else f"{where} is {shown(value)}: {said}")
    if kind == "invalid_key" or detail["loc"][-1:] == ("[key]",):
        above = ".".join(found.path[:-1])
        return Problem(found.path, f"{above} has the key {shown(value)}; keys are texts: write it in quotes")
    if kind == "extra_forbidden":
        path = (*found.path, str(detail["loc"][-1]))
        known = ", ".join(getattr(found.annotation, "model_fields", {}))
        return Problem(path, f"unknown key {'.'.join(path)!r}; known are {known}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _name_that_chooses(found, value)
    rule = must_be(found.annotation, found.bounds)
    return Problem(found.path, f"{where} is {shown(value)}; it must be {rule}{_remedy(found, value)}")


def _name_that_chooses(found: _Found, value: Any) -> Problem:
    configs = [branch for branch in _branches(_unwrapped(found.annotation)[0]) if _is_config(branch)]
    names = [str(branch.model_fields["name"].default) for branch in configs]
    path = (*found.path, "name")
    name = value.get("name") if isinstance(value, Mapping) else value
    return Problem(
        path,
        f"{'.'.join(path)} is {shown(name)}; it must be {_listed(map(repr, names))}{_nearest(name, names)}",
    )


def _remedy(found: _Found, value: Any) -> str:
    branches = _branches(_unwrapped(found.annotation)[0])
    if value is None and found.has_default:
        return "; leave it out for its default"
    if str in branches and isinstance(value, (bool, int, float)):
        return "; write it in quotes"
    choices = [str(item) for branch in branches for item in _choices(branch)]
    return _nearest(value, choices)


def _nearest(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f"; the nearest is {near[0]!r}" if near else ""


def _find(config_class: type[BaseModel], location: Sequence[str | int]) -> _Found:
    """Follow pydantic's location, which names union branches and tags besides keys, to the type that holds there."""
    found = _Found((), config_class)
    for number, part in enumerate(location):
        annotation, inner = _unwrapped(found.annotation)
        others = [branch for branch in _branches(annotation) if branch is not type(None)]
        if len(others) > 1:  # the part says which branch
            chosen = [branch for branch in others if _is_named(branch, str(part))]
            if len(chosen) == 1 and number + 1 < len(location):
                found = _Found(found.path, chosen[0], (*found.bounds, *inner), found.has_default)
            continue
        found = _below(found, others[0], part)
    return found


def _below(found: _Found, annotation: Any, part: str | int) -> _Found:
    if _is_config(annotation):
        field = annotation.model_fields.get(str(part))
        if field is None:
            return _Found(found.path, annotation, in_list=found.in_list)
        path = (*found.path, str(part))
        return _Found(path, field.annotation, tuple(field.metadata), not field.is_required(), found.in_list)
    arguments = typing.get_args(annotation)
    if part == "[key]" or not arguments:
        return found
    is_list = typing.get_origin(annotation) in (list, tuple, set)
    return _Found((*found.path, str(part)), arguments[0 if is_list else -1], in_list=is_list or found.in_list)


def _is_named(branch: Any, label: str) -> bool:
    """Whether pydantic calls a branch of a union so: a config by its tag or class, a mapping `dict[…]`."""
    if _is_config(branch):
        name = branch.model_fields.get("name")
        return label == branch.__name__ or (name is not None and label == name.default)
    origin = typing.get_origin(branch)
    return isinstance(origin, type) and label.startswith(f"{origin.__name__}[")


def _one(annotation: Any, bounds: Sequence[Any]) -> str:
    annotation, inner = _unwrapped(annotation)
    bounds = [*bounds, *inner]
    words = _base(annotation) + _limits(bounds)
    least = max((getattr(rule, "min_length", None) or 0 for rule in bounds), default=0)
    if least:
        words += ", not empty" if least == 1 else f", at least {least} long"
    return f"{words}, such as 8GiB" if annotation is ByteSize else words


def _limits(bounds: Sequence[Any]) -> str:
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in bounds
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return f" {', '.join(limits)}" if limits else ""


def _base(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _listed(map(shown, arguments))
    if origin in (list, tuple, set):
        item, bounds = _unwrapped(arguments[0])
        return f"a list of {_many(item)}{_limits(bounds)}"
    if origin is dict or annotation is dict:
        return "a mapping"
    if _is_config(annotation):
        return _section(annotation)
    return _WORDS.get(annotation, "of another type")


def _section(config_class: Any) -> str:
    names = [repr(name) for name in list(config_class.model_fields)[:3]]
    more = ", …" if len(config_class.model_fields) > 3 else ""
    words = f"a mapping of its keys ({', '.join(names)}{more})"
    return f"a single text for {config_class.shorthand!r}, or {words}" if config_class.shorthand else words


def _many(item: Any) -> str:
    return _MANY.get(item, "mappings" if _is_config(item) else "values")


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _choices(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _branches(annotation: Any) -> list[Any]:
    """The types of a union, nested ones among them; of another type itself."""
    return list(_iterate_branches(annotation))


def _iterate_branches(annotation: Any) -> Iterator[Any]:
    inner, _ = _unwrapped(annotation)
    if typing.get_origin(inner) in (Union, types.UnionType):  # one whose `name` chooses is wrapped
        annotation = inner
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        yield annotation
        return
    for branch in typing.get_args(annotation):
        yield from _iterate_branches(branch)


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated`, and the bounds that stood there."""
    if typing.get_origin(annotation) is not Annotated:
        return annotation, ()
    inner, *more = typing.get_args(annotation)
    rules = [rule for item in more for rule in (item.metadata if isinstance(item, FieldInfo) else [item])]
    below, deeper = _unwrapped(inner)
    return below, (*rules, *deeper)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
