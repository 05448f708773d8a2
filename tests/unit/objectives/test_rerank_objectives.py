"""Cross-encoder and classifier objectives by hand and against torch's own losses; two workers equal one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from raytower.config import Config, make_config
from raytower.errors import InputError
from raytower.objectives.classification import weights_of
from raytower.objectives.config import (
    CrossEntropy,
    Focal,
    LambdaLoss,
    ListwiseSoftmax,
    PairwiseMargin,
    PointwiseCrossEntropy,
    PointwiseRegression,
    RankNet,
)
from tests.support.warm import in_two_processes
from tests.support.worker_group import end_worker, join_group

NAN = math.nan


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def random_logits(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class TestPointwiseCrossEntropy:
    LOGITS = torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, 0.0]])

    def test_by_hand(self) -> None:
        # The chance of class 1 is the sigmoid of the difference of the two logits.
        expected = -(math.log(sigmoid(1.0)) + math.log(1 - sigmoid(-1.5)) + math.log(1 - sigmoid(1.0))) / 3
        assert float(PointwiseCrossEntropy()(self.LOGITS, torch.tensor([1, 0, 0]))) == pytest.approx(expected)

    def test_a_heavier_positive_is_torchs_pos_weight_on_the_difference(self) -> None:
        logits, labels = random_logits(9, 2), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0])
        peer = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
        loss = PointwiseCrossEntropy(positive_weight=3.0)(logits, labels)
        assert float(loss) == pytest.approx(float(peer(logits[:, 1] - logits[:, 0], labels)), abs=1e-6)

    @pytest.mark.parametrize(("label", "shown"), [(2.0, "2"), (-1.0, "-1"), (0.5, "0.5"), (NAN, "nan")])
    def test_other_labels_are_refused(self, label: float, shown: str) -> None:
        with pytest.raises(InputError, match=f"label {shown} is neither 0 nor 1"):
            PointwiseCrossEntropy()(self.LOGITS, torch.tensor([1.0, label, 0.0]))


class TestPointwiseRegression:
    def test_bce_by_hand(self) -> None:
        logits, labels = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([1.0, 0.0, 0.25])
        expected = -math.log(sigmoid(0.3)) - math.log(1 - sigmoid(-1.2))
        expected -= 0.25 * math.log(sigmoid(2.0)) + 0.75 * math.log(1 - sigmoid(2.0))
        assert float(PointwiseRegression()(logits, labels)) == pytest.approx(expected / 3, abs=1e-6)

    def test_bce_weighs_the_relevant_side(self) -> None:
        logits, labels = torch.tensor([[0.3], [-1.2]]), torch.tensor([1.0, 0.0])
        expected = -4 * math.log(sigmoid(0.3)) - math.log(1 - sigmoid(-1.2))
        loss = PointwiseRegression(positive_weight=4.0)(logits, labels)
        assert float(loss) == pytest.approx(expected / 2, abs=1e-6)

    def test_mse_by_hand(self) -> None:
        logits, labels = torch.tensor([[0.5], [4.0], [-1.0]]), torch.tensor([0.0, 5.0, -3.0])
        loss = PointwiseRegression(loss="mse")(logits, labels)
        assert float(loss) == pytest.approx((0.25 + 1.0 + 4.0) / 3)

    @pytest.mark.parametrize(
        ("loss", "label", "message"),
        [
            ("bce", 3.0, r"label 3 is outside 0\.\.1"),
            ("bce", -0.5, r"label -0\.5 is outside 0\.\.1"),
            ("bce", NAN, r"label nan is outside 0\.\.1"),
            ("mse", NAN, "label nan is not finite"),
            ("mse", math.inf, "label inf is not finite"),
        ],
    )
    def test_labels_out_of_range_are_refused(self, loss: str, label: float, message: str) -> None:
        objective = make_config(PointwiseRegression, {"loss": loss})
        with pytest.raises(InputError, match=message):
            objective(torch.zeros(2, 1), torch.tensor([1.0, label]))

    def test_mse_knows_no_positive_weight(self) -> None:
        with pytest.raises(InputError, match=r"positive_weight is 2\.0, but loss mse"):
            make_config(PointwiseRegression, {"loss": "mse", "positive_weight": 2.0})

    def test_what_a_reader_puts_on_the_logit(self) -> None:
        assert PointwiseRegression().activation == "sigmoid"
        assert PointwiseRegression(loss="mse").activation == "identity"


class TestPairwiseMargin:
    def test_by_hand(self) -> None:
        # Row 0: one negative far below (0), one above; row 1: both within the margin or above.
        logits = torch.tensor([[2.0, -3.0, 2.5], [0.0, 0.0, -0.2]])
        first = max(0, 0.1 - sigmoid(2) + sigmoid(-3)) + max(0, 0.1 - sigmoid(2) + sigmoid(2.5))
        second = 0.1 + max(0, 0.1 - sigmoid(0) + sigmoid(-0.2))
        assert max(0, 0.1 - sigmoid(2) + sigmoid(-3)) == 0
        assert float(PairwiseMargin()(logits, None)) == pytest.approx((first + second) / 4, abs=1e-6)

    def test_it_is_torchs_ranking_loss_over_every_pair(self) -> None:
        scores = random_logits(5, 4).sigmoid()
        peer = nn.MarginRankingLoss(margin=0.3)
        best, others = scores[:, :1].expand(-1, 3).reshape(-1), scores[:, 1:].reshape(-1)
        loss = PairwiseMargin(margin=0.3)(random_logits(5, 4))
        assert float(loss) == pytest.approx(float(peer(best, others, torch.ones(15))), abs=1e-6)


class TestListwiseSoftmax:
    def test_by_hand(self) -> None:
        logits = [[1.0, 0.0, -1.0], [0.2, 2.0, 0.1]]
        losses = [-math.log(math.exp(row[0]) / sum(math.exp(value) for value in row)) for row in logits]
        assert float(ListwiseSoftmax()(torch.tensor(logits), None)) == pytest.approx(sum(losses) / 2)


class GivenLogits(nn.Module):
    """Stands where a peer's loss wants a cross-encoder: the logit of each pair is one that it is handed."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def preprocess(self, pairs: list[tuple[str, str]], **_: object) -> dict[str, Tensor]:
        return {"places": torch.tensor([int(text) for _, text in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.logits[features["places"]]}


def peer_value(
    name: str, logits: Tensor, labels: Tensor, weighting: str | None = None, **settings: Any
) -> Tensor:
    """Of one query's documents, by sentence-transformers: the mean over its pairs."""
    from sentence_transformers.cross_encoder import losses

    if weighting is not None:
        settings["weighting_scheme"] = getattr(losses, weighting)()
    peer = getattr(losses, name)(GivenLogits(logits), mini_batch_size=-1, **settings)
    texts = [str(place) for place in range(len(logits))]
    value: Tensor = peer([["query"], [texts]], [labels])
    return value


LENGTHS = [5, 2, 4, 3]
NONE = -math.inf
GRADES = torch.tensor(
    [[3, 1, 1, 0, 2], [1, 0, NONE, NONE, NONE], [0, 2, 0.5, 2, NONE], [1, 1, 1, NONE, NONE]]
)
PRESENT = GRADES.isfinite()
PEERS = {
    "ndcg_loss2pp": "NDCGLoss2PPScheme",
    "ndcg_loss2": "NDCGLoss2Scheme",
    "lambda_rank": "LambdaRankScheme",
}


def lists_of_logits() -> Tensor:
    return random_logits(4, 5, seed=3).masked_fill(~PRESENT, -math.inf).requires_grad_()


def ndcg_lists() -> list[tuple[Tensor, Tensor]]:
    """Each query's own logits and labels."""
    return [
        (logits[:length].detach().requires_grad_(), labels[:length])
        for logits, labels, length in zip(lists_of_logits(), GRADES, LENGTHS, strict=True)
    ]


def assert_gradients(
    loss: Tensor, logits: Tensor, alone: list[Tensor], lists: list[tuple[Tensor, Tensor]]
) -> None:
    """Those of each query's own loss; places without a document have none."""
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isfinite().all())
    assert not gradient[~PRESENT].any()
    for row, (value, (own, _)) in enumerate(zip(alone, lists, strict=True)):
        (expected,) = torch.autograd.grad(value, own, allow_unused=True)
        wanted = torch.zeros_like(own) if expected is None else expected / len(lists)
        assert torch.allclose(gradient[row, : len(own)], wanted, rtol=0, atol=1e-6), row


class TestRankNet:
    def test_by_hand(self) -> None:
        # Row 0: 1 before 2, 1 before 3, equal labels are not compared. Row 1: the last document is missing.
        logits = torch.tensor([[0.5, 1.0, -2.0], [0.3, 0.1, -math.inf]])
        labels = torch.tensor([[4.0, 2.0, 2.0], [0.0, 1.0, -math.inf]])
        first = (math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-2.5))) / 2
        second = math.log(1 + math.exp(0.2))
        assert float(RankNet()(logits, labels)) == pytest.approx((first + second) / 2, abs=1e-6)

    def test_lists_of_unequal_length_agree_with_sentence_transformers(self) -> None:
        logits, lists = lists_of_logits(), ndcg_lists()
        alone = [peer_value("RankNetLoss", own, labels, reduction_log="natural") for own, labels in lists]
        loss = RankNet()(logits, GRADES)
        assert float(loss.detach()) == pytest.approx(float(torch.stack(alone).detach().sum()) / 4, abs=1e-6)
        assert float(alone[3]) == 0  # labels that are all equal
        assert_gradients(loss, logits, alone, lists)

    def test_only_the_order_of_labels_counts(self) -> None:
        logits = lists_of_logits()
        assert float(RankNet()(logits, GRADES * 7 - 3)) == float(RankNet()(logits, GRADES))


