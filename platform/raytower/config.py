"""Configs: one frozen, keyword-only class per component, read from YAML plus `--section.key value` overrides.

Unknown keys are refused with the nearest known key named; every message says where the value came from.
"""

from __future__ import annotations

import difflib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.types import ByteSize as ByteSize

from raytower.config_words import problems_of
from raytower.errors import InputError
from raytower.requirements import ray_options, refuse_requirements

ConfigT = TypeVar("ConfigT", bound="Config")
# Where the value of a key came from, by the key's path.
Source = Callable[[tuple[str, ...]], str]
_COMMAND_LINE = "the command line"


class Config(BaseModel):
    """Base of every config: frozen, validated when made, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    shorthand: ClassVar[str | None] = None
    """The key that a single value in place of the section means: `input: FILE` is `input: {path: FILE}`."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """What keys were called before, to their names of now, both dotted where they lie in a section. An old name is
    refused with the new one."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names under which keys are still taken, to their names. Where both are given, the key's own name counts."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        if cls.shorthand is not None and isinstance(values, (str, os.PathLike)):
            return {cls.shorthand: os.fspath(values)}
        if isinstance(values, Mapping) and values.keys() & cls.aliases.keys():
            own = {name: value for name, value in values.items() if name not in cls.aliases}
            return {cls.aliases[name]: value for name, value in values.items() if name in cls.aliases} | own
        return values


class FittedWorkersConfig(Config):
    """Processes that a job's work is shared out to, what each of them holds while it works, and where it may run; what
    is null is as the machine has it (see `raytower.workers`)."""

    aliases: ClassVar = {"max": "num"}

    num: int | None = Field(default=None, ge=1)
    """How many there are; null is one for each GPU, and without GPUs one for each machine."""
    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs of each, which computes with as many threads; null shares out those of its machine."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of each; null is 1 where there is one for each, and else 0. Below 1 several share one, such as four of
    0.25."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """What each holds of other things that nodes have, by the names that `ray start --resources` gave them, such as
    {"license": 1}."""
    label_selector: dict[str, str] = {}
    """Labels that the node of each must have, such as {"ray.io/accelerator-type": "L4", "ray.io/market-type": "spot"}.
    A value may also be !spot, in(L4, A10G) or !in(L4, A10G)."""

    @model_validator(mode="after")
    def _check_requirements(self) -> Self:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(
                f"workers.num_gpus is {self.num_gpus:g}; above 1 they are whole ones: give a whole number, or a part "
                "of one GPU"
            )
        refuse_requirements(self.resources, self.label_selector, "workers.")
        return self

    @property
    def num_threads(self) -> int:
        """Threads that a worker computes with, once num_cpus is known."""
        return max(int(self.num_cpus or 1), 1)

    @property
    def ray_options(self) -> dict[str, Any]:
        """`resources` and `label_selector` as options of a Ray task or actor; what is empty is left out."""
        return ray_options(self.resources, self.label_selector)


class WorkersConfig(FittedWorkersConfig):
    """Processes that a job's work is shared out to, and what each of them holds while it works: numbers, not nulls."""

    num: int = Field(default=2, ge=1)
    """How many there are, or how many shards are built at once."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of each, which computes with as many threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each. Below 1 several share one, such as four of 0.25."""


class AutoscalingWorkersConfig(FittedWorkersConfig):
    """Workers that come and go: never fewer than `min` where there are so many parts of work, never more than `num`."""

    num: int | None = Field(default=None, ge=1)
    """Most of them; null is one for each GPU, and without GPUs two for each machine."""
    min: int = Field(default=1, ge=1)
    """How many are kept where work is short."""

    def model_post_init(self, context: Any) -> None:
        if self.num is not None and self.min > self.num:
            raise ValueError(
                f"workers.min is {self.min}, more than workers.num {self.num}; lower min or raise num"
            )


OnError = Literal["fail", "quarantine"]
FractionField = Annotated[float, Field(ge=0, le=1)]


def load_config(
    config_class: type[ConfigT],
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    content: bytes | None = None,
) -> ConfigT:
    """Read `path` (YAML or JSON), lay `overrides` (nested or dotted keys) over it and validate.

    `content` is the file's, where it has been read: a pipe can be read once.

    Raises:
        InputError: the file is missing or no mapping, a key is unknown, or a value breaks its rule.
    """
    below = {} if path is None else _read_file(path, content)
    above = nested_keys(overrides or {})
    merged = _lay_over(config_class, below, above)
    return _validated(config_class, merged, _source_of(None if path is None else _named(path), below, above))


