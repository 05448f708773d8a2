"""Indexes: search against brute force, what a build refuses, what may be found in a damaged one, changes and
versions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raytower.index.compact as compact
import raytower.index.fold as fold
from raytower.config import make_config
from raytower.data.config import PathConfig
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.build import plan_build
from raytower.index.change import add_to_index, delete_from_index, plan_add, plan_delete, set_in_index
from raytower.index.change_config import (
    IndexAddConfig,
    IndexDeleteConfig,
    IndexGcConfig,
    IndexListConfig,
    IndexRollbackConfig,
    IndexSetConfig,
    IndexVerifyConfig,
)
from raytower.index.collect import collect_garbage, plan_gc
from raytower.index.compact import compact_index, plan_compact
from raytower.index.config import IndexBuildConfig, IndexCompactConfig
from raytower.index.fold import Held, plan_fold
from raytower.index.hits import merge_hits
from raytower.index.manage import index_list, index_rollback, index_verify
from raytower.index.plan import IndexRequest, split_rows
from raytower.index.reader import Index, resolve_parameters
from raytower.index.rowmap import RowMap
from raytower.index.versions import open_manifest, publish, version_names
from raytower.retrieval.lookup import find_documents
from raytower.storage import Location
from tests.support.index_cases import (
    DIM,
    HERE,
    brute_force,
    build,
    clustered_vectors,
    embeddings_of,
    found_ids,
    write_embeddings,
)

ANYWHERE = {"hnsw": {"efSearch": 400}, "ivf_flat": {"nprobe": 10_000}, "flat": {}}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A flat index of 300 rows in two shards."""
    vectors = clustered_vectors(300)
    build(tmp_path / "index", embeddings_of(tmp_path / "embeddings", vectors), shards=2)
    return tmp_path / "index", vectors


def edit_version(folder: Path, edit: Any) -> None:
    """Change the newest version's document as nobody should."""
    place = max((folder / "versions").glob("*.json"))
    values = json.loads(place.read_text())
    edit(values)
    place.write_text(json.dumps(values))


def add_twenty(index: Path, embeddings: Path) -> None:
    """Add the documents 300 to 319."""
    more = clustered_vectors(20, seed=3)
    add_to_index(IndexAddConfig(index=str(index), embeddings=embeddings_of(embeddings, more, 300)))


class TestPlanner:
    @given(rows=st.integers(1, 10**6), shards=st.integers(1, 64))
    def test_ranges_add_up_and_none_is_empty(self, rows: int, shards: int) -> None:
        shards = min(shards, rows)
        ranges = split_rows(rows, shards)
        assert [start for start, _ in ranges] == [0, *[end for _, end in ranges[:-1]]]
        assert ranges[-1][1] == rows
        sizes = [end - start for start, end in ranges]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1

    def test_auto_goes_from_exact_to_graph_to_codes(self) -> None:
        def kind(rows: int, memory: int) -> str:
            values = {"dim": 384, "shards": "auto", "memory_bytes": memory, "num_workers": 2, "recall": 0.95}
            return IndexRequest(rows=rows, kind="auto", **values).plan().kind  # type: ignore[arg-type]

        assert kind(5_000, 8 * 2**30) == "flat"
        assert kind(1_000_000, 8 * 2**30) == "hnsw"
        assert kind(10_000_000, 8 * 2**30) == "ivf_rabitq"
        assert kind(50_000_000, 8 * 2**30) == "ivf_rabitq"

    def test_what_does_not_fit_names_what_would(self) -> None:
        with pytest.raises(InputError, match=r"kind ivf_rabitq \(647\.6 MiB\) would fit"):
            IndexRequest(
                rows=10_000_000,
                dim=384,
                kind="hnsw",
                shards=4,
                recall=0.95,
                memory_bytes=8 * 2**30,
                num_workers=2,
            ).plan()

    def test_more_shards_than_rows(self) -> None:
        with pytest.raises(InputError, match="shards is 4, more than the 3 rows"):
            IndexRequest(rows=3, dim=8, kind="flat", shards=4).plan()


class TestRowMap:
    @given(data=st.data())
    def test_it_equals_a_dictionary(self, data: st.DataObject) -> None:
        rows = np.array(sorted(data.draw(st.sets(st.integers(0, 60)))), np.int64)
        addresses = np.arange(len(rows)) + 1000 * data.draw(st.integers(0, 3))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
        pieces = data.draw(st.permutations(np.split(np.arange(len(rows)), cuts)))
        found = RowMap.of_batches([(rows[piece], addresses[piece]) for piece in pieces])
        known = dict(zip(rows.tolist(), addresses.tolist(), strict=True))
        assert found.rows().tolist() == rows.tolist()
        asked = np.arange(-2, 65)
        assert found.addresses_of(asked).tolist() == [known.get(row, -1) for row in asked.tolist()]
        assert found.rows_at(addresses).tolist() == rows.tolist()
        shards = [np.array(sorted(data.draw(st.sets(st.integers(0, 64)))), np.int64) for _ in range(3)]
        held = {row for shard in shards for row in shard.tolist()}
        assert found.outside(shards).tolist() == sorted(set(known) - held)
        for shard in shards:
            mask = found.live_mask(shard)
            live = [row in known for row in shard.tolist()]
            assert all(live) if mask is None else mask.tolist() == live

    def test_a_row_that_stands_twice(self) -> None:
        with pytest.raises(ValueError, match="row 3 stands twice"):
            RowMap.of_batches([(np.array([1, 2, 3]), np.arange(3)), (np.array([3]), np.array([9]))])