class TestLambdaLoss:
    def test_by_hand(self) -> None:
        # Places 2 1 3, gains 3 1 0; the best order has the DCG 3 + 1/log2(3). All three pairs are compared.
        logits, labels = torch.tensor([[0.5, 1.0, -2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        best = 3 + 1 / math.log2(3)
        d1, d2, d3 = 1.0, 1 / math.log2(3), 0.5
        pairs = [  # gains apart, discounts of the places, places apart, difference of logits
            (2, d1 - d2, d1 - d2, -0.5),
            (3, d2 - d3, d1 - d2, 2.5),
            (1, d1 - d3, d2 - d3, 3.0),
        ]
        for weighting, mu, swap in (("lambda_rank", 0, 1), ("ndcg_loss2", 1, 0), ("ndcg_loss2pp", 10, 1)):
            expected = sum(
                gain / best * (mu * apart + swap * change) * math.log2(1 + math.exp(-difference))
                for gain, change, apart, difference in pairs
            )
            objective = make_config(LambdaLoss, {"weighting": weighting})
            assert float(objective(logits, labels)) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("k", [None, 1, 2])
    @pytest.mark.parametrize("weighting", list(PEERS))
    def test_lists_of_unequal_length_agree_with_sentence_transformers(
        self, weighting: str, k: int | None
    ) -> None:
        """The peer takes the mean over the pairs of a query, which is the sum here."""
        logits, lists = lists_of_logits(), ndcg_lists()
        alone = []
        for own, labels in lists:
            order = own.argsort(descending=True).tolist()
            top = set(order[:k])
            num_pairs = sum(
                bool(labels[a] > labels[b]) and (a in top or b in top)
                for a in range(len(own))
                for b in range(len(own))
            )
            alone.append(num_pairs * peer_value("LambdaLoss", own, labels, PEERS[weighting], k=k))
        objective = make_config(LambdaLoss, {"weighting": weighting, "k": k})
        loss = objective(logits, GRADES)
        assert float(loss.detach()) == pytest.approx(float(torch.stack(alone).detach().sum()) / 4, abs=1e-6)
        assert_gradients(loss, logits, alone, lists)

    @pytest.mark.parametrize(("label", "shown"), [(-0.5, "-0.5"), (31.0, "31"), (NAN, "nan")])
    def test_labels_that_make_no_gains_are_refused(self, label: float, shown: str) -> None:
        with pytest.raises(InputError, match=rf"label {shown} is outside 0\.\.30.* choose rank_net"):
            LambdaLoss()(torch.zeros(1, 2), torch.tensor([[1.0, label]]))

    def test_a_perfect_order_far_apart_costs_nothing(self) -> None:
        assert float(LambdaLoss()(torch.tensor([[99.0, 66, 33]]), torch.tensor([[3.0, 1, 0]]))) < 1e-9


@pytest.mark.parametrize("objective", [PairwiseMargin(), ListwiseSoftmax(), RankNet(), LambdaLoss()])
def test_a_query_without_negatives_is_refused(
    objective: PairwiseMargin | ListwiseSoftmax | RankNet | LambdaLoss,
) -> None:
    with pytest.raises(InputError, match=r"1 document; objective \w+ compares at least 2"):
        objective(torch.zeros(3, 1), torch.zeros(3, 1))


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


class TestClassification:
    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    def test_cross_entropy_is_torchs(self, weights: Tensor | None) -> None:
        logits = random_logits(7, 3)
        expected = nn.CrossEntropyLoss(weight=weights)(logits, CLASSES)
        assert float(CrossEntropy()(logits, CLASSES, weights)) == pytest.approx(float(expected), abs=1e-6)

    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    def test_focal_by_hand(self, gamma: float, weights: Tensor | None) -> None:
        logits = random_logits(7, 3)
        total, norm = 0.0, 0.0
        for row, place in zip(logits.double().tolist(), CLASSES.tolist(), strict=True):
            p = math.exp(row[place]) / sum(math.exp(value) for value in row)
            weight = 1.0 if weights is None else float(weights[place])
            total += weight * (1 - p) ** gamma * -math.log(p)
            norm += weight
        loss = Focal(gamma=gamma)(logits, CLASSES, weights)
        assert float(loss) == pytest.approx(total / norm, abs=1e-6)

    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    def test_focal_with_gamma_0_is_cross_entropy(self, weights: Tensor | None) -> None:
        gradients = []
        for loss in (Focal(gamma=0.0), nn.CrossEntropyLoss(weight=weights)):
            logits = random_logits(7, 3).requires_grad_()
            arguments = (weights,) if isinstance(loss, Focal) else ()
            loss(logits, CLASSES, *arguments).backward()
            gradients.append(logits.grad)
        assert gradients[1] is not None
        assert torch.allclose(*gradients, rtol=0, atol=1e-6)  # type: ignore[arg-type]

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
    def test_focal_has_a_gradient_where_a_text_is_certain(self, gamma: float) -> None:
        """(1 - p)^gamma has an infinite slope at p = 1 for a gamma below 1, which must not become NaN."""
        logits = torch.tensor([[60.0, 0.0], [0.0, 60.0], [0.0, 0.1]], requires_grad=True)
        Focal(gamma=gamma)(logits, torch.tensor([0, 0, 0])).backward()
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())
        assert bool((logits.grad[1:].abs() > 1e-3).all())

    @pytest.mark.parametrize("objective", [CrossEntropy(), Focal()])
    @pytest.mark.parametrize("number", [3, -1, -100])
    def test_classes_out_of_range_are_refused(self, objective: CrossEntropy | Focal, number: int) -> None:
        with pytest.raises(InputError, match=rf"class {number} is outside 0\.\.2"):
            objective(torch.zeros(2, 3), torch.tensor([0, number]))


class TestClassWeights:
    LABELS = ("a", "b##c", "rare")

    def test_none(self) -> None:
        assert weights_of(CrossEntropy(), self.LABELS, [5, 3, 2]) is None

    def test_balanced(self) -> None:
        weights = weights_of(Focal(class_weights="balanced"), self.LABELS, [5, 3, 2])
        assert weights is not None
        assert weights.tolist() == pytest.approx([10 / 15, 10 / 9, 10 / 6])

    def test_a_class_without_rows_weighs_one(self) -> None:
        weights = weights_of(CrossEntropy(class_weights="balanced"), self.LABELS, [6, 0, 3])
        assert weights is not None
        assert weights.tolist() == pytest.approx([9 / 18, 1.0, 9 / 9])

    def test_by_label(self) -> None:
        weights = weights_of(CrossEntropy(class_weights={"rare": 4.0, "a": 0.5}), self.LABELS, [5, 3, 2])
        assert weights is not None
        assert weights.tolist() == [0.5, 1.0, 4.0]

    def test_an_unknown_label_is_refused(self) -> None:
        with pytest.raises(
            InputError, match="names 'rar', which is none of the 3 labels; the nearest is 'rare'"
        ):
            weights_of(CrossEntropy(class_weights={"rar": 4.0}), self.LABELS, [5, 3, 2])

    @pytest.mark.parametrize("setting", ["even", {"a": 0.0}, {"a": -1.0}, {"a": math.inf}])
    def test_settings_out_of_range_are_refused(self, setting: object) -> None:
        with pytest.raises(InputError, match="class_weights"):
            make_config(CrossEntropy, {"class_weights": setting})


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        (PointwiseCrossEntropy, {"positive_weight": 0.0}),
        (PointwiseRegression, {"positive_weight": -1.0}),
        (PointwiseRegression, {"loss": "mae"}),
        (PairwiseMargin, {"margin": 0.0}),
        (PairwiseMargin, {"margin": 1.5}),
        (Focal, {"gamma": -0.1}),
        (ListwiseSoftmax, {"margin": 0.1}),
        (LambdaLoss, {"k": 0}),
        (LambdaLoss, {"weighting": "ndcg"}),
        (RankNet, {"k": 3}),
    ],
)
def test_settings_out_of_range_are_refused(objective: type[Config], values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        make_config(objective, values)


@dataclass(frozen=True)
class Case:
    """An objective over the logits of eight rows, computed as features times a matrix of `columns` columns."""

    columns: int
    loss: Callable[[Tensor, slice], Tensor]


BINARY = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
GRADED = torch.tensor([0.5, 0, 1, 0.2, 0.9, 0.1, 0, 1])
# Halves with unequal numbers of documents that are compared.
LISTS = torch.tensor([[1.0, 0, 0, 0]] * 4 + [[3.0, 2, 1, 0], [2, 2, 1, 1], [0, 1, 2, 3], [1, 0, 3, 3]])
# The two halves differ in the sum of their class weights.
UNEVEN = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1])

