"""Shares of a job from file to file: how rows are cut, who does them, and what is kept of a job that was ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.config import FittedWorkersConfig
from raytower.data.config import InputConfig
from raytower.data.pieces import Piece, read_pieces, survey
from raytower.errors import InputError
from raytower.file_jobs import run as run_module
from raytower.file_jobs.plan import (
    NUMBER,
    Share,
    choose_rows_per_share,
    choose_workers,
    shares_between,
    shares_of,
    shares_of_rows,
)
from raytower.file_jobs.run import FileBeside, FileJob, Sink, join_bytes, join_parquet, run_shares
from raytower.storage import Location, writer_lease
from raytower.workers import Node


def pieces_with(*num_rows: int) -> list[Piece]:
    schema = pa.schema([("id", pa.string())])
    source: Any = None
    extent: Any = None
    firsts = np.cumsum([0, *num_rows]).tolist()
    return [Piece(source, i, extent, firsts[i], rows, schema) for i, rows in enumerate(num_rows)]


def spans(shares: Sequence[Share]) -> list[tuple[int, int]]:
    """First and last row of each share, counted over the whole input."""
    return [
        (share.pieces[0].first_row + share.start, share.pieces[0].first_row + share.start + share.num_rows)
        for share in shares
    ]


def test_shares_begin_where_groups_do() -> None:
    pieces = pieces_with(4, 4, 4)
    shares = shares_between(pieces, np.array([0, 3, 9]), 4)
    assert spans(shares) == [(0, 9), (9, 12)]
    assert [[piece.index for piece in share.pieces] for share in shares] == [[0, 1, 2], [2]]
    assert [share.start for share in shares] == [0, 1]
    # A group that is longer than a share stays whole.
    assert spans(shares_between(pieces, np.array([0]), 2)) == [(0, 12)]
    assert spans(shares_between(pieces, np.arange(12), 4)) == [(0, 4), (4, 8), (8, 12)]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_shares_hold_every_row_once(rows: list[int], rows_per_share: int, random: Any) -> None:
    pieces, total = pieces_with(*rows), sum(rows)
    starts = np.array([0, *(row for row in range(1, total) if random.random() < 0.4)])
    shares = shares_between(pieces, starts, rows_per_share)
    found = spans(shares)
    assert [row for first, last in found for row in range(first, last)] == list(range(total))
    assert {first for first, _ in found} <= set(starts.tolist())
    for share in shares:
        held = sum(piece.num_rows for piece in share.pieces)
        assert 0 <= share.start < share.pieces[0].num_rows
        # No piece more than is needed.
        assert held - share.pieces[-1].num_rows < share.start + share.num_rows <= held


def test_rows_of_a_share_go_by_what_they_cost() -> None:
    assert choose_rows_per_share(1, 1024) == 1024
    assert choose_rows_per_share(101, 1024) == 128  # 16,384 / 101 is 162
    assert choose_rows_per_share(10_000, 1024) == 16


@pytest.mark.parametrize(
    ("asked", "texts", "shares", "joins", "nodes", "expected"),
    [
        ({}, 10_000, 10, False, [Node(cpus=8)], None),  # little work
        ({}, 50_000, 49, False, [Node(cpus=8)], None),  # one machine
        ({}, 50_000, 49, False, [Node(cpus=8, gpus=2)], (2, 4, 1)),
        ({}, 50_000, 49, True, [Node(cpus=8)], (1, 8, 0)),  # the driver of a cluster has other work
        ({}, 50_000, 49, True, [Node(cpus=8)] * 3, (3, 8, 0)),
        ({}, 50_000, 2, True, [Node(cpus=8)] * 3, (2, 8, 0)),
        ({"num": 2}, 10, 5, False, [Node(cpus=8)], (2, 4, 0)),  # asked for
        ({"num": 4, "num_cpus": 1, "num_gpus": 0}, 10, 3, False, [], (3, 1, 0)),
    ],
)
def test_who_does_it(
    asked: dict[str, Any], texts: int, shares: int, joins: bool, nodes: list[Node], expected: Any
) -> None:
    chosen = choose_workers(
        FittedWorkersConfig(**asked), texts, shares, joins_cluster=joins, find_nodes=lambda: nodes
    )
    assert (chosen and (chosen.num, chosen.num_cpus, chosen.num_gpus)) == expected


class Upper:
    """Writes the texts of a share in capitals; `fail_at` ends the job there, as a kill would."""

    calls: ClassVar[list[str]] = []

    def __init__(self, fail_at: str | None = None) -> None:
        self._fail_at = fail_at

    def __call__(self, table: pa.Table, sink: Sink) -> dict[str, Any]:
        texts = table["text"].to_pylist()
        if self._fail_at in texts:
            sink.write(b"half")
            raise KeyboardInterrupt
        Upper.calls += texts
        sink.write("".join(f"{text.upper()}\n" for text in texts).encode())
        return {"rows": len(texts)}


def upper(fail_at: str | None = None) -> Upper:
    return Upper(fail_at)


def job_of(folder: Path, fail_at: str | None = None, content: str = "a") -> FileJob:
    (folder / "in.txt").write_text("".join(f"text {i}\n" for i in range(10)))
    surveyed = survey(InputConfig(path=str(folder / "in.txt")), "lines", 3)
    return FileJob(
        output=Location.of(folder / "out.txt"),
        shares=shares_of(surveyed.pieces),
        open_worker=upper,
        arguments=(fail_at,),
        content={"content": content},
    )


EXPECTED = "".join(f"TEXT {i}\n" for i in range(10))


def test_a_job_that_was_ended_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_shares(job_of(tmp_path, fail_at="text 7"), None, join_bytes)
    assert not (tmp_path / "out.txt").exists()
    Upper.calls = []
    figures, num_done = run_shares(job_of(tmp_path), None, join_bytes)
    assert num_done == 4
    assert Upper.calls == ["text 6", "text 7", "text 8", "text 9"]
    assert figures == [{"rows": 3}, {"rows": 3}, {"rows": 3}, {"rows": 1}]
    assert (tmp_path / "out.txt").read_text() == EXPECTED
    assert sorted(place.name for place in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_parts_of_another_job_are_done_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_shares(job_of(tmp_path, fail_at="text 7"), None, join_bytes)
    Upper.calls = []
    run_shares(job_of(tmp_path, content="b"), None, join_bytes)
    assert len(Upper.calls) == 10
    assert "begun with other settings, models or rows" in capsys.readouterr().err
    assert (tmp_path / "out.txt").read_text() == EXPECTED


@pytest.mark.parametrize("damage", ["record", "part", "cut"])
def test_a_damaged_part_is_done_again(tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_shares(job_of(tmp_path, fail_at="text 7"), None, join_bytes)
    part = tmp_path / ".out.txt.parts" / "part-00000000"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        (part if damage == "part" else part.with_name(f"{part.name}.json")).unlink()
    Upper.calls = []
    run_shares(job_of(tmp_path), None, join_bytes)
    assert Upper.calls[:3] == ["text 0", "text 1", "text 2"]
    assert (tmp_path / "out.txt").read_text() == EXPECTED


def test_one_job_at_a_time_writes_to_an_output(tmp_path: Path) -> None:
    with (
        writer_lease(Location.of(tmp_path / ".out.txt.lock"), owner="somebody"),
        pytest.raises(InputError, match="is being written by another job"),
    ):
        run_shares(job_of(tmp_path), None, join_bytes)


def test_parquet_parts_become_one_file(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        pq.write_table(pa.table({"n": [number, number + 10]}), tmp_path / f"part {number}")
        parts.append(Location.of(tmp_path / f"part {number}"))
    with Location.of(tmp_path / "all.parquet").open_write() as sink:
        join_parquet(parts, sink)
    assert pq.read_table(tmp_path / "all.parquet")["n"].to_pylist() == [0, 10, 1, 11, 2, 12]


def test_the_identity_tells_what_decides_the_output(tmp_path: Path) -> None:
    first = job_of(tmp_path)
    assert first.identity == job_of(tmp_path).identity
    assert first.identity != job_of(tmp_path, content="b").identity
    assert json.loads(json.dumps(first.content)) == first.content
    assert run_module._record(first.part(3)).name == "part-00000003.json"
    assert sum(table.num_rows for table in read_pieces(first.shares[0].pieces)) == 3


class Numbered:
    """Writes the numbers of a share's rows, and beside them those that are divisible by 4."""

    def __init__(self, fail_at: int | None = None) -> None:
        self._fail_at = fail_at

    def __call__(self, table: pa.Table, sink: Sink, *beside: Sink) -> dict[str, Any]:
        numbers = table[NUMBER].to_pylist()
        for each in beside:
            each.write("".join(f"{number}\n" for number in numbers if number % 4 == 0).encode())
        if self._fail_at in numbers:
            raise KeyboardInterrupt
        Upper.calls += table["text"].to_pylist()
        sink.write("".join(f"{number}\n" for number in numbers).encode())
        return {}


