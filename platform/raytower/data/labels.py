"""Labels in their normal form: what users take for one label is one, however a tool has written it down.

A whole number is written without a fraction (pandas makes 1.0 of 1 as soon as one value of a column is missing), and
space around a label is no part of it: `1`, `1.0` and ` 1 ` are the label `1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

_WHOLE = r"^(-?[0-9]+)\.0*$"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def normal_labels(labels: pa.Array) -> pa.Array:
    """A column of labels, strings, each in its normal form; null stays null."""
    trimmed = pc.utf8_trim_whitespace(labels)
    whole = pc.replace_substring_regex(trimmed, _WHOLE, r"\1")
    return pc.if_else(pc.equal(whole, "-0"), "0", whole)


def label_text(label: str | int | float) -> str:
    """One label in its normal form."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(normal_labels(pa.array([str(label)], pa.string()))[0].as_py())


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their classes: by value where all are numbers (2 before 10), else by text."""
    found = list(labels)
    if all(map(_NUMBER.fullmatch, found)):
        return sorted(found, key=lambda label: (float(label), label))
    return sorted(found)
