"""Rows in compressed files and huge row groups are copied once, and the copies give the same rows."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data import sources
from raytower.data.config import InputConfig
from raytower.data.copied import CopiedRows
from raytower.data.pieces import Picked, Piece, Survey, read_piece, survey
from raytower.data.records import RecordKind
from raytower.errors import InputError
from raytower.storage import Location
from raytower.training import copies, runner
from raytower.training.copies import copy_where_needed, pieces_to_copy
from raytower.training.loop import TrainingPlan
from raytower.training.retriever import plan_train_retriever, train_retriever
from raytower.training.row_stream import MixedPlan, StreamPlan, stream_batches
from tests.support.data_files import beir_folder, write, write_jsonl
from tests.support.tiny_training import retriever_config

TEXT = "".join(f"question {i}\tanswer {i}\n" for i in range(60))


def pieces_of(path: Path, kind: RecordKind = "pairs", rows: int = 5) -> tuple[Piece, ...]:
    return survey(InputConfig(path=str(path)), kind, rows).pieces


def rows_of(pieces: Sequence[Piece]) -> list[list[dict[str, Any]]]:
    return [read_piece(piece).to_pylist() for piece in pieces]


def parquet(path: Path, row_group_size: int) -> Path:
    rows = [line.split("\t") for line in TEXT.splitlines()]
    table = pa.table({"query": [row[0] for row in rows], "document": [row[1] for row in rows]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_which_pieces_are_copied(tmp_path: Path) -> None:
    """Those of a compressed file, or of a row group, of more than eight pieces."""
    plain = pieces_of(write(tmp_path / "plain.tsv", TEXT))
    assert pieces_to_copy(plain) == []
    small = gzip.compress("".join(TEXT.splitlines(keepends=True)[:40]).encode())
    assert pieces_to_copy(pieces_of(write(tmp_path / "small.tsv.gz", small))) == []
    assert pieces_to_copy(pieces_of(write(tmp_path / "big.tsv.gz", gzip.compress(TEXT.encode())))) == list(
        range(12)
    )
    assert pieces_to_copy(pieces_of(parquet(tmp_path / "small.parquet", 40))) == []
    # The second row group has three pieces.
    assert pieces_to_copy(pieces_of(parquet(tmp_path / "big.parquet", 45))) == list(range(9))
    folder = beir_folder(tmp_path / "beir")
    assert pieces_to_copy(pieces_of(folder, rows=1)) == []


@pytest.mark.parametrize("name", ["rows.tsv.gz", "rows.parquet"])
def test_copies_give_the_same_rows_in_the_same_order(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        write(path, gzip.compress(TEXT.encode()))
    else:
        parquet(path, 60)
    pieces = list(pieces_of(path))
    odd = np.arange(5) % 2 == 1
    pieces[3] = replace(pieces[3], picked=Picked.of(odd), num_rows=2)
    expected = rows_of(pieces)
    folder = Location.of(tmp_path / "rows")
    copied = copy_where_needed(pieces, folder)
    path.unlink()
    assert all(isinstance(piece.source, CopiedRows) for piece in copied)
    assert rows_of(copied[::-1])[::-1] == expected
    assert [piece.num_rows for piece in copied] == [len(rows) for rows in expected]
    assert read_piece(copied[0]).schema.equals(copied[0].schema, check_metadata=True)


def test_lists_and_labels_are_copied_too(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "documents": ["a", f"b{i}"], "scores": [1, 0.5]} for i in range(40)]
    plain = write_jsonl(tmp_path / "lists.jsonl", rows)
    path = write(tmp_path / "lists.jsonl.gz", gzip.compress(plain.read_bytes()))
    pieces = pieces_of(path, "candidates", 4)
    assert rows_of(copy_where_needed(pieces, Location.of(tmp_path / "a"))) == rows_of(pieces)
    texts = write(tmp_path / "texts.txt.gz", gzip.compress(TEXT.replace("\t", " ").encode()))
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    labelled = [replace(piece, label="tea", schema=schema) for piece in pieces_of(texts, "lines")]
    assert rows_of(copy_where_needed(labelled, Location.of(tmp_path / "b"))) == rows_of(labelled)


def test_a_job_that_was_killed_takes_the_copies_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytower.training.copies._PIECES_PER_FILE", 5)
    pieces = pieces_of(write(tmp_path / "rows.tsv.gz", gzip.compress(TEXT.encode())))
    folder = Location.of(tmp_path / "rows")
    expected = rows_of(copy_where_needed(pieces, folder))
    files = sorted((tmp_path / "rows").iterdir())
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-20])
    written = [file.stat().st_ino for file in files]
    assert rows_of(copy_where_needed(pieces, folder)) == expected
    assert [file.stat().st_ino == before for file, before in zip(files, written, strict=True)] == [
        True,
        False,
        True,
    ]
    # A copy of other pieces is none of these.
    others = [replace(piece, num_rows=4, picked=Picked.of(np.arange(5) > 0)) for piece in pieces]
    assert rows_of(copy_where_needed(others, folder)) == [rows[1:] for rows in expected]


def test_a_copy_that_is_gone_is_named(tmp_path: Path) -> None:
    pieces = copy_where_needed(
        pieces_of(write(tmp_path / "rows.tsv.gz", gzip.compress(TEXT.encode()))),
        Location.of(tmp_path / "rows"),
    )
    (file,) = (tmp_path / "rows").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a copy of training rows, cannot be read"):
        read_piece(pieces[0])


def test_training_reads_a_compressed_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was decompressed from its beginning for nearly each piece: 1e8 rows at 2,400 a second."""
    pieces = pieces_of(write(tmp_path / "rows.tsv.gz", gzip.compress(TEXT.encode())))
    opened: list[str] = []
    plain = sources.SourceFile.open

    def counted(file: sources.SourceFile) -> pa.NativeFile:
        opened.append(file.location.name)
        return plain(file)

    monkeypatch.setattr(sources.SourceFile, "open", counted)
    copied = copy_where_needed(pieces, Location.of(tmp_path / "rows"))
    plan = StreamPlan(pieces=pieces, batch_size=6, num_batches=30, seed=1, window_rows=15)
    of_copies = list(stream_batches(replace(plan, pieces=copied)))
    assert opened == ["rows.tsv.gz"]
    assert of_copies == list(stream_batches(plan))
    assert len(opened) > 10


