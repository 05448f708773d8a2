"""Cases for the proof that two workers equal one process: an objective, the texts of a batch and their targets.

Texts that count as equal lie on both halves of the batch, so that masks must reach across workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from raytower.models.chunks import Chunk
from raytower.models.encoder import Encoder
from raytower.models.two_tower import TwoTower, split_columns
from raytower.objectives.config import (
    AnglE,
    CoSENT,
    CosineEmbedding,
    CosineRegression,
    EmbeddingDistillation,
    GuideSettings,
    HardestNegative,
    InBatchNegatives,
    KLDivergence,
    MarginMSE,
    Matryoshka,
    RandomNegative,
    SimCSE,
)
from raytower.objectives.keys import BatchKeys, text_keys
from raytower.objectives.matryoshka import over_dimensions
from raytower.objectives.targets import EncoderObjective, Guide, Targets
from tests.support.warm import in_two_processes
from tests.support.worker_group import end_worker, join_group

QUERIES = [
    "what is a deductible",
    "who pays the debt",
    "a new car",
    "life insurance?",
    "who pays",
    "dog",
    "a new car ",  # the same text as row 2, on the other worker
    "他的",
]
DOCUMENTS = [
    "the part you pay",
    "the owner does",
    "bought today",
    "pays at death",
    "the owner does",  # the same text as row 1, on the other worker
    "an animal",
    "another animal",
    "我们大学",
]
OTHER_DOCUMENTS = [*DOCUMENTS[:4], "the debtor", *DOCUMENTS[5:]]
NEGATIVES = ["not this", "nor that", "the part you pay", "x", "y", "z", "an animal", "国"]
LABELS = ["pay", "debt", None, "pay", "debt", "animal", "car", None]

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One objective on one batch.

    labels: one for each row, shared by its query and its document. vectors: another encoder's, (8, T) of each column:
    a guide's if `guide` has its settings, otherwise a teacher's.
    """

    objective: EncoderObjective
    columns: Sequence[Sequence[str]]
    labels: Sequence[str | None] | None = None
    scores: Sequence[float] | None = None
    teacher: Sequence[Sequence[float]] | None = None
    vectors: Sequence[Tensor] | None = None
    guide: GuideSettings | None = None

    @property
    def teacher_dim(self) -> int | None:
        return None if self.vectors is None or self.guide is not None else self.vectors[0].shape[1]

    def texts(self, rows: slice) -> list[list[str]]:
        return [list(column[rows]) for column in self.columns]

    def targets(self, rows: slice) -> Targets:
        query, first, *others = self.texts(rows)
        labels = None if self.labels is None else self.labels[rows]
        keys = BatchKeys(
            query=text_keys(query, labels=labels),
            documents=(text_keys(first, labels=labels), *(text_keys(texts) for texts in others)),
        )
        vectors = None if self.vectors is None else [column[rows] for column in self.vectors]
        guide = None if self.guide is None or vectors is None else Guide(settings=self.guide, columns=vectors)
        return Targets(
            keys=keys,
            guide=guide,
            teacher_columns=vectors if guide is None else None,
            labels_B=None if self.scores is None else torch.tensor(self.scores[rows]),
            teacher_BK=None if self.teacher is None else torch.tensor(self.teacher[rows]),
        )


PAIRS = (QUERIES, DOCUMENTS)
TRIPLES = (QUERIES, DOCUMENTS, NEGATIVES)
TEACHER = [[0.9, 0.1], [0.7, 0.4], [0.8, 0.8], [0.6, -0.2], [0.5, 0.3], [0.9, 0.2], [0.4, 0.1], [1.0, 0.0]]
BATCH = slice(0, 8)
GRADES = [5, 3.5, 0, 1, 3.5, 2, 4, 0]


def unit_vectors(num_columns: int, dim: int) -> list[Tensor]:
    """(8, dim) of each column, always the same."""
    generator = torch.Generator().manual_seed(dim)
    return list(nn.functional.normalize(torch.randn(num_columns, 8, dim, generator=generator), dim=-1))


