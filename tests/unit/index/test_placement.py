"""Placement by cluster: which shard a row lies on, which shards a query visits, and an index that is placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index import placement as placement_module
from raytower.index.change import add_to_index
from raytower.index.change_config import IndexAddConfig
from raytower.index.compact import compact_index
from raytower.index.config import IndexCompactConfig
from raytower.index.placement import Placement, sample_rows_for, train_placement
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.storage import Location
from tests.support.index_cases import HERE, build, write_embeddings

DIM = 16


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(rows: int, seed: int = 0, *, centres: int = 60, zipf: float = 0.0) -> NDArray[np.float32]:
    """Unit vectors around centres that are the same for every seed; `zipf` makes some far more common."""
    middles = np.random.default_rng(1).normal(size=(centres, DIM))
    shares = 1 / np.arange(1, centres + 1) ** zipf
    random = np.random.default_rng(seed)
    chosen = random.choice(centres, rows, p=shares / shares.sum())
    return unit(middles[chosen] + 0.3 * random.normal(size=(rows, DIM)))


def train(
    sample: NDArray[np.float32], shards: int, seed: int = 0, *, clusters_per_shard: int = 64, **changes: Any
) -> Placement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_module, "_CLUSTERS_PER_SHARD", clusters_per_shard)
        return train_placement(sample, shards, seed, **{"metric": "cosine", **changes})


def make_placement(centroids: list[list[float]], shard_of: list[int]) -> Placement:
    return Placement(np.array(centroids, np.float32), np.array(shard_of, np.int32))


def nearest_by_distance(vectors: NDArray[Any], centroids: NDArray[Any]) -> NDArray[np.int64]:
    distances = np.linalg.norm(vectors.astype(np.float64)[:, None] - centroids.astype(np.float64), axis=2)
    return distances.argmin(axis=1)


class TestTraining:
    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 400),
        distinct=st.integers(1, 400),
        shards=st.integers(1, 12),
        metric=st.sampled_from(["cosine", "inner_product"]),
        seed=st.integers(0, 2**40),
    )
    def test_any_sample_keeps_the_bound_and_fills_every_shard(
        self, rows: int, distinct: int, shards: int, metric: str, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        pool = random.normal(size=(distinct, 4))
        pool = unit(pool) if metric == "cosine" else pool.astype(np.float32)
        sample = pool[random.integers(0, distinct, rows)]
        placement = train(sample, shards, seed, metric=metric, clusters_per_shard=8)
        assert placement.num_shards == min(shards, len(np.unique(sample, axis=0)))
        sizes = np.bincount(placement.assign(sample), minlength=placement.num_shards)
        assert sizes.min() >= 1
        heaviest = np.bincount(nearest_by_distance(sample, placement.centroids)).max()
        mean = rows / placement.num_shards
        # One row may fall to the other side where a distance is a tie in float32.
        assert sizes.max() <= max(1.25 * mean, mean + heaviest) + 1

    @pytest.mark.parametrize("shards", [3, 8, 16])
    @pytest.mark.parametrize("zipf", [0.0, 1.0])
    def test_no_shard_is_larger_than_five_quarters_of_the_mean(self, shards: int, zipf: float) -> None:
        sample = clustered(8_000, zipf=zipf)
        placement = train(sample, shards)
        assert placement.num_shards == shards
        assert np.bincount(placement.assign(sample)).max() <= 1.25 * 8_000 / shards
        assert np.bincount(placement.assign(sample)).min() >= 0.5 * 8_000 / shards
        # Other rows of the same corpus follow the sample.
        assert np.bincount(placement.assign(clustered(8_000, 1, zipf=zipf))).max() <= 1.4 * 8_000 / shards

    def test_outliers_get_no_shard_of_their_own(self) -> None:
        sample = clustered(4_000)
        # The opposite of everything else, and so the best cluster there is.
        sample[:40] = unit(-sample[40:].mean(axis=0) + 0.01 * sample[:40])
        sizes = np.bincount(train(sample, 6).assign(sample))
        assert sizes.min() >= 0.5 * 4_000 / 6
        assert sizes.max() <= 1.25 * 4_000 / 6

    def test_heavy_clusters_are_split_until_the_bound_holds(self) -> None:
        # With one cluster a shard k-means alone gives shards of any size.
        sample = clustered(8_000, centres=5, zipf=1.5)
        placement = train(sample, 8, clusters_per_shard=1)
        assert placement.num_shards == 8
        assert np.bincount(nearest_by_distance(sample, placement.centroids)).max() <= 250
        assert np.bincount(placement.assign(sample)).max() <= 1250

    def test_clusters_that_fit_nowhere_go_to_the_least_loaded(self) -> None:
        # A shard has room for one cluster and a half more; 12 of them cannot be split.
        placement = train(np.repeat(clustered(12), 50, axis=0), 8)
        assert sorted(np.bincount(placement.shard_of).tolist()) == [1, 1, 1, 1, 2, 2, 2, 2]

    def test_centroids_that_no_row_is_near_are_left_out(self) -> None:
        sample = np.array([[0, 0], [5, 5], [0, 1], [5, 5]], np.float32)
        centroids = np.array([[9, 9], [0, 0], [-9, 0], [5, 5]], np.float32)
        kept, weights, labels = placement_module._occupied(sample, centroids)
        assert kept.tolist() == [[0, 0], [5, 5]]
        assert weights.tolist() == [2, 2]
        assert labels.tolist() == [0, 1, 0, 1]

    def test_near_clusters_share_a_shard(self) -> None:
        random = np.random.default_rng(0)
        groups = 10 * np.eye(4, DIM)
        clusters = (groups[:, None] + random.normal(size=(4, 8, DIM))).reshape(-1, DIM)
        sample = (clusters.repeat(40, axis=0) + 0.05 * random.normal(size=(1280, DIM))).astype(np.float32)
        placement = train(sample, 4, metric="inner_product", clusters_per_shard=8)
        shard_of_group = placement.assign(sample).reshape(4, 320)
        assert (shard_of_group == shard_of_group[:, :1]).all()
        assert sorted(shard_of_group[:, 0].tolist()) == [0, 1, 2, 3]

    def test_equal_rows_stay_on_one_shard_however_many(self) -> None:
        sample = clustered(4_000)
        sample[::2] = sample[0]
        placement = train(sample, 8)
        shards = placement.assign(sample)
        assert placement.num_shards == 8
        assert len(set(shards[::2].tolist())) == 1
        # The rest is spread over the other seven as evenly as it would be alone.
        others = np.delete(np.bincount(shards, minlength=8), shards[0])
        assert others.min() > 0
        assert others.max() <= 1.25 * 4_000 / 8

    @pytest.mark.parametrize(("distinct", "expected"), [(1, 1), (5, 5), (8, 8), (30, 8)])
    def test_fewer_distinct_rows_than_clusters(self, distinct: int, expected: int) -> None:
        rows = clustered(distinct)
        placement = train(np.tile(rows, (50, 1)), 8)
        assert placement.num_shards == expected
        if distinct <= 8:
            assert sorted(placement.assign(rows).tolist()) == list(range(distinct))

    def test_a_large_common_component_does_not_hide_the_differences(self) -> None:
        sample = clustered(2_000) + np.float32(1_000)
        placement = train(sample, 8, metric="inner_product")
        shards = placement.assign(sample)
        assert np.bincount(shards).max() <= 1.25 * 250
        by_distance = placement.shard_of[nearest_by_distance(sample, placement.centroids)]
        assert (shards == by_distance).mean() > 0.99

    def test_minus_zero_is_zero(self) -> None:
        sample = np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)
        assert train(sample, 2).num_shards == 1

    def test_the_same_seed_gives_the_same_placement(self) -> None:
        sample = clustered(3_000)
        first, again, other = train(sample, 4, 7), train(sample, 4, 7), train(sample, 4, 8)
        assert first.sha256 == again.sha256
        assert np.array_equal(first.centroids, again.centroids)
        assert first.sha256 != other.sha256

    def test_centroids_have_unit_length_under_cosine_only(self) -> None:
        sample = clustered(3_000)
        assert np.allclose(np.linalg.norm(train(sample, 4).centroids, axis=1), 1, atol=1e-5)
        means = train(sample, 4, metric="inner_product").centroids
        assert (np.linalg.norm(means, axis=1) < 0.999).any()

    @pytest.mark.parametrize(
        ("sample", "shards", "message"),
        [
            (np.ones((3, 2)), 0, "shards is 0"),
            (np.ones((0, 2)), 2, r"shape \(0, 2\)"),
            (np.ones(3), 2, r"shape \(3,\)"),
            (np.full((3, 2), np.nan), 2, "NaN"),
        ],
    )
    def test_refusals(self, sample: NDArray[Any], shards: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            train(sample.astype(np.float32), shards)

    def test_sample_rows(self) -> None:
        assert sample_rows_for(8) == 8 * 64 * 64


class TestPlacement:
    def test_assign_is_the_nearest_by_distance_also_without_unit_length(self) -> None:
        random = np.random.default_rng(0)
        centroids = (random.normal(size=(40, 5)) * random.uniform(0.1, 4, (40, 1))).astype(np.float32)
        placement = Placement(centroids, np.repeat(np.arange(8, dtype=np.int32), 5))
        vectors = (random.normal(size=(500, 5)) * 3).astype(np.float32)
        assert placement.assign(vectors).dtype == np.int32
        assert placement.assign(vectors).tolist() == (nearest_by_distance(vectors, centroids) // 5).tolist()
        assert placement.assign(vectors[:0]).shape == (0,)

    def test_visit_by_hand(self) -> None:
        placement = make_placement([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], [0, 1, 1, 2])
        query = np.array([[0, 1], [0.9, 0.1], [-1, 0.1]], np.float32)
        # Best centroid of each shard: 0, 1, 0.8; then 0.9, 0.1, 0.62; then -1, 1, -0.52.
        assert placement.visit(query, 1).tolist() == [
            [False, True, False],
            [True, False, False],
            [False, True, False],
        ]
        assert placement.visit(query, 2).tolist() == [
            [False, True, True],
            [True, False, True],
            [False, True, True],
        ]

    def test_equal_scores_go_by_shard_number(self) -> None:
        placement = make_placement([[1, 0], [1, 0], [1, 0]], [0, 1, 2])
        assert placement.visit(np.array([[1, 1]], np.float32), 2).tolist() == [[True, True, False]]

    @settings(max_examples=50, deadline=None)
    @given(owned=st.lists(st.integers(1, 4), min_size=1, max_size=8), seed=st.integers(0, 99))
    def test_more_shards_include_those_of_fewer_up_to_all(self, owned: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        shard_of = np.repeat(np.arange(len(owned), dtype=np.int32), owned)
        # Few different values, so that equal scores occur.
        placement = Placement(random.integers(-1, 2, (len(shard_of), 3)).astype(np.float32), shard_of)
        queries = random.integers(-1, 2, (20, 3)).astype(np.float32)
        before = np.zeros((20, len(owned)), bool)
        for probe in range(1, len(owned) + 3):
            visited = placement.visit(queries, probe)
            assert (visited.sum(axis=1) == min(probe, len(owned))).all()
            assert (visited | before == visited).all()
            before = visited
        assert before.all()

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = clustered(1_000)
        placement = train(vectors, 6)
        whole = placement.assign(vectors), placement.visit(vectors, 2)
        monkeypatch.setattr(placement_module, "_BLOCK_VALUES", 7 * len(placement.centroids))
        assert np.array_equal(placement.assign(vectors), whole[0])
        assert np.array_equal(placement.visit(vectors, 2), whole[1])

    def test_half_of_the_shards_hold_the_neighbours(self) -> None:
        corpus, queries = clustered(6_000), clustered(200, 1)
        placement = train(corpus, 8)
        neighbours = np.argsort(-(queries @ corpus.T), axis=1)[:, :10]
        visited = placement.visit(queries, 4)
        found = np.take_along_axis(visited, placement.assign(corpus)[neighbours], axis=1).mean()
        by_rows = np.take_along_axis(visited, neighbours * 8 // len(corpus), axis=1).mean()
        assert found >= 0.95
        assert 0.4 < by_rows < 0.6

    def test_without_empty(self) -> None:
        placement = make_placement([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]], [0, 1, 1, 2, 3])
        kept = placement.without_empty(np.array([5, 0, 1, 9]))
        assert kept.centroids[:, 0].tolist() == [0, 3, 4]
        assert kept.shard_of.tolist() == [0, 1, 2]
        assert placement.without_empty(np.array([1, 1, 1, 1])).sha256 == placement.sha256

    @pytest.mark.parametrize("probe", [0, -1])
    def test_no_shard_to_visit_is_refused(self, probe: int) -> None:
        with pytest.raises(InputError, match=f"shards_probe is {probe}"):
            make_placement([[1, 0]], [0]).visit(np.ones((1, 2), np.float32), probe)

    def test_other_dimensions_are_refused(self) -> None:
        placement = make_placement([[1, 0]], [0])
        with pytest.raises(InputError, match=r"\(4, 3\).*\(vectors, 2\)"):
            placement.visit(np.ones((4, 3), np.float32), 1)
        with pytest.raises(InputError, match=r"\(2,\)"):
            placement.assign(np.ones(2, np.float32))

    @pytest.mark.parametrize(
        ("centroids", "shard_of", "message"),
        [
            (np.ones((2, 2)), np.zeros(2, np.int32), "float64"),
            (np.ones((0, 2), np.float32), np.zeros(0, np.int32), r"\(0, 2\)"),
            (np.ones((2, 2), np.float32), np.zeros(3, np.int32), r"int32 \(3,\)"),
            (np.ones((2, 2), np.float32), np.zeros(2, np.int64), "int64"),
            (np.full((2, 2), np.inf, np.float32), np.zeros(2, np.int32), "infinite"),
            (np.ones((2, 2), np.float32), np.array([0, 2], np.int32), r"\[0, 2\]"),
            (np.ones((2, 2), np.float32), np.array([1, 1], np.int32), r"\[1, 1\]"),
            (np.ones((2, 2), np.float32), np.array([1, 0], np.int32), r"\[1, 0\]"),
        ],
    )
    def test_arrays_that_do_not_fit(
        self, centroids: NDArray[Any], shard_of: NDArray[Any], message: str
    ) -> None:
        with pytest.raises(FormatError, match=message):
            Placement(centroids, shard_of)


class TestPlacementFile:
    def test_round_trip_with_equal_bytes(self, tmp_path: Path) -> None:
        placement = train(clustered(1_000), 4)
        placement.save(tmp_path / "a.npz")
        placement.save(Location.of(tmp_path) / "b.npz")
        loaded = Placement.load(tmp_path / "a.npz")
        assert loaded.sha256 == placement.sha256
        assert loaded.assign(clustered(100)).tolist() == placement.assign(clustered(100)).tolist()
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]

    def test_every_flipped_byte_is_refused_or_harmless(self, tmp_path: Path) -> None:
        placement = make_placement([[1, 0], [0, 1]], [0, 1])
        path = tmp_path / "placement.npz"
        placement.save(path)
        whole = path.read_bytes()
        refused = 0
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x15
            path.write_bytes(damaged)
            try:
                assert Placement.load(path).sha256 == placement.sha256
            except FormatError:
                refused += 1
        assert refused > len(whole) // 2

    @pytest.mark.parametrize("keep", [0, 1, 100, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "placement.npz"
        make_placement([[1, 0]], [0]).save(path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(FormatError, match=r"placement\.npz is no whole placement file"):
            Placement.load(path)

    def test_a_damaged_header_that_asks_for_too_much_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "placement.npz"
        make_placement([[1, 0], [0, 1]], [0, 1]).save(path)
        whole = path.read_bytes()
        damaged = whole.replace(b"(2, 2), }" + 16 * b" ", b"(2, 20000000000000000), }")
        assert len(damaged) == len(whole)
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"checksum of centroids\.npy is wrong"):
            Placement.load(path)

    def test_what_is_no_placement(self, tmp_path: Path) -> None:
        path = tmp_path / "placement.npz"
        with pytest.raises(InputError, match="no file"):
            Placement.load(path)
        good = {"centroids": np.ones((1, 2), np.float32), "shard_of": np.zeros(1, np.int32)}
        for arrays, message in (
            ({**good}, "no whole placement"),
            ({**good, "format_version": 2}, "format version 2"),
            ({"format_version": 1, "shard_of": good["shard_of"]}, "'centroids'"),
            ({**good, "format_version": 1, "shard_of": np.ones(1, np.int32)}, "without a gap"),
            ({**good, "format_version": np.array([{"a": 1}], object)}, "no whole placement"),
        ):
            np.savez(path, **arrays)  # type: ignore[arg-type]
            with pytest.raises(FormatError, match=message):
                Placement.load(path)
        np.save(path.with_suffix(".npy"), good["centroids"])
        with pytest.raises(FormatError, match="no whole placement"):
            Placement.load(path.with_suffix(".npy"))


class TestPlacedIndex:
    def test_a_query_visits_few_shards_and_each_row_lies_on_one(self, tmp_path: Path) -> None:
        vectors = clustered(4000)
        embeddings = write_embeddings(tmp_path / "e", [f"id {row}" for row in range(4000)], vectors)
        build(tmp_path / "index", embeddings, shards=8, placement="cluster", target={"recall": 0.95})
        index = Index.open(tmp_path / "index")
        placement = index.manifest.placement
        assert placement is not None
        assert placement.shards == len(index.shards) == 8
        rows = np.sort(np.concatenate([np.asarray(shard.rows) for shard in index.shards]))
        assert rows.tolist() == list(range(4000))
        assert index.manifest.search_parameters["10"]["shards_probe"] < 8
        queries = clustered(100, seed=3)
        exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
        for probe in (None, {"shards_probe": 8}):
            found = index.search(queries, 10, search_parameters=probe).rows
            right = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
            assert right / 1000 >= (0.9 if probe is None else 1.0)
        with pytest.raises(InputError, match="shards_probe is 0"):
            index.search(queries, 10, search_parameters={"shards_probe": 0})

    def test_added_rows_are_always_visited_and_compaction_places_them(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "e", [f"id {row}" for row in range(1000)], clustered(1000))
        build(tmp_path / "index", embeddings, shards=4, placement="cluster")
        more = write_embeddings(tmp_path / "more", ["new"], clustered(1, seed=9))
        add_to_index(IndexAddConfig(index=str(tmp_path / "index"), embeddings=more))
        index = Index.open(tmp_path / "index")
        hits = index.search(clustered(1, seed=9), 1, search_parameters={"shards_probe": 1})
        assert index.documents(hits.rows[0])[0].id == "new"
        compact_index(IndexCompactConfig(index=str(tmp_path / "index"), shards=4), run=HERE)
        shards = open_manifest(tmp_path / "index").shards
        assert all(shard.placed for shard in shards)
        assert sum(shard.rows for shard in shards) == 1001

    def test_shards_probe_needs_a_placed_index(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "e", [f"id {row}" for row in range(100)], clustered(100))
        build(tmp_path / "index", embeddings)
        with pytest.raises(InputError, match="placed by cluster"):
            Index.open(tmp_path / "index").search(clustered(1), 3, search_parameters={"shards_probe": 1})