class TestSearch:
    @pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq"])
    def test_every_kind_gives_every_row_once_when_asked_for_more(self, kind: str, tmp_path: Path) -> None:
        vectors = clustered_vectors(1500)
        build(tmp_path / "index", embeddings_of(tmp_path / "embeddings", vectors), kind=kind, shards=2)
        index = Index.open(tmp_path / "index")
        for found in found_ids(index, vectors[:3], 2000):
            assert sorted(found) == sorted(f"id {row}" for row in range(1500))

    def test_shards_give_the_brute_force_hits(self, small: tuple[Path, np.ndarray]) -> None:
        folder, vectors = small
        queries = clustered_vectors(20, seed=5)
        assert found_ids(Index.open(folder), queries, 10) == brute_force(vectors, queries, 10)

    def test_a_part_of_the_shards_and_the_others_give_all(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, _vectors = small
        add_twenty(folder, tmp_path / "more")
        parts = [Index.open(folder, part=(number, 2)) for number in range(2)]
        queries = clustered_vectors(5, seed=8)
        merged = merge_hits([part.search(queries, 9) for part in parts], 9)
        whole = Index.open(folder).search(queries, 9)
        assert merged.rows.tolist() == whole.rows.tolist()

    def test_unnormalised_vectors_of_a_cosine_model_are_ranked_by_cosine(self, tmp_path: Path) -> None:
        vectors = np.array([[10, 10], [0.1, 0.0], [0, 3]], np.float32)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors, normalised=False))
        hits = Index.open(tmp_path / "index").search(np.array([[5.0, 0.0]]), 3)
        assert hits.rows.tolist() == [[1, 0, 2]]
        assert np.allclose(hits.scores, [[1, np.sqrt(0.5), 0]], atol=1e-6)

    @pytest.mark.parametrize("k", [0, -1])
    def test_k_below_one(self, small: tuple[Path, np.ndarray], k: int) -> None:
        with pytest.raises(InputError, match=f"k is {k}"):
            Index.open(small[0]).search(small[1][:1], k)

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            (np.zeros((1, DIM)), "zero"),
            (np.full((1, DIM), np.nan), "NaN"),
            (np.ones((1, DIM + 1)), r"shape \(1, 25\)"),
            (np.ones(DIM), "shape"),
        ],
    )
    def test_queries_that_cannot_be_searched(
        self, small: tuple[Path, np.ndarray], queries: np.ndarray, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            Index.open(small[0]).search(queries, 3)

    @pytest.mark.parametrize(
        ("kind", "placement"), [("hnsw", "rows"), ("ivf_flat", "rows"), ("flat", "cluster")]
    )
    def test_the_recall_of_a_version_is_that_of_what_is_served(
        self, kind: str, placement: str, tmp_path: Path
    ) -> None:
        vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        build(
            tmp_path / "index",
            embeddings_of(tmp_path / "e", vectors),
            kind=kind,
            shards=4,
            placement=placement,
        )
        index = Index.open(tmp_path / "index")
        asked = np.random.default_rng(5).choice(3000, 500, replace=False)
        hits = index.search(vectors[asked], 11).rows
        exact = np.argsort(-(vectors[asked] @ vectors.T), axis=1)[:, :11]
        right = sum(
            len((set(found) & set(best)) - {own})
            for found, best, own in zip(hits.tolist(), exact.tolist(), asked.tolist(), strict=True)
        )
        claimed = index.manifest.recall
        assert claimed is not None
        # Two standard deviations of a mean over 500 queries, were their hits found independently in tens.
        assert right / 5000 >= claimed - 2 * np.sqrt(claimed * (1 - claimed) / 500) - 0.002

    def test_more_hits_than_were_measured_are_searched_wider(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(400)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors), kind="ivf_flat")
        manifest = open_manifest(tmp_path / "index")
        measured = {int(depth): values["nprobe"] for depth, values in manifest.search_parameters.items()}
        deepest = max(measured)
        assert resolve_parameters(manifest, 3 * deepest)["nprobe"] == 3 * measured[deepest]
        assert resolve_parameters(manifest, 5, {"nprobe": 2}) == {"nprobe": 2}
        with pytest.raises(InputError, match="efSearch"):
            resolve_parameters(manifest, 5, {"efSearch": 2})


