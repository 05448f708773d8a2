"""`raytower tune-classify`: what `classify` needs to know of scores, found on dev rows and written to a file.

    votes          the kind of votes, k and temperature with the best metric; all are counted from one search
    calibration    chances that the first label is right, by temperature or isotonic regression
    cut            the score of one of two classes with its best F1
    threshold      the score below which no label is given

Shape legend: N dev rows, K neighbours or ranked labels, G settings.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytower.annotation.classify import count_missing, load_labeller, plan_labelling
from raytower.annotation.classify_settings import Calibration, ClassifySettings, VoteKind
from raytower.annotation.config import TuneClassifyConfig
from raytower.annotation.deciding import Decider, Decision, chances_of, read_settings, sharpened
from raytower.annotation.label_figures import (
    coverage_curve,
    expected_calibration_error,
    reliability,
    threshold_for,
)
from raytower.annotation.labellers import IndexLabeller
from raytower.annotation.labels import Prediction, count_votes
from raytower.annotation.rows_in import row_batches
from raytower.data.pieces import Survey, say_unread
from raytower.data.pieces import survey as survey_input
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside
from raytower.errors import InputError, import_extra
from raytower.metrics import macro_f1
from raytower.progress import Progress
from raytower.storage import Location, check_output

Floats = NDArray[np.float64]
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
# Temperatures of calibration that are tried, from the sharpest on; next those around the best one.
_LOWEST, _HIGHEST, _STEPS, _ROUNDS = 1e-3, 1e2, 60, 3
_SMALLEST = 1e-6


def tune_classify(config: TuneClassifyConfig) -> dict[str, Any]:
    """Label the dev rows, find the settings, and write them to `output`.

    Returns:
        `settings` as they are written; `rows`, `labels_missing`, `rejected_rows`, `mode`, `index_version` (of a
        classifier: fingerprint), `output`, `seconds`; `accuracy` and `f1_macro` with them on these rows; in mode votes
        `tried`, each way of voting and what it reaches; `ece` of the scores as they were (of shares and probabilities),
        `calibrated`, `ece` and `brier` of each calibration on rows that it was not fitted on, and `reliability` of the
        one that is taken; with `positive` its `f1` at the cut; `coverage`, what thresholds cost and give.

    Raises:
        MissingExtraError: isotonic calibration, or a positive class, without the extra `measures`.
        InputError: bad rows, fewer rows than `folds`, rows of a single label, a positive class that no row or every row
            has, no threshold that gives `min_accuracy`, an index that another encoder made.
    """
    start = time.perf_counter()
    survey = _survey(config)
    labeller, fingerprint = load_labeller(config, config.max_k)
    texts = _read(config, survey)
    expected = [label for _, label in texts]
    _check(config, expected)
    found: dict[str, Any] = {}
    ranked, way, found["tried"] = _ranked(config, labeller, texts)
    calibration, measured = choose_calibration(config, ranked, expected)
    cut, found["positive"] = choose_cut(
        config, Decider(config.mode, calibration=calibration), ranked, expected
    )
    decider = Decider(config.mode, calibration=calibration, positive=config.positive, cut=cut)
    decisions = [decider.decide(row) for row in ranked]
    scores, right = _scored(decisions, expected)
    settings = ClassifySettings(
        mode=config.mode,
        fingerprint=fingerprint,
        label_field=None if config.mode == "classifier" else config.label_field,
        depth=way.k if way else config.max_k,
        votes=way.votes if way else None,
        temperature=way.temperature if way else None,
        calibration=calibration,
        positive=config.positive,
        cut=cut,
        abstain_below=_threshold(config, scores, right),
    )
    Location.of(config.output).write_json(settings.model_dump(mode="json"))
    predicted = [row.ranked[0].label if row.ranked else "" for row in decisions]
    return {
        "rows": survey.num_rows,
        "mode": config.mode,
        "rejected_rows": survey.num_rejected,
        **labeller.figures,
        "labels_missing": count_missing(labeller, Counter(expected)),
        "accuracy": float(right.mean()),
        "f1_macro": macro_f1(predicted, expected),
        **{name: value for name, value in found.items() if value is not None},
        **measured,
        "coverage": coverage_curve(scores, right),
        "settings": settings.model_dump(mode="json"),
        "output": config.output,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _ranked(
    config: TuneClassifyConfig, labeller: Any, texts: Sequence[tuple[str, str]]
) -> tuple[list[list[Prediction]], Way | None, list[dict[str, Any]] | None]:
    """The labels of each row, best first; in mode votes also the way of voting, and what each way reaches."""
    if config.mode != "votes":
        return _label(config, labeller, texts), None, None
    assert isinstance(labeller, IndexLabeller)
    voters = _neighbours(config, labeller, texts)
    way, tried = choose_votes(voters, [label for _, label in texts], config.metric, config.max_k)
    return [way.count(row) for row in voters], way, tried


def _threshold(config: TuneClassifyConfig, scores: Floats, right: NDArray[np.bool_]) -> float | None:
    """The score (N,) below which no label is given, for `min_accuracy` of the others; None where it is not asked for.

    Raises:
        InputError: no threshold gives it.
    """
    if config.min_accuracy is None:
        return None
    threshold = threshold_for(scores, right, config.min_accuracy)
    if threshold is None:
        raise InputError(
            f"min_accuracy is {config.min_accuracy}, and no threshold gives it on these {len(right)} rows: the "
            f"surest tenth has {coverage_curve(scores, right)[0]['accuracy']:.3f}; lower it, or train the encoder"
        )
    return threshold


def plan_tune_classify(config: TuneClassifyConfig) -> dict[str, Any]:
    """Texts, batches and predicted memory; surveys the input."""
    return plan_labelling(config, _survey(config), config.max_k)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of voting. `temperature` is None where the votes have none."""

    votes: VoteKind
    k: int
    temperature: float | None = None

    def count(self, voters: Sequence[tuple[str, float]]) -> list[Prediction]:
        """Labels by their share of the first `k` voters' votes."""
        return count_votes(voters[: self.k], self.temperature or 1.0, self.votes)


