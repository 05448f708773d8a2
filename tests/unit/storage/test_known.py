"""Checksums that are remembered: never those of another content."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from raytower.storage import Location, known, known_sha256
from tests.support.s3_server import s3_server

OLD = 10**18  # 2001


@pytest.fixture
def readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read; every size is worth a note, and no clock ticks slowly."""
    read: list[str] = []
    plain = Location.sha256

    def counted(place: Location) -> str:
        read.append(place.name)
        return plain(place)

    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_NOTED_BYTES", 1)
    monkeypatch.setattr(known, "_SETTLED_NS", -1)
    monkeypatch.setattr(Location, "sha256", counted)
    return read


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_until_it_is_written(tmp_path: Path, readings: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert [known_sha256(Location.of(file)) for _ in range(3)] == [sha256(b"one")] * 3
    assert readings == ["weights"]
    (tmp_path / "link").symlink_to(file)
    assert known_sha256(Location.of(tmp_path / "link")) == sha256(b"one")
    assert readings == ["weights"]
    file.write_bytes(b"two")
    assert known_sha256(Location.of(file)) == sha256(b"two")
    os.replace(write(tmp_path / "other", b"six"), file)
    assert known_sha256(Location.of(file)) == sha256(b"six")


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_as_many_bytes_under_the_old_time_are_another_content(tmp_path: Path, readings: list[str]) -> None:
    file = write(tmp_path / "weights", b"one")
    os.utime(file, ns=(OLD, OLD))
    assert known_sha256(Location.of(file)) == sha256(b"one")
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"two")
    os.utime(file, ns=(OLD, OLD))
    assert known_sha256(Location.of(file)) == sha256(b"two")


def test_what_was_written_moments_ago_is_not_noted(
    tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written again within the same tick."""
    monkeypatch.setattr(known, "_SETTLED_NS", 60 * 10**9)
    file = write(tmp_path / "weights", b"one")
    known_sha256(Location.of(file))
    known_sha256(Location.of(file))
    assert len(readings) == 2
    assert not (tmp_path / "cache").exists()


def test_a_damaged_note_and_a_cache_that_cannot_be_written_cost_a_reading(
    tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "weights", b"one")
    known_sha256(Location.of(file))
    (note,) = (tmp_path / "cache" / "sha256").iterdir()
    for damage in (b"", b"[]", b'{"state": 1}', note.read_bytes()[:-9]):
        note.write_bytes(damage)
        assert known_sha256(Location.of(file)) == sha256(b"one")
    assert len(readings) == 5
    monkeypatch.setenv("RAYTOWER_CACHE", str(write(tmp_path / "no folder", b"")))
    assert known_sha256(Location.of(file)) == sha256(b"one")


def test_an_object_is_read_once_until_it_is_written(tmp_path: Path, readings: list[str]) -> None:
    """It was read through at each start: 150 GB of training rows over one stream."""
    with s3_server(tmp_path) as server:
        place = Location.of(server.uri("bucket/rows.tsv"))
        server.put("bucket", "rows.tsv", b"one")
        assert [known_sha256(place) for _ in range(3)] == [sha256(b"one")] * 3
        assert readings == ["rows.tsv"]
        server.put("bucket", "rows.tsv", b"two")
        assert known_sha256(place) == sha256(b"two")
        assert readings == ["rows.tsv"] * 2


def test_other_remote_files_are_read_each_time(tmp_path: Path, readings: list[str]) -> None:
    """Nothing is known to change whenever they are written."""
    write(tmp_path / "rows.tsv", b"one")
    place = Location(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "rows.tsv")
    assert [known_sha256(place) for _ in range(2)] == [sha256(b"one")] * 2
    assert len(readings) == 2
