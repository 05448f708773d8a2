"""Encoder objectives against their formulas written out and against peers; two workers equal one process."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytower.config import Config, make_config
from raytower.errors import InputError
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
from raytower.objectives.keys import BatchKeys, known_relevant, text_keys
from raytower.objectives.margin_mse import fitting_scale, refuse_saturating_scale
from raytower.objectives.matryoshka import over_dimensions
from raytower.objectives.targets import EncoderObjective, Guide, Targets
from tests.support.objective_cases import (
    CASES,
    assert_as_one_worker,
    backward_whole,
    run_cases_on_two_workers,
)
from tests.support.tiny_models import tiny_tokenizer

Excluded = set[tuple[int, int]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a pool that wait for each other on busy cores cost more than these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def distinct_keys(rows: int, num_columns: int = 1) -> BatchKeys:
    """Keys of texts that are all different."""
    columns = [text_keys([f"{column} {row}" for row in range(rows)]) for column in range(num_columns + 1)]
    return BatchKeys(query=columns[0], documents=tuple(columns[1:]))


def cosines(query: Tensor, document: Tensor) -> list[list[float]]:
    return [[float(a @ b) for b in document.double().numpy()] for a in query.double().numpy()]


# Formulas, one query after the other.


def softmax_loss(
    similarity: list[list[float]], excluded: Excluded, scale: float, margin: float = 0.0
) -> float:
    total = 0.0
    for i, row in enumerate(similarity):
        positive = math.exp(scale * (row[i] - margin))
        others = sum(math.exp(scale * s) for j, s in enumerate(row) if j != i and (i, j) not in excluded)
        total += -math.log(positive / (positive + others))
    return total / len(similarity)


def hardest_loss(similarity: list[list[float]], excluded: Excluded, margin: float) -> float:
    total = 0.0
    for i, row in enumerate(similarity):
        others = [s for j, s in enumerate(row) if j != i and (i, j) not in excluded]
        if others:
            total += max(0.0, margin - row[i] + max(others))
    return total / len(similarity)


def chosen_loss(similarity: list[list[float]], negatives: Sequence[int | None], margin: float) -> float:
    hinges = [
        0.0 if negative is None else max(0.0, margin - row[i] + row[negative])
        for i, (row, negative) in enumerate(zip(similarity, negatives, strict=True))
    ]
    return sum(hinges) / len(hinges)


# In-batch negatives.


@pytest.mark.parametrize(("scale", "margin"), [(20.0, 0.0), (20.0, 0.2), (5.0, 0.1)])
def test_in_batch_negatives_is_the_formula(scale: float, margin: float) -> None:
    query, document = unit_rows(6, 5, 1), unit_rows(6, 5, 2)
    loss = InBatchNegatives(scale=scale, margin=margin)([query, document], Targets(keys=distinct_keys(6)))
    assert float(loss) == pytest.approx(
        softmax_loss(cosines(query, document), set(), scale, margin), abs=1e-5
    )


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_symmetric_is_the_mean_of_both_directions(margin: float) -> None:
    query, document, negative = unit_rows(6, 5, 1), unit_rows(6, 5, 2), unit_rows(6, 5, 3)
    loss = InBatchNegatives(scale=10, margin=margin, symmetric=True)(
        [query, document, negative], Targets(keys=distinct_keys(6, 2))
    )
    forth = softmax_loss(cosines(query, torch.cat([document, negative])), set(), 10, margin)
    back = softmax_loss(cosines(document, query), set(), 10, margin)
    assert float(loss) == pytest.approx((forth + back) / 2, abs=1e-5)


# Queries 0 and 3 are equal by text, documents 0 and 1 by text, documents 2 and 3 by id; a hard negative is the text of
# document 3. So query 0 (and its equal, 3) has the documents 0, 1, 3, 2 (by 3) and hard negative 5 (by 3).
FALSE_NEGATIVES = BatchKeys(
    query=text_keys(["a", "b", "c", "a"]),
    documents=(
        text_keys(["same", "same ", "other", "more"], ["1", "2", "9", "9"]),
        text_keys(["n", "more", "n", "n"]),
    ),
)
EXCLUDED = {(0, 1), (0, 2), (0, 3), (0, 5), (1, 0), (2, 3), (3, 0), (3, 1), (3, 2), (3, 5)}


def test_known_relevant_documents_are_no_negatives() -> None:
    """Defect of an older system: duplicate positives inside a batch counted as negatives."""
    query, document, negative = unit_rows(4, 5, 1), unit_rows(4, 5, 2), unit_rows(4, 5, 3)
    columns, targets = [query, document, negative], Targets(keys=FALSE_NEGATIVES)
    similarity = cosines(query, torch.cat([document, negative]))
    assert float(InBatchNegatives(scale=2)(columns, targets)) == pytest.approx(
        softmax_loss(similarity, EXCLUDED, 2.0), abs=1e-5
    )
    assert float(HardestNegative(margin=0.4)(columns, targets)) == pytest.approx(
        hardest_loss(similarity, EXCLUDED, 0.4), abs=1e-5
    )


def test_known_relevant_queries_are_no_negatives_of_a_document() -> None:
    """Query j is left out for document i: equal documents, equal queries, or one by way of the other."""
    query, document = unit_rows(4, 5, 1), unit_rows(4, 5, 2)
    keys = BatchKeys(query=FALSE_NEGATIVES.query, documents=FALSE_NEGATIVES.documents[:1])
    loss = InBatchNegatives(scale=2, symmetric=True)([query, document], Targets(keys=keys))
    forth = softmax_loss(cosines(query, document), {pair for pair in EXCLUDED if pair[1] < 4}, 2.0)
    # Document 0: query 1 (equal document 1) and query 3 (equal query 0). Document 1: query 0, and 3 by it. Document 2:
    # query 3 (by id), and 0 by it. Document 3: query 2 (by id) and query 0 (equal query 3).
    known = {(0, 1), (0, 3), (1, 0), (1, 3), (2, 3), (2, 0), (3, 2), (3, 0)}
    back = softmax_loss(cosines(document, query), known, 2.0)
    assert float(loss) == pytest.approx((forth + back) / 2, abs=1e-5)


def test_rows_of_one_label_are_no_negatives() -> None:
    """Defect of an older system: texts of one label counted as negatives of each other."""
    query, document = unit_rows(4, 5, 1), unit_rows(4, 5, 2)
    labels = ["red", "blue", "red", None]
    keys = BatchKeys(
        query=text_keys(list("abcd"), labels=labels), documents=(text_keys(list("efgh"), labels=labels),)
    )
    loss = InBatchNegatives(scale=2)([query, document], Targets(keys=keys))
    assert float(loss) == pytest.approx(
        softmax_loss(cosines(query, document), {(0, 2), (2, 0)}, 2.0), abs=1e-5
    )


def test_missing_ids_and_labels_are_not_equal() -> None:
    nothing = [None, None]
    keys = BatchKeys(
        query=text_keys(["a", "b"], nothing, nothing), documents=(text_keys(["u", "v"], nothing, nothing),)
    )
    assert known_relevant(keys).mask(slice(0, len(keys.query))).tolist() == [[True, False], [False, True]]


def test_an_id_is_not_a_text_and_not_a_label() -> None:
    keys = BatchKeys(
        query=text_keys(list("abc")),
        documents=(text_keys(["7", "x", "y"], [None, "7", None], [None, None, "7"]),),
    )
    assert known_relevant(keys).mask(slice(0, len(keys.query))).tolist() == np.eye(3, dtype=bool).tolist()


def test_symmetric_and_hard_negatives_agree_with_sentence_transformers() -> None:
    peer = peer_loss("MultipleNegativesRankingLoss", scale=15.0)
    both_ways = peer_loss(
        "MultipleNegativesRankingLoss",
        scale=15.0,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    columns = [unit_rows(6, 5, seed) for seed in (1, 2, 3, 4)]
    targets = Targets(keys=distinct_keys(6, 3))
    assert_peer(InBatchNegatives(scale=15), peer, columns, targets, torch.zeros(6))
    assert_peer(InBatchNegatives(scale=15, symmetric=True), both_ways, columns, targets, torch.zeros(6))


ALL_MORE = ("query_query", "document_document", "document_query")


@pytest.mark.parametrize("num_documents", [1, 3])
@pytest.mark.parametrize("more", [("query_query",), ("document_document",), ALL_MORE])
def test_more_negatives_agree_with_sentence_transformers(more: tuple[str, ...], num_documents: int) -> None:
    """All three are GTE's improved contrastive loss, as the peer has it too."""
    names = {
        "query_query": "query_to_query",
        "document_document": "doc_to_doc",
        "document_query": "doc_to_query",
    }
    directions = ("query_to_doc", *(names[name] for name in more))
    peer = peer_loss("MultipleNegativesRankingLoss", scale=15.0, directions=directions)
    columns = [unit_rows(6, 5, seed) for seed in range(num_documents + 1)]
    objective = make_config(InBatchNegatives, {"scale": 15, "more_negatives": more})
    assert_peer(objective, peer, columns, Targets(keys=distinct_keys(6, num_documents)), torch.zeros(6))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_a_guide_filters_as_sentence_transformers_does(margin: float, relative: bool) -> None:
    """GISTEmbed: pairs with other queries and documents in the sum, triples without."""
    for more, num_documents in ((("query_query", "document_document"), 1), (None, 2)):
        columns = [unit_rows(6, 5, seed) for seed in range(num_documents + 1)]
        guide = [unit_rows(6, 4, seed + 10) for seed in range(num_documents + 1)]
        peer = guided_peer(
            guide,
            temperature=0.1,
            margin_strategy="relative" if relative else "absolute",
            margin=margin,
            contrast_anchors=more is not None,
            contrast_positives=more is not None,
        )
        given = Guide(settings=GuideSettings(encoder="x", margin=margin, relative=relative), columns=guide)
        targets = Targets(keys=distinct_keys(6, num_documents), guide=given)
        objective = make_config(InBatchNegatives, {"scale": 10, "more_negatives": more})
        assert_peer(objective, peer, columns, targets, torch.zeros(6))
        unguided = objective(columns, Targets(keys=targets.keys))
        assert float(objective(columns, targets)) < float(unguided) - 1e-3


