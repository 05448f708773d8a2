"""`raytower train-retriever`: a two-tower encoder, by any of the encoder objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from raytower.collectives import rank
from raytower.data.pieces import Piece, Survey
from raytower.data.records import INSTRUCTION
from raytower.errors import InputError
from raytower.models.chunks import Chunk, in_row_order
from raytower.models.compute import check_max_length
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.device import default_tokens_per_encoder_chunk
from raytower.models.encoder import Encoder, Projection
from raytower.models.tokenising import tokenise
from raytower.models.trained_prefixes import own_prefix
from raytower.models.two_tower import TwoTower
from raytower.models.unpadded import PaddedOnlyError
from raytower.objectives.config import EmbeddingDistillation, MarginMSE
from raytower.objectives.margin_mse import fitting_scale, refuse_saturating_scale
from raytower.objectives.matryoshka import over_dimensions
from raytower.objectives.targets import EncoderObjective, Guide, Targets, needed, present_documents
from raytower.progress import log
from raytower.storage import absolute_if_local
from raytower.training.backbone import (
    PROBE,
    freeze_unreached,
    has_dropout,
    merged_copy,
    prepare_backbone,
)
from raytower.training.batches import Rows, num_rows
from raytower.training.columns import TextColumns, query_prefixes, text_columns, without_ties
from raytower.training.config import ALONE, RetrieverDevConfig, RetrieverDevSet, TrainRetrieverConfig
from raytower.training.contradictions import say_contradictions
from raytower.training.cut_texts import cut_shares, say_cut_shares, spaced_rows
from raytower.training.dev_overlap import say_overlap
from raytower.training.dev_recall import DevSet, encode_queries, evaluate_recall, load_dev_set
from raytower.training.dev_scored import ScoredPairs, load_scored_pairs, scored_metrics
from raytower.training.inputs import (
    check_first_documents,
    check_labels,
    count_documents,
    refuse_no_negative,
    refuse_single_text,
    sample_rows,
    survey_training,
    tables,
)
from raytower.training.live_engine import LiveEngine
from raytower.training.other_encoder import OtherEncoder, other_encoder_name
from raytower.training.runner import fit, plan_training
from raytower.training.sets import configs_of, naming_set, survey_sets, surveys_of
from raytower.training.shares import evaluation_dtype, gather_rows_in_order, own_rows
from raytower.training.sibling_labels import Siblings, draw_siblings, siblings_of
from raytower.training.step import TrainingStep
from raytower.training.task import RowSet, Task
from raytower.training.windows import draw_documents

# Rows with an equal value in one of these are false negatives of each other; of candidates the best document counts.
_DISTINCT_COLUMNS = ("query", "document", "documents", "query_id", "document_id", "text")
_CPU = torch.device("cpu")
# The metric of several dev sets: the mean of what is measured of each.
_MEAN = "mean"
# Objectives that look at each pair alone.
_BY_ITSELF = ("cosine_embedding", "cosine_regression")
# Rows, or (query, document) pairs for a teacher that has to score them here, from which margin_mse's scale is taken;
# and how many documents of a row. 256 pairs take a large teacher a minute on a CPU.
_SAMPLED_SCORES = 10_000
_SAMPLED_PAIRS = 256
_SAMPLED_DOCUMENTS = 4


@dataclass(frozen=True)
class LoadedTexts:
    """A batch for the step: its texts, and all of them as chunks of tokens on the device, column after column."""

    own: RowSet[TrainRetrieverConfig]
    """The set that it is of."""
    columns: TextColumns
    chunks: list[Chunk]


class RetrieverTask(Task[TrainRetrieverConfig]):
    """Training of one encoder; see training.task.Task."""

    def __init__(
        self,
        config: TrainRetrieverConfig,
        start: str,
        num_documents: int | None,
        teacher: str | None,
        set_aside: Mapping[str, Sequence[Piece]] | None = None,
        other_encoder: str | None = None,
    ) -> None:
        """`set_aside` are dev rows among the training rows, by the name of their set. A directory here is named
        absolutely.

        Args:
            teacher: the reranker that scores documents.
            other_encoder: `other_encoder_name`.
        """
        super().__init__(config, start)
        self.num_documents = num_documents
        self.teacher = teacher
        self.other_encoder = other_encoder
        self.dev_sets = _load_dev_sets(config, set_aside or {})
        self._teacher: CrossScorer | None = None
        self._other: OtherEncoder | None = None

    @property
    def keeps_weights_apart(self) -> bool:
        # The layer into a teacher's space is not published.
        return super().keeps_weights_apart or _follows_vectors(self.config)

    @property
    def dev(self) -> RetrieverDevConfig | None:
        """Of several dev sets, the metric is that of the one that chooses, or their mean."""
        dev = self.config.dev
        if dev is None or ALONE in self.dev_sets:
            return dev
        chosen = dev.chosen_by
        metric = _MEAN if chosen is None else f"{chosen}/{self.dev_sets[chosen].config.metric}"
        return dev.model_copy(update={"metric": metric})

    @property
    def told_metrics(self) -> list[str]:
        chosen = super().told_metrics
        own = [f"{name}/{dev.config.metric}" for name, dev in self.dev_sets.items() if name != ALONE]
        return [*(name for name in own if name not in chosen), *chosen]

    @classmethod
    def survey(cls, config: TrainRetrieverConfig) -> Survey:
        return survey_sets(config, _survey)

    @classmethod
    def prepare(cls, config: TrainRetrieverConfig, surveyed: Survey) -> Self:
        encoder = _load_start(config, config.start)
        own_prefix(encoder, "query", config.start)  # the driver alone says what it lacks
        prepare_backbone(encoder.backbone, config.model_copy(update={"compile": False}))
        configs, surveys = configs_of(config), surveys_of(surveyed)
        counts: dict[str, int | None] = {}
        for name, own in configs.items():
            with naming_set(name):
                _check_rows(own, surveys[name])
                say_contradictions(surveys[name])
                counts[name] = count_documents(surveys[name], own.train.num_documents)
                _say_what_is_cut(own, surveys[name], encoder, counts[name])
        other = other_encoder_name(config)
        teacher = None if _follows_vectors(config) else config.teacher
        # A mistyped name is refused here, not by every worker.
        loaded = None if teacher is None else CrossEncoder.load(teacher)
        if other is not None:
            own_prefix(Encoder.load(other), "query", other)
        sets: dict[str, RowSet[TrainRetrieverConfig]] = {}
        for name, own in configs.items():
            with naming_set(name):
                scorer = None if own.teacher is None else loaded
                fitted = _with_fitting_scale(own, surveys[name], counts[name], scorer)
                siblings = _siblings(own, surveys[name])
            distinct = _distinct_columns(own, surveys[name])
            sets[name] = RowSet(fitted, counts[name], distinct, name, siblings)
        alone = sets.pop(ALONE, RowSet(config))
        named = [None if name is None else absolute_if_local(name) for name in (teacher, other)]
        aside = {name: own.set_aside for name, own in surveys.items()}
        start = absolute_if_local(config.start)
        task = cls(alone.config, start, alone.num_documents, named[0], aside, named[1])
        task.sets, task.distinct_columns = sets, alone.distinct_columns
        task.siblings = alone.siblings
        for dev in task.dev_sets.values():
            say_overlap(surveyed, dev.config, dev.pairs)
        return task

    def build(self, start_from: Path | None, device: torch.device = _CPU) -> nn.Module:
        config = self.config
        encoder = _load_start(config, str(start_from or self.start))
        prepare_backbone(encoder.backbone, config)
        if self.teacher is not None:
            dtype = evaluation_dtype(config.dtype, device)
            self._teacher = CrossScorer(CrossEncoder.load(self.teacher), dtype=dtype, device=device)
        teacher_dim = None
        if self.other_encoder is not None:
            self._other = OtherEncoder(self.other_encoder, config, device)
            teacher_dim = self._other.dim if config.guide is None else None
        tokens = default_tokens_per_encoder_chunk(device)
        tower = TwoTower(encoder, config.max_length, tokens, config.gradient_cache, teacher_dim)
        freeze_unreached(tower, lambda: tower(tower.plan_chunks([tower.tokenise([PROBE], "")])))
        _settle_attention(tower, config, device)
        return tower

    def load_batch(self, step: TrainingStep, rows: Rows) -> LoadedTexts:
        tower = cast(TwoTower, step.model)
        own = self.set_of(rows)
        if own.config.objective.first_is_relevant:
            rows = without_ties(rows)
        columns = text_columns(rows, own.num_documents, _hard_labels(own, rows))
        query_prefix, document_prefix = _prefixes(tower.encoder, own.config)
        before = query_prefixes(columns.instructions, own.config.instruction_format, query_prefix)
        blocks = [
            tower.tokenise(columns.queries, before),
            tower.tokenise(columns.present_documents, document_prefix),
        ]
        chunks = tower.plan_chunks(blocks, step.shares(columns.rows_of_texts, len(columns.queries)))
        columns = dataclasses.replace(columns, targets=columns.targets.to(step.device))
        return LoadedTexts(own, columns, chunks)

    def propagate(self, step: TrainingStep, batch: LoadedTexts) -> Tensor:
        columns, chunks = batch.columns, step.seeded(batch.chunks)
        targets = self._taught(columns, batch.own.config)
        objective = make_objective(batch.own.config)

        def embed(some: list[Chunk]) -> list[Tensor]:
            with step.autocast():
                return cast(list[Tensor], step.parallel(some))

        def loss_of(vectors: Any) -> Tensor:
            query_BD, document_RD = in_row_order(vectors, chunks).tensor_split([len(columns.queries)])
            return objective([query_BD, *columns.place(document_RD)], targets)

        if self.config.gradient_cache is None:
            loss = step.propagate(lambda: loss_of(embed(chunks)))
        else:
            loss = step.propagate_cached(lambda chunk: embed([chunk])[0], chunks, loss_of)
        self.observe_set(step, batch.own, loss)
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        encoder = cast(TwoTower, model).encoder
        assert self.config.dev is not None
        engine = LiveEngine(encoder, dtype=self.config.dtype, max_length=self.config.max_length)
        measured = {name: dev.measure(engine, encoder) for name, dev in self.dev_sets.items()}
        if ALONE in measured:
            return measured[ALONE]
        metrics = {f"{name}/{key}": value for name, own in measured.items() for key, value in own.items()}
        chosen = [own[self.dev_sets[name].config.metric] for name, own in measured.items()]
        return {**metrics, _MEAN: sum(chosen) / len(chosen)}

    def save(self, model: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        merged_copy(cast(TwoTower, model).encoder, self.config).save(folder, info)

    def _taught(self, columns: TextColumns, config: TrainRetrieverConfig | None = None) -> Targets:
        """The targets; with the teacher's scores or vectors, or a guide's vectors, where `config` asks for them.

        `config` is that of the set that the rows are of; None is the job's.
        """
        own = config or self.config
        if self._teacher is not None and own.teacher is not None:
            return dataclasses.replace(columns.targets, teacher_BK=_taught_scores(self._teacher, columns))
        if self._other is None or (own.guide is None and own.teacher is None):
            return columns.targets
        vectors = self._other.vectors_of(columns)
        if own.guide is None:
            return dataclasses.replace(columns.targets, teacher_columns=vectors)
        return dataclasses.replace(columns.targets, guide=Guide(settings=own.guide, columns=vectors))


@dataclass(frozen=True)
class _Dev:
    """One dev set: its rows, and how they are measured."""

    config: RetrieverDevConfig
    rows: DevSet | ScoredPairs
    prompts: TrainRetrieverConfig | RetrieverDevSet
    """Says what stands before queries and documents; null is the encoder's own."""
    instruction_format: str | None

    @property
    def pairs(self) -> Sequence[Sequence[str]]:
        """Queries and documents, one pair for each document of each query."""
        rows = self.rows
        return rows.pairs if isinstance(rows, DevSet) else [rows.queries, rows.documents]

    def measure(self, engine: LiveEngine, encoder: Encoder) -> dict[str, float]:
        """Its metrics by the engine of `encoder`; all workers call it together and get the same values."""
        dev, metric = self.rows, self.config.metric
        prefixes = _prefixes(encoder, self.prompts)
        if isinstance(dev, DevSet):
            return evaluate_recall(engine, dev, metric, prefixes, self.instruction_format)
        left_BD = torch.as_tensor(encode_queries(engine, dev, self.instruction_format, prefixes[0]))
        documents = [dev.documents[row] for row in own_rows(len(dev.labels)).tolist()]
        right_BD = engine.encode(documents, prefixes[1])
        cosines = gather_rows_in_order((left_BD * right_BD).sum(1), len(dev.labels))
        return scored_metrics(cosines.cpu().numpy(), dev.labels, metric, self.config.threshold)