IN_BATCH = {
    "plain": Case(objective=InBatchNegatives(margin=0.1), columns=(QUERIES, OTHER_DOCUMENTS)),
    "duplicates": Case(objective=InBatchNegatives(), columns=PAIRS),
    "hard negatives": Case(objective=InBatchNegatives(margin=0.1), columns=TRIPLES),
    "labels": Case(objective=InBatchNegatives(symmetric=True), columns=PAIRS, labels=LABELS),
    "symmetric": Case(objective=InBatchNegatives(margin=0.1, symmetric=True), columns=TRIPLES),
    "hardest": Case(objective=HardestNegative(margin=0.5), columns=PAIRS),
    "hardest with hard negatives": Case(objective=HardestNegative(margin=0.5), columns=TRIPLES),
    "random": Case(objective=RandomNegative(margin=0.5), columns=PAIRS),
    "random with labels": Case(objective=RandomNegative(margin=0.5), columns=PAIRS, labels=LABELS),
    "simcse": Case(objective=SimCSE(), columns=(DOCUMENTS, DOCUMENTS)),
    "more negatives": Case(
        objective=InBatchNegatives(
            margin=0.1, more_negatives=("query_query", "document_document", "document_query")
        ),
        columns=TRIPLES,
        labels=LABELS,
    ),
    "guided": Case(
        objective=InBatchNegatives(more_negatives=("query_query", "document_document")),
        columns=TRIPLES,
        vectors=unit_vectors(3, 4),
        guide=GuideSettings(encoder="unused", margin=0.2),
    ),
    "cosent": Case(objective=CoSENT(), columns=PAIRS, scores=GRADES),
    "angle": Case(objective=AnglE(), columns=PAIRS, scores=GRADES),
    "matryoshka cosent": Case(
        objective=over_dimensions(Matryoshka(dims=(32, 8)), CoSENT(scale=2)), columns=PAIRS, scores=GRADES
    ),
    "matryoshka": Case(
        objective=over_dimensions(
            Matryoshka(dims=(32, 8, 3), weights=(1.0, 0.5, 0.25)), InBatchNegatives(symmetric=True)
        ),
        columns=TRIPLES,
    ),
}
ROW_BY_ROW = {
    "cosine embedding": Case(objective=CosineEmbedding(), columns=PAIRS, scores=[1, 0, 1, -1, 0, 0, 1, 1]),
    "cosine regression": Case(
        objective=CosineRegression(), columns=PAIRS, scores=[1, 0.2, -0.5, 0, 0.9, -1, 0.3, 0.7]
    ),
    "margin mse": Case(objective=MarginMSE(scale=1), columns=TRIPLES, teacher=TEACHER),
    "kl divergence": Case(objective=KLDivergence(temperature=0.5), columns=TRIPLES, teacher=TEACHER),
    "embedding distillation": Case(
        objective=EmbeddingDistillation(), columns=TRIPLES, vectors=unit_vectors(3, 12)
    ),
}
CASES = {**IN_BATCH, **ROW_BY_ROW}


def load_tower(
    folder: Path | str,
    *,
    tokens_per_batch: int = 64,
    rows_per_batch: int | None = None,
    teacher_dim: int | None = None,
) -> TwoTower:
    """The tower of an encoder directory, without dropout; a layer to `teacher_dim` is always the same."""
    encoder = Encoder.load(folder)
    torch.manual_seed(0)
    return TwoTower(encoder, 64, tokens_per_batch, rows_per_batch, teacher_dim).eval()


def plan_case(case: Case, tower: TwoTower, rows: slice) -> list[Chunk]:
    return tower.plan_chunks([tower.tokenise(texts, "") for texts in case.texts(rows)])


def loss_of(case: Case, rows: slice, vectors: Sequence[Tensor], chunks: Sequence[Chunk]) -> Tensor:
    return case.objective(split_columns(vectors, chunks, len(case.columns)), case.targets(rows))


def backward_whole(case: Case, model: nn.Module, tower: TwoTower, rows: slice) -> Tensor:
    """Loss and gradients by one forward pass over everything."""
    chunks = plan_case(case, tower, rows)
    loss = loss_of(case, rows, model(chunks), chunks)
    loss.backward()
    return loss.detach()


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(
    loss: Tensor, gradients: Gradients, expected: Tensor, expected_gradients: Gradients
) -> None:
    """Equal to 1e-5 of the largest gradient, and large enough for that to mean something."""
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert largest > 1e-2
    for name, gradient in expected_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=1e-5 * max(largest, 1.0)), name


def assert_as_one_worker(case: Case, found: Mapping[str, Tensor], encoder_dir: Path) -> None:
    """What `run_cases_on_two_workers` found of a case is what one process finds."""
    tower = load_tower(encoder_dir, teacher_dim=case.teacher_dim)
    expected = backward_whole(case, tower, tower, BATCH)
    gradients = dict(found)
    assert_same_step(gradients.pop("loss"), gradients, expected, gradients_of(tower))


BackwardOf = Callable[[Case, nn.Module, TwoTower, slice], Tensor]


def run_cases_on_two_workers(
    cases: dict[str, Case], backward: BackwardOf, encoder_dir: Path, out: Path
) -> dict[str, dict[str, Tensor]]:
    """Mean loss (under "loss") and averaged gradients of each case, from two data-parallel processes."""
    in_two_processes(_worker, cases, backward, str(encoder_dir), out)
    results: dict[str, dict[str, Tensor]] = torch.load(out, weights_only=True)
    return results


def _worker(rank: int, cases: dict[str, Case], backward: BackwardOf, encoder_dir: str, out: Path) -> None:
    join_group(out.parent, rank)
    results = {}
    for name, case in cases.items():
        tower = load_tower(encoder_dir, teacher_dim=case.teacher_dim)
        model = nn.parallel.DistributedDataParallel(tower, broadcast_buffers=False)
        loss = backward(case, model, tower, slice(rank * 4, rank * 4 + 4))
        dist.all_reduce(loss)
        results[name] = {"loss": loss / 2, **gradients_of(tower)}
    if rank == 0:
        torch.save(results, out)
    end_worker()
