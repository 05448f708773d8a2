"""Labels in their normal form: what users take for one label is one, however a tool has written it down.

A whole number is written without a fraction (pandas makes 1.0 of 1 as soon as one value of a column is missing), a
number with an exponent is written out (JSON knows no difference between 1e3 and 1000), and space around a label is no
part of it: `1`, `1.0` and ` 1 ` are the label `1`. Imports no library of data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

WHOLE_NUMBER = r"^(-?[0-9]+)\.0*$"
# Of three digits at most, as those of a float: what is written out is no longer than a line.
EXPONENT = r"^[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?[eE][+-]?[0-9]{1,3}$"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def plain_label(label: str | int | float) -> str:
    """One label in its normal form; `rows.py` does the same to a column."""
    text = str(label).strip()
    if re.match(EXPONENT, text):
        return written_out(text)
    text = re.sub(WHOLE_NUMBER, r"\1", text)
    return "0" if text == "-0" else text


def written_out(number: str) -> str:
    """A number with an exponent without it: 1e3 is 1000, and 1.50e-3 is 0.0015."""
    text = format(Decimal(number), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text.strip("-0") == "" else text


def keyed_by_label(given: Any) -> Any:
    """A mapping of a config by labels in their normal form, as the rows have them: 0 and 0.0 are the label "0".

    What is no mapping stays as it is.

    Raises:
        ValueError: a key that YAML has read as a boolean, or two keys of one label.
    """
    if not isinstance(given, Mapping):
        return given
    named: dict[Any, Any] = {}
    for key, value in given.items():
        if isinstance(key, bool):
            raise ValueError(
                f"it has the key {str(key).lower()}, a boolean, where a label is a text (YAML reads yes, no, on "
                "and off so): write it in quotes"
            )
        label = plain_label(key) if isinstance(key, (str, int, float)) else key
        if label in named:
            raise ValueError(f"it names the label {label!r} twice; keep one of them")
        named[label] = value
    return named


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their classes: by value where all are numbers (2 before 10), else by text."""
    found = list(labels)
    if all(map(_NUMBER.fullmatch, found)):
        return sorted(found, key=lambda label: (float(label), label))
    return sorted(found)
