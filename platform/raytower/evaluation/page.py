"""The report and the comparison as pages, made of what report.json and comparison.json hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytower.pages.html import Card, Cell, cards, details, figures, listed, page, section, table
from raytower.pages.plots import Axis, Line, Plot, Point, Row, histogram, line_plot, row_plot

TITLE = "raytower evaluation"
COMPARISON_TITLE = "raytower comparison"
STAGE_TITLES = {
    "encoder": "encoder (exact search)",
    "index": "index",
    "lexical": "words (BM25)",
    "fusion": "fusion of both",
    "run": "run",
    "reranker": "reranker",
}
# Of all plots that an evaluation or a comparison may write.
PLOT_NAMES = (
    "recall-by-k",
    "recall-against-time",
    "scores",
    "by-length",
    "by-script",
    "differences",
)
_CARDS = 6


def render_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts or outside resources; every text in it is escaped."""
    stages = [(stage["title"], stage["metrics"]) for stage in report["stages"]]
    return page(
        TITLE,
        "Evaluation",
        _lede(report),
        [
            cards(_cards(stages[-1][1])),
            _losses(report.get("loss_by_stage") or []),
            section("Plots", figures(evaluation_plots(report))),
            section("Metrics", _metric_table(stages), note="Means over queries with 95 % intervals."),
            _areas(report.get("auc")),
            section(
                "Worst queries",
                "".join(map(_worst_query, report["worst_queries"])) or "<p>None.</p>",
                note="By the rank of the first relevant document; ✓ marks relevant ones.",
            ),
            section("Counts", _pairs("Counts", _counts(report))),
            section("Settings", details("All settings", _pairs("Settings", report["settings"]))),
        ],
    )


def evaluation_plots(report: Mapping[str, Any]) -> list[Plot]:
    """The plots that a report has the figures of."""
    kept = report.get("figures") or {}
    plots = [_recall_by_k(kept["recall_by_k"])] if kept.get("recall_by_k") else []
    plots += _against_time(report, kept)
    if scores := kept.get("scores"):
        every = "" if scores["every"] == 1 else f" Of every {scores['every']}th query."
        plots.append(
            histogram(
                "scores",
                "Scores of what was found",
                scores["edges"],
                [("relevant", scores["relevant"]), ("others", scores["others"])],
                "score",
                f"Each group by itself; the less they overlap, the better a threshold works.{every}",
            )
        )
    for name, title in (
        ("length", "By length of the query, in characters"),
        ("script", "By script of the query"),
    ):
        groups = (kept.get("groups") or {}).get(name) or []
        rows = [
            Row(each["name"], each["value"], each["low"], each["high"], each["queries"]) for each in groups
        ]
        if rows:
            plots.append(row_plot(f"by-{name}", title, rows, kept["group_metric"]))
    return plots


def render_comparison_page(result: Mapping[str, Any]) -> str:
    """A comparison as one page, like `render_page`."""
    systems = list(dict.fromkeys(row["system"] for row in result["comparisons"]))
    left_out = result["queries_left_out"]
    lede = (
        f"{', '.join(systems)} against {result['baseline']}, on {result['queries']:,} queries that all have"
        + (f"; {left_out:,} that some lack are left out." if left_out else ".")
    )
    return page(
        COMPARISON_TITLE,
        "Comparison",
        lede,
        [
            section("Plots", figures(comparison_plots(result))),
            section(
                "Differences",
                _comparison_table(result["comparisons"]),
                note="Differences by query with 95 % intervals; p by randomised signs, and as corrected for as many "
                "systems (Holm).",
            ),
            section(
                f"Queries that moved most, by {result['moved_by']}",
                *(
                    _moved_table(name, [row for row in result["moved"] if row["system"] == name])
                    for name in systems
                ),
            ),
        ],
    )