def ways(max_k: int) -> list[Way]:
    """The ways that are tried, those with the fewest neighbours first."""
    tried = []
    for k in sorted({k for k in NEIGHBOURS if k < max_k} | {max_k}):
        tried += [Way("similarity", k, temperature) for temperature in TEMPERATURES]
        tried += [Way("uniform", k), Way("rank", k)]
    return tried


def choose_votes(
    voters: Sequence[Sequence[tuple[str, float]]],
    expected: Sequence[str],
    metric: Literal["accuracy", "f1_macro"],
    max_k: int,
) -> tuple[Way, list[dict[str, Any]]]:
    """The way of voting with the best metric, of equal ones the first, which asks the fewest; and what each reaches.

    Args:
        voters: label and score of the nearest documents of each row, best first.
        expected: the label of each row.
    """
    tried = []
    for way in ways(max_k):
        ranked = [way.count(row) for row in voters]
        predicted = [row[0].label if row else "" for row in ranked]
        right = sum(ours == theirs for ours, theirs in zip(predicted, expected, strict=True))
        figures = {"accuracy": right / len(expected), "f1_macro": macro_f1(predicted, expected)}
        tried.append((way, figures))
    best, _ = max(tried, key=lambda each: round(each[1][metric], 12))
    return best, [
        {"votes": way.votes, "k": way.k, "temperature": way.temperature, **figures} for way, figures in tried
    ]


