"""The file of `tune-classify`: how scores become chances, and which of them become a label. Imports no NumPy.

The config of the server names these settings, and its help is to come at once. What is computed by them is in
`deciding`; how they are found, in `tune_classify`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raytower.errors import InputError

Mode = Literal["labels", "votes", "classifier"]
VoteKind = Literal["similarity", "uniform", "rank"]
FORMAT: Literal["raytower classify settings 1"] = "raytower classify settings 1"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Document):
    """How scores become chances, as `deciding.chances_of` computes them.

    temperature: softmax over the listed labels of cosine / T or, of shares and probabilities, of log(p) / T. The
    chances of the listed labels sum to 1.
    isotonic: `chances` at `scores`, and linear between them: the chance that the first label is right, by its score.
    Other labels go through the same function, which keeps their order; they do not sum to 1.
    """

    kind: Literal["temperature", "isotonic"]
    temperature: float = Field(default=1.0, gt=0)
    scores: tuple[float, ...] = ()
    chances: tuple[float, ...] = ()


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
