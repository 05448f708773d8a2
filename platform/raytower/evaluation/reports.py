"""What an evaluation leaves behind: run.trec, report.json and report.html."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa

from raytower.config import to_json
from raytower.errors import FormatError, InputError
from raytower.storage import Location, output_folder

RUN_NAME = "run.trec"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
_UNSAFE_IN_ID = re.compile(r"[\s%]")
_SHOWN_CHARACTERS = 400
_FIRST_BYTES = 2**16
_TITLE = "<title>raytower evaluation</title>"


class RunWriter:
    """Writes `query Q0 document rank score tag` lines. Made by `open_run`."""

    def __init__(self, stream: pa.NativeFile | IO[bytes], tag: str) -> None:
        self._stream = stream
        self._tag = _escape(tag)

    def write(self, query_id: str, ranked: Iterable[tuple[str, float]]) -> None:
        """The documents of one query, best first, each with its score.

        trec_eval goes by the score (as a 4-byte float, ties by id) and never reads the rank, so a score that is not
        below the one before it is written as the next smaller float: the order stays what it was.
        """
        last = np.float32(np.inf)
        lines = []
        for rank, (doc_id, score) in enumerate(ranked, start=1):
            value = np.float32(score)
            if not value < last:
                value = np.nextafter(last, np.float32(-np.inf))
            lines.append(f"{_escape(query_id)} Q0 {_escape(doc_id)} {rank} {value:.9g} {self._tag}\n")
            last = value
        self._stream.write("".join(lines).encode())


@contextmanager
def open_run(place: Location, tag: str = "raytower") -> Iterator[RunWriter]:
    """A writer of a run file; the file appears when the block ends well.

    The format parts columns by white space, so white space and `%` inside ids are written percent-encoded (`%20`).
    """
    with place.open_write() as stream:
        yield RunWriter(stream, tag)


def check_reports_output(output: str) -> None:
    """Find before any work that `output` cannot be written, or holds something else than a report.

    Raises:
        InputError: as `output_folder`, or one of the three files is there and no evaluation has written it.
    """
    place = output_folder(output, *_OURS)
    names = [child.name for child in place.children()]
    for name, is_ours in _OURS.items():
        if name in names and not ((place / name).is_file() and is_ours(place / name)):
            raise InputError(
                f"output {output!r} holds a {name!r} that no evaluation has written, and which would be lost; name "
                "another folder, or remove it"
            )


def _is_run(place: Location) -> bool:
    with place.open_read() as stream:
        first = stream.read(_FIRST_BYTES).partition(b"\n")[0].split()
    return not first or (len(first) == 6 and first[-1] == b"raytower")


def _is_report(place: Location) -> bool:
    try:
        report = place.read_json()
    except FormatError:
        return False
    return isinstance(report, dict) and report.keys() >= {"counts", "stages", "settings", "worst_queries"}


def _is_page(place: Location) -> bool:
    with place.open_read() as stream:
        return _TITLE.encode() in stream.read(_FIRST_BYTES)


_OURS = {RUN_NAME: _is_run, REPORT_NAME: _is_report, PAGE_NAME: _is_page}


def write_reports(output: Location, report: Mapping[str, Any]) -> None:
    """report.html, then report.json: who finds the JSON finds all three files of this evaluation."""
    plain = json.loads(to_json(report))
    (output / PAGE_NAME).write_bytes(render_page(plain).encode())
    (output / REPORT_NAME).write_json(plain)


def render_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts or outside resources; every text in it is escaped."""
    stages = [(stage["title"], stage["metrics"]) for stage in report["stages"]]
    settings = "".join(f"<tr><th>{_text(key)}<td>{_text(value)}" for key, value in report["settings"].items())
    counts = "".join(f"<tr><th>{_text(key)}<td>{_text(value)}" for key, value in report["counts"].items())
    worst = "".join(_worst_query(item) for item in report["worst_queries"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_TITLE}<style>{_STYLE}</style><main><h1>Evaluation</h1>"
        f"<table>{counts}</table><h2>Metrics</h2><p>Means over queries with 95&nbsp;% bootstrap intervals.</p>"
        f"{_metric_table(stages)}<h2>Worst queries</h2>{worst or '<p>None.</p>'}"
        f"<h2>Settings</h2><table>{settings}</table></main></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0}"
    "main{max-width:60rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;margin:.5rem 0}"
    "th,td{border-bottom:1px solid #ddd;padding:.25rem .75rem;text-align:left;vertical-align:top;"
    "overflow-wrap:anywhere}td.number{text-align:right;font-variant-numeric:tabular-nums}"
    "details{border-bottom:1px solid #ddd;padding:.5rem 0}summary{cursor:pointer}.found{font-weight:600}"
    ".interval{color:#666}"
)


def _metric_table(stages: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> str:
    head = "".join(f"<th>{_text(title)}" for title, _ in stages)
    rows = []
    for name in stages[0][1]:
        cells = "".join(_metric_cell(metrics[name]) for _, metrics in stages)
        rows.append(f"<tr><th>{_text(name)}{cells}")
    return f"<table><tr><th>metric{head}{''.join(rows)}</table>"


def _metric_cell(metric: Mapping[str, float]) -> str:
    interval = f"[{metric['low']:.4f}, {metric['high']:.4f}]"
    return f'<td class="number">{metric["value"]:.4f} <span class="interval">{interval}</span>'


def _worst_query(item: Mapping[str, Any]) -> str:
    hits = "".join(
        f"<tr{' class=found' if hit['relevant'] else ''}><td class=number>{hit['rank']}"
        f"<td class=number>{hit['score']:.4f}<td>{_text(hit['id'])}<td>{_text(hit['text'])}"
        for hit in item["hits"]
    )
    wanted = "".join(f"<li>{_text(text)}" for text in item["relevant"])
    return (
        f"<details><summary>{_text(item['query'])} <span class=interval>{_text(item['query_id'])}, "
        f"mrr@10 {item['mrr@10']:.3f}</span></summary><p>Relevant:<ul>{wanted}</ul>"
        f"<table><tr><th>rank<th>score<th>id<th>text{hits}</table></details>"
    )


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …")


def _escape(name: str) -> str:
    if not name:
        raise InputError("an id is empty; a run file cannot hold it, give every query and document an id")
    return _UNSAFE_IN_ID.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)