def choose_calibration(
    config: TuneClassifyConfig, ranked: Sequence[Sequence[Prediction]], expected: Sequence[str]
) -> tuple[Calibration | None, dict[str, Any]]:
    """The calibration, fitted on all rows, and figures of each kind on rows that it was not fitted on."""
    were_shares = config.mode != "labels"
    measured: dict[str, Any] = {}
    scores, right = _scored([Decider(config.mode).decide(row) for row in ranked], expected)
    if were_shares:
        measured["ece"] = expected_calibration_error(scores, right)
    if config.calibration == "none":
        return None, measured
    kinds: list[Literal["temperature", "isotonic"]] = ["temperature", "isotonic"]
    if config.calibration != "auto":
        kinds = [config.calibration]
    parts_N = np.random.default_rng(config.seed).permutation(len(right)) % config.folds
    padded_NK = padded(ranked)
    figures: list[dict[str, Any]] = []
    held_out: list[Floats] = []
    for kind in kinds:
        chances = np.empty(len(right))
        for fold in range(config.folds):
            inside, outside = parts_N == fold, parts_N != fold
            fitted = fit_calibration(kind, padded_NK[outside], right[outside], were_shares)
            chances[inside] = _first_chances(fitted, padded_NK[inside], were_shares)
        brier = float(((chances - right) ** 2).mean())
        figures.append({"kind": kind, "brier": brier, "ece": expected_calibration_error(chances, right)})
        held_out.append(chances)
    best = int(np.argmin([each["brier"] for each in figures]))
    measured |= {"calibrated": figures, "reliability": reliability(held_out[best], right)}
    return fit_calibration(kinds[best], padded_NK, right, were_shares), measured


def fit_calibration(
    kind: Literal["temperature", "isotonic"], padded_NK: Floats, right: NDArray[np.bool_], were_shares: bool
) -> Calibration:
    """A calibration of the chance that the first label is right.

    The temperature is the one with the least log loss of that chance, and not of the right label's: rows whose label
    the index does not hold count too, and lower the chances.

    Args:
        padded_NK: scores of the ranked labels of each row, as `padded`.
        right: (N,) whether the first label is.
        were_shares: whether scores are shares or probabilities, and not cosines.
    """
    if kind == "isotonic":
        fitted = import_extra("sklearn.isotonic").IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        fitted.fit(_first(padded_NK), right.astype(np.float64))
        return Calibration(
            kind=kind,
            scores=tuple(map(float, fitted.X_thresholds_)),
            chances=tuple(map(float, fitted.y_thresholds_)),
        )
    low, high = _LOWEST, _HIGHEST
    best = 1.0
    for _ in range(_ROUNDS):
        grid = np.geomspace(low, high, _STEPS)
        losses = [_log_loss(_sharpest(padded_NK, each, were_shares), right) for each in grid]
        place = int(np.argmin(losses))
        best = float(grid[place])
        low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, _STEPS - 1)])
    return Calibration(kind=kind, temperature=best)


def choose_cut(
    config: TuneClassifyConfig,
    decider: Decider,
    ranked: Sequence[Sequence[Prediction]],
    expected: Sequence[str],
) -> tuple[float | None, dict[str, Any] | None]:
    """The score of the positive class from which on a text gets it, with the best F1; of equal ones the highest."""
    if config.positive is None:
        return None, None
    metrics = import_extra("sklearn.metrics")
    scores = np.array([decider.score_of(decider.decide(row).ranked, config.positive) for row in ranked])
    is_positive = np.array([label == config.positive for label in expected])
    precision, recall, thresholds = metrics.precision_recall_curve(is_positive, scores)
    # The last point is no threshold: nothing is called positive there.
    sums = precision[:-1] + recall[:-1]
    f1 = np.divide(2 * precision[:-1] * recall[:-1], sums, out=np.zeros(len(sums)), where=sums > 0)
    best = len(f1) - 1 - int(np.argmax(np.round(f1[::-1], 12)))
    return float(thresholds[best]), {
        "label": config.positive,
        "rows": int(is_positive.sum()),
        "average_precision": float(metrics.average_precision_score(is_positive, scores)),
        "f1": float(f1[best]),
        "precision": float(precision[best]),
        "recall": float(recall[best]),
        "cut": float(thresholds[best]),
    }


def padded(ranked: Sequence[Sequence[Prediction]]) -> Floats:
    """(N, K) the scores of each row's labels, best first; where a row has fewer, what has no part in a softmax."""
    width = max((len(row) for row in ranked), default=0)
    scores = np.full((len(ranked), max(width, 1)), -np.inf)
    for number, row in enumerate(ranked):
        scores[number, : len(row)] = [item.score for item in row]
    return scores