def make_config(config_class: type[ConfigT], values: Mapping[str, Any], source: str = "config") -> ConfigT:
    """Validate `values` into `config_class`. Raises one InputError that names every offending key."""
    return _validated(config_class, values, lambda _: source)


def _validated(config_class: type[ConfigT], values: Mapping[str, Any], source: Source) -> ConfigT:
    _refuse_unknown(config_class, values, source)
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = problems_of(config_class, error)
        raise InputError("\n".join(f"{source(item.path)}: {item.message}" for item in problems)) from error


def _source_of(file: str | None, below: Mapping[str, Any], above: Mapping[str, Any]) -> Source:
    """Who has given a key: the command line, else the config file; of a section or the whole perhaps both."""

    def source(path: tuple[str, ...]) -> str:
        if file is None:
            return _COMMAND_LINE
        found = _value_at(above, path)
        if found is None:
            return file
        is_shared = isinstance(found, Mapping) and _value_at(below, path) is not None
        return f"{file} and {_COMMAND_LINE}" if is_shared else _COMMAND_LINE

    return source


def _value_at(values: Any, path: tuple[str, ...]) -> Any:
    """What is given at a path, or above it as one value; None where nothing is. What is given as null is a text."""
    for part in path:
        if not isinstance(values, Mapping):
            break
        if part not in values:
            return None
        values = values[part]
    return "null" if values is None else values or None if isinstance(values, Mapping) else values


class Loader(yaml.SafeLoader):
    """Reads YAML, which JSON is, with every key as the text that stands there.

    `0: 1.5` has the key "0", and `no: 2` the key "no", of which YAML would make a number and a boolean. A key that
    stands twice is refused, of which YAML would take the last.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                raise InputError(
                    f"key {key!r} stands twice, in lines {lines[key]} and {line}; keep one of them"
                )
            lines[key] = line
        self.flatten_mapping(node)  # before `<<` would become a text too
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key_node.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _named(path: str | Path) -> str:
    """How messages call a config file."""
    return f"config file {str(path)!r}"


def read_config_file(path: str | Path) -> bytes:
    """The content of a config file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{_named(path)}: cannot be read: {error.strerror or error}") from error


