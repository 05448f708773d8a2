"""How often an index build reads the vectors: each file of embeddings once, the table once, and once more to place."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import FormatError
from raytower.index import build as build_module
from raytower.index import embeddings as embeddings_module
from raytower.index.build import plan_build
from raytower.index.config import IndexBuildConfig
from raytower.index.embeddings import Embeddings
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest, version_names
from raytower.storage import HashedFile, Location
from raytower.storage import hashed as hashed_module
from tests.support.index_cases import build, unit_vectors, write_embeddings

ROWS, DIM, SHARDS = 700, 16, 3
HELD_OUT = 256
# The end of a Parquet file is read for its columns, and again before its rows.
FOOTERS = 2 * 2**16


class Counted:
    """A stream of a file, the bytes read from which are counted."""

    closed = False

    def __init__(self, stream: Any, count: Counter[str], name: str) -> None:
        self._stream, self._count, self._name = stream, count, name

    def read(self, size: int | None = None) -> bytes:
        content: bytes = self._stream.read(size)
        self._count[self._name] += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read by file, rows decoded from files, and rows whose vectors came from the table."""
    count: Counter[str] = Counter()
    opened, decoded, taken = Location.open_read, embeddings_module._vectors_of, DocumentTable.vectors

    def open_read(place: Location) -> Any:
        stream = opened(place)
        return Counted(stream, count, place.name) if place.name.endswith(".parquet") else stream

    def vectors_of(table: Any, *arguments: Any) -> Any:
        count["decoded"] += table.num_rows
        return decoded(table, *arguments)

    def vectors(table: DocumentTable, rows: np.ndarray, *, unit: bool) -> Any:
        count["table"] += len(rows)
        return taken(table, rows, unit=unit)

    monkeypatch.setattr(Location, "open_read", open_read)
    monkeypatch.setattr(embeddings_module, "_vectors_of", vectors_of)
    monkeypatch.setattr(DocumentTable, "vectors", vectors)
    return count


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two files, each larger than the two readings of its end."""
    folder = tmp_path_factory.mktemp("embeddings")
    noise = [os.urandom(500).hex() for _ in range(ROWS)]
    names = [f"d{row}" for row in range(ROWS)]
    return write_embeddings(folder, names, unit_vectors(ROWS, DIM), noise, rows_per_file=ROWS // 2)


@pytest.mark.parametrize("placement", ["rows", "cluster"])
@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "hnsw", "ivf_pq", "ivf_rabitq"])
def test_a_build_reads_files_once_and_the_table_once_or_twice(
    kind: Any, placement: Any, embeddings: str, tmp_path: Path, read: Counter[str]
) -> None:
    values = {"embeddings": embeddings, "output": str(tmp_path / "index"), "kind": kind, "shards": SHARDS}
    sampled = plan_build(IndexBuildConfig.model_validate(values))["train_rows"]
    build(tmp_path / "index", embeddings, kind=kind, shards=SHARDS, placement=placement)
    for file in Path(embeddings).glob("*.parquet"):
        size = file.stat().st_size
        assert size > FOOTERS
        assert size <= read[file.name] <= size + FOOTERS
    assert read["decoded"] == ROWS
    # Placed by cluster, all rows are the sample here, and each is assigned before it is put into its shard.
    passes = 1 if placement == "rows" else 3
    assert read["table"] == passes * ROWS + sampled + HELD_OUT


def test_a_restart_reads_finished_shards_once_and_measures_the_same(
    embeddings: str, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    build(whole, embeddings, kind="ivf_flat", shards=2)
    build_shard, left = build_module.build_shard, [1]

    def dying(*arguments: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return build_shard(*arguments)

    monkeypatch.setattr(build_module, "build_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", embeddings, kind="ivf_flat", shards=2)
    assert not version_names(Location.of(tmp_path / "index"))
    monkeypatch.setattr(build_module, "build_shard", build_shard)
    read.clear()
    build(tmp_path / "index", embeddings, kind="ivf_flat", shards=2)
    assert read["decoded"] == 0, "the table is taken again"
    sampled = open_manifest(whole).rows
    assert read["table"] <= ROWS + sampled + HELD_OUT
    made, wanted = open_manifest(tmp_path / "index"), open_manifest(whole)
    assert made.measured == wanted.measured
    assert made.search_parameters == wanted.search_parameters
    assert made.measured is not None
    assert made.measured.queries == HELD_OUT


@pytest.mark.parametrize("place", ["vectors", "texts"])
def test_a_changed_file_is_said_to_be_changed_and_nothing_is_published(
    place: str, embeddings: str, tmp_path: Path
) -> None:
    for file in Path(embeddings).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = max(tmp_path.glob("*.parquet"))
    content = bytearray(file.read_bytes())
    vector = unit_vectors(ROWS, DIM)[-1].tobytes()
    at = content.index(vector) + 3 if place == "vectors" else 40
    content[at] ^= 0x7F
    file.write_bytes(content)
    with pytest.raises(FormatError, match="it was changed"):
        list(Embeddings(Location.of(tmp_path)).stream(1))
    with pytest.raises(FormatError, match="it was changed"):
        build(tmp_path / "index", str(tmp_path), kind="flat")
    assert not version_names(Location.of(tmp_path / "index"))


class TestHashedFile:
    @pytest.mark.parametrize("kept", [1, 30, 10_000])
    def test_what_is_read_is_the_file_and_so_is_the_checksum(
        self, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hashed_module, "_KEPT_BYTES", kept)
        monkeypatch.setattr(Location, "read_chunk", lambda place, stream: bytes(stream.read(13)))
        content = np.random.default_rng(0).bytes(1_000)
        (tmp_path / "file").write_bytes(content)
        place = Location.of(tmp_path / "file")
        draw = np.random.default_rng(1)
        with HashedFile(place) as file:
            for start, size in zip(draw.integers(0, 1_100, 200), draw.integers(0, 90, 200), strict=True):
                file.seek(start)
                assert file.read(size) == content[start : start + size]
                assert file.tell() == max(start, min(start + size, 1_000))
            assert file.sha256() == place.sha256()
        with HashedFile(place) as file:
            assert file.read() == content
            assert file.seek(-3, io.SEEK_END) == 997
            assert file.read() == content[-3:]

    def test_a_little_way_back_costs_no_reading(self, tmp_path: Path, read: Counter[str]) -> None:
        (tmp_path / "a.parquet").write_bytes(bytes(1_000))
        with HashedFile(Location.of(tmp_path / "a.parquet")) as file:
            for start in (900, 100, 500, 0):
                file.seek(start)
                file.read(100)
            file.sha256()
        assert read["a.parquet"] == 1_000