# One negative for each query.


def test_hardest_negative_is_the_formula() -> None:
    query, document, negative = unit_rows(6, 5, 1), unit_rows(6, 5, 2), unit_rows(6, 5, 3)
    pairs = HardestNegative(margin=0.3)([query, document], Targets(keys=distinct_keys(6)))
    assert float(pairs) == pytest.approx(hardest_loss(cosines(query, document), set(), 0.3), abs=1e-5)
    triples = HardestNegative(margin=0.3)([query, document, negative], Targets(keys=distinct_keys(6, 2)))
    similarity = cosines(query, torch.cat([document, negative]))
    assert float(triples) == pytest.approx(hardest_loss(similarity, set(), 0.3), abs=1e-5)
    assert float(triples) > float(pairs)


def test_random_negative_is_the_next_row_that_is_not_relevant() -> None:
    query, document = unit_rows(5, 4, 1), unit_rows(5, 4, 2)
    plain = RandomNegative(margin=0.5)([query, document], Targets(keys=distinct_keys(5)))
    similarity = cosines(query, document)
    assert float(plain) == pytest.approx(chosen_loss(similarity, [1, 2, 3, 4, 0], 0.5), abs=1e-5)

    # Documents 1 and 2 are equal, and so are the queries 0 and 4.
    keys = BatchKeys(query=text_keys(list("abcda")), documents=(text_keys(["p", "q", "q", "r", "s"]),))
    masked = RandomNegative(margin=0.5)([query, document], Targets(keys=keys))
    assert float(masked) == pytest.approx(chosen_loss(similarity, [1, 3, 3, 4, 1], 0.5), abs=1e-5)


