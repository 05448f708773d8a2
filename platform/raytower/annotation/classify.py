"""`raytower classify`: labels for the texts of a file, by retrieval or by a trained classifier, and their accuracy.

A label that is a path in a tree has its levels parted by `##`, in what is read and in what is written. Texts are
labelled in shares; what a share has counted goes into the figures of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from raytower.annotation.classify_settings import ClassifySettings, VoteKind
from raytower.annotation.config import ClassifyConfig, TuneClassifyConfig
from raytower.annotation.deciding import Decider, Decision, read_settings
from raytower.annotation.explaining import MOST_PARTS, Weight, in_words, parts_of, weigh_parts, without
from raytower.annotation.label_figures import HIT_CUTOFFS, LabelTally
from raytower.annotation.label_page import check_label_page, confusion_of, label_plots, render_label_page
from raytower.annotation.labellers import (
    ClassifierLabeller,
    IndexLabeller,
    KnownLabels,
    Labeller,
    LabelsOfClassifier,
    LabelsOfDocuments,
)
from raytower.annotation.labels import Prediction, tree_scores
from raytower.annotation.rows_in import survey_rows
from raytower.annotation.rows_out import RowWriter, check_rows_output, header_of, refuse_name_of_another_type
from raytower.annotation.suspecting import COLUMNS as SUSPECT_COLUMNS
from raytower.annotation.suspecting import Suspicion, suspect
from raytower.data.pieces import Survey
from raytower.data.sources import refuse_output_inside
from raytower.errors import InputError
from raytower.file_jobs.plan import choose_rows_per_share, shares_of
from raytower.file_jobs.run import (
    FileBeside,
    FileJob,
    ShareWorker,
    Sink,
    content_of,
    join_bytes,
    run_shares,
    workers_for,
)
from raytower.index.reader import Index, check_fingerprint
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest
from raytower.models.encoder import Encoder
from raytower.models.text_classifier import TextClassifier
from raytower.pages.html import write_plots
from raytower.progress import log
from raytower.retrieval.load import load_classifier, load_engine, open_index_manifest, own_or
from raytower.retrieval.plans import plan_classifier_rows, plan_rows
from raytower.storage import Location, absolute_if_local

_COLUMNS = ("text", "label", "score")
_EXPLAINED = (*_COLUMNS, "because")
_NAMED_LABELS = 3
_MAX_TEXTS_PER_SHARE = 8_192
# A text of a question has about so many parts, which explain labels it without, one after the other.
_PARTS = MOST_PARTS // 4
# What decides how texts are labelled and what is told of it, and not what is written of each.
_FREE_KEYS = {"workers", "output", "rows_per_batch", "tokens_per_batch", "on_error", "input"}
_FREE_KEYS |= {"tuned", "suspects", "report", "plots", "seed"}


def classify(config: ClassifyConfig) -> dict[str, Any]:
    """Write `text label score` for each text (and `because` under explain), and measure where labels are given.

    Returns:
        rows, seconds, mode, index_version (mode classifier: the classifier's fingerprint), rejected_rows, output,
        abstained (rows without a label), and for labelled input what `LabelTally.figures` says, with `hit@5`,
        `hit@10`, `hit@20` (the right label is among the first k; of votes, for k up to the neighbours that vote), and
        `labels_missing` (rows whose label the index or the classifier does not hold; they count as wrong). With
        `suspects` the number of rows in that file, as `suspected`; texts are then labelled by others than themselves.

    Raises:
        InputError: bad rows under on_error fail, an index that another encoder made, documents without the label
            field in mode votes, settings that were tuned for something else, or, for a TSV, a text with a tab.
    """
    start = time.perf_counter()
    survey = _survey(config)
    known = _Known.of(config)
    job = _job(config, survey, known)
    workers = workers_for(
        config.workers, survey.num_rows, job.texts_per_row, len(job.shares), use_gpus=config.engine != "onnx"
    )
    head = header_of(config.file_type, _columns(config))
    figures, _ = run_shares(job, workers, partial(join_bytes, head=head))
    result: dict[str, Any] = {
        "rows": survey.num_rows,
        "mode": config.mode,
        "rejected_rows": survey.num_rejected,
        **known.figures,
        "output": config.output,
        "abstained": sum(part["abstained"] for part in figures),
    }
    if config.suspects is not None:
        result |= {
            "suspected": sum(part["suspected"] for part in figures),
            "suspects": config.suspects,
        }
    if config.labelled:
        tally = known.tally(config)
        for part in figures:
            tally.add_counted(part["counted"])
        result |= tally.figures()
        result["labels_missing"] = count_missing(known.labels, tally.label_counts)
        _write_page(config, result, tally)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _write_page(config: ClassifyConfig, result: Mapping[str, Any], tally: LabelTally) -> None:
    """The page and the plots that were asked for."""
    if config.report is None and config.plots is None:
        return
    shown = {
        **result,
        "confusion": confusion_of(tally.pairs),
        "classes": tally.classes(),
        "settings": config.model_dump(mode="json"),
    }
    if config.plots is not None:
        write_plots(Location.of(config.plots), label_plots(shown))
    if config.report is not None:
        Location.of(config.report).write_bytes(render_label_page(shown).encode())


def plan_classify(config: ClassifyConfig) -> dict[str, Any]:
    """Texts, batches, parts, workers (1: this process) and the predicted memory of each; surveys the input."""
    survey = _survey(config)
    plan = plan_labelling(config, survey, depth_of(config, settings_of(config)))
    num_parts = len(survey.pieces)
    workers = workers_for(
        config.workers,
        survey.num_rows,
        _texts_per_row(config),
        num_parts,
        use_gpus=config.engine != "onnx",
    )
    return {
        **plan,
        "parts": num_parts,
        "workers": workers.num if workers else 1,
        "on_ray": workers is not None,
    }


def plan_labelling(config: ClassifyConfig | TuneClassifyConfig, survey: Survey, depth: int) -> dict[str, Any]:
    """Texts, batches and predicted memory of labelling surveyed rows. Raises FormatError as `open_index_manifest`."""
    rejected = {"rejected_rows": survey.num_rejected}
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        plan = plan_classifier_rows(
            survey.num_rows, config, config.classifier, rows_per_batch=config.rows_per_batch
        )
        return {**plan, **rejected}
    assert config.encoder is not None
    assert config.index is not None
    plan = plan_rows(
        survey.num_rows,
        config,
        config.encoder,
        rows_per_batch=config.rows_per_batch,
        candidates=depth,
    )
    manifest = open_index_manifest(config.index, plan["fingerprint"])
    return {**plan, **rejected, "index_rows": manifest.rows}


def load_labeller(
    config: ClassifyConfig | TuneClassifyConfig,
    depth: int,
    *,
    votes: VoteKind = "similarity",
    temperature: float = 1.0,
    leave_out_same: bool = False,
    version: str | None = None,
) -> tuple[Labeller, str]:
    """The labeller of a job and the fingerprint of its model.

    Args:
        version: of the index; None is the newest one.

    The others are as of IndexLabeller.
    """
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        engine = load_classifier(config.classifier, config)
        return ClassifierLabeller(engine, depth), engine.fingerprint
    assert config.encoder is not None
    assert config.index is not None
    encoder = load_engine(config.encoder, config)
    labeller = IndexLabeller(
        encoder,
        Index.open(config.index, version, encoder_fingerprint=encoder.fingerprint),
        mode=config.mode,
        depth=depth,
        label_field=config.label_field,
        votes=votes,
        temperature=temperature,
        prefix=own_or(config.query_prefix, encoder.encoder, "query", config.encoder),
        leave_out_same=leave_out_same,
    )
    return labeller, encoder.fingerprint


def count_missing(known: KnownLabels, label_counts: Mapping[str, int]) -> int:
    """Rows, of so many for each label, whose label could never have been predicted; some are named in the log."""
    missing = known.missing(label_counts)
    names = [label for label in label_counts if label in missing]
    num_missing = sum(label_counts[label] for label in names)
    if num_missing:
        shown = ", ".join(map(repr, names[:_NAMED_LABELS])) + (", …" if len(names) > _NAMED_LABELS else "")
        log(f"{num_missing:,} rows have a label that cannot be given ({shown}); they count as wrong")
    return num_missing


def settings_of(config: ClassifyConfig) -> ClassifySettings | None:
    """The tuned settings that a config names. Raises InputError and FormatError as `read_settings`."""
    return None if config.tuned is None else read_settings(config.tuned)


def depth_of(config: ClassifyConfig, settings: ClassifySettings | None) -> int:
    """Neighbours that vote, or labels that are ranked: as deep as the deepest metric looks."""
    if settings is not None:
        return settings.depth
    return config.k if config.mode == "votes" else max(config.k, *HIT_CUTOFFS)


@dataclass(frozen=True)
class _Known:
    """What is known before any text is labelled."""

    settings: ClassifySettings | None
    """The tuned ones, where the config names some."""
    depth: int
    decider: Decider
    labels: KnownLabels
    version: str | None
    """Of the index; None where a classifier labels."""
    identity: Mapping[str, Any]
    """The models' and the index's, for `FileJob.content`."""
    figures: Mapping[str, Any]
    """What labels, for the result."""
    query_prefix: str | None
    """Put before each text; null where a classifier labels."""

    @classmethod
    def of(cls, config: ClassifyConfig) -> _Known:
        """Raises InputError and FormatError: no such model or index, an index that another encoder made, or settings
        that were tuned for something else."""
        settings = settings_of(config)
        depth = depth_of(config, settings)
        decider = _decider_of(config, settings)
        if config.mode == "classifier":
            assert config.classifier is not None  # the config refused it otherwise
            classifier = TextClassifier.load(config.classifier)
            _check_settings(config, settings, classifier.fingerprint)
            figures = {"fingerprint": classifier.fingerprint}
            labels = LabelsOfClassifier(classifier.labels)
            _refuse_unknown(decider.positive, labels, config.classifier)
            return cls(settings, depth, decider, labels, None, figures, figures, None)
        assert config.encoder is not None
        assert config.index is not None
        encoder = Encoder.load(config.encoder)
        manifest = open_manifest(config.index)
        check_fingerprint(manifest, encoder.fingerprint, config.encoder)
        _check_settings(config, settings, encoder.fingerprint)
        prefix = own_or(config.query_prefix, encoder, "query", config.encoder)
        table = DocumentTable.open(Location.of(config.index), manifest.table_version)
        documents = LabelsOfDocuments(table, config.label_field)
        _refuse_unknown(decider.positive, documents, config.index)
        identity = {
            "fingerprint": encoder.fingerprint,
            "query_prefix": prefix,
            "index_version": manifest.version,
            "index": manifest.sha256(),
        }
        return cls(
            settings,
            depth,
            decider,
            documents,
            manifest.version,
            identity,
            {"index_version": manifest.version},
            prefix,
        )

    def tally(self, config: ClassifyConfig) -> LabelTally:
        """An empty one."""
        return LabelTally(self.decider, [k for k in HIT_CUTOFFS if k <= self.depth], config.seed)


def _refuse_unknown(positive: str | None, known: KnownLabels, origin: str) -> None:
    """Raises InputError where the positive class is a label that is never given."""
    if positive is not None and known.missing([positive]):
        raise InputError(
            f"positive is {positive!r}, a label that {origin!r} never gives; name one that it gives"
        )


def _decider_of(config: ClassifyConfig, settings: ClassifySettings | None) -> Decider:
    positive, cut, abstain_below = config.positive, config.cut, config.abstain_below
    calibration = None
    if settings is not None:
        calibration = settings.calibration
        if positive in (None, settings.positive):
            positive, cut = settings.positive, settings.cut
        abstain_below = settings.abstain_below if abstain_below is None else abstain_below
    return Decider(
        config.mode, calibration=calibration, positive=positive, cut=cut, abstain_below=abstain_below
    )


def _check_settings(config: ClassifyConfig, settings: ClassifySettings | None, fingerprint: str) -> None:
    """Raises InputError for settings that were tuned for something else."""
    if settings is not None:
        assert config.tuned is not None
        label_field = None if config.mode == "classifier" else config.label_field
        settings.check(config.mode, fingerprint, label_field, config.tuned)


def _job(config: ClassifyConfig, survey: Survey, known: _Known) -> FileJob:
    beside = []
    if config.suspects is not None:
        head = header_of(config.file_type, SUSPECT_COLUMNS)
        beside.append(FileBeside(Location.of(config.suspects), partial(join_bytes, head=head)))
    names = {key: getattr(config, key) for key in ("encoder", "index", "classifier")}
    places: dict[str, Any] = {key: absolute_if_local(name) for key, name in names.items() if name is not None}
    everywhere = config.model_copy(update={**places, "query_prefix": known.query_prefix})
    return FileJob(
        output=Location.of(config.output),
        shares=shares_of(survey.pieces),
        open_worker=open_worker,
        arguments=(everywhere, known.settings, known.version),
        content={
            "settings": config.model_dump(mode="json", exclude=_FREE_KEYS),
            "read_as": config.input.model_dump(mode="json", exclude={"path"}),
            "tuned": known.settings.model_dump(mode="json") if known.settings else None,
            "suspects": config.suspects is not None,
            **known.identity,
            "input": content_of(survey),
        },
        texts_per_row=_texts_per_row(config),
        verb="classified",
        unit="texts",
        beside=beside,
    )


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A row of the result."""

    text: str
    expected: str | None
    decision: Decision
    weights: Sequence[Weight] | None
    suspicion: Suspicion | None


class ClassifyWorker:
    """Labels the texts of a share."""

    def __init__(
        self, config: ClassifyConfig, settings: ClassifySettings | None, version: str | None
    ) -> None:
        """The tuned settings, and the version of the index, where there are some."""
        self._config = config
        votes, temperature = config.votes, config.temperature
        if settings is not None:
            votes, temperature = settings.votes or votes, settings.temperature or temperature
        self.labeller, _ = load_labeller(
            config,
            depth_of(config, settings),
            votes=votes,
            temperature=temperature,
            leave_out_same=config.suspects is not None,
            version=version,
        )
        self.decider = _decider_of(config, settings)
        self._writing = _Writing(config, self.decider)

    def __call__(self, table: pa.Table, sink: Sink, *beside: Sink) -> dict[str, Any]:
        """Write the rows of `table` (text and perhaps label), and those with a suspected label to the sink beside.

        Returns:
            `abstained`, `suspected`, and of labelled rows `counted`, as LabelTally gives it.

        Raises:
            InputError: a document without the label field in mode votes; for a TSV a text with a tab or a line break.
        """
        config = self._config
        rows = RowWriter(sink, config.file_type, _columns(config), has_header=False)
        suspects = [RowWriter(each, config.file_type, SUSPECT_COLUMNS, has_header=False) for each in beside]
        tally = LabelTally(self.decider, (), config.seed)
        num_abstained = 0
        for start in range(0, table.num_rows, config.rows_per_batch):
            for row in self.label(table.slice(start, config.rows_per_batch)):
                self._writing.write(rows, row)
                num_abstained += row.decision.label is None
                if row.expected is not None:
                    tally.add(row.decision, row.expected)
                if row.suspicion is not None:
                    found = row.suspicion
                    for writer in suspects:
                        writer.write(row.text, row.expected, found.suggested, found.share, found.reason)
        return {
            "abstained": num_abstained,
            "suspected": sum(writer.num_rows for writer in suspects),
            "counted": tally.counted() if config.labelled else None,
        }

    def label(self, table: pa.Table) -> Iterator[_Labelled]:
        """The rows of a batch with their labels."""
        texts = table["text"].to_pylist()
        expected: list[Any] = table["label"].to_pylist() if self._config.labelled else [None] * len(texts)
        suspicions: list[Suspicion | None] = [None] * len(texts)
        if self._config.suspects is not None:
            ranked, suspicions = self._suspect(texts, expected)
        else:
            ranked = self.labeller.label(texts)
        decisions = [self.decider.decide(row) for row in ranked]
        weights = self._explain(texts, decisions) if self._config.explain else [None] * len(texts)
        for row in zip(texts, expected, decisions, weights, suspicions, strict=True):
            yield _Labelled(*row)

    def _suspect(
        self, texts: Sequence[str], expected: Sequence[str]
    ) -> tuple[list[list[Prediction]], list[Suspicion | None]]:
        assert isinstance(self.labeller, IndexLabeller)  # the config refused it otherwise
        found = self.labeller.neighbours(texts)
        ranked = [self.labeller.rank(each.voters) for each in found]
        most = self._config.suspect_share
        return ranked, [
            suspect(label, row, each.voters, each.same, each.nearest, most)
            for label, row, each in zip(expected, ranked, found, strict=True)
        ]

    def _explain(self, texts: Sequence[str], decisions: Sequence[Decision]) -> list[Sequence[Weight] | None]:
        """The parts that decide each first label; the shortened texts are labelled a bounded number at a time."""
        parts = [parts_of(text) if row.ranked else [] for text, row in zip(texts, decisions, strict=True)]
        shortened = [without(text, part) for text, own in zip(texts, parts, strict=True) for part in own]
        labels = [row.ranked[0].label for row, own in zip(decisions, parts, strict=True) for _ in own]
        scores: list[float] = []
        for start in range(0, len(shortened), self._config.rows_per_batch):
            stop = start + self._config.rows_per_batch
            # A text of one word leaves nothing, which no model need take; it keeps none of the score.
            batch = [text if text.strip() else "" for text in shortened[start:stop]]
            left = [text for text in batch if text]
            ranked = iter(self.labeller.label(left) if left else [])
            for text, label in zip(batch, labels[start:stop], strict=True):
                if text:
                    scores.append(self.decider.score_of(self.decider.decide(next(ranked)).ranked, label))
                else:
                    scores.append(0.0)
        rest = iter(scores)
        return [
            weigh_parts(text, own, row.score, [next(rest) for _ in own])
            for text, own, row in zip(texts, parts, decisions, strict=True)
        ]


def open_worker(
    config: ClassifyConfig, settings: ClassifySettings | None, version: str | None
) -> ShareWorker:
    return ClassifyWorker(config, settings, version)


class _Writing:
    """How rows are written."""

    def __init__(self, config: ClassifyConfig, decider: Decider) -> None:
        self._config = config
        self._decider = decider

    def write(self, writer: RowWriter, row: _Labelled) -> None:
        """A line: of TSV with an empty label where there is none, of JSON with all that is known."""
        decision, k = row.decision, self._config.k
        more: dict[str, Any] = {"labels": [[item.label, item.score] for item in decision.ranked[:k]]}
        levels = tree_scores(decision.ranked, self._decider.gives_shares)
        if len(levels) > 1:
            more["levels"] = [[[item.label, item.score] for item in level[:k]] for level in levels]
        if row.expected is not None:
            more["expected"] = row.expected
        label: Any = decision.label
        if label is None and self._config.file_type == "tsv":
            label = ""
        values: list[Any] = [row.text, label, decision.score]
        if row.weights is not None:
            values.append(in_words(row.weights))
            more["words"] = [
                {"word": each.word, "start": each.start, "drop": each.drop} for each in row.weights
            ]
        writer.write(*values, **more)


def _survey(config: ClassifyConfig) -> Survey:
    """Raises InputError as `survey_rows`, also about the file of suspects."""
    if config.suspects is not None:
        refuse_output_inside(config.suspects, config.input.path)
        check_rows_output(config.suspects, SUSPECT_COLUMNS)
        refuse_name_of_another_type(config.suspects, config.file_type)
    for written in (config.report, config.plots):
        if written is not None:
            refuse_output_inside(written, config.input.path)
    check_label_page(config)
    rows = choose_rows_per_share(_texts_per_row(config), _MAX_TEXTS_PER_SHARE)
    kind: Literal["labelled", "lines"] = "labelled" if config.labelled else "lines"
    return survey_rows(config, kind, _COLUMNS, _EXPLAINED, rows_per_piece=rows)


def _texts_per_row(config: ClassifyConfig) -> int:
    return 1 + (_PARTS if config.explain else 0)


def _columns(config: ClassifyConfig) -> tuple[str, ...]:
    return _EXPLAINED if config.explain else _COLUMNS
