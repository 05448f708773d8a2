"""Indexes, continued: claims of versions, restarts, odd inputs, and the promises that every kind keeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError, InputError
from raytower.index.faiss_index import new_index
from raytower.index.plan import plan_index
from raytower.index.reader import Index
from raytower.index.search import Hits, merge_hits, resolve_parameters
from raytower.index.shard_build import ShardTask, build_shard, serialise
from raytower.index.source import EmbeddingsSource
from raytower.index.versions import claim_version
from raytower.runtime import worker_environment
from raytower.storage import Location
from tests.test_index import DIM, brute_force, build, clustered_vectors, found_ids, write_embeddings
from tests.test_index_kinds import FakeGpus


def refresh_manifest(embeddings: Path) -> None:
    """The checksums of files that a test rewrote."""
    manifest = EmbeddingsManifest.read(Location.of(embeddings))
    files = [
        replace(entry, sha256=place.sha256(), bytes=place.size_bytes())
        for entry, place in ((entry, Location.of(embeddings / entry.name)) for entry in manifest.files)
    ]
    replace(manifest, files=tuple(files)).write(Location.of(embeddings))


def _die(*arguments: object) -> None:
    raise KeyboardInterrupt


def source_environment() -> dict[str, str]:
    return {**os.environ, **worker_environment()}


class TestPlannerLimits:
    def test_a_build_that_does_not_fit_names_the_shards_that_would(self) -> None:
        values: dict[str, Any] = {
            "rows": 2_000_000,
            "dim": 384,
            "kind": "ivf_flat",
            "memory_bytes": 4 * 2**30,
        }
        with pytest.raises(
            InputError, match=r"in 1 shards takes .* a task, more than target\.memory 4\.0 GiB"
        ) as refused:
            plan_index(**values, shards=1)
        named = re.search(r"shards: (\d+) would fit", str(refused.value))
        assert named is not None
        assert plan_index(**values, shards=int(named[1])).shards == int(named[1]) > 1

    @given(dim=st.integers(1, 1100), rows=st.integers(1, 10**6))
    def test_product_codes_divide_the_dimension(self, dim: int, rows: int) -> None:
        parameters = plan_index(rows=rows, dim=dim, kind="ivf_pq", shards=1, memory_bytes=2**40).parameters
        assert dim % parameters["pq_m"] == 0
        assert 1 <= parameters["nlist"] <= rows
        assert 2 ** parameters["nbits"] <= max(rows, 2)


class TestMergeOrder:
    @given(data=st.data(), k=st.integers(1, 12))
    def test_it_is_one_sort_by_score_shard_and_row(self, data: st.DataObject, k: int) -> None:
        """Against Python's sort, over scores that tie often and include both zeros."""
        scores = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.25, 1.0])
        shards = data.draw(st.lists(st.lists(scores, max_size=6), min_size=1, max_size=4))
        expected = sorted(
            (-score, shard, row) for shard, line in enumerate(shards) for row, score in enumerate(line)
        )[:k]
        merged = merge_hits(
            [
                Hits(
                    np.array([line], np.float32).reshape(1, -1),
                    np.full((1, len(line)), shard, np.int32),
                    np.arange(len(line), dtype=np.int64)[None],
                )
                for shard, line in enumerate(shards)
            ],
            k,
        )
        found = zip(
            merged.scores[0].tolist(), merged.shards[0].tolist(), merged.rows[0].tolist(), strict=True
        )
        assert [(-score, shard, row) for score, shard, row in found] == expected


class TestFilling:
    """A shard filled in line and beside the reading, here in this process."""

    @staticmethod
    def task(folder: Path, embeddings: Path, num_threads: int) -> ShardTask:
        source = EmbeddingsSource(Location.of(embeddings))
        return ShardTask(
            source=source,
            version=Location.of(folder),
            number=0,
            start=0,
            end=source.rows,
            kind="flat",
            exact_dtype="float16",
            documents_schema=pa.schema([("id", pa.string()), ("text", pa.string())]),
            spec_sha256="",
            num_threads=num_threads,
        )

    def test_rows_stay_with_their_documents_in_their_order(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(9000)  # several batches to a file
        embeddings = write_embeddings(tmp_path / "embeddings", vectors, files=2)
        template = serialise(new_index("flat", DIM, {}))
        for threads in (1, 2):
            entry = build_shard(self.task(tmp_path / str(threads), embeddings, threads), template)
            assert entry.rows == len(vectors)
            shard = tmp_path / str(threads) / "shard-00000"
            stored = faiss.read_index(str(shard / "vectors.faiss")).reconstruct_n(0, len(vectors))
            np.testing.assert_allclose(stored, vectors, atol=1e-6)  # of unit length again
            np.testing.assert_allclose(np.load(shard / "exact.npy"), vectors, atol=1e-3)
            ids = pa.ipc.open_file(str(shard / "documents.arrow")).read_all()["id"].to_pylist()
            assert ids == [f"id {row}" for row in range(len(vectors))]

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("rows", [40, 9000])  # the last batch fails, or one before it
    def test_what_faiss_refuses_is_raised_and_leaves_no_shard(
        self, threads: int, rows: int, tmp_path: Path
    ) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(rows), files=1)
        other_dimension = serialise(new_index("flat", DIM + 1, {}))
        with pytest.raises(AssertionError):
            build_shard(self.task(tmp_path / "version", embeddings, threads), other_dimension)
        assert not (tmp_path / "version" / "shard-00000").exists()


