"""What becomes of a text's ranked labels: calibrated scores, a cut for one of two classes, or no label at all.

NumPy alone: the server decides by the same functions. How the settings are found is in `tune_classify`.
Source of temperature scaling: Guo et al. 2017; of isotonic calibration: Zadrozny and Elkan 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytower.annotation.classify_settings import FORMAT, Calibration, ClassifySettings, Mode
from raytower.annotation.labels import Prediction
from raytower.errors import FormatError
from raytower.storage import Location

# A share of 0 has no logarithm. Any other number this small would do.
_SMALLEST = 1e-12


def read_settings(place: str | Location) -> ClassifySettings:
    """The settings in a file of `tune-classify`.

    Raises InputError where there is no such file, FormatError where it holds something else.
    """
    location = Location.of(place)
    values = location.read_json()
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise FormatError(
            f"{location} holds no settings of classify (format {FORMAT!r}); give the output of `raytower "
            "tune-classify`"
        )
    try:
        return ClassifySettings.model_validate(values)
    except ValueError as error:
        raise FormatError(f"{location} is damaged: {error}; run `raytower tune-classify` again") from error


@dataclass(frozen=True, slots=True)
class Decision:
    """The ranked labels of a text with their final scores, and the label that it gets.

    It is None where none is sure enough, or none was found.
    """

    label: str | None
    score: float
    ranked: Sequence[Prediction]


class Decider:
    """Turns ranked labels into decisions by one set of settings."""

    def __init__(
        self,
        mode: Mode,
        *,
        calibration: Calibration | None = None,
        positive: str | None = None,
        cut: float | None = None,
        abstain_below: float | None = None,
    ) -> None:
        """Arguments as the fields of ClassifySettings."""
        self._mode = mode
        self._were_shares = mode != "labels"
        self._calibration = calibration
        self.positive = positive
        self.cut = cut
        self.abstain_below = abstain_below

    @classmethod
    def of(cls, mode: Mode, settings: ClassifySettings | None) -> Decider:
        """By tuned settings; without them scores stay as they are, and every text gets a label."""
        if settings is None:
            return cls(mode)
        return cls(
            mode,
            calibration=settings.calibration,
            positive=settings.positive,
            cut=settings.cut,
            abstain_below=settings.abstain_below,
        )

    @property
    def gives_chances(self) -> bool:
        """Whether scores may be read as chances that a label is right; cosines may not."""
        return self._were_shares or self._calibration is not None

    @property
    def gives_shares(self) -> bool:
        """Whether the scores of a text's labels are parts of one whole."""
        kind = self._calibration.kind if self._calibration else None
        return kind == "temperature" or (kind is None and self._were_shares)

    def decide(self, ranked: Sequence[Prediction]) -> Decision:
        """The decision about a text, from its labels, best first."""
        if not ranked:
            return Decision(label=None, score=0.0, ranked=[])
        final = self._cut(self._calibrated(ranked))
        best = final[0]
        is_sure = self.abstain_below is None or best.score >= self.abstain_below
        return Decision(label=best.label if is_sure else None, score=best.score, ranked=final)

    def score_of(self, ranked: Sequence[Prediction], label: str) -> float:
        """The final score of a label. One that is not listed has no votes; of others it is the lowest listed."""
        found = next((item.score for item in ranked if item.label == label), None)
        if found is not None:
            return found
        if self._mode != "votes" and ranked:
            return min(item.score for item in ranked)
        if self._calibration is not None and self._calibration.kind == "isotonic":
            return float(chances_of(self._calibration, np.zeros(1), True)[0])
        return 0.0

    def _calibrated(self, ranked: Sequence[Prediction]) -> list[Prediction]:
        if self._calibration is None:
            return list(ranked)
        scores = np.array([item.score for item in ranked], dtype=np.float64)
        chances = chances_of(self._calibration, scores, self._were_shares).tolist()
        return [Prediction(item.label, chance) for item, chance in zip(ranked, chances, strict=True)]

    def _cut(self, ranked: list[Prediction]) -> list[Prediction]:
        """The positive class first where it reaches the cut, and else the best of the others, if there is another."""
        if self.positive is None or self.cut is None:
            return ranked
        score = self.score_of(ranked, self.positive)
        is_positive = score >= self.cut
        if is_positive and all(item.label != self.positive for item in ranked):
            return [Prediction(self.positive, score), *ranked]
        # sorted() is stable: within each side the order stays.
        return sorted(ranked, key=lambda item: (item.label == self.positive) != is_positive)


def chances_of(
    calibration: Calibration, scores: NDArray[np.float64], are_shares: bool
) -> NDArray[np.float64]:
    """Chances (K,) of the scores (K,) of a text's labels."""
    if calibration.kind == "isotonic":
        return np.interp(scores, calibration.scores, calibration.chances)
    return sharpened(scores, calibration.temperature, are_shares)


def sharpened(scores: NDArray[np.float64], temperature: float, are_shares: bool) -> NDArray[np.float64]:
    """softmax(scores / temperature) over the last axis, of the logarithms where scores are shares; -inf has no part."""
    # A share of 0 is a label that was listed; -inf is none.
    is_listed = ~np.isneginf(scores)
    logits = np.where(is_listed, np.log(np.maximum(scores, _SMALLEST)), -np.inf) if are_shares else scores
    logits = logits / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