class TestBuild:
    def test_the_plan_writes_nothing(self, tmp_path: Path) -> None:
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(50))
        plan = plan_build(IndexBuildConfig(embeddings=embeddings, output=str(tmp_path / "index")))
        assert (plan["rows"], plan["kind"]) == (50, "flat")
        assert not (tmp_path / "index").exists()

    @pytest.mark.parametrize(("bad", "message"), [(np.nan, "NaN"), (0.0, "zero")])
    def test_vectors_that_cannot_be_indexed_are_named(self, tmp_path: Path, bad: float, message: str) -> None:
        vectors = clustered_vectors(30)
        vectors[17] = bad
        with pytest.raises(InputError, match=f"row 17: id 'id 17' has a vector that .*{message}"):
            build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors))
        assert version_names(Location.of(tmp_path / "index")) == []

    def test_ids_that_stand_twice(self, tmp_path: Path) -> None:
        ids = [f"id {row}" for row in range(250)]
        ids[240] = "id 3"
        with pytest.raises(InputError, match="id 'id 3' stands twice"):
            build(tmp_path / "index", embeddings_of(tmp_path / "e", clustered_vectors(250), ids=ids))

    def test_changed_or_missing_embeddings(self, tmp_path: Path) -> None:
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(150))
        part = tmp_path / "e" / "part-00000001.parquet"
        whole = part.read_bytes()
        part.write_bytes(whole[:-1] + b"x")
        with pytest.raises((FormatError, RaytowerError), match=r"part-00000001\.parquet"):
            build(tmp_path / "index", embeddings)
        part.unlink()
        with pytest.raises(FormatError, match=r"part-00000001\.parquet is missing"):
            build(tmp_path / "index", embeddings)
        part.write_bytes(whole)
        assert build(tmp_path / "index", embeddings)["rows"] == 150

    def test_a_finished_build_never_undoes_a_later_change(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, vectors = small
        add_twenty(folder, tmp_path / "more")
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 1"]))
        before = open_manifest(folder)
        again = build(folder, str(tmp_path / "embeddings"), shards=2)
        assert again["version"] == before.version == open_manifest(folder).version
        index = Index.open(folder)
        assert index.num_rows == 319
        assert "id 1" not in found_ids(index, vectors[1:2], 319)[0]
        replaced = build(folder, str(tmp_path / "embeddings"), shards=2, replace=True)
        assert (replaced["version"], replaced["rows"]) == ("000004", 300)

    def test_another_build_does_not_take_the_place_of_changes_unasked(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, _ = small
        other = embeddings_of(tmp_path / "other", clustered_vectors(40, seed=4))
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 1"]))
        with pytest.raises(InputError, match="replace: true"):
            build(folder, other)
        assert build(folder, other, replace=True)["rows"] == 40

    def test_a_change_published_while_a_build_ran_is_not_lost(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, _ = small
        other = embeddings_of(tmp_path / "other", clustered_vectors(40, seed=4))
        import raytower.index.build as module

        measured = module.measured_against

        def meanwhile(*arguments: Any) -> Any:
            delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 2"]))
            return measured(*arguments)

        monkeypatch.setattr(module, "measured_against", meanwhile)
        with pytest.raises(InputError, match="published by now"):
            build(folder, other)
        assert Index.open(folder).num_rows == 299

    def test_a_killed_build_keeps_its_table_and_its_finished_shards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import raytower.index.build as module

        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(300))
        build_shard, built = module.build_shard, []

        def dying(*call: Any) -> Any:
            if len(built) == 2:
                raise KeyboardInterrupt
            built.append(build_shard(*call))
            return built[-1]

        monkeypatch.setattr(module, "build_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "index", embeddings, shards=4)
        kept = {
            path: path.stat().st_mtime_ns for path in (tmp_path / "index" / "shards").rglob("vectors.faiss")
        }
        assert len(kept) == 2
        built.clear()
        monkeypatch.setattr(module, "build_shard", lambda *call: built.append(1) or build_shard(*call))
        assert build(tmp_path / "index", embeddings, shards=4)["rows"] == 300
        assert len(built) == 2
        assert {path: path.stat().st_mtime_ns for path in kept} == kept

    def test_a_damaged_shard_is_not_taken_up_by_a_restart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import raytower.index.build as module

        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(300))
        publish_build = module.publish
        monkeypatch.setattr(module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "index", embeddings, shards=2)
        victim = sorted((tmp_path / "index" / "shards").rglob("vectors.faiss"))[0]
        content = bytearray(victim.read_bytes())
        content[-1] ^= 255
        victim.write_bytes(content)
        monkeypatch.setattr(module, "publish", publish_build)
        build(tmp_path / "index", embeddings, shards=2)
        assert index_verify(IndexVerifyConfig(index=str(tmp_path / "index")))["verified"]

    @pytest.mark.parametrize("missed", ["publish", "keep"])
    def test_a_target_that_is_missed(
        self, tmp_path: Path, missed: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(2000))
        target = {"recall": 1.0, "on_target_missed": missed}
        settings = {"kind": "ivf_pq", "rescore": False, "target": target}
        if missed == "keep":
            with pytest.raises(InputError, match="nothing was published"):
                build(tmp_path / "index", embeddings, **settings)
            assert version_names(Location.of(tmp_path / "index")) == []
            return
        assert build(tmp_path / "index", embeddings, **settings)["recall_target_reached"] is False
        assert "below target.recall 1.0" in capsys.readouterr().err
        listed = index_list(IndexListConfig(index=str(tmp_path / "index")))["versions"][0]
        assert listed["target_reached"] is False

    def test_half_precision_vectors_stay_half(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(200)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors.astype(np.float16)))
        index = Index.open(tmp_path / "index")
        assert index.table.take(np.arange(1), ["vector"])["vector"].type.value_type == pa.float16()
        assert np.abs(index.table.vectors(np.arange(200), unit=True) - vectors).max() < 2e-3

    def test_files_that_infer_columns_differently_are_joined(self, tmp_path: Path) -> None:
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(200))
        part = tmp_path / "e" / "part-00000001.parquet"
        table = pq.read_table(part)
        years = pa.array([1.5] * table.num_rows)
        pq.write_table(table.set_column(table.schema.get_field_index("year"), "year", years), part)
        manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
        manifest["files"][1] |= {"bytes": part.stat().st_size, "sha256": Location.of(part).sha256()}
        (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
        build(tmp_path / "index", embeddings)
        index = Index.open(tmp_path / "index")
        assert index.table.schema.field("year").type == pa.float64()
        assert [document.metadata["year"] for document in index.documents(np.array([0, 150]))] == [
            2000.0,
            1.5,
        ]

    def test_a_column_with_a_name_of_the_index(self, tmp_path: Path) -> None:
        column = {"vector": pa.array(["x"] * 20)}
        with pytest.raises(InputError, match="'vector'"):
            build(tmp_path / "index", embeddings_of(tmp_path / "e", clustered_vectors(20), columns=column))

    @pytest.mark.slow
    def test_more_text_than_32_bit_offsets_hold(self, tmp_path: Path) -> None:
        rows, length = 36_000, 64_000
        texts = [f"{row} " + "字x" * (length // 4) for row in range(rows)]
        assert sum(len(text.encode()) for text in texts[:1]) * rows > 2**31
        ids = [f"id {row}" for row in range(rows)]
        vectors = clustered_vectors(rows)
        embeddings = write_embeddings(tmp_path / "e", ids, vectors, texts, rows_per_file=2_000)
        del texts
        build(tmp_path / "index", embeddings)
        delete_from_index(IndexDeleteConfig(index=str(tmp_path / "index"), ids=["id 5"]))
        assert index_verify(IndexVerifyConfig(index=str(tmp_path / "index")))["rows"] == rows - 1
        assert compact_index(IndexCompactConfig(index=str(tmp_path / "index")), run=HERE)["rows"] == rows - 1
        assert find_documents(Index.open(tmp_path / "index"), "id", {"id 9"}, "text")["id 9"][0].startswith(
            "9 字"
        )

    def test_more_text_than_32_bit_offsets_hold_is_never_joined(self, tmp_path: Path) -> None:
        """Many fragments and batches: nothing reads a column of the whole table at once."""
        vectors = clustered_vectors(3000)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors))
        for number in range(5):
            more = clustered_vectors(50, seed=10 + number)
            embeddings = embeddings_of(tmp_path / f"more-{number}", more, 3000 + 50 * number)
            add_to_index(IndexAddConfig(index=str(tmp_path / "index"), embeddings=embeddings))
        assert index_verify(IndexVerifyConfig(index=str(tmp_path / "index")))["rows"] == 3250
        assert compact_index(IndexCompactConfig(index=str(tmp_path / "index")), run=HERE)["rows"] == 3250


class TestDamage:
    @pytest.mark.parametrize("name", ["vectors.faiss", "rows.npy"])
    def test_a_file_that_is_missing_or_short(self, small: tuple[Path, np.ndarray], name: str) -> None:
        victim = sorted((small[0] / "shards").rglob(name))[0]
        whole = victim.read_bytes()
        victim.write_bytes(whole[:-3])
        with pytest.raises(FormatError, match=f"{name} has {len(whole) - 3} bytes"):
            Index.open(small[0])
        victim.unlink()
        with pytest.raises(FormatError, match=f"{name} is missing"):
            Index.open(small[0])

    @pytest.mark.parametrize("name", ["vectors.faiss", "rows.npy"])
    def test_a_flipped_byte_is_found_by_verify(self, small: tuple[Path, np.ndarray], name: str) -> None:
        victim = sorted((small[0] / "shards").rglob(name))[0]
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
        with pytest.raises(FormatError, match=name):
            index_verify(IndexVerifyConfig(index=str(small[0])))

    def test_row_numbers_that_do_not_rise_are_refused(self, small: tuple[Path, np.ndarray]) -> None:
        victim = sorted((small[0] / "shards").rglob("rows.npy"))[0]
        rows = np.load(victim)
        np.save(victim, rows[::-1].copy())
        with pytest.raises(FormatError, match="do not rise"):
            Index.open(small[0])

    def test_every_field_of_a_version_is_needed_and_checked(self, small: tuple[Path, np.ndarray]) -> None:
        place = small[0] / "versions" / "000001.json"
        whole = json.loads(place.read_text())
        wrong: dict[type, Any] = {
            str: 7,
            int: "7",
            float: "0.5",
            list: "x",
            dict: 3,
            type(None): [1],
            bool: "x",
        }
        for name, value in whole.items():
            lacking = {key: kept for key, kept in whole.items() if key != name}
            # Versions from before there was a lexical side lack it.
            for edited in ([] if name == "lexical" else [lacking]) + [{**whole, name: wrong[type(value)]}]:
                place.write_text(json.dumps(edited))
                with pytest.raises(FormatError):
                    Index.open(small[0])
        place.write_text(json.dumps({**whole, "unknown": 1}))
        with pytest.raises(FormatError, match="unknown"):
            Index.open(small[0])

    @pytest.mark.parametrize("name", ["../../outside", "/tmp/x", "x" * 64, "..", "A" * 64])
    def test_a_version_never_leads_outside_its_index(self, small: tuple[Path, np.ndarray], name: str) -> None:
        edit_version(small[0], lambda values: values["shards"][0].update(digest=name))
        with pytest.raises(FormatError, match="digest"):
            Index.open(small[0])
        edit_version(
            small[0],
            lambda values: values["shards"][0].update(
                digest="0" * 64, files={"../x": {"sha256": "0" * 64, "bytes": 1}}
            ),
        )
        with pytest.raises(FormatError, match="files"):
            Index.open(small[0])

    def test_counts_and_versions_that_do_not_fit(self, small: tuple[Path, np.ndarray]) -> None:
        edit_version(small[0], lambda values: values.update(rows=299))
        with pytest.raises(FormatError, match=r"says 299 rows.*has 300"):
            Index.open(small[0])
        edit_version(small[0], lambda values: values.update(rows=300, table_version=99))
        with pytest.raises(FormatError, match="version 99 of its table"):
            Index.open(small[0])
        edit_version(small[0], lambda values: values.update(format_version=9))
        with pytest.raises(FormatError, match="format version 9"):
            Index.open(small[0])

    def test_a_renamed_document(self, small: tuple[Path, np.ndarray]) -> None:
        shutil.copy(small[0] / "versions" / "000001.json", small[0] / "versions" / "000007.json")
        with pytest.raises(FormatError, match="was renamed"):
            Index.open(small[0])

    def test_no_index_and_no_such_version(self, small: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds no index"):
            Index.open(tmp_path / "nowhere")
        with pytest.raises(InputError, match="no version '000009'; it has: 000001"):
            Index.open(small[0], "000009")

    def test_another_encoder(self, small: tuple[Path, np.ndarray]) -> None:
        with pytest.raises(FormatError, match="g" * 64):
            Index.open(small[0], encoder_fingerprint="g" * 64)


class TestAdd:
    def add(self, small: tuple[Path, np.ndarray], embeddings: str, **settings: Any) -> dict[str, Any]:
        return add_to_index(IndexAddConfig(index=str(small[0]), embeddings=embeddings, **settings))

    def test_documents_are_found_beside_those_of_before(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        more = clustered_vectors(50, seed=3)
        added = self.add(small, embeddings_of(tmp_path / "more", more, 300))
        assert (added["added"], added["rows"], added["version"]) == (50, 350, "000002")
        queries = clustered_vectors(10, seed=4)
        both = np.concatenate([small[1], more])
        assert found_ids(Index.open(small[0]), queries, 10) == brute_force(both, queries, 10)
        assert Index.open(small[0], "000001").num_rows == 300

    def test_an_id_that_is_there_is_refused_or_replaced(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        more = embeddings_of(tmp_path / "more", clustered_vectors(3, seed=9), 298, texts=["a", "b", "c"])
        with pytest.raises(InputError, match=r"2 ids .* such as 'id 29[89]'"):
            self.add(small, more)
        assert self.add(small, more, upsert=True)["replaced"] == 2
        index = Index.open(small[0])
        assert index.num_rows == 301
        texts = {document.id: document.text for document in index.documents(index.table.row_map.rows())}
        assert [texts[f"id {row}"] for row in (297, 298, 299, 300)] == ["text of id 297", "a", "b", "c"]

    def test_ids_that_are_places_never_replace_documents(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        day = {"ids": ["new:1", "new:2"], "derived_ids": True}
        self.add(small, embeddings_of(tmp_path / "monday", clustered_vectors(2, seed=1), 0, **day))
        tuesday = embeddings_of(tmp_path / "tuesday", clustered_vectors(2, seed=2), 0, **day)
        with pytest.raises(InputError, match="encoded from a corpus without ids"):
            self.add(small, tuesday, upsert=True)
        with pytest.raises(InputError, match="give the corpus a column id"):
            self.add(small, tuesday)
        assert Index.open(small[0]).num_rows == 302

    def test_the_same_addition_again_changes_nothing(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        more = embeddings_of(tmp_path / "more", clustered_vectors(3, seed=9), 400)
        first = self.add(small, more)
        delete_from_index(IndexDeleteConfig(index=str(small[0]), ids=["id 400"]))
        again = self.add(small, more)
        assert (first["added"], again["added"], again["version"]) == (3, 0, "000003")
        assert Index.open(small[0]).num_rows == 302, "a deleted document must not come back by a retry"
        assert self.add(small, more, upsert=True, again=True)["rows"] == 303

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fingerprint": "e" * 64}, "fingerprint"),
            ({"prefix": "passage: "}, "prefix 'passage: '"),
            ({"max_length": 32}, "max_length"),
            ({"similarity": "dot"}, "metric"),
            ({"engine": "onnx"}, "engine"),
            ({"compute_dtype": "int8"}, "compute_dtype 'int8'"),
        ],
    )
    def test_vectors_made_in_another_way(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        more = embeddings_of(tmp_path / "more", clustered_vectors(3), 400, **changes)
        with pytest.raises(InputError, match=message):
            self.add(small, more)
        with pytest.raises(InputError, match=message):
            plan_add(IndexAddConfig(index=str(small[0]), embeddings=more))
        assert version_names(Location.of(small[0])) == ["000001"]

    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            (pa.array([2.5, 1.0, None]), pa.float64()),
            (pa.nulls(3), pa.int64()),
            (pa.array([1, 2, 3], pa.int8()), pa.int64()),
        ],
    )
    def test_columns_are_widened_where_nothing_is_lost(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, column: pa.Array, kind: pa.DataType
    ) -> None:
        more = write_embeddings(
            tmp_path / "more",
            ["x", "y", "z"],
            clustered_vectors(3, seed=5),
            columns={"year": column, "new": pa.array(["a", "b", None])},
        )
        self.add(small, more)
        index = Index.open(small[0])
        assert index.table.schema.field("year").type == kind
        found = {document.id: document.metadata for document in index.documents(index.table.row_map.rows())}
        assert [found[name]["year"] for name in ("x", "y", "z")] == column.to_pylist()
        assert (found["id 5"], found["x"]["new"]) == ({"year": 2005, "new": None}, "a")
        assert len(found_ids(index, small[1][:1], 400, filter={"year": {"$gte": 2010}})[0]) == 290

    @pytest.mark.parametrize("column", [pa.array(["2001"] * 3), pa.array([[1]] * 3), pa.array([True] * 3)])
    def test_columns_of_another_type_are_refused_before_work(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, column: pa.Array
    ) -> None:
        more = write_embeddings(
            tmp_path / "more", ["x", "y", "z"], clustered_vectors(3), columns={"year": column}
        )
        with pytest.raises(InputError, match="column 'year' is int64 in the index and"):
            self.add(small, more)
        assert Index.open(small[0]).num_rows == 300
        assert version_names(Location.of(small[0])) == ["000001"]

    def test_integers_that_a_float_cannot_hold_are_refused(self, tmp_path: Path) -> None:
        big = {"number": pa.array([2**53 + 1, 1, 2], pa.int64())}
        build(
            tmp_path / "index",
            write_embeddings(tmp_path / "e", list("abc"), clustered_vectors(3), columns=big),
        )
        half = {"number": pa.array([0.5])}
        more = write_embeddings(tmp_path / "more", ["d"], clustered_vectors(1, seed=2), columns=half)
        with pytest.raises(InputError, match="1 integers of the index are too large"):
            add_to_index(IndexAddConfig(index=str(tmp_path / "index"), embeddings=more))
        assert Index.open(tmp_path / "index").documents(np.array([0]))[0].metadata == {"number": 2**53 + 1}

    def test_ids_that_stand_twice_in_an_addition(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        more = write_embeddings(tmp_path / "more", ["x", "y", "x"], clustered_vectors(3))
        for upsert in (False, True):
            with pytest.raises(InputError, match="id 'x' stands twice"):
                self.add(small, more, upsert=upsert)

    def test_recall_is_measured_again_or_null_never_copied(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(600)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors), kind="hnsw")
        assert open_manifest(tmp_path / "index").recall is not None
        small = embeddings_of(tmp_path / "small", clustered_vectors(10, seed=2), 1000)
        assert add_to_index(IndexAddConfig(index=str(tmp_path / "index"), embeddings=small))["recall"] is None
        large = embeddings_of(tmp_path / "large", clustered_vectors(90, seed=3), 2000)
        added = add_to_index(IndexAddConfig(index=str(tmp_path / "index"), embeddings=large))
        manifest = open_manifest(tmp_path / "index")
        assert added["recall"] is not None
        assert manifest.measured is not None
        assert (manifest.measured.version, manifest.measured.rows) == (manifest.version, 700)


class TestDelete:
    def test_by_ids_by_file_and_by_filter(self, small: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        folder, vectors = small
        assert delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 0", "id 1", "id 0"])) | {"seconds": 0} == {  # noqa: E501
            **delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 0", "id 1", "id 0"])),
            "seconds": 0, "deleted": 2, "unknown": 0, "repeated": 1,
        }  # fmt: skip
        (tmp_path / "gone.txt").write_bytes(b"id 2\r\nid 3\n")
        assert (
            delete_from_index(
                IndexDeleteConfig(index=str(folder), input=PathConfig(path=str(tmp_path / "gone.txt")))
            )["deleted"]
            == 2
        )
        config = IndexDeleteConfig(index=str(folder), filter={"year": {"$gte": 2290}})
        assert plan_delete(config)["matching"] == 10
        assert delete_from_index(config)["deleted"] == 10
        assert delete_from_index(IndexDeleteConfig(index=str(folder), filter="year = 2005"))["deleted"] == 1
        left = set(found_ids(Index.open(folder), vectors[:1], 300)[0])
        assert left == {f"id {row}" for row in range(4, 290) if row != 5}

    def test_ids_of_any_characters(self, tmp_path: Path) -> None:
        odd = ["a\u2028b", "c\x85d", "e\x0bf", "quote'\"", "back\\slash", "line\nbreak", "100%_", "plain"]
        build(tmp_path / "index", write_embeddings(tmp_path / "e", odd, clustered_vectors(len(odd))))
        (tmp_path / "gone.txt").write_text("\n".join(odd[:3]) + "\n", newline="")
        assert (
            delete_from_index(
                IndexDeleteConfig(
                    index=str(tmp_path / "index"), input=PathConfig(path=str(tmp_path / "gone.txt"))
                )
            )["deleted"]
            == 3
        )
        lines = "".join(json.dumps({"id": name}) + "\n" for name in odd[3:6])
        (tmp_path / "gone.jsonl").write_text(lines)
        assert (
            delete_from_index(
                IndexDeleteConfig(
                    index=str(tmp_path / "index"), input=PathConfig(path=str(tmp_path / "gone.jsonl"))
                )
            )["deleted"]
            == 3
        )
        assert sorted(found_ids(Index.open(tmp_path / "index"), clustered_vectors(1), 9)[0]) == [
            "100%_",
            "plain",
        ]

    def test_unknown_ids_are_refused_unless_this_deletion_was_made_before(
        self, small: tuple[Path, np.ndarray]
    ) -> None:
        config = IndexDeleteConfig(index=str(small[0]), ids=["id 7"])
        assert delete_from_index(config)["deleted"] == 1
        assert delete_from_index(config)["deleted"] == 0
        with pytest.raises(InputError, match="'nope'"):
            delete_from_index(IndexDeleteConfig(index=str(small[0]), ids=["nope", "id 8"]))
        ignored = delete_from_index(
            IndexDeleteConfig(index=str(small[0]), ids=["nope", "id 8"], on_unknown="ignore")
        )
        assert (ignored["deleted"], ignored["unknown"]) == (1, 1)

    def test_all_documents_and_nothing(self, small: tuple[Path, np.ndarray]) -> None:
        with pytest.raises(InputError, match="deletes all 300"):
            delete_from_index(IndexDeleteConfig(index=str(small[0]), filter={"year": {"$gte": 0}}))
        with pytest.raises(ValueError, match="nothing to delete"):
            IndexDeleteConfig(index=str(small[0]))
        with pytest.raises(InputError, match="'yaer'"):
            delete_from_index(IndexDeleteConfig(index=str(small[0]), filter={"yaer": 1}))
        with pytest.raises(InputError, match="No field named yaer"):
            delete_from_index(IndexDeleteConfig(index=str(small[0]), filter="yaer = 1"))

    @pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_sq8"])
    def test_in_every_kind_k_hits_come_back(self, tmp_path: Path, kind: str) -> None:
        vectors = clustered_vectors(600)
        build(tmp_path / "index", embeddings_of(tmp_path / "e", vectors), kind=kind)
        gone = [f"id {row}" for row in range(0, 600, 2)]
        delete_from_index(IndexDeleteConfig(index=str(tmp_path / "index"), ids=gone))
        for found in found_ids(Index.open(tmp_path / "index"), clustered_vectors(10, seed=2), 20):
            assert len(found) == 20
            assert not set(found) & set(gone)


class TestSet:
    def test_by_filter_and_by_file(self, small: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        folder, vectors = small
        changed = set_in_index(
            IndexSetConfig(index=str(folder), values={"year": None}, filter={"year": {"$lt": 2003}})
        )
        assert changed["changed"] == 3
        (tmp_path / "values.jsonl").write_text('{"id": "id 9", "year": 1}\n{"id": "id 8", "year": 2}\n')
        config = IndexSetConfig(index=str(folder), input=PathConfig(path=str(tmp_path / "values.jsonl")))
        assert set_in_index(config)["changed"] == 2
        index = Index.open(folder)
        years = {
            document.id: document.metadata["year"] for document in index.documents(index.table.row_map.rows())
        }
        assert [years[f"id {row}"] for row in (0, 2, 3, 8, 9)] == [None, None, 2003, 2, 1]
        # The vectors stay where they are: no shard is built, and search goes on.
        assert open_manifest(folder).shards == open_manifest(folder, "000001").shards
        assert found_ids(index, vectors[:5], 1) == [[f"id {row}"] for row in range(5)]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"text": "x"}, "text cannot be set"),
            ({"id": "x"}, "id cannot be set"),
            ({"nope": 1}, "no column 'nope'"),
            ({"year": "x"}, "integer"),
        ],
    )
    def test_what_cannot_be_set(
        self, small: tuple[Path, np.ndarray], values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            set_in_index(IndexSetConfig(index=str(small[0]), values=values, filter={"year": 2003}))
        assert version_names(Location.of(small[0])) == ["000001"]


class TestFolding:
    @given(
        shards=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 100_000)), max_size=12),
        tail=st.integers(0, 50_000),
    )
    def test_what_is_folded(self, shards: list[tuple[int, int]], tail: int) -> None:
        held = [Held(live, live + dead) for live, dead in shards if live + dead]
        chosen = plan_fold(held, tail)
        assert chosen == sorted(set(chosen))
        if tail > fold.TAIL_ROWS:
            total = tail + sum(held[number].live for number in chosen)
            left = [shard.live for number, shard in enumerate(held) if number not in chosen]
            assert all(live > 2 * total or total + live > fold.MAX_FOLDED_ROWS for live in left)
        for number, shard in enumerate(held):
            if shard.live < 0.7 * shard.rows and shard.live <= fold.MAX_FOLDED_ROWS:
                assert number in chosen

    def test_small_additions_never_make_many_shards(self) -> None:
        """A year of them: as many shards as a logarithm, and each row folded a few times."""
        shards: list[Held] = [Held(1_000_000, 1_000_000)]
        tail = moved = 0
        for _ in range(2_000):
            tail += 1_000
            chosen = plan_fold(shards, tail)
            if tail > fold.TAIL_ROWS:
                total = tail + sum(shards[number].live for number in chosen)
                moved += total
                shards = [shard for number, shard in enumerate(shards) if number not in chosen] + [
                    Held(total, total)
                ]
                tail = 0
            assert len(shards) < 20 + 2_000_000 // fold.MAX_FOLDED_ROWS
        assert moved < 12 * 2_000_000

    def test_additions_and_deletions_are_folded(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fold, "TAIL_ROWS", 25)
        folder, vectors = small
        all_vectors = vectors
        for number in range(4):
            more = clustered_vectors(20, seed=20 + number)
            embeddings = embeddings_of(tmp_path / f"more-{number}", more, 300 + 20 * number)
            add_to_index(IndexAddConfig(index=str(folder), embeddings=embeddings))
            all_vectors = np.concatenate([all_vectors, more])
        assert [shard.rows for shard in open_manifest(folder).shards] == [340, 40]
        queries = clustered_vectors(5, seed=4)
        assert found_ids(Index.open(folder), queries, 10) == brute_force(all_vectors, queries, 10)
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=[f"id {row}" for row in range(60)]))
        assert [shard.rows for shard in open_manifest(folder).shards] == [340, 40], (
            "too few dead rows for the work"
        )
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=[f"id {row}" for row in range(60, 160)]))
        assert [shard.rows for shard in open_manifest(folder).shards] == [220]