def _load_dev_sets(config: TrainRetrieverConfig, set_aside: Mapping[str, Sequence[Piece]]) -> dict[str, _Dev]:
    """The dev sets by name, or the one that there is under ALONE; none without dev rows.

    Raises:
        InputError: rows that cannot be read, or measured by the metric; it names the set.
    """
    loaded = {}
    for name, dev in config.dev_sets.items():
        aside = set_aside.get(name, ())
        given = (config.dev.sets or {}).get(name) if config.dev else None
        job = config.of_set(name) if dev.share is not None and name != ALONE else config
        with naming_set(name, "dev.sets" if given else "train.sets"):
            rows: DevSet | ScoredPairs = (
                load_scored_pairs(dev, dev.metric, aside, instructions=True)
                if dev.is_scored
                else load_dev_set(dev, aside)
            )
        form = given.instruction_format if given else None
        loaded[name] = _Dev(dev, rows, given or job, form or job.instruction_format)
    return loaded


def _settle_attention(tower: TwoTower, config: TrainRetrieverConfig, device: torch.device) -> None:
    """Carry out `attention`; the first worker says where auto cannot leave padding out.

    Raises:
        InputError: it is unpadded, and the model or the device has no such attention.
    """
    has_kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    has_kernel = has_kernel and config.dtype != "float32"
    if config.attention == "padded" or (config.attention == "auto" and not has_kernel):
        return
    try:
        if device.type == "cuda" and not has_kernel:
            raise PaddedOnlyError(
                f"the kernel computes in 16 bits, on GPUs from Ampere on; dtype is {config.dtype}"
            )
        if config.compile:
            raise PaddedOnlyError("it is compiled")
        tower.leave_out_padding([PROBE, _beyond_windows(tower)])
    except PaddedOnlyError as error:
        if config.attention == "unpadded":
            raise InputError(
                f"attention is unpadded, which {type(tower.encoder.backbone).__name__} is not trained with: {error}; "
                "set it to auto"
            ) from error
        if rank() == 0:
            log(f"texts are filled up (attention: auto), for of this model {error}")


