"""Labels in their normal form: what users take for one label is one, however a tool has written it down.

A whole number is written without a fraction (pandas makes 1.0 of 1 as soon as one value of a column is missing) and
without a plus, a number with an exponent is written out (JSON knows no difference between 1e3 and 1000), and space
around a label is no part of it: `1`, `1.0`, `+1` and ` 1 ` are the label `1`. Characters are composed (macOS writes
folder names decomposed), spaces within a label are single ones, and what nobody sees is left out. Imports no library of
data.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

WHOLE_NUMBER = r"^\+?(-?[0-9]+)(?:\.0*)?$"
# Soft hyphen, zero-width space, word joiner, byte order mark. Joiners stay: some scripts spell with them.
UNSEEN_IN_LABELS = "[\u00ad\u200b\u2060\ufeff]"
SPACES = r"[\s\p{Z}]+"  # as RE2 writes it, whose \s is that of ASCII
# Of three digits at most, as those of a float: what is written out is no longer than a line.
EXPONENT = r"^[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?[eE][+-]?[0-9]{1,3}$"
_MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "inf", "-inf", "infinity", "-infinity"}
_SCORES = 4
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def plain_label(label: str | int | float) -> str:
    """One label in its normal form; `rows.py` does the same to a column."""
    text = re.sub(UNSEEN_IN_LABELS, "", unicodedata.normalize("NFC", str(label)))
    text = re.sub(r"\s+", " ", text).strip()
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


def alike(labels: Mapping[str, int]) -> tuple[str, str] | None:
    """Two labels that differ only in case or in the width of their characters (`Ａ` and `a`), or None.

    Args:
        labels: how many rows each has; the pair comes with the one of more rows first.
    """
    seen: dict[str, str] = {}
    for label in sorted(labels, key=lambda label: (-labels[label], label)):
        other = seen.setdefault(unicodedata.normalize("NFKC", label).casefold(), label)
        if other != label:
            return other, label
    return None


def are_numbers(labels: Iterable[str]) -> bool:
    """Whether all of the labels are numbers."""
    return all(map(_NUMBER.fullmatch, labels))


def missing_value(labels: Iterable[str]) -> str | None:
    """The label that says that a value is missing, if there is one: `nan`, and among numbers `none`, `null`, `inf`, ….

    Tools write such a text where a column was turned into texts with a value missing.
    """
    found = list(labels)
    suspects = [label for label in found if label.casefold() in _MISSING]
    others = [label for label in found if label not in suspects]
    of_numbers = bool(others) and are_numbers(others)
    return next((label for label in suspects if of_numbers or label.casefold() == "nan"), None)


def are_scores(labels: Counter[str]) -> bool:
    """Whether labels are numbers that measure and name no class: not whole, and most rows with one of their own."""
    if not are_numbers(labels):
        return False
    fractions = [label for label in labels if "." in label]
    return len(fractions) >= _SCORES and 2 * len(labels) > labels.total()


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
    if are_numbers(found):
        return sorted(found, key=lambda label: (float(label), label))
    return sorted(found)