@pytest.mark.parametrize("objective", [HardestNegative(margin=1.0), RandomNegative(margin=1.0)])
def test_a_query_without_negatives_adds_nothing(objective: EncoderObjective) -> None:
    query, document = unit_rows(3, 5, 1).requires_grad_(), unit_rows(3, 5, 2)
    # Query 0 equals query 1 by text and query 2 by id, so all documents are its own; 1 and 2 are not equal.
    keys = BatchKeys(query=text_keys(["a", "a", "z"], ["i", None, "i"]), documents=(text_keys(list("uvw")),))
    loss = objective([query, document], Targets(keys=keys))
    loss.backward()
    similarity = cosines(query.detach(), document)
    assert loss.item() == pytest.approx(chosen_loss(similarity, [None, 2, 1], 1.0), abs=1e-5)
    assert query.grad is not None
    assert not query.grad[0].any()
    assert query.grad[1:].isfinite().all()
    assert query.grad[1:].any(-1).all()


@pytest.mark.parametrize(
    "objective", [HardestNegative(), RandomNegative(), InBatchNegatives(margin=0.1, symmetric=True)]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_without_negatives_has_no_loss_and_no_gradient(
    objective: EncoderObjective, rows: int
) -> None:
    query, document = unit_rows(rows, 5, 1).requires_grad_(), unit_rows(rows, 5, 2).requires_grad_()
    keys = BatchKeys(query=text_keys(["a"] * rows), documents=(text_keys([f"d{i}" for i in range(rows)]),))
    loss = objective([query, document], Targets(keys=keys))
    loss.backward()
    assert loss.item() == 0
    for column in (query, document):
        assert column.grad is not None
        assert not column.grad.any()


def test_simcse_leaves_equal_texts_out() -> None:
    first, second = unit_rows(4, 5, 1), unit_rows(4, 5, 2)
    texts = text_keys(["a", "b", "a ", "c"])
    loss = SimCSE(scale=2)([first, second], Targets(keys=BatchKeys(query=texts, documents=(texts,))))
    expected = softmax_loss(cosines(first, second), {(0, 2), (2, 0)}, 2.0)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


# Scored pairs.


def test_cosine_embedding_is_the_formula_and_torchs() -> None:
    left, right = unit_rows(6, 5, 1), unit_rows(6, 5, 2)
    right[3] = left[3]  # the most alike a pair can be, with label -1
    labels = torch.tensor([1.0, -1, 0, -1, 1, 0])
    loss = CosineEmbedding(margin=0.1)([left, right], Targets(labels_B=labels))
    paired = [row[i] for i, row in enumerate(cosines(left, right))]
    terms = [
        1 - s if label == 1 else max(0.0, s - 0.1) for s, label in zip(paired, labels.tolist(), strict=True)
    ]
    assert float(loss) == pytest.approx(sum(terms) / 6, abs=1e-5)
    signs = torch.where(labels == 1, 1.0, -1.0)
    assert float(loss) == pytest.approx(
        float(nn.CosineEmbeddingLoss(margin=0.1)(left, right, signs)), abs=1e-5
    )


def test_cosine_regression_agrees_with_sentence_transformers() -> None:
    scores = torch.tensor([1.0, -1.0, 0.0, 0.3])
    columns = [unit_rows(4, 5, 1), unit_rows(4, 5, 2)]
    paired = [row[i] for i, row in enumerate(cosines(*columns))]
    expected = sum((s - y) ** 2 for s, y in zip(paired, scores.tolist(), strict=True)) / 4
    assert float(CosineRegression()(columns, Targets(labels_B=scores))) == pytest.approx(expected, abs=1e-5)
    peer = peer_loss("CosineSimilarityLoss")
    assert_peer(CosineRegression(), peer, columns, Targets(labels_B=scores), scores)


@pytest.mark.parametrize(
    ("objective", "label", "rule"),
    [
        (CosineEmbedding(), 0.5, "label 0.5 is none of 1, 0 and -1"),
        (CosineEmbedding(), math.nan, "label nan is none of"),
        (CosineRegression(), 1.5, r"score 1.5 is outside -1\.\.1"),
        (CosineRegression(), -5.0, r"score -5.0 is outside -1\.\.1"),
        (CosineRegression(), math.nan, "score nan is outside"),
    ],
)
def test_labels_out_of_range_are_refused(objective: EncoderObjective, label: float, rule: str) -> None:
    columns = [unit_rows(2, 5, 1), unit_rows(2, 5, 2)]
    with pytest.raises(InputError, match=rule):
        objective(columns, Targets(labels_B=torch.tensor([1.0, label])))


# The order of scores.


def order_loss(similarity: Sequence[float], scores: Sequence[float], scale: float) -> float:
    """Each two pairs of texts, one after the other."""
    total = 1.0
    for s, y in zip(similarity, scores, strict=True):
        for higher_s, higher_y in zip(similarity, scores, strict=True):
            if higher_y > y:
                total += math.exp(scale * (s - higher_s))
    return math.log(total)


def angle_similarity(left: Tensor, right: Tensor) -> list[float]:
    """By complex numbers: the sum of real and imaginary part of the quotient, of unit length."""
    found = []
    for x, y in zip(left.double().tolist(), right.double().tolist(), strict=True):
        half = (len(x) + 1) // 2
        first, second = (
            [complex(v[k], v[k + half] if k + half < len(v) else 0) for k in range(half)] for v in (x, y)
        )
        quotient = sum(a * b.conjugate() for a, b in zip(first, second, strict=True))
        found.append(abs(quotient.real + quotient.imag))
    return found


GRADES = [[5, 3, 3, 0, 1, 3], [1, 0, 1, 0, 0, 1], [2, 2, 2, 2, 2, 2], [0.9, -0.2, 0.4, 0.41, -1, 0]]


@pytest.mark.parametrize("scores", GRADES)
@pytest.mark.parametrize("scale", [20.0, 3.0])
@pytest.mark.parametrize("dim", [6, 5])
def test_cosent_and_angle_are_the_formula_and_sentence_transformers(
    scores: list[float], scale: float, dim: int
) -> None:
    columns, labels = [unit_rows(6, dim, 1), unit_rows(6, dim, 2)], torch.tensor(scores)
    targets = Targets(labels_B=labels)
    paired = [row[i] for i, row in enumerate(cosines(*columns))]
    cosent, angle = CoSENT(scale=scale), AnglE(scale=scale)
    assert float(cosent(columns, targets)) == pytest.approx(order_loss(paired, scores, scale), abs=1e-5)
    turned = angle_similarity(*columns)
    assert float(angle(columns, targets)) == pytest.approx(order_loss(turned, scores, scale), abs=1e-5)
    assert_peer(cosent, peer_loss("CoSENTLoss", scale=scale), columns, targets, labels)
    assert_peer(angle, peer_loss("AnglELoss", scale=scale), columns, targets, labels)


@pytest.mark.parametrize("objective", [CoSENT(scale=3), AnglE(scale=3)])
def test_the_order_of_scores_has_exact_gradients(objective: EncoderObjective) -> None:
    columns = [unit_rows(5, 4, seed).double().requires_grad_() for seed in (1, 2)]
    targets = Targets(labels_B=torch.tensor([2.0, 0, 1, 1, 3]))
    assert torch.autograd.gradcheck(lambda *given: objective(given, targets), columns)


@pytest.mark.parametrize("objective", [CoSENT(), AnglE()])
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_without_an_order_are_refused(objective: EncoderObjective, score: float) -> None:
    with pytest.raises(InputError, match=f"score {score} is not finite"):
        objective([unit_rows(2, 4, 1), unit_rows(2, 4, 2)], Targets(labels_B=torch.tensor([1.0, score])))


def test_the_order_of_many_scores_takes_no_matrix() -> None:
    """200,000 pairs: a matrix of them would be 160 GB."""
    left = unit_rows(200_000, 2, 1).requires_grad_()
    labels = torch.arange(200_000) % 5
    loss = CoSENT()([left, unit_rows(200_000, 2, 2)], Targets(labels_B=labels.float()))
    loss.backward()
    assert left.grad is not None
    assert left.grad.isfinite().all()
    # Of N random pairs two fifths of N/2·N/2 pairs are compared, and half of them stand the wrong way round.
    assert 20 < float(loss.detach()) < 70


# Distillation.


@pytest.mark.parametrize("num_documents", [2, 4])
def test_margin_mse_agrees_with_the_formula_and_with_sentence_transformers(num_documents: int) -> None:
    columns = [unit_rows(3, 5, seed) for seed in range(num_documents + 1)]
    teacher = torch.randn(3, num_documents, generator=torch.Generator().manual_seed(9))
    similarity = own_cosines(columns)
    terms = [
        (2 * (s[0] - s[k]) - (t[0] - t[k])) ** 2
        for s, t in zip(similarity, teacher.tolist(), strict=True)
        for k in range(1, num_documents)
    ]
    targets = Targets(teacher_BK=teacher)
    assert float(MarginMSE(scale=2)(columns, targets)) == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    assert_peer(MarginMSE(scale=1), peer_loss("MarginMSELoss"), columns, targets, teacher)


@pytest.mark.parametrize(("scale", "temperature"), [(20.0, 1.0), (5.0, 0.5)])
def test_kl_divergence_agrees_with_the_formula_and_with_sentence_transformers(
    scale: float, temperature: float
) -> None:
    columns = [unit_rows(3, 5, seed) for seed in range(5)]
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(9)) * 3
    total = 0.0
    for s, t in zip(own_cosines(columns), teacher.tolist(), strict=True):
        student, wanted = (
            softmax([scale * value for value in s]),
            softmax([value / temperature for value in t]),
        )
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(wanted, student, strict=True))
    objective, targets = KLDivergence(scale=scale, temperature=temperature), Targets(teacher_BK=teacher)
    assert float(objective(columns, targets)) == pytest.approx(total / 3, abs=1e-4)
    peer = peer_loss("DistillKLDivLoss", student_temperature=1 / scale, teacher_temperature=temperature)
    # The peer multiplies by its student's temperature squared.
    assert_peer(objective, lambda *args: scale**2 * peer(*args), columns, targets, teacher)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("num_documents", [1, 3])
