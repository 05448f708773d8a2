"""`raytower train-reranker`: a cross-encoder, by any of the cross-encoder objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytower.collectives import gather_constants
from raytower.data.pieces import Piece, Survey
from raytower.models.chunks import Chunk
from raytower.models.compute import check_max_length
from raytower.models.cross_encoder import CausalCrossEncoder, CrossEncoder
from raytower.models.device import send
from raytower.models.logits_model import LogitsModel
from raytower.storage import absolute_if_local
from raytower.training.backbone import (
    PROBE,
    freeze_unreached,
    merged_copy,
    prepare_backbone,
)
from raytower.training.batches import Rows, num_rows
from raytower.training.columns import JudgedPairs, judged_pairs, without_ties
from raytower.training.config import ALONE, TrainRerankerConfig
from raytower.training.contradictions import say_contradictions
from raytower.training.cut_texts import cut_shares, say_cut_shares, spaced_rows
from raytower.training.dev_overlap import say_overlap
from raytower.training.dev_scored import ScoredPairs, load_scored_pairs, scored_metrics
from raytower.training.inputs import (
    check_first_documents,
    check_labels,
    count_documents,
    refuse_equal_scores,
    survey_training,
)
from raytower.training.live_engine import LiveEngine
from raytower.training.runner import fit, plan_training
from raytower.training.sets import configs_of, naming_set, survey_sets, surveys_of
from raytower.training.shares import gather_rows_in_order, own_rows
from raytower.training.step import TrainingStep
from raytower.training.task import RowSet, Task

_CPU = torch.device("cpu")
# Objectives that compare the documents of one query: logits (queries, documents) in place of (pairs, classes).
_LISTWISE = ("pairwise_margin", "listwise_softmax", "rank_net", "lambda_loss")
# Of these, the ones that read the scores of all documents; the others know the first one as the relevant one.
_GRADED = ("rank_net", "lambda_loss")


@dataclass(frozen=True)
class LoadedPairs:
    """A batch for the step: R pairs, their labels (R,) and chunks of their tokens, both on the device."""

    own: RowSet[TrainRerankerConfig]
    """The set that it is of."""
    pairs: JudgedPairs
    labels_R: Tensor  # noqa: N815 - carries its shape
    chunks: list[Chunk]


class RerankerTask(Task[TrainRerankerConfig]):
    """Training of one cross-encoder; see training.task.Task."""

    def __init__(
        self,
        config: TrainRerankerConfig,
        start: str,
        num_documents: int | None,
        set_aside: Sequence[Piece] = (),
    ) -> None:
        """`set_aside` are dev rows among the training rows."""
        super().__init__(config, start)
        self.num_documents = num_documents
        self.scored_dev: ScoredPairs | None = None
        if config.dev is not None:
            self.scored_dev = load_scored_pairs(config.dev, config.dev.metric, set_aside)

    @classmethod
    def survey(cls, config: TrainRerankerConfig) -> Survey:
        return survey_sets(config, _survey)

    @classmethod
    def prepare(cls, config: TrainRerankerConfig, surveyed: Survey) -> Self:
        model = _load_start(config, config.start)
        surveys = surveys_of(surveyed)
        sets: dict[str, RowSet[TrainRerankerConfig]] = {}
        for name, own in configs_of(config).items():
            with naming_set(name):
                count = count_documents(surveys[name], own.train.num_documents)
                _check_rows(own, surveys[name])
                say_contradictions(surveys[name])
                _say_what_is_cut(own, surveys[name], model, count)
            sets[name] = RowSet(own, count, name=name)
        alone = sets.pop(ALONE, RowSet(config))
        task = cls(config, absolute_if_local(config.start), alone.num_documents, surveyed.set_aside)
        task.sets = sets
        if task.scored_dev is not None:
            say_overlap(surveyed, config.dev, [task.scored_dev.queries, task.scored_dev.documents])
        return task

    def build(self, start_from: Path | None, device: torch.device = _CPU) -> nn.Module:
        model = _load_start(self.config, str(start_from or self.start))
        prepare_backbone(cast(PreTrainedModel, model.model.base_model), self.config)
        if self.config.lora is not None and isinstance(model, CausalCrossEncoder):
            model.freeze_head()
        whole = LogitsModel(model.eval())
        pair = [[PROBE], [PROBE]]
        freeze_unreached(
            whole, lambda: whole(whole.plan_chunks(model.tokenise(pair, self.config.max_length)))
        )
        return whole

    def load_batch(self, step: TrainingStep, rows: Rows) -> LoadedPairs:
        model = cast(LogitsModel, step.model)
        own = self.set_of(rows)
        if own.config.objective.first_is_relevant:
            rows = without_ties(rows)
        pairs = judged_pairs(rows, own.num_documents)
        block = model.inner.tokenise([pairs.queries, pairs.documents], self.config.max_length)
        chunks = model.plan_chunks(block, step.shares(pairs.rows_of_pairs, len(pairs.list_lengths)))
        labels_R = send(torch.tensor(pairs.labels), step.device)
        return LoadedPairs(own, pairs, labels_R, chunks)

    def propagate(self, step: TrainingStep, batch: LoadedPairs) -> Tensor:
        pairs, labels_R, objective = batch.pairs, batch.labels_R, batch.own.config.objective

        def compute_loss() -> Tensor:
            with step.autocast():
                logits_BC = step.parallel(step.seeded(batch.chunks))
            if objective.name in _LISTWISE:
                return objective(pairs.as_lists(logits_BC[:, 0]), pairs.as_lists(labels_R))
            if objective.num_labels > 1:
                step.observe("accuracy", (logits_BC.argmax(1) == labels_R).float().mean())
            loss = objective(logits_BC, labels_R)
            # Workers whose lists are longer hold more pairs: this makes it the mean over the pairs of all workers.
            num_pairs_W = gather_constants(torch.full((1,), float(len(labels_R)), device=loss.device))
            return loss * (len(labels_R) / num_pairs_W.mean())

        loss = step.propagate(compute_loss)
        self.observe_set(step, batch.own, loss)
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        config, dev = self.config, self.scored_dev
        assert config.dev is not None
        assert dev is not None
        inner = cast(CrossEncoder, cast(LogitsModel, model).inner)
        engine = LiveEngine(inner, dtype=config.dtype, max_length=config.max_length)
        rows = own_rows(len(dev.labels)).tolist()
        logits_NC = engine.logits([dev.queries[row] for row in rows], [dev.documents[row] for row in rows])
        logits_N = logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC[:, 1] - logits_NC[:, 0]
        gathered = gather_rows_in_order(logits_N, len(dev.labels)).cpu()
        # A threshold is given on the scale that a reader of the finished directory sees.
        scores = gathered.sigmoid() if inner.activation == "sigmoid" else gathered
        return scored_metrics(scores.double().numpy(), dev.labels, config.dev.metric, config.dev.threshold)

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        merged_copy(cast(LogitsModel, model).inner, self.config).save(folder, info)


def train_reranker(config: TrainRerankerConfig) -> dict[str, Any]:
    """Train and publish the reranker directory; returns steps, seconds, best, output.

    Raises:
        InputError: bad rows, fewer rows than a batch, an output made by another config, an unknown model, or labels
            that the objective does not take.
    """
    return fit(RerankerTask, config)


def plan_train_reranker(config: TrainRerankerConfig) -> dict[str, Any]:
    """The plan for --dry-run: makes every check that training would make, and trains nothing."""
    return plan_training(RerankerTask, config)[0]


def _survey(config: TrainRerankerConfig) -> Survey:
    train, objective = config.train, config.objective
    assert train.path is not None
    return survey_training(config, train.path, train.format, objective.formats, objective.name)


def _check_rows(config: TrainRerankerConfig, surveyed: Survey) -> None:
    """Refuse labels that the objective does not take, before any worker starts."""
    objective, names = config.objective, surveyed.schema.names
    if "label" in names or ("scores" in names and objective.name not in _LISTWISE):
        check_labels(
            surveyed, lambda labels: objective(torch.zeros(len(labels), objective.num_labels), labels)
        )
    elif "scores" in names and objective.name in _GRADED:
        check_labels(surveyed, lambda labels: _loss_of_single_documents(config, labels))
        refuse_equal_scores(surveyed, objective.name)
    elif objective.first_is_relevant:
        check_first_documents(surveyed, objective.name)


def _say_what_is_cut(
    config: TrainRerankerConfig, surveyed: Survey, model: CrossEncoder, num_documents: int | None
) -> None:
    """Log the share of the pairs that `max_length` cuts."""
    rows = spaced_rows(surveyed, num_documents=num_documents)
    pairs = judged_pairs(rows)
    shares = cut_shares(
        model.tokenise,
        {"pair of query and document": [pairs.queries, pairs.documents]},
        config.max_length,
    )
    say_cut_shares(shares, config.max_length, num_rows(rows))


def _loss_of_single_documents(config: TrainRerankerConfig, labels_B: Tensor) -> Tensor:
    """Each label as that of a list which holds nothing else: no pairs, and every label read."""
    labels_B2, logits_B2 = (
        nn.functional.pad(values_B[:, None], (0, 1), value=-torch.inf)
        for values_B in (labels_B, torch.zeros_like(labels_B))
    )
    return config.objective(logits_B2, labels_B2)


def _load_start(config: TrainRerankerConfig, start: str) -> CrossEncoder:
    """The cross-encoder to train; raises InputError for no such model or a length beyond its positions."""
    # The same seed on every worker: a fresh head must be the same everywhere.
    torch.manual_seed(config.seed)
    model = CrossEncoder.start_from(start, num_labels=config.objective.num_labels)
    model.activation = config.objective.activation
    if config.labels is not None:
        model.model.config.id2label = dict(enumerate(config.labels))
        model.model.config.label2id = {label: number for number, label in enumerate(config.labels)}
    # What is published keeps its own length, which training on shorter rows does not lower.
    check_max_length(config.max_length, model.max_positions)
    return model
