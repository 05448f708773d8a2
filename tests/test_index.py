"""Indexes: the planner's arithmetic, search against brute force, publishing, and every refusal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytower.config import make_config
from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.errors import FormatError, InputError
from raytower.index.build import build_index, plan_build
from raytower.index.config import IndexBuildConfig
from raytower.index.manage import (
    IndexListConfig,
    IndexRollbackConfig,
    IndexVerifyConfig,
    index_list,
    index_rollback,
    index_verify,
)
from raytower.index.plan import plan_index, split_rows
from raytower.index.reader import Index
from raytower.index.search import Hits, merge_hits
from raytower.index.versions import claim_version
from raytower.storage import Location

DIM = 24


def clustered_vectors(rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Unit vectors around 20 centres that are the same for every seed, so that queries resemble documents."""
    centres = np.random.default_rng(1).normal(size=(20, dim))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 20, rows)] + 0.6 * random.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_embeddings(folder: Path, vectors: np.ndarray, files: int = 3, **changes: Any) -> Path:
    """An embeddings folder as the contract describes it, without the encoding job."""
    folder.mkdir(parents=True)
    entries = []
    ids = changes.pop("ids", [f"id {row}" for row in range(len(vectors))])
    for number, part in enumerate(np.array_split(np.arange(len(vectors)), files)):
        flat = pa.array(vectors[part].reshape(-1))
        table = pa.table(
            {
                "id": [ids[row] for row in part],
                "text": [f"text of {row}" for row in part],
                "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
                "year": [2000 + int(row) for row in part],
            }
        )
        place = folder / f"part-{number:08d}.parquet"
        pq.write_table(table, place)
        sha256 = Location.of(place).sha256()
        entries.append(
            EmbeddingsFile(name=place.name, rows=len(part), bytes=place.stat().st_size, sha256=sha256)
        )
    manifest = EmbeddingsManifest(
        fingerprint="f" * 64,
        encoder="some-encoder",
        dim=vectors.shape[1],
        dtype="float32",
        normalised=True,
        prefix="",
        max_length=64,
        rows=len(vectors),
        files=tuple(entries),
    )
    replace(manifest, **changes).write(Location.of(folder))
    return folder


def build(embeddings: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "embeddings": str(embeddings),
        "output": str(output),
        "kind": "flat",
        "shards": 2,
        "workers": {"max": 2, "num_cpus": 0.5},
    }
    return build_index(make_config(IndexBuildConfig, {**values, **changes}))


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[str]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [[f"id {row}" for row in np.argsort(-line, kind="stable")[:k]] for line in scores]


def found_ids(index: Index, queries: np.ndarray, k: int) -> list[list[str]]:
    hits = index.search(queries, k)
    return [
        [document.id for document in index.documents(shards, rows)]
        for shards, rows in zip(hits.shards, hits.rows, strict=True)
    ]


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

    @given(
        rows=st.integers(1, 10**9),
        dim=st.sampled_from([8, 256, 384, 768, 1024]),
        memory=st.integers(2**27, 2**42),
    )
    def test_auto_keeps_the_memory_or_refuses(self, rows: int, dim: int, memory: int) -> None:
        values: dict[str, Any] = {
            "rows": rows,
            "dim": dim,
            "kind": "auto",
            "shards": "auto",
            "num_workers": 4,
        }
        values |= {"memory_bytes": memory, "recall": 0.95}
        if memory < rows * 9:  # not even one byte of code beside an id of eight
            with pytest.raises(InputError, match=r"target\.memory"):
                plan_index(**values)
        elif rows * dim * 6 < memory // 4:  # ample even for a graph with full vectors
            plan = plan_index(**values)
            assert plan.ranges[-1][1] == rows
            assert plan.predicted_search_memory_bytes <= memory
            assert plan.reason

    def test_auto_goes_from_exact_to_graph_to_codes(self) -> None:
        def kind(rows: int, memory: int) -> str:
            values = {"dim": 384, "shards": "auto", "memory_bytes": memory, "num_workers": 2, "recall": 0.95}
            return plan_index(rows=rows, kind="auto", **values).kind  # type: ignore[arg-type]

        assert kind(5_000, 8 * 2**30) == "flat"
        assert kind(1_000_000, 8 * 2**30) == "hnsw"
        assert kind(10_000_000, 8 * 2**30) == "ivf_rabitq"
        assert kind(50_000_000, 8 * 2**30) == "ivf_rabitq"

    def test_what_does_not_fit_names_what_would(self) -> None:
        with pytest.raises(InputError, match=r"kind ivf_rabitq \(647\.6 MiB\) would fit"):
            plan_index(
                rows=10_000_000,
                dim=384,
                kind="hnsw",
                shards=4,
                recall=0.95,
                memory_bytes=8 * 2**30,
                num_workers=2,
            )

    def test_more_shards_than_rows(self) -> None:
        with pytest.raises(InputError, match="shards is 4, more than the 3 rows"):
            plan_index(rows=3, dim=8, kind="flat", shards=4, recall=0.95, memory_bytes=2**30, num_workers=2)


