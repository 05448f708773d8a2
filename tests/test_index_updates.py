"""Adding, deleting, replacing, compacting, collecting: every version answers as a fresh build over its rows would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.config import make_config
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.collect import IndexGcConfig, collect_garbage, plan_gc
from raytower.index.compact import IndexCompactConfig, compact_index, plan_compact
from raytower.index.config import IndexBuildConfig
from raytower.index.manage import (
    IndexRollbackConfig,
    IndexVerifyConfig,
    index_rollback,
    index_verify,
)
from raytower.index.reader import Index, open_manifest
from raytower.index.update import (
    IndexAddConfig,
    IndexDeleteConfig,
    add_to_index,
    delete_from_index,
    plan_add,
    plan_delete,
)
from raytower.index.versions import finished_versions, publish, version_folder
from raytower.storage import Location
from tests.test_index import build, clustered_vectors, found_ids, write_embeddings

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORKERS = {"max": 2, "num_cpus": 0.5}
BASE_ROWS, MORE_ROWS = 300, 60


class Corpus:
    """What the index should hold, kept beside it in a dictionary."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.index = folder / "index"
        vectors = clustered_vectors(BASE_ROWS, seed=3)
        build(write_embeddings(folder / "base", vectors), self.index, **settings)
        self.rows = {f"id {row}": vector for row, vector in enumerate(vectors)}

    def add(self, ids: list[str], seed: int, **changes: Any) -> dict[str, Any]:
        vectors = clustered_vectors(len(ids), seed=seed)
        embeddings = write_embeddings(self.folder / f"more {seed}", vectors, files=2, ids=ids)
        figures = add_to_index(
            make_config(
                IndexAddConfig,
                {"index": str(self.index), "embeddings": str(embeddings), "workers": WORKERS, **changes},
            )
        )
        self.rows.update(zip(ids, vectors, strict=True))
        return figures

    def delete(self, ids: list[str], **changes: Any) -> dict[str, Any]:
        figures = delete_from_index(
            make_config(
                IndexDeleteConfig, {"index": str(self.index), "ids": ids, "workers": WORKERS, **changes}
            )
        )
        for name in ids:
            self.rows.pop(name, None)
        return figures

    def compact(self, **changes: Any) -> dict[str, Any]:
        return compact_index(
            make_config(IndexCompactConfig, {"index": str(self.index), "workers": WORKERS, **changes})
        )

    def expected(self, queries: np.ndarray, k: int) -> list[list[str]]:
        names = list(self.rows)
        scores = queries.astype(np.float64) @ np.stack(list(self.rows.values())).astype(np.float64).T
        return [[names[place] for place in np.argsort(-line, kind="stable")[:k]] for line in scores]

    def check(self, k: int = 10) -> None:
        """The published version holds these rows and no others, and finds what brute force finds."""
        index = Index.open(self.index)
        queries = clustered_vectors(20, seed=99)
        assert index.num_rows == len(self.rows)
        assert found_ids(index, queries, k) == self.expected(queries, k)
        everything = found_ids(index, queries[:1], len(self.rows) + 5)[0]
        assert sorted(everything) == sorted(self.rows)
        verified = index_verify(make_config(IndexVerifyConfig, {"index": str(self.index)}))
        assert verified["rows"] == len(self.rows)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def new_ids(count: int = MORE_ROWS, word: str = "new") -> list[str]:
    return [f"{word} {number}" for number in range(count)]


