"""Configs of the training jobs. Each objective has a config of its own: `objective: {name: …}` and its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from raytower.config import Config, FittedWorkersConfig, FractionField, OnError
from raytower.data.plain_labels import keyed_by_label
from raytower.models.config import LoraConfig, PoolingMode
from raytower.objectives.config import (
    AnglE,
    CoSENT,
    CosineEmbedding,
    CosineRegression,
    CrossEntropy,
    EmbeddingDistillation,
    Focal,
    GuideSettings,
    HardestNegative,
    InBatchNegatives,
    KLDivergence,
    LambdaLoss,
    ListwiseSoftmax,
    MarginMSE,
    Matryoshka,
    PairwiseMargin,
    PointwiseCrossEntropy,
    PointwiseRegression,
    RandomNegative,
    RankNet,
    SimCSE,
)
from raytower.workers import worker_counts

EVERY_STEPS = 200
"""Steps between two measurements where a config says nothing."""
TrainDtype = Literal["auto", "float32", "bfloat16", "float16"]
RetrieverFormat = Literal["pairs", "triples", "candidates", "scored", "lines", "labelled"]
RetrieverObjective = (
    InBatchNegatives
    | HardestNegative
    | RandomNegative
    | SimCSE
    | CosineEmbedding
    | CosineRegression
    | CoSENT
    | AnglE
    | MarginMSE
    | KLDivergence
    | EmbeddingDistillation
)
LabelBy = Literal["file", "folder"]
_LAST = r"last [1-9]\d*"
_RETRIEVER_METRIC = r"^((recall|hit|mrr|ndcg)@[1-9]\d*|auc|accuracy|f1|spearman)$"
LastCheckpoints = Annotated[str, Field(pattern=f"^{_LAST}$")]
RerankerFormat = Literal["scored", "triples", "candidates"]
RerankerObjective = (
    PointwiseCrossEntropy | PointwiseRegression | PairwiseMargin | ListwiseSoftmax | RankNet | LambdaLoss
)
ClassifierObjective = CrossEntropy | Focal
Mixing = Literal["proportional", "even"] | Annotated[float, Field(ge=1)]
ALONE = ""
"""The name of rows beside which there are no others."""
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAUGHT = ("margin_mse", "kl_divergence", "embedding_distillation")
_WITH_THRESHOLD = ("auc", "accuracy", "f1")
_INSTRUCTION_PLACE = "{}"
SetT = TypeVar("SetT", bound="TrainSet")
# Keys that change how a run goes but not its result, so a job may continue with other values.
FREE_KEYS = frozenset(
    {
        "output",
        "log_dir",
        "wandb",
        "mlflow",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "max_failures",
        "workers",
        "attention",
    }
)


class OptimizerConfig(Config):
    """AdamW with linear warm-up and a schedule; no weight decay on biases and norms."""

    lr: float = Field(default=2.0e-5, gt=0)
    """Peak learning rate, reached after warm-up."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of what lies behind the backbone: a projection, the head of a reranker or classifier. A fresh
    head learns faster at ten times lr; null is lr."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: linear or by half a cosine down to zero, or constant."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup_ratio: FractionField = 0.1
    """Share of the steps in which the learning rate rises."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class DevConfig(Config):
    """Measuring during training: how often, and when to stop."""

    shorthand = "path"

    graded_metric: ClassVar[str | None] = None
    """The metric that graded labels have, where the job measures one."""

    path: str | None = None
    """Dev rows: a file, a folder or a glob, local or by URI; null sets `share` of the training rows aside."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows that are dev rows and not trained, in place of path. `seed` draws them: all rows of a
    query together, and of each label of a classifier the same share."""
    metric: str
    """What is measured; higher is better."""
    every_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows between two measurements; 0.5 measures twice a pass. Null: every_steps says."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two measurements; null is 200, unless every_epochs says."""
    patience: int | None = Field(default=3, ge=1)
    """Evaluations in a row without a better value before training stops; null never stops it."""

    @field_validator("every_steps")
    @classmethod
    def _known_steps(cls, steps: int | None, given: ValidationInfo) -> int | None:
        # Here and nowhere else, so that a config of 200 and one that says nothing are one.
        return EVERY_STEPS if steps is None and given.data.get("every_epochs") is None else steps

    def model_post_init(self, context: Any) -> None:
        if not self.places and self.share is None:
            raise ValueError("dev.path is required and not given; name dev rows, or give dev.share")
        if self.path is not None and self.share is not None:
            raise ValueError(
                f"dev.path is {self.path!r} and dev.share {self.share:g}; dev rows come from one of them: give one"
            )
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError(
                f"dev.every_steps is {self.every_steps} and dev.every_epochs {self.every_epochs:g}; give one of them"
            )

    @property
    def each(self) -> Mapping[str, DevConfig]:
        """The config of each dev set by name, or itself under ALONE."""
        return {ALONE: self}

    @property
    def places(self) -> tuple[str, ...]:
        """All files, folders and globs that are read; none where `share` says."""
        return () if self.path is None else (self.path,)

    @property
    def origin(self) -> str:
        """Where the dev rows come from, for messages."""
        return f"dev.path {self.path!r}" if self.path is not None else f"dev.share {self.share:g}"

    def is_due(self, step: int, rows_per_step: int, num_rows: int) -> bool:
        """Whether step number `step`, counted from 1, ends with a measurement.

        every_epochs need not be whole steps: the step that brings the rows seen to the next multiple is meant. Of 100
        rows at 16 a step these are steps 7, 13, 19 and 25 for every_epochs 1.
        """
        if self.every_steps is not None:
            return step % self.every_steps == 0
        assert self.every_epochs is not None
        # As a fraction, since 0.3 of 100 rows in floating point is not always 30.
        rows_between = Fraction(str(self.every_epochs)) * num_rows
        return step * rows_per_step // rows_between > (step - 1) * rows_per_step // rows_between

    def is_over(self, stale_evaluations: int) -> bool:
        """Whether so many evaluations in a row without a better value end training."""
        return self.patience is not None and stale_evaluations >= self.patience