def _beyond_windows(tower: TwoTower) -> str:
    """A text of more words than the window of layers that see no further has tokens, on both sides."""
    settings = tower.encoder.backbone.config.get_text_config()
    window = getattr(settings, "sliding_window", None) or getattr(settings, "local_attention", None) or 0
    return " ".join([PROBE] * (1 + (2 * min(window, tower.max_length) + 8) // len(PROBE.split())))


def _survey(config: TrainRetrieverConfig) -> Survey:
    train, objective = config.train, config.objective
    assert train.path is not None
    return survey_training(
        config, train.path, train.format, objective.formats, objective.name, train.split, instructions=True
    )


def _distinct_columns(config: TrainRetrieverConfig, surveyed: Survey) -> tuple[str, ...]:
    """Columns whose values no two rows of a batch should share; none unless the sampler asks for them."""
    if config.sampler != "no_duplicates":
        return ()
    names = surveyed.schema.names
    # Texts with an equal label belong together; the label of a scored pair is 0 or 1 and says no such thing.
    distinct = [*_DISTINCT_COLUMNS, *(["label"] if "text" in names else [])]
    return tuple(name for name in distinct if name in names)


def _siblings(config: TrainRetrieverConfig, surveyed: Survey) -> Siblings:
    """Labels of the same parent, where rows get them as hard negatives.

    Raises:
        InputError: rows without labels, an objective that does not take more documents, or no label with a sibling.
    """
    count = config.train.sibling_labels
    if not count:
        return {}
    if not {"text", "label"} <= set(surveyed.schema.names):
        raise InputError(
            f"train.sibling_labels is {count}, and these rows have no labels; set train.format to labelled, or "
            "sibling_labels to 0"
        )
    if config.objective.name != "in_batch_negatives":
        raise InputError(
            f"train.sibling_labels is {count}, and objective {config.objective.name} takes no more negatives; set the "
            "objective to in_batch_negatives, or sibling_labels to 0"
        )
    siblings = siblings_of(label for table in tables(surveyed) for label in table["label"].to_pylist())
    if not any(siblings.values()):
        raise InputError(
            f"train.sibling_labels is {count}, and no two of the {len(siblings)} labels have one parent; set it to 0"
        )
    return siblings


def _hard_labels(own: RowSet[TrainRetrieverConfig], rows: Rows) -> list[list[str | None]]:
    """Columns of labels of the same parent as each row's; none where they are not asked for."""
    if not own.siblings:
        return []
    config = own.config
    return draw_siblings(rows["text"], rows["label"], own.siblings, config.train.sibling_labels, config.seed)


def _follows_vectors(config: TrainRetrieverConfig) -> bool:
    """Whether the vectors of a teacher are followed; if so, by all sets."""
    return any(isinstance(objective, EmbeddingDistillation) for objective in config.objectives)


def _taught_scores(teacher: CrossScorer, columns: TextColumns) -> Tensor:
    """(B, K) the teacher's score of each document, 0 where a row has none."""
    scores_R = torch.from_numpy(teacher.score(columns.asking_queries, columns.present_documents))
    return columns.place(scores_R).T


def _with_fitting_scale(
    config: TrainRetrieverConfig, surveyed: Survey, num_documents: int | None, teacher: CrossEncoder | None
) -> TrainRetrieverConfig:
    """The config, where its margin_mse has no scale, with the one that fits the teacher's margins in a sample.

    Raises:
        InputError: the given scale saturates, or the teacher's scores are all alike.
    """
    objective = config.objective
    if not isinstance(objective, MarginMSE):
        return config
    rows = sample_rows(surveyed, _SAMPLED_SCORES if teacher is None else _SAMPLED_PAIRS // 2)
    if num_documents is not None:
        few = num_documents if teacher is None else min(num_documents, _SAMPLED_DOCUMENTS)
        rows = draw_documents(rows, few, np.random.default_rng(config.seed))
        if teacher is not None:
            rows = rows.slice(0, _SAMPLED_PAIRS // few)
    columns = text_columns(rows.to_pydict())
    teacher_BK = columns.targets.teacher_BK
    if teacher is not None:
        teacher_BK = _taught_scores(CrossScorer(teacher, dtype="float32", device=_CPU), columns)
    teacher_BK = needed(teacher_BK, "a teacher's score of each document", objective.name)
    margin_BK = teacher_BK[:, :1] - teacher_BK[:, 1:]
    margins = margin_BK[present_documents(columns.targets, teacher_BK)[:, 1:]]
    if objective.scale is not None:
        refuse_saturating_scale(objective.scale, margins)
        return config
    scale = fitting_scale(margins)
    log(f"objective.scale is {scale:g}, from {margins.numel()} margins of the teacher")
    return config.model_copy(update={"objective": objective.model_copy(update={"scale": scale})})


def make_objective(config: TrainRetrieverConfig) -> EncoderObjective:
    """The config's objective; with `matryoshka`, over several dimensions."""
    return over_dimensions(config.matryoshka, config.objective) if config.matryoshka else config.objective


def train_retriever(config: TrainRetrieverConfig) -> dict[str, Any]:
    """Train and publish the encoder directory; returns steps, seconds, best, output.

    Raises:
        InputError: bad rows, fewer rows than a batch, an output made by another config, an unknown model, or data
            that the objective cannot train from.
    """
    return fit(RetrieverTask, config)


def plan_train_retriever(config: TrainRetrieverConfig) -> dict[str, Any]:
    """The plan for --dry-run: makes every check that training would make, and trains nothing."""
    return plan_training(RetrieverTask, config)[0]


def _load_start(config: TrainRetrieverConfig, start: str) -> Encoder:
    """The encoder to train, with the config's prefixes and projection.

    Raises:
        InputError: no such model, another pooling than its own, a length beyond its positions, matryoshka dimensions
            beyond its own, or SimCSE for a model without dropout.
    """
    # The same seed on every worker: fresh layers and adapters must be the same everywhere.
    torch.manual_seed(config.seed)
    encoder = Encoder.load(start, from_classifier=True, pooling=config.pooling)
    if config.query_prefix is not None:
        encoder.prompts["query"] = config.query_prefix
    if config.document_prefix is not None:
        encoder.prompts["document"] = config.document_prefix
    if encoder.settings.similarity == "dot" and not encoder.normalised:
        log(
            f"model {start!r} compares by dot product and gives vectors of any length; training compares by cosine, so "
            "the encoder is published with Normalize and similarity cosine"
        )
        encoder.settings = dataclasses.replace(encoder.settings, normalise=True, similarity="cosine")
    check_max_length(config.max_length, encoder.max_positions)
    if config.projection_dim is not None and (encoder.library is not None or encoder.settings.truncate_dim):
        raise InputError(
            f"projection_dim is {config.projection_dim}, and model {start!r} has modules of its own behind the "
            "pooling, or a truncate_dim, and a projection would follow them; leave it out"
        )
    if config.projection_dim is not None and not (
        len(encoder.projections) and encoder.dim == config.projection_dim
    ):
        encoder.projections.append(Projection(encoder.dim, config.projection_dim))
    if config.matryoshka is not None and config.matryoshka.dims[0] > encoder.dim:
        raise InputError(
            f"matryoshka.dims asks for {config.matryoshka.dims[0]} dimensions, and the encoder has {encoder.dim}; "
            f"start at {encoder.dim} or less"
        )
    if any(objective.name == "simcse" for objective in config.objectives) and not has_dropout(
        encoder.backbone
    ):
        raise InputError(
            f"objective simcse needs dropout, and model {start!r} has none: both passes would be equal; set "
            "hidden_dropout_prob in its config.json"
        )
    return encoder


def _check_rows(config: TrainRetrieverConfig, surveyed: Survey) -> None:
    """Refuse rows that the objective cannot train from, before any worker starts."""
    names, objective = surveyed.schema.names, config.objective
    if isinstance(objective, EmbeddingDistillation):
        if config.teacher is None:
            raise InputError(
                f"objective {objective.name} follows the vectors of a teacher, and none is named; set teacher to an "
                "encoder directory"
            )
        return
    if objective.name in ("margin_mse", "kl_divergence"):
        if config.teacher is None and "scores" not in names:
            raise InputError(
                f"objective {objective.name} follows a teacher, and these rows carry no scores; set teacher to a "
                "reranker directory, or train from candidates"
            )
        return
    if config.teacher is not None:
        raise InputError(f"teacher is set, and objective {objective.name} follows none; remove it")
    has_own_negatives = "negative" in names or "documents" in names
    if config.batch_size == 1 and not has_own_negatives and objective.name not in _BY_ITSELF:
        raise InputError(
            f"batch_size is 1, and objective {objective.name} compares the rows of a batch: it would learn nothing; "
            "raise batch_size, with gradient_cache where memory is short"
        )
    if "query" in names and "label" in names:
        check_labels(surveyed, lambda labels_B: _loss_of_equal_vectors(config, labels_B))
    elif "documents" in names or "negative" in names:
        refuse_no_negative(surveyed)
        if objective.first_is_relevant:
            check_first_documents(surveyed, objective.name)
    elif "document" in names:
        refuse_single_text(surveyed, ("query", "document"))
    elif "text" in names:
        refuse_single_text(surveyed, ("text", "label") if "label" in names else ("text",))


def _say_what_is_cut(
    config: TrainRetrieverConfig, surveyed: Survey, encoder: Encoder, num_documents: int | None
) -> None:
    """Log the share of each column's texts that `max_length` cuts, prefixes counted."""
    rows = spaced_rows(surveyed, num_documents=num_documents)
    query_prefix, document_prefix = _prefixes(encoder, config)
    columns: dict[str, list[list[str]]] = {}
    for name in ("query", "text", "document", "documents", "negative"):
        if name not in rows:
            continue
        texts = rows[name]
        if name == "documents":
            texts = [text for documents in texts for text in documents]
        prefix: str | list[str] = query_prefix if name in ("query", "text") else document_prefix
        if name == "query":
            prefix = query_prefixes(rows.get(INSTRUCTION.name), config.instruction_format, query_prefix)
        columns[name] = [encoder.prepared(texts, prefix)]
    shares = cut_shares(partial(tokenise, encoder.tokenizer), columns, config.max_length)
    say_cut_shares(shares, config.max_length, num_rows(rows))


def _loss_of_equal_vectors(config: TrainRetrieverConfig, labels_B: Tensor) -> Tensor:
    vectors_BD = torch.ones(len(labels_B), 1)
    return config.objective([vectors_BD, vectors_BD], Targets(labels_B=labels_B))


def _prefixes(encoder: Encoder, given: TrainRetrieverConfig | RetrieverDevSet) -> tuple[str, str]:
    """What stands before queries and documents: what `given` says, and else the encoder's own prompts."""
    query, document = given.query_prefix, given.document_prefix
    return (
        encoder.prefix_for("query") if query is None else query,
        encoder.prefix_for("document") if document is None else document,
    )
