"""What a process asks of its node beside CPUs and GPUs: labels, and amounts of resources that the cluster has named.

The grammar of labels is Ray's (`label_selector` of tasks and actors), which follows Kubernetes'. It is checked here, so
that a mistyped selector is refused with its config and not by the first task. Pure; imports no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"({_WORD}/)?{_WORD}")
_WANTED = re.compile(rf"!?({_WORD}|in\({_WORD}(, ?{_WORD})*\))")
# What Ray counts under names of its own, with the key that asks for it here.
_OWN_NAMES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": None, "object_store_memory": None}


def refuse_requirements(
    resources: Mapping[str, float], label_selector: Mapping[str, str], prefix: str = ""
) -> None:
    """Raises ValueError for what Ray would not take; `prefix` stands before the keys' names, such as "workers."."""
    for name in resources:
        if name in _OWN_NAMES:
            key = _OWN_NAMES[name]
            remedy = f"ask for it by {prefix}{key}" if key else "leave it out"
            raise ValueError(
                f"{prefix}resources names {name}, which Ray counts by itself: it takes names that nodes were given by "
                f"`ray start --resources`; {remedy}"
            )
    for name, wanted in label_selector.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{prefix}label_selector has the key {name!r}; a label's name is letters, digits, -, _ and . (63 at "
                "most), perhaps after a prefix and /, such as ray.io/market-type"
            )
        if not _WANTED.fullmatch(wanted):
            raise ValueError(
                f"{prefix}label_selector.{name} is {wanted!r}; give a value such as spot, !spot, in(L4, A10G) or "
                "!in(L4, A10G), of letters, digits, -, _ and ."
            )


def ray_options(resources: Mapping[str, float], label_selector: Mapping[str, str]) -> dict[str, Any]:
    """The options of a Ray task or actor that ask for both; what is empty is left out."""
    options = {"resources": dict(resources), "label_selector": dict(label_selector)}
    return {name: asked for name, asked in options.items() if asked}


def has_labels(label_selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one of those that are asked for, by Ray's rule."""
    return all(_is_wanted(wanted, labels.get(name)) for name, wanted in label_selector.items())


def _is_wanted(wanted: str, value: str | None) -> bool:
    """`!spot` is true as well of a node that has no such label; `spot` is not."""
    listed = wanted.removeprefix("!")
    values = listed[3:-1].split(",") if listed.startswith("in(") else [listed]
    return (value in {each.strip() for each in values}) != wanted.startswith("!")