@pytest.mark.usefixtures("ray_cluster")
class TestEveryKind:
    @pytest.mark.parametrize("kind", ["hnsw", "ivf_rabitq", "ivf_sq8", "ivf_pq"])
    def test_every_kind_gives_every_row_when_asked_for_more(self, kind: str, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(700))
        build(tmp_path / "embeddings", tmp_path / "index", kind=kind)
        ids = found_ids(Index.open(tmp_path / "index"), clustered_vectors(2, seed=5), 1000)
        assert [len(set(line)) for line in ids] == [700, 700]

    def test_settings_of_a_kind_are_what_is_built(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(700))
        build(tmp_path / "embeddings", tmp_path / "graph", kind="hnsw", hnsw={"m": 8, "ef_construction": 20})
        assert Index.open(tmp_path / "graph").manifest.parameters == {"M": 8, "efConstruction": 20}
        build(tmp_path / "embeddings", tmp_path / "lists", kind="ivf_pq", ivf={"nlist": 7, "pq_m": 12})
        parameters = Index.open(tmp_path / "lists").manifest.parameters
        assert (parameters["nlist"], parameters["pq_m"]) == (7, 12)

    @pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8"])
    def test_an_index_is_searched_on_the_gpu_that_is_there(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(700))
        build(tmp_path / "embeddings", tmp_path / "index", kind=kind, shards=2)
        here, there = (Index.open(tmp_path / "index") for _ in range(2))
        assert there.use_gpu() == 0  # there is none
        gpus = FakeGpus(monkeypatch)
        assert there.use_gpu() == 2
        queries = clustered_vectors(20, seed=6)
        for name in ("scores", "shards", "rows"):
            found, wanted = (getattr(index.search(queries, 10), name) for index in (there, here))
            assert found.tolist() == wanted.tolist()
        assert "search" in gpus.calls

    def test_hnsw_scores_are_exact_inner_products(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(900)
        write_embeddings(tmp_path / "embeddings", vectors)
        build(tmp_path / "embeddings", tmp_path / "index", kind="hnsw")
        queries = clustered_vectors(20, seed=6)
        hits = Index.open(tmp_path / "index").search(queries, 10)
        stored = vectors[hits.shards * 450 + hits.rows]  # 900 rows in two shards
        np.testing.assert_allclose(hits.scores, np.einsum("qd,qkd->qk", queries, stored), atol=1e-6)

    def test_a_query_s_hits_do_not_depend_on_its_batch(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(2000))
        build(tmp_path / "embeddings", tmp_path / "index", kind="hnsw")
        index, queries = Index.open(tmp_path / "index"), clustered_vectors(30, seed=6)
        assert found_ids(index, queries, 10) == [found_ids(index, query[None], 10)[0] for query in queries]

    def test_search_parameters_that_are_refused_or_scaled(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(300))
        build(tmp_path / "embeddings", tmp_path / "index", kind="hnsw", target={"k": 10})
        index = Index.open(tmp_path / "index")
        with pytest.raises(InputError, match="kind hnsw has no search parameter 'nprobe'; it has 'efSearch'"):
            index.search(clustered_vectors(1), 5, search_parameters={"nprobe": 3})
        with pytest.raises(InputError, match="efSearch is 0; it must be 1 or more"):
            index.search(clustered_vectors(1), 5, search_parameters={"efSearch": 0})
        manifest = replace(index.manifest, search_parameters={"efSearch": 24})
        assert resolve_parameters(manifest, 5) == {"efSearch": 24}
        assert resolve_parameters(manifest, 25) == {"efSearch": 60}
        assert resolve_parameters(manifest, 25, {"efSearch": 7}) == {"efSearch": 7}

    def test_padding_in_a_list_of_hits_has_no_document(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(20))
        build(tmp_path / "embeddings", tmp_path / "index")
        padded = np.array([1, -1], np.int32), np.array([3, -1], np.int64)
        assert [item.id for item in Index.open(tmp_path / "index").documents(*padded)] == ["id 13"]


@pytest.mark.usefixtures("ray_cluster")
class TestBuilding:
    def test_a_restarted_build_keeps_finished_shards_and_a_failed_one_publishes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        saved = (embeddings / "part-00000002.parquet").read_bytes()
        (embeddings / "part-00000002.parquet").write_bytes(saved[:100])
        with pytest.raises(FormatError, match=r"^\S*part-00000002\.parquet has sha256") as refused:
            build(embeddings, tmp_path / "index")
        assert "Traceback" not in str(refused.value)
        assert not (tmp_path / "index").exists()
        (embeddings / "part-00000002.parquet").write_bytes(saved)
        # A build that dies before its manifest, here while it measures, has published nothing.
        with monkeypatch.context() as patched:
            patched.setattr("raytower.index.build._measure", _die)
            with pytest.raises(KeyboardInterrupt):
                build(embeddings, tmp_path / "index")
        version = tmp_path / "index" / "versions" / "v000001"
        assert not (tmp_path / "index" / "CURRENT").exists()
        with pytest.raises(InputError, match="no published index"):
            Index.open(tmp_path / "index")
        # Of the two shards one is whole and one was damaged since.
        kept, damaged = (version / name / "vectors.faiss" for name in ("shard-00000", "shard-00001"))
        damaged.write_bytes(damaged.read_bytes()[:-1])
        (version / ".shard-00001.0123.tmp").mkdir()
        written = kept.stat().st_mtime_ns
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        assert kept.stat().st_mtime_ns == written
        assert sorted(place.name for place in version.iterdir()) == [
            "build.json",
            "manifest.json",
            "shard-00000",
            "shard-00001",
        ]
        assert Index.open(tmp_path / "index").num_rows == 60

    def test_a_finished_build_is_not_built_again_unless_it_is_damaged(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        (tmp_path / "index" / "CURRENT").unlink()  # killed between the manifest and the swap
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        assert Index.open(tmp_path / "index").version == "v000001"
        vectors = tmp_path / "index" / "versions" / "v000001" / "shard-00000" / "vectors.faiss"
        vectors.write_bytes(vectors.read_bytes()[::-1])
        assert build(embeddings, tmp_path / "index")["version"] == "v000002"
        assert Index.open(tmp_path / "index").version == "v000002"

    def test_files_that_infer_columns_differently_are_joined(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(40)
        embeddings = write_embeddings(tmp_path / "embeddings", vectors, files=2)
        place = embeddings / "part-00000001.parquet"
        table = pq.read_table(place)
        years = pa.array([float(year.as_py()) + 0.5 for year in table["year"]])
        pq.write_table(table.drop_columns(["year"]).append_column("year", years), place)
        refresh_manifest(embeddings)
        build(embeddings, tmp_path / "index")
        documents = Index.open(tmp_path / "index").documents(np.array([0, 1]), np.array([0, 0]))
        assert [document.metadata["year"] for document in documents] == [2000.0, 2020.5]

    def test_half_precision_vectors(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(300)
        write_embeddings(tmp_path / "embeddings", vectors.astype(np.float16), dtype="float16")
        build(tmp_path / "embeddings", tmp_path / "index")
        index, queries = Index.open(tmp_path / "index"), clustered_vectors(10, seed=2)
        best = [line[0] for line in found_ids(index, queries, 1)]
        assert best == [line[0] for line in brute_force(vectors.astype(np.float16), queries, 1)]

    def test_copies_of_a_row_count_as_equally_right(self, tmp_path: Path) -> None:
        """Each vector stands 40 times: any ten of its copies are the ten nearest, whichever a search picks."""
        write_embeddings(tmp_path / "embeddings", np.repeat(clustered_vectors(20), 40, axis=0))
        assert build(tmp_path / "embeddings", tmp_path / "index")["recall"] == 1.0

    def test_a_target_that_is_not_reached_is_said(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        random = np.random.default_rng(0).normal(size=(1500, DIM))
        write_embeddings(tmp_path / "embeddings", random.astype(np.float32))
        target = {"recall": 1.0, "k": 10}
        figures = build(
            tmp_path / "embeddings", tmp_path / "index", kind="ivf_pq", target=target, rescore=False
        )
        assert figures["recall_target_reached"] is False
        assert figures["recall"] < 1
        assert "below target.recall 1.0" in capfd.readouterr().err

    def test_two_builders_at_once_never_share_a_version(self, tmp_path: Path) -> None:
        index, spec = Location.of(tmp_path / "index"), {"seed": 1}
        with claim_version(index, spec) as first, claim_version(index, spec) as second:
            assert (first, second) == ("v000001", "v000002")
        # Both died without a manifest: the first that comes takes up the first, and only for the same build.
        with claim_version(index, {"seed": 2}) as other, claim_version(index, spec) as resumed:
            assert (other, resumed) == ("v000003", "v000001")

    def test_a_killed_builder_leaves_its_version_to_the_next(self, tmp_path: Path) -> None:
        script = (
            "import sys, time\nfrom raytower.index.versions import claim_version\n"
            "from raytower.storage import Location\n"
            "with claim_version(Location.of(sys.argv[1]), {'seed': 1}) as name:\n"
            "    print(name, flush=True)\n    time.sleep(60)\n"
        )
        index = Location.of(tmp_path / "index")
        command = [sys.executable, "-c", script, index.path]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=source_environment()
        ) as builder:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "v000001\n"
            with claim_version(index, {"seed": 1}) as mine:
                assert mine == "v000002"
            builder.kill()
        with claim_version(index, {"seed": 1}) as mine:
            assert mine == "v000001"

    def test_storage_without_locks_gives_each_builder_its_own_version(self, tmp_path: Path) -> None:
        # A filesystem that is not the local one takes the way of object stores.
        store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        index = Location(store, "index")
        with claim_version(index, {}) as first, claim_version(index, {}) as second:
            assert {first, second} == {"v000001", "v000002"}