def test_embedding_distillation_agrees_with_sentence_transformers(loss: str, num_documents: int) -> None:
    columns = [unit_rows(4, 6, seed) for seed in range(num_documents + 1)]
    teacher = [unit_rows(4, 6, seed + 20) for seed in range(num_documents + 1)]
    objective = make_config(EmbeddingDistillation, {"loss": loss})
    targets = Targets(teacher_columns=teacher)
    peer = peer_loss("EmbedDistillLoss", distance_metric=loss)
    assert_peer(objective, lambda given, _: peer(given, teacher), columns, targets, torch.zeros(4))
    assert float(objective(teacher, targets)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_embedding_distillation_takes_the_mean_of_each_rows_texts(loss: str) -> None:
    """A row of one document weighs as much as one of three; the places without a document have no gradient."""
    lengths = [3, 1]
    present = torch.tensor([[place < length for place in range(3)] for length in lengths])
    there = [torch.ones(2, 1), *present.T[..., None].float()]
    columns = [(unit_rows(2, 6, seed) * mask).requires_grad_() for seed, mask in enumerate(there)]
    teacher = [unit_rows(2, 6, seed + 20) * mask for seed, mask in enumerate(there)]
    objective = make_config(EmbeddingDistillation, {"loss": loss})
    alone = [
        objective(
            [column[row : row + 1] for column in columns[: length + 1]],
            Targets(teacher_columns=[column[row : row + 1] for column in teacher[: length + 1]]),
        )
        for row, length in enumerate(lengths)
    ]
    value = objective(columns, Targets(teacher_columns=teacher, present_BK=present))
    assert value.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-6)
    gradients = torch.autograd.grad(value, columns)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[2][1].any()
    assert gradients[2][0].any()