def numbered(fail_at: int | None = None) -> Numbered:
    return Numbered(fail_at)


def numbered_job(folder: Path, fail_at: int | None = None) -> FileJob:
    (folder / "in.txt").write_text("".join(f"text {i}\n" for i in range(10)))
    surveyed = survey(InputConfig(path=str(folder / "in.txt")), "lines", 3)
    return FileJob(
        output=Location.of(folder / "out.txt"),
        shares=shares_of(surveyed.pieces, are_numbered=True),
        open_worker=numbered,
        arguments=(fail_at,),
        content={},
        beside=[FileBeside(Location.of(folder / "fours.txt"), join_bytes)],
    )


def test_rows_are_numbered_over_the_whole_input_and_two_files_are_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_shares(numbered_job(tmp_path, fail_at=7), None, join_bytes)
    assert sorted(place.name for place in tmp_path.iterdir() if place.is_file()) == ["in.txt"]
    parts = tmp_path / ".out.txt.parts"
    # The second share is whole in one of its two parts alone.
    (parts / "part-00000001-1").write_bytes(b"4\nhalf")
    Upper.calls = []
    run_shares(numbered_job(tmp_path), None, join_bytes)
    assert Upper.calls == [f"text {i}" for i in range(3, 10)]
    assert (tmp_path / "out.txt").read_text() == "".join(f"{i}\n" for i in range(10))
    assert (tmp_path / "fours.txt").read_text() == "0\n4\n8\n"
    assert sorted(place.name for place in tmp_path.iterdir()) == ["fours.txt", "in.txt", "out.txt"]


def test_shares_of_rows_without_pieces_are_their_numbers() -> None:
    shares = shares_of_rows(7, 3)
    assert [(share.first_row, share.num_rows) for share in shares] == [(0, 3), (3, 3), (6, 1)]
    assert [run_module._rows_of(share).to_pydict() for share in shares] == [
        {NUMBER: [0, 1, 2]},
        {NUMBER: [3, 4, 5]},
        {NUMBER: [6]},
    ]


def test_shares_between_groups_are_numbered_by_their_first_row() -> None:
    shares = shares_between(pieces_with(4, 4, 4), np.array([0, 3, 9]), 4)
    assert [share.first_row for share in shares] == [0, 9]
