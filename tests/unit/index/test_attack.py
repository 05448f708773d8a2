"""Sequences that broke an index: each is the shortest that did."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import raytower.index.build as build_module
import raytower.index.compact as compact
import raytower.index.fold as fold
from raytower.data.config import PathConfig
from raytower.errors import FormatError, InputError
from raytower.index.change import add_to_index, delete_from_index, set_in_index
from raytower.index.change_config import (
    IndexAddConfig,
    IndexDeleteConfig,
    IndexGcConfig,
    IndexRollbackConfig,
    IndexSetConfig,
)
from raytower.index.collect import collect_garbage
from raytower.index.compact import compact_index
from raytower.index.config import IndexCompactConfig
from raytower.index.json_values import json_values
from raytower.index.manage import index_rollback
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from tests.support.index_cases import HERE, build, unit_vectors, write_embeddings
from tests.support.s3_server import s3_server


def _embeddings(folder: Path, prefix: str, count: int, **columns: Any) -> str:
    ids = [f"{prefix}{number}" for number in range(count)]
    return write_embeddings(folder / f"embeddings-{prefix}", ids, unit_vectors(count), columns=columns)


class TestAttack:
    def test_rows_folded_while_compaction_runs_are_hits_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 20))
        add_to_index(IndexAddConfig(index=index, embeddings=_embeddings(tmp_path, "b", 3)))
        monkeypatch.setattr(fold, "TAIL_ROWS", 10)

        def built(*arguments: Any) -> Any:
            made = build_module.build_shards(*arguments)
            add_to_index(IndexAddConfig(index=index, embeddings=_embeddings(tmp_path, "c", 20)))
            return made

        monkeypatch.setattr(compact, "build_shards", built)
        compact_index(IndexCompactConfig(index=index), run=HERE)
        hits = Index.open(index).search(unit_vectors(1), 60).rows[0]
        assert sorted(hits.tolist()) == list(range(43))

    def test_a_build_that_was_rolled_back_is_not_made_again(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        other = _embeddings(tmp_path, "b", 6)
        build(index, _embeddings(tmp_path, "a", 5))
        build(index, other)
        index_rollback(IndexRollbackConfig(index=index, to="000001"))
        build(index, other)
        assert (open_manifest(index).version, open_manifest(index).rows) == ("000003", 5)

    def test_a_killed_build_goes_on_after_its_table_was_collected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 5))
        other = _embeddings(tmp_path, "b", 6)
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "build_shards", _killed)
            with pytest.raises(KeyboardInterrupt):
                build(index, other)
        delete_from_index(IndexDeleteConfig(index=index, ids=["a0"]))
        collect_garbage(IndexGcConfig(index=index, keep=1))
        build(index, other, replace=True)
        assert sorted(document.id for document in _documents(index)) == [f"b{number}" for number in range(6)]

    def test_lines_with_other_keys_set_nothing(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 3, price=pa.array([0, 1, 2]), year=pa.array([0, 1, 2])))
        path = tmp_path / "values.jsonl"
        path.write_text('{"id": "a1", "price": 9}\n{"id": "a2", "year": 9}\n')
        with pytest.raises(InputError, match="line 2 has the keys"):
            set_in_index(IndexSetConfig(index=index, input=PathConfig(path=str(path))))
        assert [document.metadata["price"] for document in _documents(index)] == [0, 1, 2]

    def test_lists_of_integers_take_floats(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 2, tags=pa.array([[1], [2]])))
        added = _embeddings(tmp_path, "b", 2, tags=pa.array([[1.5], [2.5]]))
        add_to_index(IndexAddConfig(index=index, embeddings=added))
        tags = [document.metadata["tags"] for document in _documents(index)]
        assert tags == [[1.0], [2.0], [1.5], [2.5]]

    def test_lists_that_were_all_empty_take_members(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 2, tags=pa.array([[], []], pa.list_(pa.null()))))
        added = _embeddings(tmp_path, "b", 2, tags=pa.array([["x"], ["y"]]))
        add_to_index(IndexAddConfig(index=index, embeddings=added))
        assert [document.metadata["tags"] for document in _documents(index)] == [[], [], ["x"], ["y"]]

    @pytest.mark.parametrize(
        ("held", "added", "types"),
        [
            (
                pa.array([[2**60 + 1], []]),
                pa.array([[1.5], []]),
                "list<.*int64> .* list<.*double>",
            ),
            (
                pa.array([datetime(9999, 1, 1), None], pa.timestamp("us")),
                pa.array([None, None], pa.timestamp("ns")),
                r"timestamp\[us\] .* timestamp\[ns\]",
            ),
        ],
        ids=["integers in lists", "moments"],
    )
    def test_values_that_the_wider_type_does_not_hold_are_refused_by_name(
        self, tmp_path: Path, held: pa.Array, added: pa.Array, types: str
    ) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 2, odd=held))
        with pytest.raises(InputError, match=f"column 'odd' is {types}"):
            add_to_index(IndexAddConfig(index=index, embeddings=_embeddings(tmp_path, "b", 2, odd=added)))
        assert [document.metadata["odd"] for document in _documents(index)] == json_values(held)

    def test_the_copy_that_widens_a_column_takes_no_name_of_another(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        held, wider = {"x": pa.array([1]), "_x_widened": pa.array([7])}, {"x": pa.array([1.5])}
        build(index, _embeddings(tmp_path, "a", 1, **held))
        add_to_index(IndexAddConfig(index=index, embeddings=_embeddings(tmp_path, "b", 1, **wider)))
        values = [(document.metadata["x"], document.metadata["_x_widened"]) for document in _documents(index)]
        assert values == [(1.0, 7), (1.5, None)]

    def test_a_graph_that_was_folded_while_another_kind_was_built_is_built_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = str(tmp_path / "index")
        monkeypatch.setattr(fold, "TAIL_ROWS", 10)
        build(index, _embeddings(tmp_path, "a", 200), kind="hnsw")

        def built(*arguments: Any) -> Any:
            made = build_module.build_shards(*arguments)
            add_to_index(IndexAddConfig(index=index, embeddings=_embeddings(tmp_path, "b", 20)))
            assert [entry.kind for entry in open_manifest(index).shards] == ["hnsw", "hnsw"]
            return made

        monkeypatch.setattr(compact, "build_shards", built)
        compact_index(IndexCompactConfig(index=index, kind="ivf_flat"), run=HERE)
        assert {entry.kind for entry in open_manifest(index).shards} <= {"flat", "ivf_flat"}
        hits = Index.open(index).search(unit_vectors(1), 300, search_parameters={"nprobe": 100}).rows[0]
        assert sorted(hits.tolist()) == list(range(220))

    @pytest.mark.parametrize("distinct", [1, 2])
    def test_fewer_distinct_vectors_than_placed_shards_make_fewer_shards(
        self, tmp_path: Path, distinct: int
    ) -> None:
        index = tmp_path / "index"
        vectors = unit_vectors(distinct)[np.arange(30) % distinct]
        embeddings = write_embeddings(tmp_path / "embeddings", [f"a{n}" for n in range(30)], vectors)
        build(index, embeddings, shards=3, placement="cluster")
        assert len(open_manifest(str(index)).shards) == distinct
        hits = Index.open(str(index)).search(vectors[:1], 30).rows[0]
        assert sorted(hits.tolist()) == list(range(30))

    @pytest.mark.parametrize("head", [False, True], ids=["numbers", "head"])
    def test_nothing_is_published_over_a_damaged_list_of_rows(self, tmp_path: Path, head: bool) -> None:
        index = tmp_path / "index"
        build(index, _embeddings(tmp_path, "a", 100))
        (path,) = index.glob("shards/*/rows.npy")
        content = bytearray(path.read_bytes())
        # NumPy reads a head that opens a bracket too many as Python source without an end.
        content[100:101] = b"(" if head else content[100:101]
        content[500:] = content[500:] if head else bytes(len(content) - 500)
        path.write_bytes(content)
        for change in (
            lambda: Index.open(str(index)),
            lambda: delete_from_index(IndexDeleteConfig(index=str(index), ids=["a1"])),
            lambda: add_to_index(IndexAddConfig(index=str(index), embeddings=_embeddings(tmp_path, "b", 2))),
        ):
            with pytest.raises(FormatError, match="array does" if head else "do not rise"):
                change()
        assert open_manifest(str(index)).version == "000001"

    @pytest.mark.parametrize("folder", ["shards", "placement"])
    def test_what_only_a_cache_still_holds_is_missed_before_anything_is_published(
        self, tmp_path: Path, folder: str
    ) -> None:
        with s3_server(tmp_path) as s3:
            s3.client.create_bucket(Bucket="bucket")
            index = s3.uri("bucket/index")
            build(index, _embeddings(tmp_path, "a", 100), shards=2, placement="cluster")
            Index.open(index)
            (key, *_) = (key for key in s3.keys("bucket", f"index/{folder}") if not key.endswith(".json"))
            s3.client.delete_object(Bucket="bucket", Key=key)
            with pytest.raises(FormatError, match="is missing"):
                delete_from_index(IndexDeleteConfig(index=index, ids=["a1"]))
            assert open_manifest(index).version == "000001"

    def test_a_set_that_was_made_before_publishes_nothing(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 3, price=pa.array([0, 1, 2])))
        for _ in range(2):
            set_in_index(IndexSetConfig(index=index, values={"price": 9}, filter={"id": "a1"}))
        assert open_manifest(index).version == "000002"

    @pytest.mark.parametrize("value", [["p", "it's"], [], [None, "p"], None])
    def test_a_filter_sets_lists(self, tmp_path: Path, value: list[str | None] | None) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 2, tags=pa.array([["x"], ["y"]])))
        set_in_index(IndexSetConfig(index=index, values={"tags": value}, filter={"id": "a0"}))
        found = {document.id: document.metadata["tags"] for document in _documents(index)}
        assert found == {"a0": value, "a1": ["y"]}

    def test_a_list_column_takes_no_single_value(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 2, tags=pa.array([["x"], ["y"]])))
        with pytest.raises(InputError, match=r"values\.tags is \"z\"; column 'tags' holds lists"):
            set_in_index(IndexSetConfig(index=index, values={"tags": "z"}, filter={"id": "a0"}))
        assert open_manifest(index).version == "000001"

    def test_moments_at_the_ends_of_time_filter(self, tmp_path: Path) -> None:
        index = str(tmp_path / "index")
        build(index, _embeddings(tmp_path, "a", 1, at=pa.array([0], pa.timestamp("us", "UTC"))))
        filter = {"at": {"$gt": "0001-01-01T00:00:00+08:00"}}
        assert len(Index.open(index).search(unit_vectors(1), 1, filter=filter).rows[0]) == 1

    def test_an_indexed_column_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nope"):
            build(tmp_path / "index", _embeddings(tmp_path, "a", 2), indexed=["nope"])

    @pytest.mark.parametrize(
        "values", [pa.nulls(2), pa.array([{"a": 1}, {"a": 2}])], ids=["only nulls", "nested"]
    )
    def test_an_indexed_column_without_an_order_is_refused(self, tmp_path: Path, values: pa.Array) -> None:
        embeddings = _embeddings(tmp_path, "a", 2, odd=values)
        with pytest.raises(InputError, match="'odd' of type"):
            build(tmp_path / "index", embeddings, indexed=["odd"])


def _documents(index: str) -> Any:
    opened = Index.open(index)
    return opened.documents(opened.table.row_map.rows())


def _killed(*arguments: Any) -> None:
    raise KeyboardInterrupt