def test_a_teacher_of_another_dimension_is_refused() -> None:
    targets = Targets(teacher_columns=[unit_rows(2, 6, 1), unit_rows(2, 6, 2)])
    with pytest.raises(InputError, match=r"shape \(2, 6\), and the encoder's \(2, 4\)"):
        EmbeddingDistillation()([unit_rows(2, 4, 1), unit_rows(2, 4, 2)], targets)


def test_a_teacher_of_a_perfect_student_gives_no_loss() -> None:
    columns = [unit_rows(3, 5, seed) for seed in range(4)]
    cosine = torch.tensor(own_cosines(columns), dtype=torch.float32)
    assert float(KLDivergence(temperature=0.05)(columns, Targets(teacher_BK=cosine))) == pytest.approx(
        0, abs=1e-6
    )
    assert float(MarginMSE(scale=1)(columns, Targets(teacher_BK=cosine + 7))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", [MarginMSE(scale=1), KLDivergence()])
def test_unusable_teachers_are_refused(objective: EncoderObjective) -> None:
    query, first, second = (unit_rows(2, 5, seed) for seed in range(3))
    with pytest.raises(InputError, match=r"teacher score nan is not finite"):
        objective([query, first, second], Targets(teacher_BK=torch.tensor([[1, 0], [1, math.nan]])))
    with pytest.raises(InputError, match=r"shape \(2, 3\).*\(2, 2\)"):
        objective([query, first, second], Targets(teacher_BK=torch.zeros(2, 3)))
    with pytest.raises(InputError, match=r"got 1 for each; train from triples or candidates"):
        objective([query, first], Targets(teacher_BK=torch.zeros(2, 1)))


def test_documents_that_a_row_lacks_count_nothing() -> None:
    """Rows of 4, 2 and 1 documents cost what they cost each by itself; a missing one gets no gradient."""
    lengths = [4, 2, 1]
    columns = [unit_rows(3, 5, seed).requires_grad_() for seed in range(5)]
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    present = torch.tensor([[place < length for place in range(4)] for length in lengths])
    targets = Targets(teacher_BK=teacher, present_BK=present)
    for objective in (MarginMSE(scale=2), KLDivergence(temperature=0.5)):
        alone = [
            objective(
                [column[row : row + 1] for column in columns[: length + 1]],
                Targets(teacher_BK=teacher[row : row + 1, :length]),
            )
            for row, length in enumerate(lengths)
            if length > 1
        ]
        loss = objective(columns, targets)
        assert loss.item() == pytest.approx(torch.stack(alone).sum().item() / 3, abs=1e-5)
        gradients = torch.autograd.grad(loss, columns)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[3][1:].any()  # the third document, which row 0 alone has
        assert gradients[3][0].any()


@pytest.mark.parametrize("objective", [InBatchNegatives(scale=3, symmetric=True), HardestNegative(margin=1)])
def test_a_missing_document_is_nobodys_negative(objective: EncoderObjective) -> None:
    """As if the places without a document were not there: the same loss from the other columns alone."""
    query, first, second = (unit_rows(3, 5, seed) for seed in range(3))
    keys = BatchKeys(
        query=text_keys(list("abc")), documents=(text_keys(list("xyz")), text_keys([None, "n", None]))
    )
    loss = objective([query, first, second * torch.tensor([[0.0], [1.0], [0.0]])], Targets(keys=keys))
    similarity = cosines(query, torch.cat([first, second[1:2]]))
    if isinstance(objective, HardestNegative):
        assert float(loss) == pytest.approx(hardest_loss(similarity, set(), 1), abs=1e-5)
    else:
        both = softmax_loss(similarity, set(), 3) + softmax_loss(cosines(first, query), set(), 3)
        assert float(loss) == pytest.approx(both / 2, abs=1e-5)


def test_the_scale_of_margins_fits_the_teacher() -> None:
    """95 of 100 margins of 0.2 to 20 lie below 19.01: two digits of it are 19."""
    margins = torch.arange(1, 101) / 5
    assert fitting_scale(margins) == fitting_scale(-margins) == 19
    assert fitting_scale(margins / 19) == 1
    refuse_saturating_scale(6, margins)  # reaches 12, and the median is 10
    with pytest.raises(InputError, match=r"scale is 1, so .* reach 2, and .*median 10.*takes 19"):
        refuse_saturating_scale(1, margins)
    with pytest.raises(InputError, match="alike"):
        fitting_scale(torch.zeros(9))
    with pytest.raises(InputError, match="margin_mse needs a scale"):
        MarginMSE()([unit_rows(2, 5, seed) for seed in range(3)], Targets(teacher_BK=torch.zeros(2, 2)))


# Matryoshka.


def test_matryoshka_is_the_weighted_sum_over_cut_embeddings() -> None:
    columns = [unit_rows(4, 6, seed) for seed in (1, 2, 3)]
    wrapped = over_dimensions(Matryoshka(dims=(6, 3, 2), weights=(1, 0.5, 2)), InBatchNegatives(scale=7))
    expected = 0.0
    for dim, weight in ((6, 1), (3, 0.5), (2, 2)):
        cut = [column[:, :dim] / column[:, :dim].norm(dim=1, keepdim=True) for column in columns]
        expected += weight * softmax_loss(cosines(cut[0], torch.cat(cut[1:])), set(), 7.0)
    loss = wrapped(columns, Targets(keys=distinct_keys(4, 2)))
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_matryoshka_agrees_with_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = Given(6)
    peer = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), [6, 3, 2])
    columns, targets = [unit_rows(4, 6, seed) for seed in (1, 2, 3)], Targets(keys=distinct_keys(4, 2))

    def peer_value(given: list[Tensor], labels: Tensor) -> Tensor:
        return peer([{"sentence_embedding": column} for column in given], labels)

    assert_peer(
        over_dimensions(Matryoshka(dims=(6, 3, 2)), InBatchNegatives()),
        peer_value,
        columns,
        targets,
        torch.zeros(4),
    )


