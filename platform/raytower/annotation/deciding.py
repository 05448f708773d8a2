"""What becomes of a text's ranked labels: calibrated scores, a cut for one of two classes, or no label at all.

NumPy alone: the server decides by the same functions. How the settings are found is in `tune_classify`.
Source of temperature scaling: Guo et al. 2017; of isotonic calibration: Zadrozny and Elkan 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from raytower.annotation.config import VoteKind
from raytower.annotation.labels import Prediction
from raytower.errors import FormatError, InputError
from raytower.storage import Location

Mode = Literal["labels", "votes", "classifier"]
FORMAT: Literal["raytower classify settings 1"] = "raytower classify settings 1"
# A share of 0 has no logarithm. Any other number this small would do.
_SMALLEST = 1e-12


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Document):
    """How scores become chances.

    temperature: softmax over the listed labels of cosine / T or, of shares and probabilities, of log(p) / T. The
    chances of the listed labels sum to 1.
    isotonic: `chances` at `scores`, and linear between them: the chance that the first label is right, by its score.
    Other labels go through the same function, which keeps their order; they do not sum to 1.
    """

    kind: Literal["temperature", "isotonic"]
    temperature: float = Field(default=1.0, gt=0)
    scores: tuple[float, ...] = ()
    chances: tuple[float, ...] = ()

    def apply(self, scores: NDArray[np.float64], are_shares: bool) -> NDArray[np.float64]:
        """Chances (K,) of the scores (K,) of a text's labels."""
        if self.kind == "isotonic":
            return np.interp(scores, self.scores, self.chances)
        return sharpened(scores, self.temperature, are_shares)


class ClassifySettings(_Document):
    """What `tune-classify` found on dev rows, as `classify` and the server read it."""

    format: Literal["raytower classify settings 1"] = FORMAT
    mode: Mode
    fingerprint: str
    """Of the encoder, or of the classifier, whose scores these settings are for."""
    label_field: str | None = None
    """Mode labels and votes."""
    depth: int = Field(ge=1)
    """Mode votes: neighbours that vote. Else: labels that are ranked, among which chances are shared out."""
    votes: VoteKind | None = None
    temperature: float | None = None
    """Of votes by similarity."""
    calibration: Calibration | None = None
    positive: str | None = None
    """One of two classes, whose label is given from `cut` on."""
    cut: float | None = None
    abstain_below: float | None = None
    """The lowest score with which a label is given."""

    @classmethod
    def read(cls, place: str | Location) -> ClassifySettings:
        """Raises InputError where there is no such file, FormatError where it holds something else."""
        location = Location.of(place)
        values = location.read_json()
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise FormatError(
                f"{location} holds no settings of classify (format {FORMAT!r}); give the output of `raytower "
                "tune-classify`"
            )
        try:
            return cls.model_validate(values)
        except ValueError as error:
            raise FormatError(
                f"{location} is damaged: {error}; run `raytower tune-classify` again"
            ) from error

    def check(self, mode: Mode, fingerprint: str, label_field: str | None, name: str) -> None:
        """Raises InputError where the settings, called `name`, were tuned for something else."""
        for what, theirs, ours in (
            ("mode", self.mode, mode),
            ("fingerprint", self.fingerprint, fingerprint),
            ("label_field", self.label_field, label_field),
        ):
            if theirs != ours:
                raise InputError(
                    f"{name!r} was tuned for {what} {theirs!r}, and this one is {ours!r}; scores of the two differ: "
                    "run `raytower tune-classify` for this one"
                )


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
            return float(self._calibration.apply(np.zeros(1), True)[0])
        return 0.0

    def _calibrated(self, ranked: Sequence[Prediction]) -> list[Prediction]:
        if self._calibration is None:
            return list(ranked)
        scores = np.array([item.score for item in ranked], dtype=np.float64)
        chances = self._calibration.apply(scores, self._were_shares).tolist()
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


def sharpened(scores: NDArray[np.float64], temperature: float, are_shares: bool) -> NDArray[np.float64]:
    """softmax(scores / temperature) over the last axis, of the logarithms where scores are shares; -inf has no part."""
    # A share of 0 is a label that was listed; -inf is none.
    is_listed = ~np.isneginf(scores)
    logits = np.where(is_listed, np.log(np.maximum(scores, _SMALLEST)), -np.inf) if are_shares else scores
    logits = logits / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
