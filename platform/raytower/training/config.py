"""Configs of the training jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raytower.config import Config, FractionField, OnError

# float16 would need loss scaling; bfloat16 has the range of float32.
TrainDtype = Literal["float32", "bfloat16"]


class OptimizerConfig(Config):
    """AdamW with linear warm-up and linear decay to zero; no weight decay on biases and norms."""

    lr: float = Field(default=2.0e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_ratio: FractionField = 0.1
    max_grad_norm: float = Field(default=1.0, gt=0)


class TrainWorkersConfig(Config):
    """Ray Train workers; `batch_size` is shared out evenly over them."""

    num: int = Field(default=2, ge=1)
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)


class TrainJobConfig(Config):
    """Keys that every training job has."""

    model: str
    output: str
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(default=64, ge=1)
    epochs: float = Field(default=1, gt=0)
    dtype: TrainDtype = "bfloat16"
    seed: int = Field(default=0, ge=0)
    workers: TrainWorkersConfig = TrainWorkersConfig()
    on_error: OnError = "fail"
    shuffle_rows: int = Field(default=100_000, ge=1)
    log_every_steps: int = Field(default=10, ge=1)
    checkpoint_every_steps: int = Field(default=500, ge=1)
    max_failures: int = Field(default=2, ge=0)

    def model_post_init(self, context: Any) -> None:
        if self.batch_size % self.workers.num:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.workers.num} workers cannot share evenly; "
                "make it a multiple of workers.num"
            )


class RetrieverTrainInput(Config):
    path: str
    format: Literal["auto", "pairs", "triples"] = "auto"


class RetrieverDevConfig(Config):
    """Recall on dev pairs against a corpus (null: the dev documents themselves), during training."""

    path: str
    corpus: str | None = None
    corpus_rows: int = Field(default=20_000, ge=1)
    metric: str = Field(default="recall@10", pattern=r"^((recall|hit)@[1-9]\d*|(mrr|ndcg)@10)$")
    every_steps: int = Field(default=200, ge=1)
    patience: int = Field(default=3, ge=1)


class InBatchNegativesConfig(Config):
    name: Literal["in_batch_negatives"] = "in_batch_negatives"
    scale: float = Field(default=20.0, gt=0)
    margin: float = Field(default=0.0, ge=0, le=2)


class TrainRetrieverConfig(TrainJobConfig):
    """`raytower train-retriever` (design 5)."""

    train: RetrieverTrainInput
    dev: RetrieverDevConfig | None = None
    objective: InBatchNegativesConfig = InBatchNegativesConfig()
    max_length: int = Field(default=64, ge=1)
    query_prefix: str | None = None
    document_prefix: str | None = None


class RerankerTrainInput(Config):
    path: str
    format: Literal["auto", "scored", "triples"] = "auto"


class RerankerDevConfig(Config):
    """Area under the ROC curve on scored dev pairs, during training."""

    path: str
    metric: Literal["auc"] = "auc"
    every_steps: int = Field(default=200, ge=1)
    patience: int = Field(default=3, ge=1)


class PointwiseConfig(Config):
    name: Literal["pointwise_cross_entropy"] = "pointwise_cross_entropy"
    positive_weight: float = Field(default=1.0, gt=0)


class TrainRerankerConfig(TrainJobConfig):
    """`raytower train-reranker`."""

    train: RerankerTrainInput
    dev: RerankerDevConfig | None = None
    objective: PointwiseConfig = PointwiseConfig()
    batch_size: int = Field(default=32, ge=1)
    max_length: int = Field(default=128, ge=1)