def test_matryoshka_refuses_more_dimensions_than_there_are() -> None:
    wrapped = over_dimensions(Matryoshka(dims=(8, 2)), InBatchNegatives())
    with pytest.raises(InputError, match="asks for 8 dimensions; the embeddings have 6"):
        wrapped([unit_rows(2, 6, 1), unit_rows(2, 6, 2)], Targets(keys=distinct_keys(2)))


# Settings and targets.


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        (InBatchNegatives, {"scale": 0}, "scale"),
        (InBatchNegatives, {"scale": -1}, "scale"),
        (InBatchNegatives, {"scale": math.inf}, "scale"),
        (InBatchNegatives, {"margin": -0.1}, "margin"),
        (InBatchNegatives, {"margin": 2.1}, "margin"),
        (InBatchNegatives, {"margin": math.nan}, "margin"),
        (HardestNegative, {"margin": 0}, "margin"),
        (HardestNegative, {"margin": 2.1}, "margin"),
        (RandomNegative, {"margin": 0}, "margin"),
        (RandomNegative, {"margin": 2.1}, "margin"),
        (InBatchNegatives, {"more_negatives": []}, "more_negatives"),
        (InBatchNegatives, {"more_negatives": ["query"]}, "more_negatives"),
        (InBatchNegatives, {"more_negatives": ["query_query"] * 2}, "write each once"),
        (
            InBatchNegatives,
            {"more_negatives": ["query_query"], "symmetric": True},
            "in one sum for both sides",
        ),
        (GuideSettings, {"encoder": "x", "margin": -0.1}, "margin"),
        (GuideSettings, {"margin": 0.1}, "encoder"),
        (CoSENT, {"scale": 0}, "scale"),
        (AnglE, {"scale": -1}, "scale"),
        (EmbeddingDistillation, {"loss": "l2"}, "loss"),
        (SimCSE, {"scale": 0}, "scale"),
        (CosineEmbedding, {"margin": 1}, "margin"),
        (CosineEmbedding, {"margin": -1.1}, "margin"),
        (MarginMSE, {"scale": 0}, "scale"),
        (KLDivergence, {"scale": 0}, "scale"),
        (KLDivergence, {"temperature": 0}, "temperature"),
        (Matryoshka, {"dims": []}, "dims"),
        (Matryoshka, {"dims": [8, 8]}, "from the largest to the smallest"),
        (Matryoshka, {"dims": [4, 8]}, "from the largest to the smallest"),
        (Matryoshka, {"dims": [8, 0]}, "dims"),
        (Matryoshka, {"dims": [8, 4], "weights": [1]}, "1 weights for 2 dims"),
        (Matryoshka, {"dims": [8, 4], "weights": [1, 0]}, "weights"),
        (InBatchNegatives, {"scael": 1}, "nearest known key is 'scale'"),
        (InBatchNegatives, {"name": "simcse"}, "name"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[Config], values: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key):
        make_config(kind, values)


