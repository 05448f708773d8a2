"""How a recall score and a rerank logit become one score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytower.errors import FormatError, InputError
from raytower.models.search_mode import SearchMode


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """`(1 - weight) * z(recall) + weight * z(rerank)`; z uses the means and deviations seen when tuned.

    Cosines and logits live on different scales, so each is standardised first. The constants are fixed, not
    taken from the candidates of one query: a fused score does not depend on what else was recalled. They hold for the
    recall scores of one mode of search, since each mode's have a scale of their own.

    Raises:
        InputError: the weight is outside [0, 1], or a constant is not finite, or a deviation not above 0.
    """

    weight: float
    recall_mean: float = 0.0
    recall_std: float = 1.0
    rerank_mean: float = 0.0
    rerank_std: float = 1.0
    mode: SearchMode = "dense"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(
                f"fusion weight is {self.weight}; it must lie between 0 (recall alone) and 1 (rerank alone)"
            )
        for name in ("recall_mean", "recall_std", "rerank_mean", "rerank_std"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name.endswith("_std") and value <= 0):
                raise InputError(f"fusion {name} is {value}; means must be finite and deviations above 0")

    def fuse(self, recall_scores: ArrayLike, rerank_logits: ArrayLike) -> NDArray[np.float64]:
        """Fused scores, float64, in the common shape of the two arguments."""
        recall = (np.asarray(recall_scores, dtype=np.float64) - self.recall_mean) / self.recall_std
        rerank = (np.asarray(rerank_logits, dtype=np.float64) - self.rerank_mean) / self.rerank_std
        return (1 - self.weight) * recall + self.weight * rerank

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored under `fusion` in a reranker's raytower.json."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Fusion:
        """Raises FormatError where a key is missing or unknown, or a value breaks its rule.

        What was stored before there were modes names none: it was tuned in mode dense.
        """
        known = {field.name for field in fields(Fusion)}
        if {"mode", *values} != known:
            raise FormatError(
                f"stored fusion has the keys {sorted(values)}; it must have exactly {sorted(known)}"
            )
        mode = values.get("mode", "dense")
        if mode not in get_args(SearchMode):
            raise FormatError(f"stored fusion has mode {mode!r}; it must be one of {get_args(SearchMode)}")
        numbers = {name: value for name, value in values.items() if name != "mode"}
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers.values()):
            raise FormatError(f"stored fusion {dict(values)} must hold numbers only")
        try:
            return Fusion(mode=mode, **{name: float(value) for name, value in numbers.items()})
        except InputError as error:
            raise FormatError(f"stored fusion: {error}") from error