class TestVersions:
    def test_a_reader_keeps_answering_from_its_version(self, small: tuple[Path, np.ndarray]) -> None:
        index = Index.open(small[0])
        delete_from_index(IndexDeleteConfig(index=str(small[0]), ids=["id 0"]))
        assert found_ids(index, small[1][:1], 1) == [["id 0"]]
        assert found_ids(Index.open(small[0]), small[1][:1], 1) != [["id 0"]]

    def test_rollback_is_a_new_version_that_equals_an_older_one(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, vectors = small
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 0"]))
        rolled = index_rollback(IndexRollbackConfig(index=str(folder), to="000001"))
        assert (rolled["version"], rolled["before"]) == ("000003", "000002")
        assert index_rollback(IndexRollbackConfig(index=str(folder), to="000001"))["version"] == "000003"
        assert found_ids(Index.open(folder), vectors[:1], 1) == [["id 0"]]
        with pytest.raises(InputError, match="no version '000009'"):
            index_rollback(IndexRollbackConfig(index=str(folder), to="000009"))
        add_to_index(
            IndexAddConfig(
                index=str(folder), embeddings=embeddings_of(tmp_path / "m", clustered_vectors(5), 900)
            )
        )
        assert Index.open(folder).num_rows == 305

    def test_what_cannot_be_opened_is_not_published(
        self, small: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        victim = sorted((small[0] / "shards").rglob("vectors.faiss"))[0]
        victim.write_bytes(b"broken" * 10)
        with pytest.raises(FormatError, match=r"vectors\.faiss"):
            delete_from_index(IndexDeleteConfig(index=str(small[0]), ids=["id 0"]))
        assert version_names(Location.of(small[0])) == ["000001"]

    def test_a_version_is_made_once(self, small: tuple[Path, np.ndarray]) -> None:
        manifest = open_manifest(small[0])
        with pytest.raises(RaytowerError, match="made by another writer"):
            publish(Location.of(small[0]), manifest)

    def test_garbage(self, small: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        folder, _vectors = small
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 0"]))
        compact_index(IndexCompactConfig(index=str(folder), shards=2), run=HERE)
        old = {shard.digest for shard in open_manifest(folder, "000001").shards}
        config = IndexGcConfig(index=str(folder), keep=1)
        assert plan_gc(config)["removed"] == ["000001", "000002"]
        assert collect_garbage(config)["removed_shards"] == [], "a build that runs now may need what is fresh"
        collected = collect_garbage(IndexGcConfig(index=str(folder), keep=1, unfinished=True))
        assert set(collected["removed_shards"]) == old
        assert version_names(Location.of(folder)) == ["000003"]
        assert Index.open(folder).num_rows == 299
        assert index_verify(IndexVerifyConfig(index=str(folder)))["verified"]


class TestCompact:
    def test_it_equals_a_fresh_build_over_the_same_rows(
        self, small: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, vectors = small
        more = clustered_vectors(50, seed=3)
        add_to_index(
            IndexAddConfig(index=str(folder), embeddings=embeddings_of(tmp_path / "more", more, 300))
        )
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=[f"id {row}" for row in range(40)]))
        assert plan_compact(IndexCompactConfig(index=str(folder)))["compacted"]
        compacted = compact_index(IndexCompactConfig(index=str(folder), shards=2), run=HERE)
        assert (compacted["rows"], compacted["shards"], compacted["compacted"]) == (310, 2, True)
        assert sum(shard.rows for shard in open_manifest(folder).shards) == 310
        queries = clustered_vectors(10, seed=4)
        live = np.concatenate([vectors, more])
        wanted = [
            [name for name in line if int(name[3:]) >= 40][:10] for line in brute_force(live, queries, 350)
        ]
        assert found_ids(Index.open(folder), queries, 10) == wanted
        assert not compact_index(IndexCompactConfig(index=str(folder)), run=HERE)["compacted"]

    def test_what_is_published_meanwhile_is_carried_over(
        self, small: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, vectors = small
        delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 0"]))
        build_shards = compact.build_shards

        def meanwhile(*arguments: Any) -> Any:
            built = build_shards(*arguments)
            delete_from_index(IndexDeleteConfig(index=str(folder), ids=["id 1"]))
            more = embeddings_of(tmp_path / "more", clustered_vectors(5, seed=3), 300)
            add_to_index(IndexAddConfig(index=str(folder), embeddings=more))
            return built

        monkeypatch.setattr(compact, "build_shards", meanwhile)
        compact_index(IndexCompactConfig(index=str(folder)), run=HERE)
        found = set(found_ids(Index.open(folder), vectors[:1], 400)[0])
        assert found == {f"id {row}" for row in range(2, 305)}

    def test_another_kind_may_be_asked_for(self, small: tuple[Path, np.ndarray]) -> None:
        assert compact_index(IndexCompactConfig(index=str(small[0]), kind="hnsw"), run=HERE)["kind"] == "hnsw"

    def test_another_target_is_reached_and_recorded(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        build(
            index, embeddings_of(tmp_path / "e", clustered_vectors(600)), kind="hnsw", target={"recall": 0.5}
        )
        asked = {"recall": 0.99, "k": 7}
        compacted(index, target=asked)
        manifest = open_manifest(index)
        assert (manifest.recall_target, manifest.recall_k) == (0.99, 7)
        assert manifest.measured is not None
        assert (manifest.measured.version, manifest.measured.target, manifest.measured.k) == (
            "000002",
            0.99,
            7,
        )
        # Asked for again it is there already, and what is not asked for is the version's own.
        for target in (asked, {}, {"k": 7}):
            config = make_config(IndexCompactConfig, {"index": str(index), "target": target})
            assert plan_compact(config) == {"parent": "000002", "compacted": False}
            assert compact_index(config, run=HERE)["compacted"] is False

    def test_a_target_that_is_missed_is_kept_back_where_asked(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(2000))
        build(index, embeddings, kind="ivf_pq", rescore=False)
        config = make_config(
            IndexCompactConfig, {"index": str(index), "target": {"recall": 1.0, "on_target_missed": "keep"}}
        )
        with pytest.raises(InputError, match=r"below target\.recall 1\.0.* nothing was published"):
            compact_index(config, run=HERE)
        assert version_names(Location.of(index)) == ["000001"]
        assert delete_from_index(IndexDeleteConfig(index=str(index), ids=["id 0"]))["rows"] == 1999

    def test_the_time_of_a_query_decides_the_kind(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "e", clustered_vectors(600)), kind="flat")
        compacted(index, kind="auto", target={"latency_ms": 2.5})
        assert "within target.latency_ms 2.5" in open_manifest(index).kind_reason

    def test_codes_alone_can_be_compacted_since_the_table_has_the_vectors(self, tmp_path: Path) -> None:
        embeddings = embeddings_of(tmp_path / "e", clustered_vectors(600))
        build(tmp_path / "index", embeddings, kind="ivf_sq8", rescore=False)
        delete_from_index(IndexDeleteConfig(index=str(tmp_path / "index"), ids=["id 0"]))
        assert compact_index(IndexCompactConfig(index=str(tmp_path / "index")), run=HERE)["rows"] == 599

    @pytest.mark.parametrize(
        ("kind", "asked", "kept"),
        [
            ("hnsw", {"hnsw": {"m": 5, "ef_construction": 17}}, {"M": 5, "efConstruction": 17}),
            ("ivf_flat", {"ivf": {"nlist": 7}}, {"nlist": 7}),
            ("ivf_pq", {"ivf": {"nlist": 9, "pq_m": 12}}, {"nlist": 9, "pq_m": 12}),
        ],
    )
    def test_what_was_set_at_the_build_is_kept_by_compaction(
        self, tmp_path: Path, kind: str, asked: dict[str, Any], kept: dict[str, int]
    ) -> None:
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "e", clustered_vectors(400)), kind=kind, **asked)
        delete_from_index(IndexDeleteConfig(index=str(index), filter="year < 2300"))
        compacted(index)
        delete_from_index(IndexDeleteConfig(index=str(index), ids=["id 399"]))
        compacted(index)
        manifest = open_manifest(index)
        assert kept.items() <= manifest.parameters.items()
        files = faiss.read_index(str(index / "shards" / manifest.shards[0].digest / "vectors.faiss"))
        if kind == "hnsw":
            # On the lowest level a node has twice as many links.
            assert faiss.downcast_index(files.base_index).hnsw.nb_neighbors(0) == 2 * 5
        else:
            assert faiss.extract_index_ivf(files).nlist == kept["nlist"]

    def test_codes_that_were_set_at_the_build_are_kept_by_a_fold(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = tmp_path / "index"
        vectors = clustered_vectors(900)
        asked = {"nlist": 30, "pq_m": 2}
        build(index, embeddings_of(tmp_path / "e", vectors[:400]), kind="ivf_pq", ivf=asked)
        monkeypatch.setattr(fold, "TAIL_ROWS", 10)
        monkeypatch.setattr(fold, "FLAT_ROWS", 10)
        monkeypatch.setattr(fold, "_TIER", 0)
        more = embeddings_of(tmp_path / "more", vectors[400:], first=400)
        add_to_index(IndexAddConfig(index=str(index), embeddings=more))
        entries = open_manifest(index).shards
        assert [entry.rows for entry in entries] == [400, 500]
        file = faiss.read_index(str(index / "shards" / entries[1].digest / "vectors.faiss"))
        assert faiss.downcast_index(faiss.extract_index_ivf(file)).pq.M == 2

    def test_lists_that_were_set_are_fewer_only_while_there_are_fewer_rows(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        vectors = clustered_vectors(140)
        build(index, embeddings_of(tmp_path / "e", vectors[:60]), kind="ivf_flat", ivf={"nlist": 30})
        delete_from_index(IndexDeleteConfig(index=str(index), filter="year < 2040"))
        compacted(index)
        assert open_manifest(index).parameters["nlist"] == 20
        more = embeddings_of(tmp_path / "more", vectors[60:], first=60)
        add_to_index(IndexAddConfig(index=str(index), embeddings=more))
        compacted(index)
        assert open_manifest(index).parameters["nlist"] == 30

    def test_lists_that_were_planned_follow_the_rows(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        vectors = clustered_vectors(800)
        build(index, embeddings_of(tmp_path / "e", vectors[:100]), kind="ivf_flat")
        add_to_index(
            IndexAddConfig(index=str(index), embeddings=embeddings_of(tmp_path / "more", vectors[100:], 100))
        )
        assert open_manifest(index).parameters == {"nlist": 2}  # 39 rows a list
        compacted(index)
        assert open_manifest(index).parameters == {"nlist": 20}

    def test_settings_of_another_kind_are_not_asked_for(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "e", clustered_vectors(200)), kind="hnsw", hnsw={"m": 5})
        for kind in ("ivf_flat", "flat", "ivf_pq", "hnsw"):
            compacted(index, kind=kind)
            assert open_manifest(index).kind == kind


def compacted(index: Path, **settings: Any) -> None:
    config = IndexCompactConfig.model_validate({"index": str(index), **settings})
    assert compact_index(config, run=HERE)["compacted"] is True
