"""Settings of the objectives: `objective: {name: ..., ...}` of a training config. Imports no torch.

The settings of an objective are called as its loss, a function of the same name in a module of the same name: the loss
of `MarginMSE`, whose name is margin_mse, is `margin_mse` in objectives/margin_mse.py. `computed_in` names another
module: `CrossEntropy` and `Focal` have theirs in objectives/classification.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from raytower.config import Config
from raytower.data.plain_labels import keyed_by_label

if TYPE_CHECKING:
    from torch import Tensor

    from raytower.objectives.targets import Targets

ClassWeights = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None


class ObjectiveSettings(Config):
    """Base of all settings. `formats` are the record kinds that the objective trains from.

    `first_is_relevant`: of a candidate list it takes the first document for the relevant one and all others for
    negatives, whatever their scores are.
    """

    formats: ClassVar[tuple[str, ...]]
    first_is_relevant: ClassVar[bool] = False
    computed_in: ClassVar[str | None] = None

    name: str

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss, a function of these settings and a batch to a scalar; imports torch."""
        module = importlib.import_module(f"{__package__}.{self.computed_in or self.name}")
        function: Callable[..., Tensor] = getattr(module, self.name)
        return function


class EncoderSettings(ObjectiveSettings):
    """Settings of a loss over embeddings: one column of queries, then columns of documents."""

    def __call__(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        """Mean loss over this worker's rows, a scalar, of unit-length embeddings (B, D) of each column."""
        return self.loss_function(self, columns, targets)


class RerankerSettings(ObjectiveSettings):
    """Settings of a loss over a cross-encoder's logits, `num_labels` for each pair. Readers of the trained model put
    `activation` on its logits."""

    num_labels: ClassVar[int] = 1

    def __call__(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean loss, a scalar, of logits (B, num_labels) of pairs or (B, K) of each query's documents."""
        return self.loss_function(self, logits, labels)


class ClassifierSettings(ObjectiveSettings):
    """Settings of a loss over a classifier's logits; `class_weights` says what a text of each class counts."""

    formats: ClassVar[tuple[str, ...]] = ("labelled",)
    computed_in: ClassVar[str | None] = "classification"

    class_weights: ClassWeights = None
    """What a text of each class counts: balanced weighs classes by how rare they are, a mapping names each, null
    counts all alike."""

    _labels_as_texts = field_validator("class_weights", mode="before")(keyed_by_label)

    def __call__(self, logits_BC: Tensor, classes_B: Tensor, weights_C: Tensor | None = None) -> Tensor:
        """This worker's loss, a scalar, of logits (B, C), classes (B,) and the weights (C,) of the classes."""
        return self.loss_function(self, logits_BC, classes_B, weights_C)


class InBatchNegatives(EncoderSettings):
    """The objective with its settings. Cosines differ by at most 2, so a margin lies in 0..2."""

    formats: ClassVar[tuple[str, ...]] = ("pairs", "triples", "candidates", "labelled")
    first_is_relevant: ClassVar[bool] = True

    name: Literal["in_batch_negatives"] = "in_batch_negatives"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Cosines are multiplied by it before the softmax."""
    margin: float = Field(default=0.0, ge=0, le=2)
    """Subtracted from the cosine of the positive."""
    symmetric: bool = False
    """Learn from document to query too."""
    more_negatives: tuple[Literal["query_query", "document_document", "document_query"], ...] | None = Field(
        default=None, min_length=1
    )
    """Further negatives, in the same sum: query_query, the query beside other queries; document_document and
    document_query, its document beside other documents and other queries. All three are GTE's loss; null takes none."""

    def model_post_init(self, context: Any) -> None:
        more = self.more_negatives or ()
        if more and self.symmetric:
            raise ValueError(
                f"symmetric is true, and more_negatives {list(more)} stand in one sum for both sides; remove one of "
                "them (document_query is the other direction)"
            )
        if len(set(more)) < len(more):
            raise ValueError(f"more_negatives are {list(more)}; write each once")


class HardestNegative(EncoderSettings):
    """The objective with its margin, a difference of cosines."""

    formats: ClassVar[tuple[str, ...]] = ("pairs", "triples", "candidates", "labelled")
    first_is_relevant: ClassVar[bool] = True

    name: Literal["hardest_negative"] = "hardest_negative"
    margin: float = Field(default=0.2, gt=0, le=2)
    """By how much the positive's cosine has to exceed the hardest negative's."""


class RandomNegative(EncoderSettings):
    """The objective with its margin, a difference of cosines."""

    formats: ClassVar[tuple[str, ...]] = ("pairs", "labelled")

    name: Literal["random_negative"] = "random_negative"
    margin: float = Field(default=0.2, gt=0, le=2)
    """By how much the positive's cosine has to exceed the negative's."""


class SimCSE(EncoderSettings):
    """The objective with its scale."""

    formats: ClassVar[tuple[str, ...]] = ("lines",)

    name: Literal["simcse"] = "simcse"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Cosines are multiplied by it before the softmax."""


class CosineEmbedding(EncoderSettings):
    """The objective with its margin, a cosine."""

    formats: ClassVar[tuple[str, ...]] = ("scored",)

    name: Literal["cosine_embedding"] = "cosine_embedding"
    margin: float = Field(default=0.3, ge=-1, lt=1)
    """Cosine below which a pair that does not match costs nothing."""


class CosineRegression(EncoderSettings):
    """The objective; it has no settings."""

    formats: ClassVar[tuple[str, ...]] = ("scored",)

    name: Literal["cosine_regression"] = "cosine_regression"


class CoSENT(EncoderSettings):
    """The objective with its scale."""

    formats: ClassVar[tuple[str, ...]] = ("scored",)

    name: Literal["cosent"] = "cosent"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Differences of cosines are multiplied by it."""


class AnglE(EncoderSettings):
    """The objective with its scale."""

    formats: ClassVar[tuple[str, ...]] = ("scored",)

    name: Literal["angle"] = "angle"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Differences of similarities are multiplied by it."""


class MarginMSE(EncoderSettings):
    """The objective with the scale that brings cosines to the teacher's range."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")

    name: Literal["margin_mse"] = "margin_mse"
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Brings differences of cosines to the teacher's range; null takes the one that fits the teacher's margins in a
    sample of the rows."""


class KLDivergence(EncoderSettings):
    """The objective with the student's scale and the teacher's temperature."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")

    name: Literal["kl_divergence"] = "kl_divergence"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """The student's cosines are multiplied by it before the softmax."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The teacher's scores are divided by it before the softmax."""


class EmbeddingDistillation(EncoderSettings):
    """The objective with its distance."""

    formats: ClassVar[tuple[str, ...]] = ("pairs", "triples", "candidates", "scored", "lines")

    name: Literal["embedding_distillation"] = "embedding_distillation"
    loss: Literal["cosine", "mse"] = "cosine"
    """Distance from the teacher's vector: 1 - cosine, or the mean squared difference of a dimension."""


class PointwiseCrossEntropy(RerankerSettings):
    """The objective; raise `positive_weight` where negatives far outnumber positives."""

    formats: ClassVar[tuple[str, ...]] = ("scored", "triples", "candidates")
    num_labels: ClassVar[int] = 2
    activation: ClassVar[Literal["sigmoid", "identity"]] = "sigmoid"  # of z₁ - z₀: the softmax of the two

    name: Literal["pointwise_cross_entropy"] = "pointwise_cross_entropy"
    positive_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What a relevant pair counts; raise it where negatives far outnumber positives."""


class PointwiseRegression(RerankerSettings):
    """The objective; `positive_weight` scales the relevant side of bce, where negatives outnumber positives."""

    formats: ClassVar[tuple[str, ...]] = ("scored", "triples", "candidates")

    name: Literal["pointwise_regression"] = "pointwise_regression"
    loss: Literal["bce", "mse"] = "bce"
    """bce for labels or probabilities, mse for scores of any range."""
    positive_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What the relevant side of bce counts."""

    def model_post_init(self, context: Any) -> None:
        if self.loss == "mse" and self.positive_weight != 1:
            raise ValueError(
                f"positive_weight is {self.positive_weight}, but loss mse weighs no positives; set loss to bce, or "
                "leave positive_weight out"
            )

    @property
    def activation(self) -> Literal["sigmoid", "identity"]:
        """What a reader puts on the logit."""
        return "sigmoid" if self.loss == "bce" else "identity"


class PairwiseMargin(RerankerSettings):
    """The objective; `margin` is a difference of two scores in 0..1."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    first_is_relevant: ClassVar[bool] = True
    activation: ClassVar[Literal["sigmoid", "identity"]] = "sigmoid"

    name: Literal["pairwise_margin"] = "pairwise_margin"
    margin: float = Field(default=0.1, gt=0, le=1)
    """By how much the relevant document's score, in 0 to 1, has to exceed the other's."""


class ListwiseSoftmax(RerankerSettings):
    """The objective; it has no settings."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    first_is_relevant: ClassVar[bool] = True
    activation: ClassVar[Literal["sigmoid", "identity"]] = "identity"

    name: Literal["listwise_softmax"] = "listwise_softmax"


class RankNet(RerankerSettings):
    """The objective; it has no settings."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    activation: ClassVar[Literal["sigmoid", "identity"]] = "identity"

    name: Literal["rank_net"] = "rank_net"


class LambdaLoss(RerankerSettings):
    """The objective with its weights."""

    formats: ClassVar[tuple[str, ...]] = ("triples", "candidates")
    activation: ClassVar[Literal["sigmoid", "identity"]] = "identity"

    name: Literal["lambda_loss"] = "lambda_loss"
    weighting: Literal["ndcg_loss2pp", "ndcg_loss2", "lambda_rank"] = "ndcg_loss2pp"
    """What the order of two documents counts: lambda_rank by what nDCG changes if they change places, ndcg_loss2 by a
    tighter bound, ndcg_loss2pp by both."""
    k: int | None = Field(default=None, ge=1)
    """Places that nDCG counts: two documents beyond them are not compared; null counts all."""


class CrossEntropy(ClassifierSettings):
    """Cross-entropy over the classes, weighted by class where `class_weights` says so."""

    name: Literal["cross_entropy"] = "cross_entropy"


class Focal(ClassifierSettings):
    """Focal loss; the larger `gamma`, the less a text counts that is classified right already."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """The larger, the less a text counts that is classified right already; 0 is cross-entropy."""


class Matryoshka(Config):
    """The dimensions, each smaller than the one before, and the weight of each."""

    dims: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    """Lengths, each smaller than the one before."""
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    """What each length counts; null counts all alike."""

    def model_post_init(self, context: Any) -> None:
        if any(later >= earlier for earlier, later in pairwise(self.dims)):
            raise ValueError(f"dims are {list(self.dims)}; write each once, from the largest to the smallest")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(self.dims)} dims; give one for each, or leave "
                "weights out for 1 each"
            )


class GuideSettings(Config):
    """Another encoder that tells false negatives, and how near they may come to the positive."""

    shorthand = "encoder"

    encoder: str
    """A directory, a hub id or a storage URI, as for `model`; it is read only."""
    margin: float = Field(default=0.0, ge=0, le=2)
    """How far below the positive's cosine, as the guide has it, a text must lie to be a negative."""
    relative: bool = False
    """Whether the margin is a share of the positive's cosine."""