def test_a_run_reads_copies_beside_its_checkpoints(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MOST_PIECES", 0)
    path = write(tmp_path / "rows.tsv.gz", gzip.compress(TEXT.encode()))
    config = retriever_config(still_encoder, path, tmp_path / "out")
    assert plan_train_retriever(config)["copied_rows"] == 60
    assert not list(tmp_path.glob(".out.*"))
    taken: list[Piece] = []

    def stop(config: Any, surveyed: Survey, *_: Any) -> None:
        taken.extend(surveyed.pieces)
        raise InterruptedError

    monkeypatch.setattr(runner, "_make_plan", stop)
    with pytest.raises(InterruptedError):
        train_retriever(config)
    (piece,) = taken
    (copy,) = tmp_path.glob(".out.*.train/rows/*")
    assert piece.source == CopiedRows(Location.of(copy))
    assert read_piece(piece).num_rows == 60


def test_copies_of_several_sets_lie_apart(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets have other columns; the batches are those of the files themselves."""
    monkeypatch.setattr(copies, "_MOST_PIECES", 0)
    triples = "query\ttitle\tneg_title\n" + "".join(f"q{i}\td{i}\tn{i}\n" for i in range(16))
    sets = {
        "pairs": str(write(tmp_path / "pairs.tsv.gz", gzip.compress(TEXT.encode()))),
        "triples": str(write(tmp_path / "triples.tsv.gz", gzip.compress(triples.encode()))),
        "plain": str(write(tmp_path / "plain.tsv", TEXT)),
    }
    config = retriever_config(
        still_encoder, tmp_path / "pairs.tsv.gz", tmp_path / "out", train={"sets": sets}
    )
    assert plan_train_retriever(config)["copied_rows"] == 60 + 16
    plans: list[TrainingPlan] = []
    make_plan = runner._make_plan

    def stop(config: Any, surveyed: Survey, task: Any, *rest: Any) -> None:
        plans.extend(make_plan(config, own, task, *rest) for own in (surveyed, task.survey(config)))
        raise InterruptedError

    monkeypatch.setattr(runner, "_make_plan", stop)
    with pytest.raises(InterruptedError):
        train_retriever(config)
    copied, read = (plan.stream for plan in plans)
    assert isinstance(copied, MixedPlan)
    for name, own in copied.sets.items():
        found = list(tmp_path.glob(f".out.*.train/rows/{name}/*"))
        assert [piece.source for piece in own.pieces if isinstance(piece.source, CopiedRows)] == [
            CopiedRows(Location.of(path)) for path in found
        ]
        assert len(found) == (name != "plain")
    assert len(copied.pieces) == 3
    assert sum(isinstance(piece.source, CopiedRows) for piece in copied.pieces) == 2
    assert list(stream_batches(copied)) == list(stream_batches(read))
