"""Results as tables, for people at a terminal; programs get JSON."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytower import escapes
from raytower.config import to_json

_MAX_WIDTH = 120
# What a column of text is folded to at least, and what stands between two columns.
_NARROWEST = 12
_GAP = 2


def render_result(result: Mapping[str, Any]) -> str:
    """Single values as a list of names and values, lists of records as a table each."""
    single: dict[str, Any] = {}
    tables: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for name, value in result.items():
        if isinstance(value, Sequence) and not isinstance(value, str) and _is_table(value):
            tables.append((name, value))
        else:
            single |= _flat(name, value)
    parts = [_pairs(single)] if single else []
    parts += [f"{name}\n{_records(rows)}" for name, rows in tables]
    return "\n\n".join(parts)


def render_search_or_figures(result: Mapping[str, Any]) -> str:
    """The hits of one query, one a line, wherever they go; the figures of many, as those of every job."""
    if "results" in result:
        from raytower.retrieval.search import render_search  # FAISS and torch, which other tables do without

        return render_search(dict(result))
    return render_result(result) if sys.stdout.isatty() else to_json(result)


def render_evaluation(result: Mapping[str, Any]) -> str:
    """A line a metric: its value, its 95 % interval and, after a reranker, what the first stage alone has.

    Of a comparison a line a metric and system, and the queries that moved most.
    """
    if "comparisons" in result:
        return _render_comparison(result)
    first = result["recall_stage"] or {}
    rows = [
        {
            "metric": name,
            "value": result[name],
            "95 % interval": f"{low:.4f} to {high:.4f}",
            **({"first stage alone": first.get(name)} if first else {}),
        }
        for name, (low, high) in result["intervals"].items()
    ]
    shown = {*result["intervals"], "intervals", "recall_stage", "loss_by_stage"}
    rest = {name: value for name, value in result.items() if name not in shown}
    losses = [_loss_row(row) for row in result.get("loss_by_stage") or []]
    parts = [_records(rows), render_result(rest)]
    if losses:
        parts.insert(1, f"where a loss comes from\n{_records(losses)}")
    return "\n\n".join(parts)


def _loss_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A stage: each metric, and what it gained or lost against the stage before."""
    shown: dict[str, Any] = {"stage": row["stage"], "against": row["against"] or ""}
    for name, metric in row["metrics"].items():
        moved = row["differences"].get(name)
        shown[name] = f"{metric['value']:.4f}" + ("" if moved is None else f" ({moved['value']:+.4f})")
    return shown


def _render_comparison(result: Mapping[str, Any]) -> str:
    rows = [
        {
            "metric": row["metric"],
            "system": row["system"],
            "baseline": row["baseline_value"],
            "value": row["value"],
            "difference": f"{row['difference']:+.4f}",
            "95 % interval": f"{row['low']:+.4f} to {row['high']:+.4f}",
            "p": row["p"],
            "p (Holm)": row["p_holm"],
            "better/worse/equal": f"{row['better']:,}/{row['worse']:,}/{row['equal']:,}",
        }
        for row in result["comparisons"]
    ]
    moved = [
        {
            "system": row["system"],
            "query": row["query"],
            "from": row["baseline_value"],
            "to": row["value"],
        }
        for row in result["moved"]
    ]
    rest = {name: value for name, value in result.items() if name not in ("comparisons", "moved")}
    parts = [_records(rows), render_result(rest)]
    if moved:
        parts.insert(1, f"queries that moved most, by {result['moved_by']}\n{_records(moved)}")
    return "\n\n".join(parts)


def render_pipeline(result: Mapping[str, Any]) -> str:
    """The steps as a table; what each came from is for programs."""
    steps = [{name: value for name, value in step.items() if name != "lineage"} for step in result["steps"]]
    return render_result({**result, "steps": steps})


def render_tuning(result: Mapping[str, Any]) -> str:
    """The curve of weights, the one that was taken marked, and the rest as names and values."""
    best, highest = result["weight"], max(point["mrr@10"] for point in result["curve"])
    rows = [
        {
            "": "→" if point["weight"] == best else "",
            **point,
            "of the best": "▏" if not highest else "█" * round(40 * point["mrr@10"] / highest),
        }
        for point in result["curve"]
    ]
    rest = {name: value for name, value in result.items() if name != "curve"}
    return f"{_records(rows)}\n\n{render_result(rest)}"


def render_versions(result: Mapping[str, Any]) -> str:
    """A line a version, the newest last and marked; `index list --json` has the rest."""
    rows = [
        {
            "": "→" if version["version"] == result["current"] else "",
            **{name: version[name] for name in ("version", "operation", "kind", "rows", "shards", "recall")},
            "target": version["recall_target"],
            "search parameters": " ".join(
                f"{k}={v}" for k, v in _widest(version["search_parameters"]).items()
            ),
        }
        for version in result["versions"]
    ]
    missed = [version["version"] for version in result["versions"] if version["target_reached"] is False]
    warning = f"\n\nversions that miss their recall target: {', '.join(missed)}" if missed else ""
    return _records(rows) + warning


def _widest(parameters: Any) -> Mapping[str, Any]:
    """Search parameters by k: those of the largest k; else the parameters themselves."""
    if (
        isinstance(parameters, Mapping)
        and parameters
        and all(isinstance(v, Mapping) for v in parameters.values())
    ):
        return dict(list(parameters.values())[-1])
    return parameters if isinstance(parameters, Mapping) else {}


def _is_table(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(item, Mapping) for item in value)


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for inner, item in value.items():
        flat |= _flat(f"{name}.{inner}", item)
    return flat


def _pairs(values: Mapping[str, Any]) -> str:
    """A line a value; a name above its value where the terminal is too narrow for both."""
    names = [escapes.one_cell(name) for name in values]
    shown = list(map(_shown, values.values()))
    if max(map(cell_len, names)) + _GAP + _NARROWEST > _width():
        return "\n".join(f"{name}\n  {value}" for name, value in zip(names, shown, strict=True))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in zip(names, shown, strict=True):
        table.add_row(Text(name), Text(value))
    return _draw(table)


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a record; a list of pairs each where the terminal is too narrow for all columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, pad_edge=False, header_style="bold")
    needed = 0
    for name in names:
        numbers = all(isinstance(row.get(name), (int, float)) for row in rows)
        justify: Literal["left", "right"] = "right" if numbers else "left"
        head = escapes.one_cell(name)
        table.add_column(Text(head), justify=justify, overflow="fold", no_wrap=numbers)
        widest = max(map(cell_len, [head, *(_shown(row.get(name)) for row in rows)]))
        needed += (widest if numbers else min(widest, _NARROWEST)) + _GAP
    if needed - _GAP > _width():
        return "\n\n".join(_pairs({name: row.get(name) for name in names}) for row in rows)
    for row in rows:
        table.add_row(*(Text(_shown(row.get(name))) for name in names))
    return _draw(table)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return escapes.one_cell(str(value))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_WIDTH)


def _draw(table: Table) -> str:
    out = io.StringIO()
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
    colours: Literal["standard"] | None = None if is_plain else "standard"
    Console(file=out, width=_width(), force_terminal=not is_plain, color_system=colours).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))