def comparison_plots(result: Mapping[str, Any]) -> list[Plot]:
    """The plots of a comparison: differences of each system, recall by k, quality against time."""
    rows = result["comparisons"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    plots = []
    differences = [
        Row(
            row["metric"] if len(systems) == 1 else f"{row['metric']}, {_end_of(row['system'])}",
            row["difference"],
            row["low"],
            row["high"],
            colour=systems.index(row["system"]),
            label=row["metric"] if row["system"] == systems[0] else "",
        )
        for row in rows
    ]
    plots.append(
        row_plot(
            "differences",
            f"Against {_end_of(result['baseline'])}",
            differences,
            "difference",
            zero=True,
            legend=[_end_of(name) for name in systems] if len(systems) > 1 else (),
        )
    )
    by_system: dict[str, list[Point]] = {result["baseline"]: []}
    for row in rows:
        kind, _, k = row["metric"].partition("@")
        if kind.lower() in ("recall", "r") and k.isdigit():
            points = by_system.setdefault(row["system"], [])
            points.append(Point(int(k), row["value"]))
            if row["system"] == systems[0]:
                by_system[result["baseline"]].append(Point(int(k), row["baseline_value"]))
    lines = [
        Line(_end_of(name), sorted(points, key=lambda each: each.x)) for name, points in by_system.items()
    ]
    if all(len(line.points) > 1 for line in lines):
        plots.append(line_plot("recall-by-k", "Recall by k", lines, *_axes_by_k(lines)))
    return plots + _systems_against_time(result)


# --- plots ---------------------------------------------------------------------------------------------------------


def _recall_by_k(stages: Sequence[Mapping[str, Any]]) -> Plot:
    lines = [
        Line(
            STAGE_TITLES[stage["stage"]],
            [Point(each["k"], each["value"], each["low"], each["high"]) for each in stage["points"]],
        )
        for stage in stages
    ]
    return line_plot(
        "recall-by-k", "Recall by k", lines, *_axes_by_k(lines), note="Bands are 95 % intervals."
    )


def _axes_by_k(lines: Sequence[Line]) -> tuple[Axis, Axis]:
    ks = sorted({point.x for line in lines for point in line.points})
    ticks = [k for k in ks if str(round(k)).strip("0") in ("1", "2", "5")]
    return Axis("k", is_log=True, ticks=ticks), Axis("recall")


def _against_time(report: Mapping[str, Any], kept: Mapping[str, Any]) -> list[Plot]:
    """Recall against milliseconds a query: at settings of the index where they were tried, else with each stage."""
    if tried := kept.get("recall_against_time"):
        name = tried[0]["parameter"]
        points = [
            Point(
                each["milliseconds"],
                each["value"],
                each["low"],
                each["high"],
                f"{name} {each['setting']}" if each["used"] else "",
            )
            for each in sorted(tried, key=lambda each: float(each["milliseconds"]))
        ]
        note = f"Search in the index alone, at {', '.join(str(each['setting']) for each in tried)} as {name}."
        x, y = Axis("milliseconds a query"), Axis(f"recall@{tried[0]['k']}")
        return [
            line_plot("recall-against-time", "Recall against time", [Line("index", points)], x, y, note=note)
        ]
    spent, queries = report.get("milliseconds") or {}, report["counts"]["queries"]
    reranked = [each for each in kept.get("recall_by_k") or [] if each["stage"] == "reranker"]
    if not reranked or not spent.get("rerank"):
        return []
    others = [each for each in kept["recall_by_k"] if each["stage"] not in ("reranker", "encoder")]
    k = min((each["k"] for each in reranked[0]["points"]), key=lambda each: abs(each - 10))
    points = []
    for stage, names in ((others[-1], ("encode", "recall")), (reranked[0], ("encode", "recall", "rerank"))):
        at = next(each for each in stage["points"] if each["k"] == k)
        took = sum(spent[name] for name in names) / queries
        points.append(Point(took, at["value"], at["low"], at["high"], STAGE_TITLES[stage["stage"]]))
    x, y = Axis("milliseconds a query, in batches"), Axis(f"recall@{k}")
    return [line_plot("recall-against-time", "Recall against time", [Line("stages", points)], x, y)]


def _systems_against_time(result: Mapping[str, Any]) -> list[Plot]:
    took = {name: each for name, each in (result.get("milliseconds") or {}).items() if each is not None}
    moved_by = [row for row in result["comparisons"] if row["metric"] == result["moved_by"]]
    values = {result["baseline"]: moved_by[0]["baseline_value"]} | {
        row["system"]: row["value"] for row in moved_by
    }
    if len(took) < len(values):
        return []
    lines = [
        Line(_end_of(name), [Point(took[name], value, label=_end_of(name))]) for name, value in values.items()
    ]
    x, y = Axis("milliseconds a query, in batches"), Axis(result["moved_by"])
    return [line_plot("recall-against-time", f"{result['moved_by']} against time", lines, x, y)]


def _end_of(name: str) -> str:
    """The last part of a path, which tells systems apart in a plot."""
    return name.rstrip("/").rpartition("/")[2] or name


# --- parts ---------------------------------------------------------------------------------------------------------


def _lede(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    run = settings.get("run")
    what = run.get("path") if isinstance(run, Mapping) else settings.get("index")
    parts = [f"{report['counts']['queries']:,} queries", str(what) if what else ""]
    for name in ("encoder", "reranker"):
        parts.append(f"{name} {settings[name]}" if settings.get(name) else "")
    return " · ".join(part for part in parts if part)


def _cards(metrics: Mapping[str, Mapping[str, float]]) -> list[Card]:
    """The figures that say most: those at 10 where there are some."""
    names = [name for name in metrics if name.endswith("@10")]
    names += [name for name in metrics if name not in names]
    return [
        Card(
            name,
            f"{metrics[name]['value']:.3f}",
            f"{metrics[name]['low']:.3f} to {metrics[name]['high']:.3f}",
        )
        for name in names[:_CARDS]
    ]


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each stage against the one before; see `stages.loss_by_stage`."""
    if not rows:
        return ""
    names = list(rows[0]["metrics"])
    columns: list[Cell | str] = ["stage", *(Cell(name, "number") for name in names)]
    lines: list[list[Cell | str]] = []
    for row in rows:
        title = STAGE_TITLES[row["stage"]]
        lines.append(
            [
                Cell(title),
                *(Cell(f"{row['metrics'][name]['value']:.4f}", "number") for name in names),
            ]
        )
        if row["against"] is not None:
            against = f"against {STAGE_TITLES[row['against']]}"
            lines.append([Cell("", "", against), *(_difference(row["differences"][name]) for name in names)])
    return section(
        "Where a loss comes from",
        table("Where a loss comes from", columns, lines),
        note="The first stage loses what is missing to 1. Differences are of the same queries; those whose 95 % "
        "interval lies on one side of 0 are coloured.",
    )


def _difference(item: Mapping[str, float]) -> Cell:
    kind = " up" if item["low"] > 0 else " down" if item["high"] < 0 else ""
    return Cell(f"{item['value']:+.4f}", f"number{kind}", f"[{item['low']:+.4f}, {item['high']:+.4f}]")


def _counts(report: Mapping[str, Any]) -> dict[str, Any]:
    spent = {f"{name} (ms)": value for name, value in (report.get("milliseconds") or {}).items() if value}
    stages = {"other stages (s)": report["stages_seconds"]} if report.get("stages_seconds") else {}
    return {**report["counts"], **spent, **stages}


def _pairs(name: str, values: Mapping[str, Any]) -> str:
    return table(name, (), [[Cell(key), Cell(value, "text")] for key, value in values.items()])


def _metric_table(stages: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> str:
    columns: list[Cell | str] = ["metric", *(Cell(title, "number") for title, _ in stages)]
    rows = [[Cell(name), *(_metric(metrics[name]) for _, metrics in stages)] for name in stages[0][1]]
    return table("Metrics", columns, rows)


def _metric(metric: Mapping[str, float]) -> Cell:
    return Cell(f"{metric['value']:.4f}", "number", f"[{metric['low']:.4f}, {metric['high']:.4f}]")


def _areas(auc: Mapping[str, Any] | None) -> str:
    """See `ScoreSample.areas`."""
    if auc is None:
        return ""
    by_query = {"value": auc["by_query"], "low": auc["low"], "high": auc["high"]}
    pooled = "" if auc["pooled"] is None else f"{auc['pooled']:.4f}"
    rows: list[list[Cell | str]] = [
        [Cell(f"each query by itself ({auc['queries']:,})"), _metric(by_query)],
        [Cell("all scores together"), Cell(pooled, "number")],
    ]
    return section(
        "Relevant documents above others",
        table("Relevant documents above others", ["", Cell("AUC", "number")], rows),
        note="The chance that a relevant document scores above another one that was found. Where the second is much "
        "lower, scores of different queries cannot be compared, and one threshold does not fit all.",
    )


def _worst_query(item: Mapping[str, Any]) -> str:
    columns: list[Cell | str] = ["rank", Cell("score", "number"), Cell("id", "id"), Cell("text", "text")]
    rows = [
        [
            Cell(f"{hit['rank']}{' ✓' if hit['relevant'] else ''}"),
            Cell(f"{hit['score']:.4f}", "number"),
            Cell(hit["id"], "id"),
            Cell(hit["text"], "text"),
        ]
        for hit in item["hits"]
    ]
    found = table(f"Hits of {item['query']}", columns, rows) if rows else "<p>No hits.</p>"
    return details(
        item["query"],
        "<p>Relevant:</p>",
        listed(item["relevant"]),
        found,
        small=f"{item['query_id']}, mrr@10 {item['mrr@10']:.3f}",
    )


def _comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = (
        "metric",
        "system",
        "baseline",
        "value",
        "difference",
        "p",
        "p (Holm)",
        "better",
        "worse",
        "equal",
    )
    columns: list[Cell | str] = [
        Cell(name, "" if place < 2 else "number") for place, name in enumerate(names)
    ]
    lines = [
        [
            Cell(row["metric"]),
            Cell(row["system"], "id"),
            Cell(f"{row['baseline_value']:.4f}", "number"),
            Cell(f"{row['value']:.4f}", "number"),
            _difference({"value": row["difference"], "low": row["low"], "high": row["high"]}),
            Cell(f"{row['p']:.4f}", "number"),
            Cell(f"{row['p_holm']:.4f}", "number"),
            *(Cell(f"{row[name]:,}", "number") for name in ("better", "worse", "equal")),
        ]
        for row in rows
    ]
    return table("Differences", columns, lines)


def _moved_table(system: str, moved: Sequence[Mapping[str, Any]]) -> str:
    if not moved:
        return ""
    columns: list[Cell | str] = [
        Cell(f"query, in {system}", "text"),
        *(Cell(name, "number") for name in ("before", "after", "difference")),
    ]
    rows = [
        [
            Cell(row["query"], "text", row["query_id"]),
            Cell(f"{row['baseline_value']:.4f}", "number"),
            Cell(f"{row['value']:.4f}", "number"),
            Cell(f"{row['difference']:+.4f}", f"number {'up' if row['difference'] > 0 else 'down'}"),
        ]
        for row in moved
    ]
    return table(f"Queries that moved most in {system}", columns, rows)
