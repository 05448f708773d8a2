"""Checks of what other programs hand over: texts, vectors, counts and names, each mistake said with its place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from raytower.errors import InputError

_SHOWN_CHARACTERS = 60


class Unpicklable:
    """Base of what holds locks, open files or the memory of a GPU, and says so where it is to be pickled."""

    def _how_to_send(self) -> str:
        """What to send to another process in its place."""
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"{type(self).__name__} cannot be pickled or copied: it holds locks and what it has loaded; "
            f"{self._how_to_send()}"
        )


def texts_of(values: Any, name: str) -> list[str]:
    """`values` as a list of strings: a list, an iterator, a column of numpy, pandas or Arrow.

    Raises:
        InputError: one string where several are meant, no list (such as a data frame), or an element that is no string.
    """
    texts = items_of(values)
    if texts is None:
        raise InputError(f"{name} is {shown(values)}; it must be a list of strings{_remedy(values)}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{place}] is {shown(text)}; every text must be a string")
    return texts


def items_of(values: Any) -> list[Any] | None:
    """What a list, an iterator or a column holds, in order; None for one text and for what has no order or columns."""
    if isinstance(values, str | bytes | Mapping | Set) or getattr(values, "ndim", 1) != 1:
        return None
    if not isinstance(values, Iterable) or hasattr(values, "column_names"):  # tables of Arrow and datasets
        return None
    for converter in ("tolist", "to_pylist"):  # their elements are Python's own then
        if hasattr(values, converter):
            return list(getattr(values, converter)())
    return list(values)


def vectors_of(values: Any, name: str, dim: int) -> NDArray[np.float32]:
    """`values` as float32 (N, dim).

    Raises:
        InputError: no numbers, another shape, or a value that is not finite, with its row.
    """
    try:
        vectors = np.asarray(values)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # ragged lists; tensors of a GPU or with a gradient
        raise InputError(f"{name} is no array: {error}; give numbers of the shape (N, {dim})") from error
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        one = f"; one vector is given as {name}[None]" if vectors.shape == (dim,) else ""
        raise InputError(f"{name} has the shape {vectors.shape}; vectors of this encoder are (N, {dim}){one}")
    if vectors.dtype.kind not in "fiu":
        raise InputError(f"{name} has the dtype {vectors.dtype}; vectors are real numbers, such as float32")
    with np.errstate(over="ignore"):
        single = vectors.astype(np.float32, copy=False)
    wrong = np.flatnonzero(~np.isfinite(single).all(axis=1))
    if len(wrong):
        raise InputError(
            f"{name}[{wrong[0]}] holds a value that is not finite in float32; leave that vector out, or encode its "
            "text again"
        )
    return single


def count_of(value: Any, name: str) -> int:
    """`value` as a whole number, 1 or more; numpy's are such numbers, True and 3.0 are not.

    Raises:
        InputError: it is none.
    """
    try:
        count = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise InputError(f"{name} is {shown(value)}; it must be a whole number, 1 or more")
    if count < 1:
        raise InputError(f"{name} is {count}; it must be 1 or more")
    return count


def name_of(value: Any, name: str, made_by: str) -> str:
    """`value` as the name of a model or the place of an index.

    Raises:
        InputError: it is neither text nor path, or empty.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        raise InputError(f"{name} is {shown(value)}; it must be {made_by}")
    return str(value)


def plain(value: Any) -> Any:
    """A config's value, or a filter, as a file would give it: paths as texts, numpy's numbers as Python's own."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _remedy(values: Any) -> str:
    if isinstance(values, str):
        return f": write [{values[:20]!r}]" if len(values) <= 20 else ": put it into a list"
    return f": call list() on it, or pick one column of this {type(values).__name__}"


def shown(value: Any) -> str:
    """A value for a message, with its type."""
    text = " ".join(repr(value).split())
    short = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
    return f"{short} (of type {type(value).__name__})"