class TrainingWorkersConfig(FittedWorkersConfig):
    """Workers of a training, which goes on with fewer of them while machines are missing."""

    min: int | None = Field(default=None, ge=1)
    """Fewest workers that a training goes on with where machines are lost; it takes others in when they come. null is
    `num`: it waits for all."""
    sharding: Literal["none", "full"] = "none"
    """What each worker holds: none, the whole model; full, its part of the weights, gradients and moments, with layers
    put together as they compute, for models that do not fit one GPU so."""

    def model_post_init(self, context: Any) -> None:
        if self.sharding == "full" and self.num == 1:
            raise ValueError(
                "workers.sharding is full and workers.num 1, which has nobody to share the model with; raise num, or "
                "set sharding to none"
            )
        if self.min is None or self.num is None:
            return
        if self.min > self.num:
            raise ValueError(
                f"workers.min is {self.min}, more than workers.num {self.num}; lower min or raise num"
            )
        if self.min < self.num and worker_counts(self.min, self.num) == [self.num]:
            fewer = worker_counts(1, self.num)[-2]
            raise ValueError(
                f"workers.min is {self.min} and workers.num {self.num}; each worker takes as many of {self.num} equal "
                f"shares of a batch as any other, so that there are {self.num} or, as the next fewer, {fewer}; lower "
                f"min to {fewer}, or leave it out"
            )


class WandbConfig(Config):
    """Where Weights & Biases keeps the run."""

    shorthand = "project"

    project: str = Field(default="raytower", min_length=1)
    """Project of the run."""
    entity: str | None = None
    """User or team that the project belongs to; null is the default of the account."""
    mode: Literal["offline", "online"] = "offline"
    """offline asks no network: it writes a folder that `wandb sync` sends. online sends while training runs, with the
    key that WANDB_API_KEY or `wandb login` gives to the worker."""
    dir: str | None = None
    """Local folder of its files; null is `<output>.wandb`."""


class MlflowConfig(Config):
    """Where MLflow keeps the run."""

    shorthand = "experiment"

    experiment: str = Field(default="raytower", min_length=1)
    """Experiment of the run; it is made where there is none of this name."""
    tracking_uri: str | None = None
    """sqlite:///FILE, or a server's http:// or https:// address, whose user and password are MLFLOW_TRACKING_USERNAME
    and MLFLOW_TRACKING_PASSWORD of the environment; null is the file mlflow.db beside the output."""

    def model_post_init(self, context: Any) -> None:
        if self.tracking_uri is None:
            return
        parts = urlsplit(self.tracking_uri)
        if parts.username or parts.password:
            raise ValueError(
                "mlflow.tracking_uri holds a user or a password, which would be written into the output; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in their place"
            )
        if not self.tracking_uri.startswith(("sqlite:///", "http://", "https://")):
            raise ValueError(
                f"mlflow.tracking_uri is {self.tracking_uri!r}; give sqlite:///FILE, or the http:// or https:// "
                "address of a server"
            )