def _first(padded_NK: Floats) -> Floats:
    return np.where(np.isfinite(padded_NK[:, 0]), padded_NK[:, 0], 0.0)


def _first_chances(calibration: Calibration, padded_NK: Floats, were_shares: bool) -> Floats:
    if calibration.kind == "isotonic":
        return chances_of(calibration, _first(padded_NK), were_shares)
    return _sharpest(padded_NK, calibration.temperature, were_shares)


def _sharpest(padded_NK: Floats, temperature: float, were_shares: bool) -> Floats:
    some = np.isfinite(padded_NK[:, 0])
    chances = np.zeros(len(padded_NK))
    chances[some] = sharpened(padded_NK[some], temperature, were_shares)[:, 0]
    return chances


def _log_loss(chances: Floats, right: NDArray[np.bool_]) -> float:
    held = np.clip(chances, _SMALLEST, 1 - _SMALLEST)
    return float(-np.log(np.where(right, held, 1 - held)).mean())


def _scored(decisions: Sequence[Decision], expected: Sequence[str]) -> tuple[Floats, NDArray[np.bool_]]:
    """(N,) the score of each first label, and whether it is right."""
    firsts = [row.ranked[0].label if row.ranked else None for row in decisions]
    right = [ours == theirs for ours, theirs in zip(firsts, expected, strict=True)]
    return np.array([row.score for row in decisions]), np.array(right)


def _survey(config: TuneClassifyConfig) -> Survey:
    refuse_output_inside(config.output, config.input.path)
    place = check_output(config.output, is_folder=False)
    if place.exists() and place.size_bytes():
        read_settings(place)  # nothing else may be written over
    surveyed = survey_input(
        config.input, "labelled", on_error=config.on_error, quarantine=quarantine_of(config.output)
    )
    say_unread(config.input.path, "labelled", surveyed)
    return surveyed


def _read(config: TuneClassifyConfig, survey: Survey) -> list[tuple[str, str]]:
    return [
        (text, label)
        for table in row_batches(survey, config.rows_per_batch)
        for text, label in zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True)
    ]


def _check(config: TuneClassifyConfig, expected: Sequence[str]) -> None:
    path = config.input.path
    if len(expected) < config.folds:
        raise InputError(
            f"{path!r} has {len(expected)} rows, and folds is {config.folds}; give more dev rows, or lower folds"
        )
    if len(set(expected)) == 1:
        raise InputError(
            f"{path!r} has one label, {expected[0]!r}, alone: any settings give it; tune on rows of several labels"
        )
    if config.positive is not None and config.positive not in expected:
        raise InputError(
            f"positive is {config.positive!r}, which no row of {path!r} has (there are "
            f"{', '.join(map(repr, sorted(set(expected))[:5]))}); name one of its labels"
        )


def _batches(config: TuneClassifyConfig, texts: Sequence[tuple[str, str]]) -> list[list[str]]:
    size = config.rows_per_batch
    return [[text for text, _ in texts[start : start + size]] for start in range(0, len(texts), size)]


def _neighbours(
    config: TuneClassifyConfig, labeller: IndexLabeller, texts: Sequence[tuple[str, str]]
) -> list[Sequence[tuple[str, float]]]:
    progress = Progress("searched", "texts", len(texts))
    found: list[Sequence[tuple[str, float]]] = []
    for batch in _batches(config, texts):
        found += [each.voters for each in labeller.neighbours(batch)]
        progress.advance(len(batch))
    return found


def _label(
    config: TuneClassifyConfig, labeller: Any, texts: Sequence[tuple[str, str]]
) -> list[list[Prediction]]:
    progress = Progress("classified", "texts", len(texts))
    ranked: list[list[Prediction]] = []
    for batch in _batches(config, texts):
        ranked += labeller.label(batch)
        progress.advance(len(batch))
    return ranked