class TestMerge:
    def test_padding_never_becomes_a_hit(self) -> None:
        """Defect of an older system: FAISS's -1 padding read as the last document."""
        left = Hits(
            np.array([[0.9, -np.inf]], np.float32),
            np.array([[0, -1]], np.int32),
            np.array([[7, -1]], np.int64),
        )
        right = Hits(
            np.array([[0.5, 0.4]], np.float32), np.array([[1, 1]], np.int32), np.array([[3, 4]], np.int64)
        )
        merged = merge_hits([left, right], 3)
        assert merged.shards.tolist() == [[0, 1, 1]]
        assert merged.rows.tolist() == [[7, 3, 4]]

    def test_ties_go_by_shard_then_row(self) -> None:
        def part(shard: int, rows: list[int]) -> Hits:
            return Hits(
                np.ones((1, 2), np.float32), np.full((1, 2), shard, np.int32), np.array([rows], np.int64)
            )

        merged = merge_hits([part(1, [0, 1]), part(0, [9, 5])], 4)
        assert list(zip(merged.shards[0].tolist(), merged.rows[0].tolist(), strict=True)) == [
            (0, 5),
            (0, 9),
            (1, 0),
            (1, 1),
        ]


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A flat index of two shards over 500 vectors; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("index")
    vectors = clustered_vectors(500)
    write_embeddings(folder / "embeddings", vectors)
    build(folder / "embeddings", folder / "index")
    return folder, vectors


@pytest.fixture
def damaged(built: tuple[Path, np.ndarray], tmp_path: Path) -> Path:
    """A copy of the built index to damage: its version folder."""
    shutil.copytree(built[0] / "index", tmp_path / "index")
    return tmp_path / "index" / "versions" / "v000001"


class TestSearch:
    def test_flat_shards_give_the_brute_force_hits(self, built: tuple[Path, np.ndarray]) -> None:
        index = Index.open(built[0] / "index")
        for queries in (clustered_vectors(2, seed=9), clustered_vectors(40, seed=8)):
            assert found_ids(index, queries, 10) == brute_force(built[1], queries, 10)
        document = index.documents(np.array([1], np.int32), np.array([3], np.int64))[0]
        assert (document.text, document.metadata) == ("text of 253", {"year": 2253})

    @pytest.mark.usefixtures("ray_cluster")
    @pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_sq8"])
    def test_approximate_kinds_reach_the_recall_that_their_manifest_claims(
        self, kind: str, tmp_path: Path
    ) -> None:
        vectors = clustered_vectors(3000)
        write_embeddings(tmp_path / "embeddings", vectors)
        figures = build(tmp_path / "embeddings", tmp_path / "index", kind=kind)
        assert figures["recall"] >= 0.95
        index = Index.open(tmp_path / "index")
        curve = index.manifest.recall_curve
        chosen = index.manifest.search_parameters
        cheaper = [point for point in curve if point["value"] < chosen[point["parameter"]]]
        assert all(point["recall"] < 0.95 for point in cheaper)
        assert max(point["recall"] for point in curve) >= 0.95
        queries = clustered_vectors(100, seed=7)
        pairs = zip(found_ids(index, queries, 10), brute_force(vectors, queries, 10), strict=True)
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) > 0.9

    def test_k_beyond_the_index_gives_every_row_once(self, built: tuple[Path, np.ndarray]) -> None:
        ids = found_ids(Index.open(built[0] / "index"), clustered_vectors(1, seed=5), 10_000)[0]
        assert len(ids) == len(set(ids)) == 500

    @pytest.mark.usefixtures("ray_cluster")
    @pytest.mark.parametrize("kind", ["hnsw", "ivf_flat"])
    def test_k_beyond_what_graph_or_lists_reach_gives_every_row_once(self, kind: str, tmp_path: Path) -> None:
        vectors = clustered_vectors(3000)
        write_embeddings(tmp_path / "embeddings", vectors)
        build(tmp_path / "embeddings", tmp_path / "index", kind=kind)
        index = Index.open(tmp_path / "index")
        queries = clustered_vectors(2, seed=4)
        parameters = {"nprobe": 1} if kind == "ivf_flat" else {"efSearch": 4}
        hits = index.search(queries, 5000, search_parameters=parameters)
        for number, (shards, rows) in enumerate(zip(hits.shards, hits.rows, strict=True)):
            ids = [document.id for document in index.documents(shards, rows)]
            assert ids == brute_force(vectors, queries, 3000)[number]

    @pytest.mark.parametrize("k", [0, -3])
    def test_k_below_one(self, built: tuple[Path, np.ndarray], k: int) -> None:
        with pytest.raises(InputError, match=f"k is {k}"):
            Index.open(built[0] / "index").search(clustered_vectors(1), k)

    def test_queries_that_cannot_be_searched(self, built: tuple[Path, np.ndarray]) -> None:
        index = Index.open(built[0] / "index")
        with pytest.raises(InputError, match=r"shape \(2, 8\); index version v000001 takes \(queries, 24\)"):
            index.search(clustered_vectors(2, dim=8), 5)
        with pytest.raises(InputError, match="zero"):
            index.search(np.zeros((1, DIM)), 5)
        with pytest.raises(InputError, match="NaN or infinity"):
            index.search(np.full((1, DIM), np.nan), 5)