CASES = {
    "pointwise_cross_entropy": Case(
        2, lambda logits, rows: PointwiseCrossEntropy(positive_weight=3.0)(logits, BINARY[rows])
    ),
    "bce": Case(1, lambda logits, rows: PointwiseRegression(positive_weight=3.0)(logits, GRADED[rows])),
    "mse": Case(1, lambda logits, rows: PointwiseRegression(loss="mse")(logits, GRADED[rows])),
    "pairwise_margin": Case(4, lambda logits, rows: PairwiseMargin(margin=0.3)(logits)),
    "listwise_softmax": Case(4, lambda logits, rows: ListwiseSoftmax()(logits)),
    "rank_net": Case(4, lambda logits, rows: RankNet()(logits, LISTS[rows])),
    "lambda_loss": Case(4, lambda logits, rows: LambdaLoss()(logits, LISTS[rows])),
    "cross_entropy": Case(3, lambda logits, rows: CrossEntropy()(logits, UNEVEN[rows])),
    "weighted_cross_entropy": Case(3, lambda logits, rows: CrossEntropy()(logits, UNEVEN[rows], WEIGHTS)),
    "focal": Case(3, lambda logits, rows: Focal()(logits, UNEVEN[rows], WEIGHTS)),
}


def gradient_of(case: Case, rows: slice) -> Tensor:
    """Of the loss of some of the eight rows with respect to the matrix."""
    features = random_logits(8, 5, seed=1)
    matrix = random_logits(5, case.columns, seed=2).requires_grad_()
    case.loss(features[rows] @ matrix, rows).backward()
    assert matrix.grad is not None
    return matrix.grad


def worker(rank: int, out: Path) -> None:
    """One of two data-parallel workers; rank 0 writes the averaged gradient of each case."""
    join_group(out.parent, rank)
    gradients = {name: gradient_of(case, slice(rank * 4, rank * 4 + 4)) for name, case in CASES.items()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save(gradients, out)
    end_worker()


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out: Path = tmp_path_factory.mktemp("workers") / "two.pt"
    in_two_processes(worker, out)
    return dict(torch.load(out, weights_only=True))


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_two_workers_give_the_gradients_of_one(name: str, gradients_of_two: dict[str, Tensor]) -> None:
    """A weighted mean taken on each worker alone would weigh a text by the worker it fell to."""
    one = gradient_of(CASES[name], slice(0, 8))
    assert float(one.abs().max()) > 1e-2
    assert torch.allclose(one, gradients_of_two[name], rtol=0, atol=1e-5)
