"""Hybrid search: fused scores by hand, and real indexes beside numpy over all inner products and bm25s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import InputError
from raytower.index import hybrid
from raytower.index.change import add_to_index, delete_from_index
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig
from raytower.index.compact import compact_index
from raytower.index.config import IndexCompactConfig, TokensConfig
from raytower.index.hybrid import HybridFusion, check_mode, modes_of, search_hybrid, unite
from raytower.index.manifest import HybridEntry
from raytower.index.reader import Index
from raytower.index.search_config import HybridConfig
from raytower.index.versions import changing, following, open_manifest, publish
from raytower.storage import Location
from tests.support.index_cases import (
    HERE,
    build,
    clustered_vectors,
    embeddings_of,
    unit_vectors,
    write_embeddings,
)
from tests.unit.index.test_lexical import oracle, random_texts

QUERIES = ["怎么开通微粒贷", "VIP-3", "app 转账额度", "。？！", "zzz"]
VECTORS = unit_vectors(len(QUERIES), seed=9)
DEPTH = 20


def fused_by_hand(
    dense: np.ndarray, lexical: np.ndarray, allowed: np.ndarray, weight: float
) -> dict[int, float]:
    """Standardised scores of the documents that are among the first DEPTH of a side, by row, best first."""
    by_vector = [row for row in np.argsort(-dense, kind="stable") if allowed[row]][:DEPTH]
    by_words = [row for row in np.argsort(-lexical, kind="stable") if allowed[row] and lexical[row] > 0][
        :DEPTH
    ]
    rows = sorted({*by_vector, *by_words})

    def z(values: np.ndarray) -> np.ndarray:
        return (values - values.mean()) / values.std() if np.ptp(values) > 0 else values * 0

    scores = (1 - weight) * z(dense[rows]) + weight * z(lexical[rows])
    order = np.argsort(-scores, kind="stable")
    return {rows[place]: float(scores[place]) for place in order}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return random_texts(300, seed=3)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> str:
    folder = tmp_path_factory.mktemp("hybrid")
    vectors = unit_vectors(len(texts), seed=4)
    half = {"parity": [row % 2 for row in range(len(texts))]}
    embeddings = write_embeddings(
        folder / "in", [str(row) for row in range(len(texts))], vectors, texts, half
    )
    build(folder / "index", embeddings, shards=2)
    return str(folder / "index")


class TestFusedScores:
    def test_a_standardised_sum_by_hand(self) -> None:
        dense, lexical = np.array([0.9, 0.5, 0.1]), np.array([0.0, 2.0, 4.0])
        # Deviations .3266 and 1.633: both are 1.2247 either side of their means.
        found = HybridFusion(weight=0.25).fuse(dense, lexical)
        assert found == pytest.approx(
            [0.75 * 1.224745 - 0.25 * 1.224745, 0, -0.75 * 1.224745 + 0.25 * 1.224745]
        )

    def test_reciprocal_ranks_by_hand(self) -> None:
        dense, lexical = np.array([0.9, 0.5, 0.1, 0.1]), np.array([0.0, 2.0, 4.0, 2.0])
        found = HybridFusion(way="reciprocal_ranks", weight=0.5).fuse(dense, lexical)
        # Equal scores share the better rank; a document without a word of the query has no rank among the words.
        by_hand = [0.5 / 61, 0.5 / 62 + 0.5 / 62, 0.5 / 63 + 0.5 / 61, 0.5 / 63 + 0.5 / 62]
        assert found == pytest.approx(by_hand)

    @pytest.mark.parametrize("way", ["standardised", "reciprocal_ranks"])
    def test_the_ends_of_the_weight_are_one_side_alone(self, way: Any) -> None:
        dense, lexical = np.array([0.3, 0.9, 0.1]), np.array([5.0, 1.0, 9.0])
        by_vector = HybridFusion(way=way, weight=0).fuse(dense, lexical)
        by_words = HybridFusion(way=way, weight=1).fuse(dense, lexical)
        assert (np.argsort(-by_vector).tolist(), np.argsort(-by_words).tolist()) == ([1, 0, 2], [2, 0, 1])

    def test_equal_scores_have_no_order(self) -> None:
        same = np.full(3, 0.1 + 0.2)
        assert HybridFusion(weight=1).fuse(np.array([1.0, 2.0, 3.0]), same).tolist() == [0, 0, 0]

    def test_a_weight_beyond_its_bounds_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"lexical scores is 1\.5; it must lie between 0"):
            HybridFusion(weight=1.5)


class TestRealIndexes:
    @pytest.fixture(autouse=True)
    def _few_candidates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hybrid, "LEAST_CANDIDATES", DEPTH)
        monkeypatch.setattr(
            hybrid, "_ROWS_AT_ONCE", 30
        )  # vectors of some queries are read apart from those of others

    @pytest.mark.parametrize("filter", [None, {"parity": 1}])
    def test_it_is_the_union_with_missing_scores_computed(
        self, built: str, texts: list[str], filter: dict[str, Any] | None
    ) -> None:
        index = Index.open(built)
        allowed = np.array([filter is None or row % 2 == 1 for row in range(len(texts))])
        documents = unit_vectors(len(texts), seed=4)
        found = search_hybrid(index, QUERIES, VECTORS, 10, HybridFusion(weight=0.3), filter=filter)
        for number, query in enumerate(QUERIES):
            dense, lexical = documents @ VECTORS[number], oracle(texts, query)
            by_hand = fused_by_hand(dense, lexical, allowed, 0.3)
            rows, scores = list(by_hand)[:10], list(by_hand.values())[:10]
            assert found.scores[number] == pytest.approx(scores, abs=1e-5), query
            assert sorted(found.rows[number][:9]) == sorted(rows[:9])
            np.testing.assert_allclose(found.dense[number], dense[found.rows[number]], atol=1e-6)
            np.testing.assert_allclose(found.lexical[number], lexical[found.rows[number]], atol=1e-4)

    def test_a_query_without_words_has_the_dense_result(self, built: str) -> None:
        index = Index.open(built)
        for way in ("standardised", "reciprocal_ranks"):
            found = search_hybrid(index, ["。？！", "zzz"], VECTORS[:2], 10, HybridFusion(way=way))  # type: ignore[arg-type]
            assert found.rows.tolist() == index.search(VECTORS[:2], 10).rows.tolist()
            assert not found.lexical.any()

    def test_fewer_documents_match_than_are_asked_for(self, built: str) -> None:
        found = search_hybrid(
            Index.open(built), QUERIES[:1], VECTORS[:1], 10, HybridFusion(), filter="id IN ('3', '5')"
        )
        assert sorted(found.rows[0].tolist()) == [3, 5]
        none = search_hybrid(
            Index.open(built), QUERIES[:1], VECTORS[:1], 10, HybridFusion(), filter="id = 'x'"
        )
        assert none.rows.shape == (1, 0)
        assert (
            search_hybrid(Index.open(built), [], np.empty((0, 8), np.float32), 3, HybridFusion()).rows.shape[
                0
            ]
            == 0
        )

    def test_changes_are_found_at_once(self, tmp_path: Path) -> None:
        vectors = unit_vectors(3, seed=1)
        place = str(tmp_path / "index")
        build(
            place, write_embeddings(tmp_path / "in", ["a", "b", "c"], vectors, ["red", "green", "red rose"])
        )
        delete_from_index(IndexDeleteConfig(index=place, ids=["a"]))
        more = write_embeddings(tmp_path / "more", ["d"], unit_vectors(1, seed=2), ["red tulip"])
        add_to_index(IndexAddConfig(index=place, embeddings=more))
        index = Index.open(place)
        found = search_hybrid(index, ["red"], vectors[:1], 9, HybridFusion(weight=1))
        assert [document.id for document in index.documents(found.rows[0])][:2] in (["c", "d"], ["d", "c"])
        assert len(found.rows[0]) == 3


class TestModesOfAnIndex:
    def test_an_index_without_a_lexical_side_is_searched_by_vectors_alone(self, tmp_path: Path) -> None:
        build(tmp_path / "index", embeddings_of(tmp_path / "in", unit_vectors(5)), lexical=False)
        manifest = open_manifest(str(tmp_path / "index"))
        assert modes_of(manifest) == ("dense",)
        check_mode(manifest, "dense")
        for mode in ("lexical", "hybrid"):
            with pytest.raises(InputError, match=f"mode is {mode}.*index compact --lexical true"):
                check_mode(manifest, mode)  # type: ignore[arg-type]
        assert HybridFusion.of(manifest, HybridConfig()) == HybridFusion(way="standardised", weight=0.3)

    def test_the_first_mode_is_the_one_that_was_asked_for(self, built: str) -> None:
        manifest = open_manifest(built)
        assert modes_of(manifest) == ("dense", "lexical", "hybrid")
        assert modes_of(manifest, "hybrid") == ("hybrid", "dense", "lexical")

    def test_what_was_tuned_serves_its_own_way(self, built: str) -> None:
        manifest = open_manifest(built)
        assert manifest.lexical is not None
        tuned = manifest.model_copy(
            update={"lexical": manifest.lexical.model_copy(update={"hybrid": _tuned(0.45)})}
        )
        expected = {
            (None, None): ("standardised", 0.45),
            ("standardised", None): ("standardised", 0.45),
            ("reciprocal_ranks", None): ("reciprocal_ranks", 0.3),
            (None, 0.1): ("standardised", 0.1),
            ("reciprocal_ranks", 0.8): ("reciprocal_ranks", 0.8),
        }
        for (way, weight), (found_way, found_weight) in expected.items():
            config = HybridConfig(fusion=way, weight=weight)  # type: ignore[arg-type]
            assert HybridFusion.of(tuned, config) == HybridFusion(way=found_way, weight=found_weight)  # type: ignore[arg-type]

    def test_it_stays_with_the_tokens_that_it_was_tuned_with(self, tmp_path: Path) -> None:
        place = str(tmp_path / "index")
        build(place, write_embeddings(tmp_path / "in", ["a", "b"], unit_vectors(2), ["red", "green roses"]))
        with changing(Location.of(place), "a test") as writer:
            assert writer.manifest.lexical is not None
            lexical = writer.manifest.lexical.model_copy(update={"hybrid": _tuned(0.6)})
            publish(writer.index, following(writer.manifest, "tune", "a" * 64, lexical=lexical))
        delete_from_index(IndexDeleteConfig(index=place, ids=["a"]))
        compact_index(IndexCompactConfig(index=place), run=HERE)
        kept = open_manifest(place).lexical
        assert kept is not None
        assert kept.hybrid == _tuned(0.6)
        compact_index(IndexCompactConfig(index=place, tokens=TokensConfig(stemmer="english")), run=HERE)
        anew = open_manifest(place).lexical
        assert anew is not None
        assert anew.hybrid is None


def _tuned(weight: float) -> HybridEntry:
    return HybridEntry(fusion="standardised", weight=weight, queries=5)


@pytest.mark.parametrize("way", ["standardised", "reciprocal_ranks"])
def test_a_query_without_words_has_its_vectors_order_at_any_weight(way: Any, tmp_path: Path) -> None:
    """At weight 1 all its scores are equal, and its hits were the lowest rows."""
    vectors = unit_vectors(200)
    build(tmp_path / "i", write_embeddings(tmp_path / "e", [f"i{n}" for n in range(200)], vectors))
    index = Index.open(str(tmp_path / "i"))
    query = unit_vectors(1, seed=9)
    hits = search_hybrid(index, ["!!!"], query, 5, HybridFusion(way=way, weight=1.0))
    assert hits.rows.tolist() == index.search(query, 5).rows.tolist()


def test_all_vectors_scores_are_exact_where_shards_hold_codes(tmp_path: Path) -> None:
    """Scores of codes stood beside exact ones of candidates by words: half of the best ten were others."""
    vectors = clustered_vectors(2000)
    texts = [f"w{n % 97} v{n % 13}" for n in range(2000)]
    embeddings = write_embeddings(tmp_path / "e", [f"i{n}" for n in range(2000)], vectors, texts=texts)
    build(tmp_path / "i", embeddings, kind="ivf_pq", rescore=False, ivf={"nlist": 4, "pq_m": 8})
    index = Index.open(str(tmp_path / "i"))
    queries, words = clustered_vectors(5, seed=5), [f"w{n}" for n in range(5)]
    united = unite(index, words, queries, index.search(queries, 50), index.search_lexical(words, 50))
    for query, each in zip(queries, united, strict=True):
        np.testing.assert_allclose(each.dense, vectors[each.rows] @ query, atol=1e-5)
