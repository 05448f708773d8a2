"""Targets: what a batch says about its rows besides their texts, the second argument of every encoder objective.

Shape legend: B rows of this worker, K candidate documents of each row, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from raytower.errors import InputError
from raytower.models.device import send
from raytower.objectives.config import GuideSettings
from raytower.objectives.keys import BatchKeys

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Another encoder's unit-length vectors (B, G) of each column, 0 where a row has no document, and its margin."""

    settings: GuideSettings
    columns: Sequence[Tensor]

    def limits(self, query_BG: Tensor, document_BG: Tensor) -> Tensor:
        """(B,) the guide's cosine above which a text is no negative of the pair."""
        cosine_B = (query_BG * document_BG).sum(-1)
        if self.settings.relative:
            return cosine_B - self.settings.margin * cosine_B.abs()
        return cosine_B - self.settings.margin


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of this worker's rows; an objective reads the field it needs and leaves the others."""

    keys: BatchKeys | None = None
    """For objectives that compare rows of the batch: keys that show which texts are equal."""

    labels_B: Tensor | None = None  # noqa: N815 - carries its shape
    """For scored pairs: the label or the score of each pair."""

    teacher_BK: Tensor | None = None  # noqa: N815
    """For distillation: the teacher's score of each candidate document; column 0 is the first document column."""

    present_BK: Tensor | None = None  # noqa: N815
    """False where a row has no document in a column; its vector and its score are 0 and count nothing. None: all are
    there."""

    teacher_columns: Sequence[Tensor] | None = None
    """For embedding distillation: the teacher's unit-length vectors (B, T) of each column, 0 where a row has no
    document."""

    guide: Guide | None = None
    """For in_batch_negatives: another encoder's view of which texts are too similar to be negatives."""

    def to(self, device: torch.device) -> Targets:
        """The same for a loss on the device, sent there without waiting for it. Vectors of others lie there already."""
        labels_B, teacher_BK, present_BK = (
            None if values is None else send(values, device)
            for values in (self.labels_B, self.teacher_BK, self.present_BK)
        )
        keys = None if self.keys is None else self.keys.to(device)
        return replace(self, keys=keys, labels_B=labels_B, teacher_BK=teacher_BK, present_BK=present_BK)


EncoderObjective = Callable[[Sequence[Tensor], Targets], Tensor]
"""(unit-length embeddings (B, D) of each column: queries first, then documents; targets) → mean loss of the B rows."""


def needed(value: ValueT | None, what: str, objective: str) -> ValueT:
    """Return the target that an objective cannot do without. Raises InputError where the batch has none."""
    if value is None:
        raise InputError(
            f"objective {objective} needs {what}, which these rows do not carry; train from rows that do, "
            "or choose another objective"
        )
    return value


def found_wrong(wrong: Tensor) -> bool:
    """Whether any value is True, of those in the CPU's memory.

    An accelerator is not asked: each step would wait for it. The labels of all training rows are checked before the
    first step, and a teacher's score that is no number makes such a loss, which ends the run.
    """
    return wrong.device.type == "cpu" and bool(wrong.any())


def candidate_cosines(columns: Sequence[Tensor], objective: str) -> Tensor:
    """(B, K) cosines of each query with its own documents. Raises InputError for fewer than two documents."""
    query_BD, *documents = columns
    if len(documents) < 2:
        raise InputError(
            f"objective {objective} compares the documents of a query and got {len(documents)} for each; "
            "train from triples or candidates"
        )
    return (query_BD[:, None] * torch.stack(list(documents), dim=1)).sum(-1)


def present_documents(targets: Targets, cosine_BK: Tensor) -> Tensor:
    """(B, K) True where a row has a document, on the device of the student's cosines."""
    if targets.present_BK is None:
        return torch.ones_like(cosine_BK, dtype=torch.bool)
    return targets.present_BK.to(cosine_BK.device)


def refuse_single_documents(logits_BK: Tensor, objective: str) -> None:
    """Raises InputError where logits (B, K) hold one document a query: an objective over lists compares two or more."""
    if logits_BK.shape[1] < 2:
        raise InputError(
            f"each query has {logits_BK.shape[1]} document; objective {objective} compares at least 2: "
            "give a negative for each query"
        )


def distilled(columns: Sequence[Tensor], targets: Targets, objective: str) -> tuple[Tensor, Tensor]:
    """The student's cosines and the teacher's scores, both (B, K), of each query's documents.

    Raises:
        InputError: fewer than two documents, or no finite teacher score for each.
    """
    cosine_BK = candidate_cosines(columns, objective)
    return cosine_BK, teacher_scores(targets, cosine_BK, objective)


def teacher_scores(targets: Targets, cosine_BK: Tensor, objective: str) -> Tensor:
    """The teacher's scores (B, K) for the student's cosines. Raises InputError where one is missing or not finite."""
    teacher_BK = needed(targets.teacher_BK, "a teacher's score of each document", objective).to(cosine_BK)
    if teacher_BK.shape != cosine_BK.shape:
        raise InputError(
            f"the teacher's scores have shape {tuple(teacher_BK.shape)}; objective {objective} needs one for each "
            f"of the rows and documents, {tuple(cosine_BK.shape)}"
        )
    wrong_BK = ~teacher_BK.isfinite()
    if found_wrong(wrong_BK):
        raise InputError(f"teacher score {float(teacher_BK[wrong_BK][0])} is not finite; score the row again")
    return teacher_BK
