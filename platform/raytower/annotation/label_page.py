"""The figures of `raytower classify` as a page, with plots; made of what the job returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raytower.annotation.config import ClassifyConfig
from raytower.errors import InputError
from raytower.pages.html import (
    Card,
    Cell,
    cards,
    check_plots_folder,
    details,
    figures,
    page,
    section,
    table,
    title_tag,
)
from raytower.pages.plots import MOST_IN_MATRIX, Axis, Line, Plot, Point, line_plot, matrix
from raytower.storage import check_output

TITLE = "raytower classification"
PLOT_NAMES = ("confusion", "reliability", "coverage")
NO_LABEL = "(none)"
"""Given to a text without a ranked label."""
_OTHERS = "(others)"
_CARDS = ("accuracy", "f1_macro", "precision_macro", "recall_macro", "ece", "answered", "accuracy_answered")
_MOST_PAIRS = 30
_MOST_CLASSES = 500
_FIRST_BYTES = 2**16


def check_label_page(config: ClassifyConfig) -> None:
    """Find before any work that the page or its plots cannot be written.

    Raises:
        InputError: as `check_output` and `check_plots_folder`, or the page's name is that of another file.
    """
    if config.report is not None:
        place = check_output(config.report, is_folder=False)
        if place.is_file() and place.size_bytes():
            with place.open_read() as stream:
                if title_tag(TITLE).encode() not in stream.read(_FIRST_BYTES):
                    raise InputError(
                        f"report {config.report!r} holds something that classify has not written, and which would be "
                        "lost; name another file, or remove it"
                    )
    if config.plots is not None:
        check_plots_folder(config.plots, PLOT_NAMES)


def confusion_of(pairs: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """What was given in place of what, from how often each (expected, given) came about.

    Returns:
        `names` and `counts`, a square of the labels with the most errors, those that are left out as one; `pairs`, the
        most frequent errors: `expected`, `given`, `rows`.
    """
    wrong: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for (expected, given), count in pairs.items():
        rows[expected] += count
        if expected != given:
            wrong[expected] += count
            wrong[given] += count
    every = sorted(
        {name for pair in pairs for name in pair}, key=lambda name: (-wrong[name], -rows[name], name)
    )
    shown = every if len(every) <= MOST_IN_MATRIX else [*every[: MOST_IN_MATRIX - 1], _OTHERS]
    place = {name: number for number, name in enumerate(shown)}
    counts = [[0] * len(shown) for _ in shown]
    for (expected, given), count in pairs.items():
        counts[place.get(expected, len(shown) - 1)][place.get(given, len(shown) - 1)] += count
    errors = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    return {
        "names": shown,
        "counts": counts,
        "pairs": [
            {"expected": expected, "given": given, "rows": count}
            for (expected, given), count in errors.most_common(_MOST_PAIRS)
        ],
    }


def label_plots(figures_of: Mapping[str, Any]) -> list[Plot]:
    """Confusion, reliability where scores are chances, and what a threshold costs."""
    confusion = figures_of["confusion"]
    plots = [
        matrix(
            "confusion",
            "Which label is given for which",
            confusion["names"],
            confusion["counts"],
            "Labels with the most errors; a shade is the share of a row.",
        )
    ]
    if bins := figures_of.get("reliability"):
        points = [Point(each["chance"], each["accuracy"]) for each in bins]
        plots.append(
            line_plot(
                "reliability",
                "Do chances come true?",
                [Line("rows", points)],
                Axis("chance", bounds=(0, 1)),
                Axis("share that is right", bounds=(0, 1)),
                diagonal=True,
                note=f"On the broken line they do. Expected calibration error {figures_of['ece']:.4f}.",
            )
        )
    curve = figures_of["coverage"]
    if len(curve) > 1:
        points = [Point(each["coverage"], each["accuracy"]) for each in curve]
        plots.append(
            line_plot(
                "coverage",
                "What a threshold costs and gives",
                [Line("rows", points)],
                Axis("share of the rows that get a label", bounds=(0, 1)),
                Axis("accuracy of these"),
                note="The surest rows first.",
            )
        )
    return plots


def render_label_page(result: Mapping[str, Any]) -> str:
    """The page of a result with `confusion` (see `confusion_of`) and `classes`, and with `settings`."""
    intervals = result["intervals"]
    shown = [name for name in _CARDS if isinstance(result.get(name), float)]
    items = [
        Card(
            name.replace("_", " "),
            f"{result[name]:.3f}",
            f"{intervals[name][0]:.3f} to {intervals[name][1]:.3f}" if name in intervals else "",
        )
        for name in shown
    ]
    return page(
        TITLE,
        "Classification",
        f"{result['rows']:,} rows · mode {result['mode']}",
        [
            cards(items),
            section("Plots", figures(label_plots(result))),
            section("Labels", _classes(result["classes"]), note="In the order of how many rows expect them."),
            section("Errors by label", _errors(result["confusion"]["pairs"])),
            section("Levels", _levels(result.get("levels") or [])),
            section("Settings", details("All settings", _settings(result["settings"]))),
        ],
    )


def _classes(classes: Mapping[str, Mapping[str, float]]) -> str:
    names = sorted(classes, key=lambda name: (-classes[name]["rows"], name))
    columns: list[Cell | str] = [Cell("label", "text"), *_numbers("rows", "precision", "recall", "f1")]
    rows = [
        [
            Cell(name, "text"),
            Cell(f"{classes[name]['rows']:,}", "number"),
            *(Cell(f"{classes[name][key]:.4f}", "number") for key in ("precision", "recall", "f1")),
        ]
        for name in names[:_MOST_CLASSES]
    ]
    left = len(names) - len(rows)
    return table("Labels", columns, rows) + (f"<p>{left:,} rarer labels are left out.</p>" if left else "")


def _errors(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "<p>None.</p>"
    columns: list[Cell | str] = [Cell("expected", "text"), Cell("given", "text"), Cell("rows", "number")]
    rows = [
        [Cell(each["expected"], "text"), Cell(each["given"], "text"), Cell(f"{each['rows']:,}", "number")]
        for each in pairs
    ]
    return table("Errors by label", columns, rows)


def _levels(levels: Sequence[Mapping[str, Any]]) -> str:
    if not levels:
        return ""
    columns: list[Cell | str] = ["level", *_numbers("rows", "accuracy", "f1 macro")]
    rows = [
        [
            Cell(each["level"]),
            Cell(f"{each['rows']:,}", "number"),
            Cell(f"{each['accuracy']:.4f}", "number"),
            Cell(f"{each['f1_macro']:.4f}", "number"),
        ]
        for each in levels
    ]
    return table("Levels", columns, rows)


def _numbers(*names: str) -> list[Cell]:
    return [Cell(name, "number") for name in names]


def _settings(settings: Mapping[str, Any]) -> str:
    return table("Settings", (), [[Cell(key), Cell(value, "text")] for key, value in settings.items()])