@pytest.mark.parametrize(
    "objective",
    [
        InBatchNegatives(),
        HardestNegative(),
        RandomNegative(),
        SimCSE(),
        CosineEmbedding(),
        MarginMSE(scale=1),
        CoSENT(),
        AnglE(),
        EmbeddingDistillation(),
    ],
)
def test_missing_targets_are_named(objective: EncoderObjective) -> None:
    columns = [unit_rows(2, 5, seed) for seed in range(3 if isinstance(objective, MarginMSE) else 2)]
    with pytest.raises(InputError, match=r"needs (the keys|labels|scores|a teacher's (score|vectors))"):
        objective(columns, Targets())


# Two workers.


@pytest.fixture(scope="module")
def from_two_workers(
    dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("two") / "results.pt"
    return run_cases_on_two_workers(CASES, backward_whole, dummy_encoder_dir, out)


@pytest.mark.processes
@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_give_the_loss_and_gradients_of_one(
    name: str, from_two_workers: dict[str, dict[str, Tensor]], dummy_encoder_dir: Path
) -> None:
    """Defect of an older system: gradients off by the world size when negatives are gathered across workers."""
    assert_as_one_worker(CASES[name], from_two_workers[name], dummy_encoder_dir)


# Peers.


class Given(nn.Module):
    """Stands where a peer's loss wants a model: gives back the embeddings it is handed."""

    def __init__(self, dim: int = 5) -> None:
        super().__init__()
        self.dim = dim

    def get_embedding_dimension(self) -> int:
        return self.dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


def peer_loss(name: str, **settings: Any) -> Callable[[list[Tensor], Tensor], Tensor]:
    from sentence_transformers.sentence_transformer import losses

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    compute: Callable[[list[Tensor], Tensor], Tensor]
    compute = getattr(losses, name)(Given(), **settings).compute_loss_from_embeddings
    return compute


class GivenByGuide(Given):
    """Gives back what another encoder made of the same texts."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["guide"]}


def guided_peer(guide: Sequence[Tensor], **settings: Any) -> Callable[[list[Tensor], Tensor], Tensor]:
    """sentence-transformers' GISTEmbedLoss over given embeddings."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    model, other = Given(), GivenByGuide()
    for each in (model, other):
        each.tokenizer, each.max_seq_length = tiny_tokenizer(), 64
    peer = GISTEmbedLoss(model, other, **settings)  # type: ignore[arg-type]

    def value(columns: list[Tensor], labels: Tensor) -> Tensor:
        features = [
            {"sentence_embedding": own, "guide": theirs} for own, theirs in zip(columns, guide, strict=True)
        ]
        return peer(features, labels)

    return value


def assert_peer(
    objective: EncoderObjective,
    peer: Callable[[list[Tensor], Tensor], Tensor],
    columns: Sequence[Tensor],
    targets: Targets,
    labels: Tensor,
) -> None:
    """The same value and the same gradient of every column."""
    ours = [column.clone().requires_grad_() for column in columns]
    theirs = [column.clone().requires_grad_() for column in columns]
    loss, expected = objective(ours, targets), peer(theirs, labels)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    gradients, wanted = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    for number, (one, other) in enumerate(zip(gradients, wanted, strict=True)):
        # Cosines may be computed from embeddings that the peer normalises once more: compare along the sphere.
        assert torch.allclose(
            on_sphere(one, columns[number]), on_sphere(other, columns[number]), atol=1e-5
        ), number


def on_sphere(gradient: Tensor, column: Tensor) -> Tensor:
    return gradient - (gradient * column).sum(-1, keepdim=True) * column


def own_cosines(columns: Sequence[Tensor]) -> list[list[float]]:
    """Of each query with its own documents."""
    query, *documents = columns
    return [[float(query[i] @ column[i]) for column in documents] for i in range(len(query))]


def softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]