@pytest.mark.usefixtures("ray_cluster")
class TestBuild:
    def test_unnormalised_vectors_of_a_cosine_model_are_ranked_by_cosine(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(200)
        scaled = vectors * np.linspace(0.5, 9, 200, dtype=np.float32)[:, None]
        write_embeddings(tmp_path / "embeddings", scaled, normalised=False)
        build(tmp_path / "embeddings", tmp_path / "index")
        queries = clustered_vectors(10, seed=3)
        assert found_ids(Index.open(tmp_path / "index"), queries * 7, 5) == brute_force(vectors, queries, 5)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0.0, "zero")],
    )
    def test_vectors_that_cannot_be_indexed_are_named(self, tmp_path: Path, bad: float, message: str) -> None:
        vectors = clustered_vectors(50)
        vectors[33] = bad
        write_embeddings(tmp_path / "embeddings", vectors)
        with pytest.raises(InputError, match=f"'id 33'.*{message}"):
            build(tmp_path / "embeddings", tmp_path / "index")
        assert not (tmp_path / "index" / "CURRENT").exists()

    def test_duplicate_ids_across_shards_are_named(self, tmp_path: Path) -> None:
        ids = [f"id {row}" for row in range(50)]
        ids[49] = "id 1"
        write_embeddings(tmp_path / "embeddings", clustered_vectors(50), ids=ids)
        with pytest.raises(
            InputError,
            match=r"'id 1' stands twice.*part-00000000\.parquet row 1 and part-00000002\.parquet row 15",
        ):
            build(tmp_path / "embeddings", tmp_path / "index")

    def test_a_dimension_other_than_the_manifests(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(50), dim=32)
        with pytest.raises(InputError, match="manifest says fixed_size_list of 32 dimensions"):
            build(tmp_path / "embeddings", tmp_path / "index")

    def test_embeddings_that_lost_a_file(self, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "embeddings", clustered_vectors(50))
        (tmp_path / "embeddings" / "part-00000001.parquet").unlink()
        with pytest.raises(FormatError, match=r"part-00000001\.parquet is missing"):
            build(tmp_path / "embeddings", tmp_path / "index")

    def test_changed_embeddings_are_refused_and_nothing_is_published(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        place = embeddings / "part-00000002.parquet"
        place.write_bytes(place.read_bytes()[:100])
        with pytest.raises(FormatError, match=r"part-00000002\.parquet has sha256 .*changed after encoding"):
            build(embeddings, tmp_path / "index")
        assert not (tmp_path / "index" / "CURRENT").exists()
        with pytest.raises(InputError, match="no published"):
            Index.open(tmp_path / "index")

    def test_a_build_that_died_before_its_manifest_continues_with_what_is_missing(
        self, tmp_path: Path
    ) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        build(embeddings, tmp_path / "index")
        version = tmp_path / "index" / "versions" / "v000001"
        (version / "manifest.json").unlink()
        (tmp_path / "index" / "CURRENT").unlink()
        kept = (version / "shard-00000" / "vectors.faiss").stat().st_mtime_ns
        shutil.rmtree(version / "shard-00001")
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        assert (version / "shard-00000" / "vectors.faiss").stat().st_mtime_ns == kept
        assert Index.open(tmp_path / "index").num_rows == 60

    def test_a_version_of_a_living_builder_is_left_alone(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        build(embeddings, tmp_path / "index")
        version = tmp_path / "index" / "versions" / "v000001"
        (version / "manifest.json").unlink()
        spec = json.loads((version / "build.json").read_text())
        with claim_version(Location.of(tmp_path / "index"), spec) as name:
            assert name == "v000001"
            assert build(embeddings, tmp_path / "index")["version"] == "v000002"

    def test_a_finished_build_started_again_builds_nothing(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        assert build(embeddings, tmp_path / "index")["version"] == "v000001"
        assert [place.name for place in (tmp_path / "index" / "versions").iterdir()] == ["v000001"]

    def test_versions_are_listed_verified_and_rolled_back(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        uri = str(tmp_path / "index")
        build(embeddings, tmp_path / "index")
        opened = Index.open(uri)
        build(embeddings, tmp_path / "index", kind="hnsw")
        listed = index_list(IndexListConfig(index=uri))
        assert [(entry["version"], entry["current"]) for entry in listed["versions"]] == [
            ("v000001", False),
            ("v000002", True),
        ]
        assert index_verify(IndexVerifyConfig(index=uri))["verified"] is True
        assert opened.version == "v000001"
        assert len(found_ids(opened, clustered_vectors(1), 5)[0]) == 5
        assert index_rollback(IndexRollbackConfig(index=uri, to="v000001"))["before"] == "v000002"
        assert Index.open(uri).version == "v000001"
        with pytest.raises(InputError, match="no finished version 'v000009'; it has: v000001, v000002"):
            index_rollback(IndexRollbackConfig(index=uri, to="v000009"))

    def test_the_plan_writes_nothing(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(60))
        values = {"embeddings": str(embeddings), "output": str(tmp_path / "index"), "shards": 3}
        plan = plan_build(make_config(IndexBuildConfig, values))
        assert (plan["kind"], plan["shards"], plan["rows"]) == ("flat", 3, 60)
        assert not (tmp_path / "index").exists()


class TestRefusals:
    def test_another_encoder(self, built: tuple[Path, np.ndarray]) -> None:
        with pytest.raises(FormatError, match=r"fingerprint f{64} .*given has 0{64}"):
            Index.open(built[0] / "index", encoder_fingerprint="0" * 64)

    @pytest.mark.parametrize("name", ["vectors.faiss", "documents.arrow"])
    def test_a_flipped_byte(self, damaged: Path, name: str) -> None:
        path = damaged / "shard-00001" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(FormatError, match=f"{name} has sha256"):
            Index.open(damaged.parents[1])

    def test_a_truncated_shard(self, damaged: Path) -> None:
        path = damaged / "shard-00000" / "vectors.faiss"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(FormatError, match="truncated or changed"):
            Index.open(damaged.parents[1])

    def test_a_missing_file(self, damaged: Path) -> None:
        (damaged / "shard-00000" / "documents.arrow").unlink()
        with pytest.raises(FormatError, match=r"documents\.arrow is missing"):
            Index.open(damaged.parents[1])

    def test_wrong_counts(self, damaged: Path) -> None:
        manifest = json.loads((damaged / "manifest.json").read_text())
        manifest["shards"][0]["rows"] += 1
        (damaged / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(FormatError, match="its shards add up to 501"):
            Index.open(damaged.parents[1])
        manifest["rows"] += 1
        (damaged / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(FormatError, match="has 250 vectors and 250 documents; its manifest says 251"):
            Index.open(damaged.parents[1])

    def test_a_missing_or_newer_manifest(self, damaged: Path) -> None:
        manifest = json.loads((damaged / "manifest.json").read_text())
        (damaged / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
        with pytest.raises(FormatError, match="format version 3; this raytower reads version 2"):
            Index.open(damaged.parents[1])
        (damaged / "manifest.json").unlink()
        with pytest.raises(FormatError, match="never finished"):
            Index.open(damaged.parents[1])

    def test_no_such_version_or_index(self, built: tuple[Path, np.ndarray], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no version 'v000007'"):
            Index.open(built[0] / "index", "v000007")
        with pytest.raises(InputError, match="no published index"):
            Index.open(tmp_path)
        with pytest.raises(InputError, match="'v1' is no version name"):
            Index.open(built[0] / "index", "v1")
