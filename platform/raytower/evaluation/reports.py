"""What an evaluation leaves behind.

run.trec and qrels.trec (the judgements), per_query.jsonl (each query with its text and the value of each metric),
report.json and report.html; a comparison leaves comparison.json and comparison.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa

from raytower.config import to_json
from raytower.data.qrels import OURS, trec_id
from raytower.errors import FormatError, InputError
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.judgements import Judgements, absent_text
from raytower.evaluation.page import COMPARISON_TITLE, PLOT_NAMES, TITLE, render_page
from raytower.metrics import Floats
from raytower.pages.html import check_plots_folder, title_tag, write_plots
from raytower.pages.pictures import check_pictures, write_pictures
from raytower.pages.plots import Plot
from raytower.progress import log
from raytower.storage import Location, output_folder

RUN_NAME = "run.trec"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
QRELS_NAME = "qrels.trec"
PER_QUERY_NAME = "per_query.jsonl"
COMPARISON_NAME = "comparison.json"
COMPARISON_PAGE_NAME = "comparison.html"
# The style stands behind the title.
_FIRST_BYTES = 2**16


class RunWriter:
    """Writes `query Q0 document rank score tag` lines. Made by `open_run`."""

    def __init__(self, stream: pa.NativeFile | IO[bytes], tag: str) -> None:
        self._stream = stream
        self._tag = trec_id(tag)

    def write(self, query_id: str, ranked: Iterable[tuple[str, float]]) -> None:
        """The documents of one query, best first, each with its score.

        trec_eval goes by the score (as a 4-byte float, ties by id) and never reads the rank, so a score that is not
        below the one before it is written as the next smaller float: the order stays what it was.
        """
        pairs = list(ranked)
        values = np.array([score for _, score in pairs], np.float32)
        if not (values[1:] < values[:-1]).all():
            for place in range(1, len(values)):
                if not values[place] < values[place - 1]:
                    values[place] = np.nextafter(values[place - 1], np.float32(-np.inf))
        query = trec_id(query_id)
        lines = [
            f"{query} Q0 {trec_id(doc_id)} {rank} {value:.9g} {self._tag}\n"
            for rank, ((doc_id, _), value) in enumerate(zip(pairs, values.tolist(), strict=True), start=1)
        ]
        self._stream.write("".join(lines).encode())


@contextmanager
def open_run(place: Location, tag: str = OURS) -> Iterator[RunWriter]:
    """A writer of a run file; the file appears when the block ends well.

    The format parts columns by white space, so white space and `%` inside ids are written percent-encoded (`%20`).
    """
    with place.open_write() as stream:
        yield RunWriter(stream, tag)


def check_outputs(config: EvaluateConfig) -> None:
    """Raises InputError as `check_reports_output`, `check_plots_folder` and `check_pictures`."""
    if config.output is not None:
        check_reports_output(config.output)
        if config.figures is not None:
            check_pictures(config.output, PLOT_NAMES)
    if config.plots is not None:
        check_plots_folder(config.plots, PLOT_NAMES)


def write_drawings(config: EvaluateConfig, plots: Sequence[Plot]) -> None:
    """The plots of a page as files, where they are asked for."""
    if config.plots is not None:
        write_plots(Location.of(config.plots), plots)
    if config.output is not None and config.figures is not None:
        write_pictures(Location.of(config.output), plots, PLOT_NAMES)


def check_reports_output(output: str) -> None:
    """Find before any work that `output` cannot be written, or holds something else than a report.

    Raises:
        InputError: as `output_folder`, or one of the files is there and no evaluation has written it.
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
    return not first or (len(first) == 6 and first[-1] == OURS.encode())


def _is_qrels(place: Location) -> bool:
    with place.open_read() as stream:
        first = stream.read(_FIRST_BYTES).partition(b"\n")[0].split()
    return not first or (len(first) == 4 and first[1] == OURS.encode())


def _is_per_query(place: Location) -> bool:
    with place.open_read() as stream:
        return bytes(stream.read(_FIRST_BYTES)).startswith(b'{"query_id": ')


def _is_comparison(place: Location) -> bool:
    try:
        comparison = place.read_json()
    except FormatError:
        return False
    return isinstance(comparison, dict) and comparison.keys() >= {"baseline", "comparisons", "moved"}


def _is_report(place: Location) -> bool:
    try:
        report = place.read_json()
    except FormatError:
        return False
    return isinstance(report, dict) and report.keys() >= {"counts", "stages", "settings", "worst_queries"}


def _is_page(place: Location) -> bool:
    with place.open_read() as stream:
        return title_tag(TITLE).encode() in stream.read(_FIRST_BYTES)


def _is_comparison_page(place: Location) -> bool:
    with place.open_read() as stream:
        return title_tag(COMPARISON_TITLE).encode() in stream.read(_FIRST_BYTES)


_OURS = {
    RUN_NAME: _is_run,
    REPORT_NAME: _is_report,
    PAGE_NAME: _is_page,
    QRELS_NAME: _is_qrels,
    PER_QUERY_NAME: _is_per_query,
    COMPARISON_NAME: _is_comparison,
    COMPARISON_PAGE_NAME: _is_comparison_page,
}


def write_reports(
    output: Location, report: Mapping[str, Any], judgements: Judgements, values: Mapping[str, Floats]
) -> None:
    """All files but run.trec, report.json last: who finds the JSON finds all files of this evaluation.

    Args:
        output: the folder.
        report: what the page and the JSON hold.
        judgements: of the queries.
        values: by metric one value per query, [Q].
    """
    plain = json.loads(to_json(report))
    _write_qrels(output / QRELS_NAME, judgements)
    _write_per_query(output / PER_QUERY_NAME, judgements, values)
    (output / PAGE_NAME).write_bytes(render_page(plain).encode())
    (output / REPORT_NAME).write_json(plain)


def _write_qrels(place: Location, judgements: Judgements) -> None:
    """TREC's qrels; a relevant text that the index lacks has an id of its own, so that it counts as missed there too.

    Where a judged text stands in the index several times, each of its documents is relevant here, while `evaluate`
    counts the text once.
    """
    judged = [
        {**one, **other}
        for one, other in zip(
            judgements.relevant, judgements.unwanted or [{}] * len(judgements.relevant), strict=True
        )
    ]
    if any(value != int(value) for one in judged for value in one.values()):
        log(f"{place.name} is not written: some judgements are no whole numbers, which TREC's form demands")
        place.delete()
        return
    with place.open_write() as stream:
        for query_id, one in zip(judgements.ids, judged, strict=True):
            lines = [
                f"{trec_id(query_id)} {OURS} {trec_id(_name_of(doc_id, number))} {int(value)}\n"
                for number, (doc_id, value) in enumerate(one.items(), start=1)
            ]
            stream.write("".join(lines).encode())


def _name_of(doc_id: str, number: int) -> str:
    return doc_id if absent_text(doc_id) is None else f"not in the index {number}"


def _write_per_query(place: Location, judgements: Judgements, values: Mapping[str, Floats]) -> None:
    """A line a query: `query_id`, `query`, `relevant` (how many documents are) and `metrics`, by name."""
    columns = {name: each.tolist() for name, each in values.items()}
    with place.open_write() as stream:
        for row, (query_id, text) in enumerate(zip(judgements.ids, judgements.texts, strict=True)):
            line = {
                "query_id": query_id,
                "query": text,
                "relevant": len(judgements.relevant[row]),
                "metrics": {name: each[row] for name, each in columns.items()},
            }
            stream.write(f"{to_json(line)}\n".encode())
