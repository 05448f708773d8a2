"""Labels in their normal form: what users take for one label is one, however a tool has written it down.

A whole number is written without a fraction (pandas makes 1.0 of 1 as soon as one value of a column is missing), and
space around a label is no part of it: `1`, `1.0` and ` 1 ` are the label `1`. Imports no library of data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WHOLE_NUMBER = r"^(-?[0-9]+)\.0*$"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def plain_label(label: str | int | float) -> str:
    """One label in its normal form; `rows.py` does the same to a column."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = re.sub(WHOLE_NUMBER, r"\1", str(label).strip())
    return "0" if text == "-0" else text


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their classes: by value where all are numbers (2 before 10), else by text."""
    found = list(labels)
    if all(map(_NUMBER.fullmatch, found)):
        return sorted(found, key=lambda label: (float(label), label))
    return sorted(found)