class TestAdd:
    def test_documents_are_found_beside_those_of_before(self, corpus: Corpus) -> None:
        before = open_manifest(corpus.index)[0]
        figures = corpus.add(new_ids(), seed=11)
        corpus.check()
        after = open_manifest(corpus.index)[0]
        assert (figures["added"], figures["replaced"], figures["rows"]) == (
            MORE_ROWS,
            0,
            BASE_ROWS + MORE_ROWS,
        )
        assert (after.parent, after.operation) == (before.version, "add")
        assert after.shards[: len(before.shards)] == before.shards  # shared, not copied
        assert not list(version_folder(Location.of(corpus.index), after.version).local_path.glob("*/*.old"))

    def test_an_id_that_is_there_is_refused_or_replaced(self, corpus: Corpus) -> None:
        ids = ["id 5", "id 299", "brand new"]
        with pytest.raises(
            InputError, match=r"2 ids of .* are in index version v000001 already, such as 'id"
        ):
            corpus.add(ids, seed=12)
        (corpus.folder / "more 12").rename(corpus.folder / "kept")
        figures = corpus.add(ids, seed=12, upsert=True)
        assert (figures["added"], figures["replaced"], figures["rows"]) == (3, 2, BASE_ROWS + 1)
        corpus.check()

    def test_an_id_that_was_deleted_may_come_again(self, corpus: Corpus) -> None:
        corpus.delete(["id 7"])
        assert corpus.add(["id 7"], seed=13)["replaced"] == 0
        corpus.check()

    def test_the_same_addition_twice_is_refused_then_replaces_itself(self, corpus: Corpus) -> None:
        corpus.add(new_ids(5), seed=14)
        embeddings = corpus.folder / "more 14"
        values = {"index": str(corpus.index), "embeddings": str(embeddings), "workers": WORKERS}
        with pytest.raises(InputError, match="already"):
            add_to_index(make_config(IndexAddConfig, values))
        figures = add_to_index(make_config(IndexAddConfig, {**values, "upsert": True}))
        assert figures["replaced"] == 5
        corpus.check()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fingerprint": "e" * 64}, "has fingerprint 'eee"),
            ({"prefix": "passage: "}, "has prefix 'passage: '"),
            ({"max_length": 32}, "has max_length 32"),
            ({"similarity": "dot"}, "has metric 'inner_product'"),
        ],
    )
    def test_vectors_made_in_another_way_are_refused(
        self, corpus: Corpus, changes: dict[str, Any], message: str
    ) -> None:
        embeddings = write_embeddings(corpus.folder / "other", clustered_vectors(5, seed=1), **changes)
        values = {"index": str(corpus.index), "embeddings": str(embeddings), "workers": WORKERS}
        for run in (add_to_index, plan_add):
            with pytest.raises(InputError, match=message):
                run(make_config(IndexAddConfig, values))
        assert open_manifest(corpus.index)[0].version == "v000001"

    def test_another_dimension_is_refused(self, corpus: Corpus) -> None:
        vectors = clustered_vectors(5, seed=1, dim=16)
        embeddings = write_embeddings(corpus.folder / "narrow", vectors)
        values = {"index": str(corpus.index), "embeddings": str(embeddings)}
        with pytest.raises(InputError, match="has dim 16, index version v000001 has 24"):
            add_to_index(make_config(IndexAddConfig, values))

    def test_the_plan_says_what_would_be_added(self, corpus: Corpus) -> None:
        embeddings = write_embeddings(corpus.folder / "some", clustered_vectors(5, seed=1), ids=new_ids(5))
        plan = plan_add(
            make_config(IndexAddConfig, {"index": str(corpus.index), "embeddings": str(embeddings)})
        )
        assert plan == {
            "parent": "v000001",
            "rows_before": BASE_ROWS,
            "rows_added": 5,
            "delta_kind": "flat",
            "delta_shards": 1,
        }

    @pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_sq8"])
    def test_a_large_addition_is_of_the_same_kind_with_the_same_training(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raytower.index.update._FLAT_DELTA_ROWS", 10)
        corpus = Corpus(tmp_path, kind=kind, target={"recall": 1.0})
        corpus.add(new_ids(), seed=15)
        assert [entry.kind for entry in open_manifest(corpus.index)[0].shards] == [kind] * 3
        corpus.delete(["new 3", "id 3"])
        index = Index.open(corpus.index)
        queries = clustered_vectors(20, seed=99)
        found = found_ids(index, queries, 10)
        right = [len(set(a) & set(b)) for a, b in zip(found, corpus.expected(queries, 10), strict=True)]
        assert sum(right) >= 0.95 * 200
        assert not {"new 3", "id 3"} & {name for line in found for name in line}


class TestDelete:
    def test_deleted_documents_are_never_hits_again(self, corpus: Corpus) -> None:
        gone = [f"id {row}" for row in range(0, BASE_ROWS, 3)]
        figures = corpus.delete(gone)
        assert (figures["deleted"], figures["rows"]) == (100, 200)
        corpus.check()
        # A deleted document's own vector does not find it.
        vectors = clustered_vectors(BASE_ROWS, seed=3)
        assert found_ids(Index.open(corpus.index), vectors[:1], 1)[0] != ["id 0"]

    @pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_pq"])
    def test_in_every_kind_k_hits_come_back(self, tmp_path: Path, kind: str) -> None:
        corpus = Corpus(tmp_path, kind=kind)
        corpus.delete([f"id {row}" for row in range(BASE_ROWS - 12)])
        found = found_ids(Index.open(corpus.index), clustered_vectors(5, seed=98), 12)
        assert [sorted(line) for line in found] == [sorted(corpus.rows)] * 5

    def test_deleting_on_top_of_a_deletion(self, corpus: Corpus) -> None:
        corpus.delete(["id 1", "id 2"])
        corpus.add(new_ids(4), seed=16)
        corpus.delete(["id 3", "new 0"])
        corpus.check()
        manifest = open_manifest(corpus.index)[0]
        assert (manifest.deleted_rows, manifest.rows) == (4, BASE_ROWS)

    def test_by_a_file_of_ids(self, corpus: Corpus) -> None:
        (corpus.folder / "ids.txt").write_text("id 8\nid 9\nid 8\n", encoding="utf-8")
        figures = corpus.delete([], path=str(corpus.folder / "ids.txt"))
        assert (figures["deleted"], figures["repeated"], figures["unknown"]) == (2, 1, 0)
        del corpus.rows["id 8"], corpus.rows["id 9"]
        corpus.check()

    def test_an_unknown_id_and_one_deleted_twice(self, corpus: Corpus) -> None:
        with pytest.raises(InputError, match="1 of 2 ids are not in index version v000001: 'nobody'"):
            corpus.delete(["id 1", "nobody"])
        assert open_manifest(corpus.index)[0].version == "v000001"
        corpus.rows["id 1"] = clustered_vectors(BASE_ROWS, seed=3)[1]
        corpus.delete(["id 1"])
        with pytest.raises(InputError, match="'id 1'; they never were, or are deleted already"):
            corpus.delete(["id 1"])
        figures = corpus.delete(["id 1", "id 2"], on_unknown="ignore")
        assert (figures["deleted"], figures["unknown"]) == (1, 1)
        nothing = corpus.delete(["id 1"], on_unknown="ignore")
        assert (nothing["deleted"], nothing["version"]) == (0, "v000003")
        corpus.check()

    def test_what_cannot_be_deleted(self, corpus: Corpus) -> None:
        with pytest.raises(InputError, match="deletes all 300 documents"):
            delete_from_index(
                make_config(
                    IndexDeleteConfig,
                    {"index": str(corpus.index), "ids": list(corpus.rows), "workers": WORKERS},
                )
            )
        with pytest.raises(InputError, match="nothing to delete"):
            make_config(IndexDeleteConfig, {"index": str(corpus.index)})
        (corpus.folder / "ids.txt").write_text("id 8\n\nid 9\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"ids\.txt line 2 is empty"):
            plan_delete(
                make_config(
                    IndexDeleteConfig,
                    {"index": str(corpus.index), "path": str(corpus.folder / "ids.txt")},
                )
            )

    def test_damaged_tombstones_are_noticed(self, corpus: Corpus) -> None:
        corpus.delete(["id 1", "id 2"])
        (place,) = (corpus.index / "versions" / "v000002" / "deleted").iterdir()
        content = bytearray(place.read_bytes())
        content[-8] ^= 1
        place.write_bytes(content)
        with pytest.raises(FormatError, match="sha256"):
            Index.open(corpus.index)
        place.unlink()
        with pytest.raises(FormatError, match="is missing"):
            Index.open(corpus.index, verify="none")


class TestVersions:
    def test_a_reader_keeps_answering_from_its_version(self, corpus: Corpus) -> None:
        reader = Index.open(corpus.index)
        queries = clustered_vectors(5, seed=99)
        before = found_ids(reader, queries, 10)
        corpus.delete([name for line in before for name in line if name in corpus.rows])
        corpus.add(new_ids(), seed=17)
        corpus.compact()
        gc = make_config(IndexGcConfig, {"index": str(corpus.index), "keep": 1})
        collect_garbage(gc)
        assert found_ids(reader, queries, 10) == before
        corpus.check()

    def test_rollback_brings_deleted_documents_back(self, corpus: Corpus) -> None:
        vectors = clustered_vectors(BASE_ROWS, seed=3)
        corpus.delete(["id 4"])
        index_rollback(make_config(IndexRollbackConfig, {"index": str(corpus.index), "to": "v000001"}))
        corpus.rows["id 4"] = vectors[4]
        corpus.check()

    def test_what_was_published_meanwhile_is_not_lost(
        self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another deletion is published between the start of an addition and its end."""
        import raytower.index.update as update

        real = update.build_shards

        def meanwhile(*arguments: Any) -> Any:
            monkeypatch.setattr(update, "build_shards", real)
            corpus.delete(["id 1"])
            return real(*arguments)

        monkeypatch.setattr(update, "build_shards", meanwhile)
        with pytest.raises(RaytowerError, match="has v000003 published by now; nothing was changed"):
            corpus.add(new_ids(3), seed=18)
        corpus.check()

    def test_publishing_against_another_parent(self, corpus: Corpus) -> None:
        index = Location.of(corpus.index)
        corpus.delete(["id 1"])
        with pytest.raises(RaytowerError, match="v000002 published by now"):
            publish(index, "v000001", instead_of="v000001")
        publish(index, "v000001", instead_of="v000002")

    def test_an_interrupted_addition_is_invisible_and_continues(self, corpus: Corpus) -> None:
        """A real process is killed once it has written a shard of the addition, then the same command runs again."""
        ids = new_ids()
        embeddings = write_embeddings(corpus.folder / "killed", clustered_vectors(len(ids), 19), ids=ids)
        script = (
            "import sys, time, raytower.index.update as u\n"
            "from raytower.config import make_config\n"
            "u.derive = lambda *a: time.sleep(600)\n"
            "u.add_to_index(make_config(u.IndexAddConfig, {'index': sys.argv[1], 'embeddings': sys.argv[2],"
            " 'workers': {'max': 1, 'num_cpus': 0.5}}))\n"
        )
        command = [sys.executable, "-c", script, str(corpus.index), str(embeddings)]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        shard = corpus.index / "versions" / "v000002" / "shard-00000" / "vectors.faiss"
        try:
            wait_for(shard.exists, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        corpus.check()
        written = shard.stat().st_mtime_ns
        values = {"index": str(corpus.index), "embeddings": str(embeddings), "workers": WORKERS}
        assert add_to_index(make_config(IndexAddConfig, values))["version"] == "v000002"
        assert shard.stat().st_mtime_ns == written  # kept, not built again
        corpus.rows.update(zip(ids, clustered_vectors(len(ids), 19), strict=True))
        corpus.check()


class TestCompact:
    def test_it_equals_a_fresh_build_over_the_same_rows(self, corpus: Corpus) -> None:
        corpus.add(["id 5", *new_ids()], seed=20, upsert=True)
        corpus.delete([f"id {row}" for row in range(100, 200)])
        assert plan_compact(make_config(IndexCompactConfig, {"index": str(corpus.index)}))["compacted"]
        figures = corpus.compact()
        assert figures["compacted"]
        assert (figures["shards_before"], figures["deleted_before"]) == (3, 101)
        corpus.check()
        manifest = open_manifest(corpus.index)[0]
        assert manifest.deleted_rows == 0
        assert {entry.version for entry in manifest.shards} == {manifest.version}
        again = corpus.compact()
        assert (again["compacted"], again["version"]) == (False, manifest.version)

    @pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_sq8", "ivf_pq"])
    def test_every_kind_reaches_the_recall_of_a_fresh_build(self, tmp_path: Path, kind: str) -> None:
        corpus = Corpus(tmp_path, kind=kind)
        corpus.add(new_ids(), seed=21)
        corpus.delete([f"id {row}" for row in range(0, BASE_ROWS, 5)])
        corpus.compact()
        manifest = open_manifest(corpus.index)[0]
        ids = list(corpus.rows)
        vectors = np.stack(list(corpus.rows.values()))
        fresh = build(
            write_embeddings(tmp_path / "fresh", vectors, ids=ids), tmp_path / "fresh index", kind=kind
        )
        assert manifest.kind == kind
        assert manifest.recall >= min(fresh["recall"], 0.95)
        queries = clustered_vectors(20, seed=99)
        right = [
            sum(
                len(set(a) & set(b))
                for a, b in zip(
                    found_ids(Index.open(place), queries, 10), corpus.expected(queries, 10), strict=True
                )
            )
            for place in (corpus.index, tmp_path / "fresh index")
        ]
        assert min(right) >= 0.9 * 200

    def test_another_kind_may_be_asked_for(self, corpus: Corpus) -> None:
        assert corpus.compact(kind="hnsw")["kind"] == "hnsw"
        assert open_manifest(corpus.index)[0].kind == "hnsw"

    def test_codes_alone_cannot_be_compacted(self, tmp_path: Path) -> None:
        corpus = Corpus(tmp_path, kind="ivf_sq8", rescore=False)
        corpus.delete(["id 1"])
        with pytest.raises(InputError, match="without exact vectors, so it cannot be built anew"):
            corpus.compact()


class TestGarbage:
    def test_only_what_no_kept_version_needs_goes(self, corpus: Corpus) -> None:
        corpus.add(new_ids(), seed=22)  # v2 shares the shards of v1
        corpus.delete(["id 1"])  # v3
        config = make_config(IndexGcConfig, {"index": str(corpus.index), "keep": 1})
        planned = plan_gc(config)
        assert finished_versions(Location.of(corpus.index)) == ["v000001", "v000002", "v000003"]
        figures = collect_garbage(config)
        assert figures["versions_removed"] == planned["versions_removed"] == ["v000001", "v000002"]
        assert figures["places_removed"] == 0  # every shard is still needed
        corpus.check()
        corpus.compact()
        figures = collect_garbage(config)
        assert figures["bytes_freed"] > 0
        left = sorted(path.name for path in (corpus.index / "versions").iterdir())
        assert left == ["v000004"]
        corpus.check()

    def test_the_published_version_stays_however_old(self, corpus: Corpus) -> None:
        corpus.delete(["id 1"])
        corpus.add(new_ids(3), seed=23)
        index_rollback(make_config(IndexRollbackConfig, {"index": str(corpus.index), "to": "v000001"}))
        figures = collect_garbage(make_config(IndexGcConfig, {"index": str(corpus.index), "keep": 1}))
        assert figures["versions_kept"] == ["v000001", "v000003"]
        assert len(Index.open(corpus.index).documents(np.zeros(1, np.int32), np.zeros(1, np.int64))) == 1

    def test_leftovers_of_killed_builds_go_only_when_asked(self, corpus: Corpus) -> None:
        left = corpus.index / "versions" / "v000002"
        (left / "shard-00000").mkdir(parents=True)
        (left / "build.json").write_text("{}")
        (left / "shard-00000" / "vectors.faiss").write_bytes(b"x" * 10)
        values = {"index": str(corpus.index)}
        assert collect_garbage(make_config(IndexGcConfig, values))["versions_removed"] == []
        assert left.exists()
        figures = collect_garbage(make_config(IndexGcConfig, {**values, "unfinished": True}))
        assert (figures["versions_removed"], figures["bytes_freed"]) == (["v000002"], 10)
        assert not left.exists()
        corpus.check()


class TestPlacementByCluster:
    def test_a_query_visits_some_shards_and_finds_what_it_should(self, tmp_path: Path) -> None:
        corpus = Corpus(tmp_path, shards=5, placement="cluster", target={"recall": 0.95})
        manifest = open_manifest(corpus.index)[0]
        assert manifest.placement is not None
        assert manifest.placement.shards == len(manifest.shards)
        probe = manifest.search_parameters["shards_probe"]
        assert 1 <= probe <= 5
        curve = manifest.placement_curve
        assert [point["shards_probe"] for point in curve] == list(range(1, len(curve) + 1))
        assert manifest.recall >= 0.95
        assert not (corpus.index / "versions" / "v000001" / "placed").exists()
        index = Index.open(corpus.index)
        queries = clustered_vectors(20, seed=99)
        hits = index.search(queries, 10, search_parameters={"shards_probe": 5})
        everywhere = [
            [document.id for document in index.documents(shards, rows)]
            for shards, rows in zip(hits.shards, hits.rows, strict=True)
        ]
        assert everywhere == corpus.expected(queries, 10)
        # Visiting one shard still gives k hits where that shard holds fewer.
        few = index.search(queries, BASE_ROWS, search_parameters={"shards_probe": 1})
        assert (few.shards >= 0).all()

    def test_added_documents_are_found_and_compaction_places_them(self, tmp_path: Path) -> None:
        corpus = Corpus(tmp_path, shards=4, placement="cluster", target={"recall": 1.0})
        corpus.add(new_ids(), seed=24)
        corpus.delete(["id 1", "new 1"])
        index = Index.open(corpus.index)
        assert found_ids(index, np.stack([corpus.rows["new 2"]]), 1) == [["new 2"]]
        corpus.compact(shards=4)
        manifest = open_manifest(corpus.index)[0]
        assert manifest.placement is not None
        assert manifest.placement.shards == len(manifest.shards)
        assert not (corpus.index / "versions" / manifest.version / "unplaced").exists()
        corpus.check()

    def test_shards_probe_needs_a_placed_index(self, corpus: Corpus) -> None:
        queries = clustered_vectors(1, seed=99)
        with pytest.raises(InputError, match="not placed by cluster"):
            Index.open(corpus.index).search(queries, 1, search_parameters={"shards_probe": 1})
        placed = Corpus(corpus.folder / "placed", shards=3, placement="cluster")
        with pytest.raises(InputError, match="shards_probe is 0"):
            Index.open(placed.index).search(queries, 1, search_parameters={"shards_probe": 0})


class TestFilters:
    def test_before_ranking_over_shards_and_deletions(self, corpus: Corpus) -> None:
        corpus.delete(["id 250"])
        index = Index.open(corpus.index)
        queries = clustered_vectors(5, seed=99)
        hits = index.search(queries, 20, filter={"year": {"$gte": 2240, "$lt": 2260}})
        wanted = {f"id {row}" for row in range(240, 260)} - {"id 250"}
        for shards, rows in zip(hits.shards, hits.rows, strict=True):
            assert {document.id for document in index.documents(shards, rows)} == wanted
        assert index.search(queries, 5, filter={"year": 1900}).rows.shape == (5, 0)
        with pytest.raises(InputError, match="'yaer'"):
            index.search(queries, 5, filter={"yaer": 1})


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            assert process.stderr is not None
            process.kill()
            raise AssertionError(f"it ended, or took too long: {process.stderr.read().decode()[-2000:]}")
        time.sleep(0.05)


def test_the_build_config_is_written_as_it_was_read() -> None:
    values = {"embeddings": "e", "output": "o", "placement": "cluster"}
    config = make_config(IndexBuildConfig, values)
    assert json.loads(config.model_dump_json())["placement"] == "cluster"