def _read_file(path: str | Path, content: bytes | None) -> dict[str, Any]:
    """A config file's keys and values, as they stand there."""
    name = _named(path)
    content = read_config_file(path) if content is None else content
    try:
        loaded = yaml.load(content.decode("utf-8"), Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8: {error}; save it as UTF-8") from error
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2020-13-45 is a ValueError
        raise InputError(f"{name}: not valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise InputError(
            f"{name}: it holds a {type(loaded).__name__} and must hold a mapping of keys to values"
        )
    values: dict[str, Any] = loaded or {}
    return values


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, for --dry-run and for the record beside an output."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def to_json(value: Any) -> str:
    """One line of JSON with text kept readable; NaN and infinity become null, which is all JSON knows."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def nested_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted keys (`section.key`) taken apart and laid over the sections that are given whole.

    Raises:
        InputError: a section is given as a single value, and one of its keys besides.
    """
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        *parents, leaf = key.split(".")
        section = nested
        for parent in parents:
            below = section.setdefault(parent, {})
            if not isinstance(below, Mapping):
                raise InputError(
                    f"{key!r} is given, and {parent!r} as {below!r}; give {parent!r} as a mapping"
                )
            section[parent] = dict(below)
            section = section[parent]
        section[leaf] = value
    return nested


def _lay_over(
    config_class: type[Config], below: Mapping[str, Any], above: Mapping[str, Any]
) -> dict[str, Any]:
    """`above` over `below`: sections key by key, all other values whole."""
    merged = dict(below)
    for key, value in above.items():
        field = config_class.model_fields.get(key)
        sections = nested_configs(field.annotation) if field else []
        if sections and isinstance(value, Mapping):
            under = merged.get(key)
            if not isinstance(under, Mapping):
                shorthand = "name" if len(sections) > 1 else sections[0].shorthand
                under = {} if under is None or shorthand is None else {shorthand: under}
            if len(sections) > 1 and value.get("name", under.get("name")) != under.get("name"):
                under = {}  # the settings of another choice
            value = _lay_over(sections[0], under, value)
        merged[key] = value
    return merged


def nested_configs(annotation: Any) -> list[type[Config]]:
    """The config classes that a field may hold: several where a key such as `name` chooses between them."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [item for argument in typing.get_args(annotation) for item in nested_configs(argument)]
    return []


def _nested_config(annotation: Any, default: Any, values: Mapping[str, Any]) -> type[Config] | None:
    """The class that `values` are for: the only one there is, or the one whose `name` they give, or the default's."""
    configs = nested_configs(annotation)
    if len(configs) <= 1:
        return configs[0] if configs else None
    name = values.get("name")
    if name is None:
        return type(default) if isinstance(default, Config) else None
    return next((item for item in configs if item.model_fields["name"].default == name), None)


def _known_keys(config_class: type[Config], prefix: tuple[str, ...] = ()) -> list[str]:
    keys = []
    for name, field in config_class.model_fields.items():
        keys.append(".".join((*prefix, name)))
        for nested in nested_configs(field.annotation):
            keys.extend(_known_keys(nested, (*prefix, name)))
    return list(dict.fromkeys(keys))


def former_keys(config_class: type[Config]) -> dict[str, str]:
    """What keys of a class and of its bases were called before they were renamed, each with its name of now."""
    classes = reversed(config_class.__mro__)
    renamed = {old: new for part in classes for old, new in vars(part).get("renamed", {}).items()}
    return {**renamed, **config_class.aliases}


def _refuse_former_keys(
    config_class: type[Config], values: Mapping[str, Any], prefix: tuple[str, ...], source: Source
) -> None:
    refused = former_keys(config_class).items() - config_class.aliases.items()
    given = [
        names for names in former_keys(config_class).items() if names in refused and _holds(values, names[0])
    ]
    if given:
        raise InputError(
            "\n".join(
                f"{source((*prefix, *old.split('.')))}: unknown key {'.'.join((*prefix, old))!r}: "
                f"it is called {'.'.join((*prefix, new))!r} now"
                for old, new in given
            )
        )


def _holds(values: Any, key: str) -> bool:
    """Whether a dotted key is given in nested values."""
    head, _, rest = key.partition(".")
    if not isinstance(values, Mapping) or head not in values:
        return False
    return not rest or _holds(values[head], rest)


def refuse_unknown_keys(config_class: type[Config], values: Mapping[str, Any], source: str) -> None:
    """Raise InputError where `values` have a key that the config has not, naming the one that may be meant."""
    _refuse_unknown(config_class, values, lambda _: source)


def _refuse_unknown(
    config_class: type[Config], values: Mapping[str, Any], source: Source, prefix: tuple[str, ...] = ()
) -> None:
    _refuse_former_keys(config_class, values, prefix, source)
    fields = config_class.model_fields
    for key, value in values.items():
        path = (*prefix, str(key))
        if key not in fields and key not in config_class.aliases:
            raise InputError(f"{source(path)}: {describe_unknown(config_class, str(key), prefix)}")
        if isinstance(value, Mapping) and key in fields:
            nested = _nested_config(fields[key].annotation, fields[key].default, value)
            if nested is not None:
                _refuse_unknown(nested, value, source, path)


def describe_unknown(config_class: type[Config], key: str, prefix: tuple[str, ...] = ()) -> str:
    """What is wrong with a (dotted) key that a config has not, and which one may be meant."""
    dotted = ".".join((*prefix, key))
    above, _, below = dotted.rpartition(".")
    known = _known_keys(config_class, prefix)
    if dotted in known:
        head, *sections, last = key.split(".")
        nested = f"{last}: …"
        for section in reversed(sections):
            nested = f"{section}: {{{nested}}}"
        return f"unknown key {dotted!r}: in a file sections are nested; write {head}: {{{nested}}}"
    if above in known and not any(other.startswith(f"{above}.") for other in known):
        return (
            f"unknown key {dotted!r}: {above} is one value; a mapping is given whole, {above}: {{{below}: …}}"
        )
    nearest = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    hint = f"the nearest known key is {nearest[0]!r}" if nearest else f"known are {', '.join(known)}"
    return f"unknown key {dotted!r}; {hint}"