class TrainInput(Config):
    """Where the training rows are."""

    shorthand = "path"

    path: str | None
    """Training rows: a file, a folder or a glob, local or by URI."""

    @property
    def places(self) -> tuple[str, ...]:
        """All files, folders and globs that are read."""
        return () if self.path is None else (self.path,)


class TrainSet(Config):
    """One of several sets of training rows."""

    shorthand = "path"

    path: str
    """Training rows: a file, a folder or a glob, local or by URI."""
    weight: float = Field(default=1, gt=0)
    """How often a row of this set comes beside one of the others; with mixing even, its share of the batches beside
    theirs."""


class MixedTrainInput(TrainInput, Generic[SetT]):
    """Where the training rows are: one set of them, or several by name."""

    path: str | None = None
    """Training rows: a file, a folder or a glob, local or by URI; required unless there are sets."""
    sets: dict[str, SetT] | None = None
    """Several sets of rows by name, in place of path; each batch is of one set, so that its negatives are of one kind.
    Each has a path, a `weight`, and of its own what it gives of `format`, `num_documents`, `objective` and others; the
    rest is as it stands beside the sets, and for the whole job."""
    mixing: Mixing = "proportional"
    """Which share of the batches each of the sets has. proportional: that of its rows; even: the same for all; a number
    T from 1 on: that of the T-th root of its rows, between the two. Times `weight`."""

    def model_post_init(self, context: Any) -> None:
        if (self.path is None) == (not self.sets):
            if self.path is not None:
                raise ValueError(
                    f"train.path is {self.path!r} and train.sets are {', '.join(self.sets or {})}; rows come from one "
                    "of them: give one"
                )
            raise ValueError(
                "train.path is required and not given; name training rows, or several sets of them by train.sets"
            )
        _check_names("train.sets", self.sets)
        if self.path is not None and self.mixing != "proportional":
            raise ValueError(
                f"train.mixing is {self.mixing}, and train.path names one set of rows; remove it, or name several by "
                "train.sets"
            )

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(own.path for own in self.sets.values()) if self.sets else super().places

    def of_set(self, name: str) -> Self:
        """The rows of one of the sets alone."""
        assert self.sets is not None
        return self.model_copy(update={"sets": None, **given_keys(self.sets[name], type(self))})

    @model_serializer(mode="wrap")
    def _without_sets(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One set of rows is written down, and known again, as it was before there were these keys."""
        values: dict[str, Any] = dump(self)
        newer = [
            *(() if self.sets else ("sets", "mixing")),
            *(() if values.get("sibling_labels") else ("sibling_labels",)),
        ]
        return {key: values[key] for key in values if key not in newer}


class TrainJobConfig(Config):
    """Keys that every training job has."""

    train: TrainInput | MixedTrainInput[Any]
    """Where the training rows are."""

    model: str | None = None
    """Any Hugging Face encoder directory or hub id."""
    init_from: str | None = None
    """A directory that an earlier training wrote, to continue from; it takes the place of `model`."""
    output: str
    """Directory of the trained model, which appears when training has ended."""
    dev: DevConfig | None = None
    """Measuring during training; null measures nothing and keeps the last weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its learning rates and their schedule."""
    batch_size: int = Field(default=64, ge=1)
    """Rows of a batch over all workers; in-batch objectives find their negatives among these."""
    accumulate_batches: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged into one optimizer step."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training rows; 0.5 takes half of them."""
    dtype: TrainDtype = "auto"
    """Precision of forward passes; weights that train, gradients and optimizer stay in float32. auto: bfloat16 on GPUs
    and on CPUs that multiply it, else float32, by the machine that starts the job. On a GPU float32 is multiplied by
    TF32."""
    recompute: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the backbone: pays on accelerators and long runs, needs a C++ compiler."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the backbone's weights, which are held in dtype; the saved directory
    holds them merged."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of what is drawn by chance; the same one gives the same result."""
    workers: TrainingWorkersConfig = TrainingWorkersConfig()
    """`batch_size` is shared out evenly over them: left to the machine there are no more than divide it."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""
    shuffle_rows: int = Field(default=100_000, ge=1)
    """Rows that are shuffled together; a worker holds a few times as many."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines of progress."""
    log_dir: str | None = None
    """TensorBoard's event files; null is `<output>.tensorboard`."""
    wandb: WandbConfig | None = None
    """Weights & Biases beside TensorBoard; needs the extra wandb. A project alone, or {}, takes the defaults; null
    writes none."""
    mlflow: MlflowConfig | None = None
    """MLflow beside TensorBoard; needs the extra mlflow. An experiment alone, or {}, takes the defaults; null writes
    none."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: Literal["all"] | Annotated[int, Field(ge=1)] | LastCheckpoints = 2
    """Checkpoints kept while training runs: a number keeps so many of the best by the dev metric, and the newest. all,
    and such as "last 3", leave model directories of all, or of the last so many, in `<output>.checkpoints` when
    training has ended; with dev rows each one is kept until then, since the best may be any."""
    max_failures: int = Field(default=2, ge=0)
    """Times that lost workers are replaced before the job fails; a job started again counts anew."""

    @field_validator("keep_checkpoints", mode="before")
    @classmethod
    def _known_words(cls, given: Any) -> Any:
        # A number from the command line is a text, too.
        if isinstance(given, str) and not re.fullmatch(rf"all|[1-9]\d*|{_LAST}", given):
            raise ValueError("give all, a number of the best from 1 on, or such as 'last 3'")
        return given

    def model_post_init(self, context: Any) -> None:
        if self.workers.num is not None and self.batch_size % self.workers.num:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.workers.num} workers cannot share evenly; "
                "make it a multiple of workers.num"
            )
        if self.workers.num_gpus not in (None, 0, 1):
            raise ValueError(
                f"workers.num_gpus is {self.workers.num_gpus:g}; a training worker computes on one GPU, or on CPUs "
                "with 0: no two can share a GPU, and a second one would lie idle. Set it to 0 or 1, and workers.num "
                "to the number of GPUs"
            )
        if self.workers.sharding == "full" and self.compile:
            raise ValueError(
                "workers.sharding is full and compile is true: a compiled backbone hides its layers from what puts "
                "them together; set compile to false, or workers.sharding to none"
            )
        if self.start_name is None:
            raise ValueError("model is required and not given; name an encoder by model or by init_from")

    @property
    def num_left_checkpoints(self) -> int | None:
        """How many of the last checkpoints leave their model directories when training has ended; None is all."""
        kept = self.keep_checkpoints
        return None if kept == "all" else int(kept.removeprefix("last ")) if isinstance(kept, str) else 0

    @property
    def train_sets(self) -> dict[str, Any]:
        """The sets of training rows by name; none where the rows are one."""
        return self.train.sets or {} if isinstance(self.train, MixedTrainInput) else {}

    def of_set(self, name: str) -> Self:
        """The config of one of train.sets: what the set gives, and the job's keys where it gives nothing."""
        assert isinstance(self.train, MixedTrainInput)
        own = self.train_sets[name]
        return self.model_copy(update={"train": self.train.of_set(name), **given_keys(own, type(self))})

    @property
    def start_name(self) -> str | None:
        return self.init_from if self.init_from is not None else self.model

    @property
    def start(self) -> str:
        """Where the weights come from: `init_from`, or `model` without it."""
        assert self.start_name is not None
        return self.start_name


def given_keys(own: Config, config_class: type[Config]) -> dict[str, Any]:
    """What a set gives of the keys of a class; null leaves the class's own."""
    names = own.model_fields_set & set(config_class.model_fields)
    return {name: getattr(own, name) for name in names if getattr(own, name) is not None}


def _check_names(key: str, sets: Mapping[str, Config] | None) -> None:
    """Names of sets are parts of the names of metrics."""
    for name in sets or {}:
        if not _SET_NAME.fullmatch(name):
            raise ValueError(
                f"{key}: {name!r} cannot be the name of a set; use letters and digits, and - and _ behind them"
            )


def _check_instruction_format(given: str | None) -> str | None:
    if given is not None and given.count(_INSTRUCTION_PLACE) != 1:
        raise ValueError(f"{_INSTRUCTION_PLACE} must stand in it once, where the instruction goes")
    return given


def _with_default_name(name: str) -> Any:
    """Let `objective: {margin: 0.2}` mean the default objective, and `objective: simcse` the one of that name."""

    def fill(values: Any) -> Any:
        objective = values.get("objective") if isinstance(values, Mapping) else None
        if isinstance(objective, str):
            return {**values, "objective": {"name": objective}}
        if isinstance(objective, Mapping):
            return {**values, "objective": {"name": name, **objective}}
        return values

    return fill


class RetrieverTrainSet(TrainSet):
    """Pairs, triples, texts or others, with what is learnt from them."""

    format: Literal["auto", RetrieverFormat] | None = None
    """Kind of the rows, as train.format."""
    split: str | None = None
    """Split of a BEIR folder, as train.split."""
    num_documents: int | None = Field(default=None, ge=2)
    """Most documents of a row of candidates, as train.num_documents."""
    sibling_labels: int | None = Field(default=None, ge=0)
    """Labels of the same parent as hard negatives, as train.sibling_labels."""
    objective: Annotated[RetrieverObjective, Field(discriminator="name")] | None = None
    """What is learnt from this set; null is the job's objective."""
    query_prefix: str | None = None
    """Put before each query of this set; null is the job's."""
    document_prefix: str | None = None
    """Put before each document of this set; null is the job's."""
    instruction_format: str | None = None
    """What an instruction of a row becomes, as the job's instruction_format."""

    _objective_name = model_validator(mode="before")(_with_default_name("in_batch_negatives"))
    _instruction_place = field_validator("instruction_format")(_check_instruction_format)


class RetrieverTrainInput(MixedTrainInput[RetrieverTrainSet]):
    """Where the training rows are."""

    format: Literal["auto", RetrieverFormat] = "auto"
    """Kind of the rows; auto detects it from the first rows."""
    split: str | None = None
    """Split of a BEIR folder, whose pairs are those that qrels/<split>.tsv judges relevant; null reads train."""
    num_documents: int | None = Field(default=None, ge=2)
    """Candidates: most documents of a row, its best and others that each epoch draws anew; null takes all."""
    sibling_labels: int = Field(default=0, ge=0)
    """Labelled rows with in_batch_negatives: other labels of the same parent (`A##C` of `A##B`) that a row gets as hard
    negatives; fewer where it has fewer."""


class RetrieverDevSet(Config):
    """One of several dev sets."""

    shorthand = "path"

    path: str
    """Dev rows: a file, a folder or a glob, local or by URI."""
    split: str | None = None
    """Split of a BEIR folder, as dev.split."""
    corpus: str | None = None
    """Texts to search among, as dev.corpus."""
    corpus_rows: int | None = Field(default=None, ge=1)
    """Corpus texts that are searched, as dev.corpus_rows."""
    metric: str | None = Field(default=None, pattern=_RETRIEVER_METRIC)
    """What is measured of this set, as dev.metric."""
    threshold: float | None = None
    """accuracy and f1: a cosine above this is a match, as dev.threshold."""
    query_prefix: str | None = None
    """Put before each query of this set; null is the job's."""
    document_prefix: str | None = None
    """Put before each document of this set; null is the job's."""
    instruction_format: str | None = None
    """What an instruction of a row becomes, as the job's instruction_format."""

    _instruction_place = field_validator("instruction_format")(_check_instruction_format)


class RetrieverDevConfig(DevConfig):
    """Measuring during training: recall of dev pairs against a corpus, or, for the metrics auc, accuracy, f1 and
    spearman, the cosines of scored dev pairs."""

    graded_metric: ClassVar = "spearman"

    split: str | None = None
    """Split of a BEIR folder, whose queries are those that qrels/<split>.tsv judges; null reads dev."""
    corpus: str | None = None
    """Texts to search among; null takes those of a BEIR folder, and else the dev documents themselves."""
    corpus_rows: int = Field(default=20_000, ge=1)
    """Corpus texts that are searched: all relevant ones, and a fixed sample of the others."""
    metric: str = Field(default="recall@10", pattern=_RETRIEVER_METRIC)
    """recall@k, hit@k, mrr@k or ndcg@k of dev pairs; auc, accuracy, f1 or spearman of scored ones."""
    threshold: float | None = None
    """accuracy and f1: a cosine above this is a match; null takes the threshold that suits the dev set best."""
    sets: dict[str, RetrieverDevSet] | None = Field(default=None, min_length=1)
    """Several dev sets by name, in place of path and share. Each has a path, and of its own what it gives of `metric`,
    `split`, `corpus`, `corpus_rows`, `threshold`, `query_prefix`, `document_prefix` and `instruction_format`; the rest
    is as it stands beside the sets, and for the whole job."""
    chosen_by: str | None = None
    """Of several sets, the one whose metric chooses the best checkpoint; null is the mean of all."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.sets is None:
            _check_dev_rows(self, "dev")
            return
        _check_names("dev.sets", self.sets)
        for key, given in (("path", self.path), ("share", self.share)):
            if given is not None:
                raise ValueError(
                    f"dev.{key} is {given!r} and dev.sets are {', '.join(self.sets)}; dev rows come from one of them: "
                    "give one"
                )
        for name, own in self.each.items():
            _check_dev_rows(own, f"dev.sets.{name}")

    @property
    def places(self) -> tuple[str, ...]:
        return super().places if self.sets is None else tuple(own.path for own in self.sets.values())

    @property
    def each(self) -> dict[str, RetrieverDevConfig]:
        """The config of each set by name: what it gives, and else what stands beside the sets; itself without sets."""
        if self.sets is None:
            return {ALONE: self}
        return {name: self.of_set(name) for name in self.sets}

    def of_set(self, name: str) -> Self:
        """The config of one of the sets."""
        assert self.sets is not None
        given = given_keys(self.sets[name], RetrieverDevConfig)
        metric = given.get("metric", self.metric)
        # What stands beside the sets is for those that read it.
        unread = ["corpus", "split"] if "@" not in metric else []
        unread += [] if metric in _WITH_THRESHOLD else ["threshold"]
        return self.model_copy(update={"sets": None, **dict.fromkeys(unread), **given})

    @property
    def is_scored(self) -> bool:
        return "@" not in self.metric

    @model_serializer(mode="wrap")
    def _without_sets(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One dev set is written down, and known again, as it was before there could be several."""
        values: dict[str, Any] = dump(self)
        return {
            key: values[key] for key in values if key not in ("sets", "chosen_by") or values[key] is not None
        }


def _check_dev_rows(dev: RetrieverDevConfig, key: str) -> None:
    """Refuse keys that the metric of one dev set does not read; `key` is that of the set."""
    if dev.is_scored and dev.corpus is not None:
        raise ValueError(
            f"{key}.corpus is set, and {key}.metric {dev.metric} searches none; remove it, or measure recall@10"
        )
    if dev.is_scored and dev.split is not None:
        raise ValueError(f"{key}.split is set, and {key}.metric {dev.metric} reads scored pairs; remove it")
    if dev.path is None and dev.split is not None:
        raise ValueError(
            f"dev.split is {dev.split!r}, and dev.share takes dev rows from the training rows, whose split is "
            "train.split; remove dev.split, or name the folder by dev.path"
        )
    if dev.threshold is not None and dev.metric not in _WITH_THRESHOLD:
        raise ValueError(f"{key}.threshold is set, and {key}.metric {dev.metric} has none; remove it")


class TrainRetrieverConfig(TrainJobConfig):
    """`raytower train-retriever`."""

    train: RetrieverTrainInput
    """Where the training rows are."""
    dev: RetrieverDevConfig | None = None
    """Measuring during training; null measures nothing and keeps the last weights."""
    objective: Annotated[RetrieverObjective, Field(discriminator="name")] = InBatchNegatives()
    """What is learnt: the loss and its settings. A name alone takes its defaults."""
    matryoshka: Matryoshka | None = None
    """Train several prefix lengths of an embedding at once; null trains the whole one."""
    pooling: PoolingMode | None = None
    """How the vectors of a text's tokens become one, for a plain Hugging Face directory: their mean, cls (the first),
    max, lasttoken (of decoders), or pooler (BERT's layer over the first, which the directory must have); null is mean.
    A sentence-transformers directory brings its own."""
    projection_dim: int | None = Field(default=None, ge=1)
    """Project embeddings to this dimension; the encoder's own projection is kept where it has one of that size."""
    teacher: str | None = None
    """A reranker directory that scores candidates while training, for margin_mse and kl_divergence; for
    embedding_distillation an encoder directory, whose vectors are followed."""
    guide: GuideSettings | None = None
    """An encoder that tells false negatives of in_batch_negatives: what it finds nearer than the positive is none.
    null: only texts known to be relevant are left out."""
    sampler: Literal["shuffle", "no_duplicates"] = "shuffle"
    """no_duplicates: rows that share a query, document, id or label come in different batches, as far as there are
    enough batches."""
    gradient_cache: int | None = Field(default=None, ge=1)
    """Rows of a chunk: large batches at the memory of a chunk; null keeps the whole batch's activations."""
    attention: Literal["auto", "padded", "unpadded"] = "auto"
    """padded: texts of a chunk are filled up to the longest; unpadded: they lie end to end, and nothing is computed of
    padding; auto: unpadded on a GPU in 16 bits, where the model gives the same vectors so."""
    max_length: int = Field(default=64, ge=1)
    """Tokens of a text while training; the published encoder keeps the length of its start."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    document_prefix: str | None = None
    """Put before each document when it is encoded; null is the encoder's own prompt."""
    instruction_format: str | None = None
    """Put before a query whose row says an instruction, in place of the query's prefix: {} stands for the instruction,
    as in "Instruct: {}\\nQuery: "; null is the instruction alone."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        names = [objective.name for objective in self.objectives]
        shown = ", ".join(dict.fromkeys(names))
        if self.guide is not None and "in_batch_negatives" not in names:
            raise ValueError(
                f"guide is set, and objective {shown} asks none; remove it, or choose in_batch_negatives"
            )
        if self.train_sets and self.teacher is not None and not set(_TAUGHT) & set(names):
            raise ValueError(
                f"teacher is set, and no set's objective follows one ({shown}); remove it, or choose an objective that "
                "follows a teacher"
            )
        if "embedding_distillation" in names and len(set(names)) > 1:
            raise ValueError(
                f"the sets have the objectives {shown}; embedding_distillation follows the vectors of a teacher, "
                "from which others pull away: give it to all sets, or train it in a run of its own"
            )
        self._check_chosen_dev_set()
        if self.matryoshka is not None and "embedding_distillation" in names:
            raise ValueError(
                f"matryoshka.dims are {list(self.matryoshka.dims)}, and objective {shown} follows whole vectors of the "
                "teacher, which has none for their prefixes; remove matryoshka, and train it afterwards by another "
                "objective"
            )

    def _check_chosen_dev_set(self) -> None:
        if self.dev is None or self.dev.chosen_by is None:
            return
        named = [name for name in self.dev_sets if name != ALONE]
        if self.dev.chosen_by not in named:
            remedy = f"choose one of: {', '.join(named)}" if named else "there are no dev sets: remove it"
            raise ValueError(f"dev.chosen_by is {self.dev.chosen_by!r}, which is no dev set; {remedy}")

    @property
    def objectives(self) -> list[RetrieverObjective]:
        """What is learnt from each of the sets, or from the rows that are one."""
        return [own.objective or self.objective for own in self.train_sets.values()] or [self.objective]

    @property
    def dev_sets(self) -> dict[str, RetrieverDevConfig]:
        """The config of each dev set by name. With dev.share each training set has a dev set of its name."""
        if self.dev is None:
            return {}
        if self.dev.share is not None and self.train_sets:
            return dict.fromkeys(self.train_sets, self.dev)
        return self.dev.each

    def of_set(self, name: str) -> Self:
        """As of every job; without a guide or a teacher where the set's objective asks none."""
        own = super().of_set(name)
        unasked = ["guide"] if own.objective.name != "in_batch_negatives" else []
        unasked += ["teacher"] if own.objective.name not in _TAUGHT else []
        return own.model_copy(update=dict.fromkeys(unasked))

    @model_serializer(mode="wrap")
    def _without_format(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run whose rows say no instructions is known again as it was before they could."""
        values: dict[str, Any] = dump(self)
        return {key: values[key] for key in values if key != "instruction_format" or values[key] is not None}

    _objective_name = model_validator(mode="before")(_with_default_name("in_batch_negatives"))
    _instruction_place = field_validator("instruction_format")(_check_instruction_format)


class RerankerTrainSet(TrainSet):
    """Judged pairs, triples or candidates, with what is learnt from them."""

    format: Literal["auto", RerankerFormat] | None = None
    """Kind of the rows, as train.format."""
    num_documents: int | None = Field(default=None, ge=2)
    """Most documents of a row of candidates, as train.num_documents."""
    objective: Annotated[RerankerObjective, Field(discriminator="name")] | None = None
    """What is learnt from this set; null is the job's objective."""

    _objective_name = model_validator(mode="before")(_with_default_name("pointwise_regression"))


class RerankerTrainInput(MixedTrainInput[RerankerTrainSet]):
    """Where the training rows are."""

    format: Literal["auto", RerankerFormat] = "auto"
    """Kind of the rows; auto detects it from the first rows."""
    num_documents: int | None = Field(default=None, ge=2)
    """Candidates: most documents of a row, its best and others that each epoch draws anew; null takes all."""


class RerankerDevConfig(DevConfig):
    """Judged pairs, scored during training."""

    metric: Literal["auc", "accuracy", "f1"] = "auc"
    """What is measured of the scores of judged pairs."""
    threshold: float | None = None
    """accuracy and f1: a score above this is a match; null takes the threshold that suits the dev set best."""


class TrainRerankerConfig(TrainJobConfig):
    """`raytower train-reranker`."""

    train: RerankerTrainInput
    """Where the training rows are."""
    dev: RerankerDevConfig | None = None
    """Measuring during training; null measures nothing and keeps the last weights."""
    objective: Annotated[RerankerObjective, Field(discriminator="name")] = PointwiseRegression()
    """What is learnt: the loss and its settings. A name alone takes its defaults."""
    labels: list[str] | None = Field(default=None, min_length=2, max_length=2)
    """Names of the two classes of pointwise_cross_entropy, the one of pairs that do not match first, as config.json of
    the output gives them; null keeps those of the model."""
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch over all workers."""
    max_length: int = Field(default=128, ge=1)
    """Tokens of a (query, document) pair while training; the published reranker keeps the length of its start."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        for name, own in self.train_sets.items():
            if own.objective is not None and own.objective.num_labels != self.objective.num_labels:
                raise ValueError(
                    f"train.sets.{name}.objective {own.objective.name} reads {own.objective.num_labels} logits of a "
                    f"pair, and the job's objective {self.objective.name} reads {self.objective.num_labels}; a model "
                    "has so many for all sets: choose objectives with equally many"
                )
        if self.labels is None:
            return
        if self.objective.num_labels != 2:
            raise ValueError(
                f"labels are {self.labels}, and objective {self.objective.name} has no classes to name; remove them, "
                "or choose pointwise_cross_entropy"
            )
        if len(set(self.labels)) < 2 or not all(label.strip() for label in self.labels):
            raise ValueError(f"labels are {self.labels}; give two different names")

    _objective_name = model_validator(mode="before")(_with_default_name("pointwise_regression"))


class ClassifierTrainInput(TrainInput):
    path: str | None = None
    """Training rows: a file, a folder or a glob, local or by URI; null takes those of `paths`."""
    label_by: LabelBy | None = None
    """Where labels stand if the rows of `path` are texts alone: file, in the name of each file (sports.txt); folder, in
    that of the folder that a file lies in (sports/1.txt). Null: each row has its label."""
    paths: dict[str, str] | None = Field(default=None, min_length=1)
    """The texts of each label, {sports: a.jsonl, art: "art/*.txt"}, in place of `path`: a file, a folder or a glob."""

    _labels_as_texts = field_validator("paths", mode="before")(keyed_by_label)

    def model_post_init(self, context: Any) -> None:
        if self.path is None and self.paths is None:
            raise ValueError(
                "train.path is required and not given; name labelled rows, or texts by train.paths"
            )
        _check_labelled_paths("train", self)

    @property
    def places(self) -> tuple[str, ...]:
        return super().places if self.paths is None else tuple(self.paths.values())

    @property
    def origin(self) -> str:
        """Where the rows come from, for messages."""
        return str(self.path) if self.paths is None else "train.paths"


class ClassifierDevConfig(DevConfig):
    """Labelled dev texts; f1 is the mean over labels (macro)."""

    label_by: LabelBy | None = None
    """Where labels stand if the dev rows are texts alone, as in train.label_by. Null: each row has its label."""
    paths: dict[str, str] | None = Field(default=None, min_length=1)
    """The dev texts of each label in place of `path`, as in train.paths."""

    metric: Literal["accuracy", "f1"] = "accuracy"
    """What is measured; f1 is the mean over labels."""

    _labels_as_texts = field_validator("paths", mode="before")(keyed_by_label)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        _check_labelled_paths("dev", self)

    @property
    def places(self) -> tuple[str, ...]:
        return super().places if self.paths is None else tuple(self.paths.values())

    @property
    def origin(self) -> str:
        return super().origin if self.paths is None else "dev.paths"


def _check_labelled_paths(section: str, given: ClassifierTrainInput | ClassifierDevConfig) -> None:
    """Raise ValueError where `paths` stands beside another source of rows or labels."""
    if given.paths is None:
        return
    for other in ("path", "share", "label_by"):
        value = getattr(given, other, None)
        if value is not None:
            raise ValueError(
                f"{section}.{other} is {value!r}, and {section}.paths names the texts of each label; give one of them"
            )


class TrainClassifierConfig(TrainJobConfig):
    """`raytower train-classifier`: the fine-tuned baseline, one label a text."""

    train: ClassifierTrainInput
    """Where the training rows are."""
    labels: str | None = None
    """A file with one label a line, in the order of the classes; null takes the labels of the training rows, sorted,
    numbers by value."""
    dev: ClassifierDevConfig | None = None
    """Measuring during training; null measures nothing and keeps the last weights."""
    objective: Annotated[ClassifierObjective, Field(discriminator="name")] = CrossEntropy()
    """What is learnt: the loss and its settings. A name alone takes its defaults."""
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch over all workers."""
    max_length: int = Field(default=128, ge=1)
    """Tokens of a text while training; the published classifier keeps the length of its start."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.dev is not None and self.dev.share is not None and self.dev.label_by is not None:
            raise ValueError(
                f"dev.label_by is {self.dev.label_by!r}, and dev.share takes dev rows from the training rows, which "
                "have their labels by train.label_by; remove dev.label_by"
            )

    _objective_name = model_validator(mode="before")(_with_default_name("cross_entropy"))
