"""`raytower classify`: labels for the texts of a file, by retrieval or by a trained classifier, and their accuracy.

A label that is a path in a tree has its levels parted by `##`, in what is read and in what is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raytower.annotation.classify_settings import ClassifySettings, VoteKind
from raytower.annotation.config import ClassifyConfig, TuneClassifyConfig
from raytower.annotation.deciding import Decider, Decision, read_settings
from raytower.annotation.explaining import Weight, in_words, parts_of, weigh_parts, without
from raytower.annotation.label_figures import HIT_CUTOFFS, LabelTally
from raytower.annotation.label_page import check_label_page, confusion_of, label_plots, render_label_page
from raytower.annotation.labellers import ClassifierLabeller, IndexLabeller, Labeller
from raytower.annotation.labels import Prediction, tree_scores
from raytower.annotation.rows_in import row_batches, survey_rows
from raytower.annotation.rows_out import RowWriter, check_rows_output, open_rows, refuse_name_of_another_type
from raytower.annotation.suspecting import COLUMNS as SUSPECT_COLUMNS
from raytower.annotation.suspecting import Suspicion, suspect
from raytower.data.pieces import Survey
from raytower.data.sources import refuse_output_inside
from raytower.index.reader import Index
from raytower.pages.html import write_plots
from raytower.progress import Progress, log
from raytower.retrieval.load import load_classifier, load_engine, open_index_manifest, own_or
from raytower.retrieval.plans import plan_classifier_rows, plan_rows
from raytower.storage import Location

_COLUMNS = ("text", "label", "score")
_EXPLAINED = (*_COLUMNS, "because")
_NAMED_LABELS = 3


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
    job = _Job.of(config)
    writing = _Writing(config, job.decider)
    tally = LabelTally(job.decider, [k for k in HIT_CUTOFFS if k <= job.depth], config.seed)
    progress = Progress("classified", "texts", survey.num_rows)
    num_suspected = num_abstained = 0
    with ExitStack() as files:
        rows = files.enter_context(open_rows(Location.of(config.output), config.file_type, writing.columns))
        suspects = None
        if config.suspects is not None:
            place = Location.of(config.suspects)
            suspects = files.enter_context(open_rows(place, config.file_type, SUSPECT_COLUMNS))
        for table in row_batches(survey, config.rows_per_batch):
            for row in job.label(table):
                writing.write(rows, row)
                num_abstained += row.decision.label is None
                if row.expected is not None:
                    tally.add(row.decision, row.expected)
                if suspects is not None and row.suspicion is not None:
                    num_suspected += 1
                    found = row.suspicion
                    suspects.write(row.text, row.expected, found.suggested, found.share, found.reason)
            progress.advance(table.num_rows)
    result: dict[str, Any] = {
        "rows": survey.num_rows,
        "mode": config.mode,
        "rejected_rows": survey.num_rejected,
        **job.labeller.figures,
        "output": config.output,
        "abstained": num_abstained,
    }
    if config.suspects is not None:
        result |= {"suspected": num_suspected, "suspects": config.suspects}
    if config.labelled:
        result |= tally.figures()
        result["labels_missing"] = count_missing(job.labeller, tally.label_counts)
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
    """Texts, batches and predicted memory; surveys the input."""
    survey = _survey(config)
    return plan_labelling(config, survey, depth_of(config, settings_of(config)))


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
) -> tuple[Labeller, str]:
    """The labeller of a job and the fingerprint of its model. Arguments as of IndexLabeller."""
    if config.mode == "classifier":
        assert config.classifier is not None  # the config refused it otherwise
        engine = load_classifier(config.classifier, config)
        return ClassifierLabeller(engine, depth), engine.fingerprint
    assert config.encoder is not None
    assert config.index is not None
    encoder = load_engine(config.encoder, config)
    labeller = IndexLabeller(
        encoder,
        Index.open(config.index, encoder_fingerprint=encoder.fingerprint),
        mode=config.mode,
        depth=depth,
        label_field=config.label_field,
        votes=votes,
        temperature=temperature,
        prefix=own_or(config.query_prefix, encoder.encoder, "query", config.encoder),
        leave_out_same=leave_out_same,
    )
    return labeller, encoder.fingerprint


def count_missing(labeller: Labeller, label_counts: dict[str, int]) -> int:
    """Rows, of so many for each label, whose label could never have been predicted; some are named in the log."""
    num_missing = labeller.count_missing(label_counts)
    if num_missing:
        names = [label for label, count in label_counts.items() if labeller.count_missing({label: count})]
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


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A row of the result."""

    text: str
    expected: str | None
    decision: Decision
    weights: Sequence[Weight] | None
    suspicion: Suspicion | None


class _Job:
    """What labels a batch of rows."""

    def __init__(self, config: ClassifyConfig, labeller: Labeller, decider: Decider, depth: int) -> None:
        self._config = config
        self.labeller = labeller
        self.decider = decider
        self.depth = depth

    @classmethod
    def of(cls, config: ClassifyConfig) -> _Job:
        """Raises InputError: settings that were tuned for something else."""
        settings = settings_of(config)
        votes, temperature = config.votes, config.temperature
        positive, cut, abstain_below = config.positive, config.cut, config.abstain_below
        calibration = None
        if settings is not None:
            votes = settings.votes or votes
            temperature = settings.temperature or temperature
            calibration = settings.calibration
            if positive in (None, settings.positive):
                positive, cut = settings.positive, settings.cut
            abstain_below = settings.abstain_below if abstain_below is None else abstain_below
        depth = depth_of(config, settings)
        labeller, fingerprint = load_labeller(
            config,
            depth,
            votes=votes,
            temperature=temperature,
            leave_out_same=config.suspects is not None,
        )
        if settings is not None:
            assert config.tuned is not None
            label_field = None if config.mode == "classifier" else config.label_field
            settings.check(config.mode, fingerprint, label_field, config.tuned)
        decider = Decider(
            config.mode, calibration=calibration, positive=positive, cut=cut, abstain_below=abstain_below
        )
        return cls(config, labeller, decider, depth)

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
            ranked = iter(self.labeller.label([text for text in batch if text]))
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


class _Writing:
    """How rows are written."""

    def __init__(self, config: ClassifyConfig, decider: Decider) -> None:
        self._config = config
        self._decider = decider
        self.columns = _columns(config)

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
    return survey_rows(config, "labelled" if config.labelled else "lines", _COLUMNS, _EXPLAINED)


def _columns(config: ClassifyConfig) -> tuple[str, ...]:
    return _EXPLAINED if config.explain else _COLUMNS
