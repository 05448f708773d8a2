"""Modes dense, lexical and hybrid in search, evaluate, mine, tune-fusion and Python: scores of bm25s, no model where
none is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raytower
from raytower.annotation.config import MineConfig
from raytower.annotation.mine import mine, plan_mine
from raytower.config import make_config
from raytower.errors import InputError
from raytower.evaluation.config import EvaluateConfig, TuneFusionConfig
from raytower.evaluation.evaluate import evaluate, plan_evaluate
from raytower.evaluation.tuning import plan_tune_fusion, tune_fusion_on_dev
from raytower.index.hybrid import Candidates, HybridFusion, search_hybrid
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.ranked.search import plan_one_or_many, search_one_or_many
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.load import fusion_in
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.search import plan_search, search
from raytower.retrieval.tune_fusion import WEIGHTS, tune_on_queries
from raytower.retrieval.tune_hybrid import tune_hybrid
from tests.support.evaluation_fakes import TableScorer
from tests.support.index_cases import build, unit_vectors, write_embeddings
from tests.unit.index.test_lexical import oracle

TEXTS = [
    "error code E-4021 in the pump",
    "the pump makes a noise",
    "error in the motor",
    "手机银行转账额度",
    "怎么提高信用卡额度",
    "code of conduct",
]
IDS = [f"d{number}" for number in range(len(TEXTS))]
QUERIES = ["E-4021", "额度", "…", "pump error"]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index over TEXTS whose encoder nobody has."""
    folder = tmp_path_factory.mktemp("wordy")
    vectors = unit_vectors(len(TEXTS))
    columns = {"even": [number % 2 == 0 for number in range(len(TEXTS))]}
    embeddings = write_embeddings(folder / "in", IDS, vectors, TEXTS, columns, encoder="/nowhere/encoder")
    build(folder / "index", embeddings)
    return str(folder / "index")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> str:
    """An index over TEXTS by a tiny encoder."""
    folder = tmp_path_factory.mktemp("world")
    encoder = Encoder.load(dummy_encoder_dir)
    embeddings = write_embeddings(
        folder / "in",
        IDS,
        ForwardEngine(encoder).encode(TEXTS),
        TEXTS,
        fingerprint=encoder.fingerprint,
        encoder=str(dummy_encoder_dir),
    )
    build(folder / "index", embeddings, shards=2)
    return str(folder / "index")


def by_words(query: str) -> dict[str, float]:
    """The documents with a word of the query, and the scores that bm25s gives them, best first."""
    scores = oracle(TEXTS, query)
    return {IDS[row]: float(scores[row]) for row in np.argsort(-scores, kind="stable") if scores[row] > 0}


def queries_file(path: Path) -> str:
    path.write_text("".join(f"{query}\n" for query in QUERIES), encoding="utf-8")
    return str(path)


def judged(path: Path, rows: list[tuple[str, str]]) -> dict[str, str]:
    path.write_text("".join(f"{query}\t{text}\n" for query, text in rows), encoding="utf-8")
    return {"path": str(path), "format": "pairs"}


class TestSearch:
    def test_words_alone_need_no_encoder(self, wordy: str) -> None:
        config = make_config(SearchConfig, {"index": wordy, "query": "pump error", "mode": "lexical"})
        found = search(config)
        assert found["mode"] == "lexical"
        expected = by_words("pump error")
        assert {hit["id"]: hit["score"] for hit in found["results"]} == pytest.approx(expected, abs=1e-5)
        assert [hit["score"] for hit in found["results"]] == [hit["recall_score"] for hit in found["results"]]
        assert plan_search(config)["fingerprint"] is None
        with pytest.raises(InputError, match="nowhere"):
            search(config.model_copy(update={"mode": "dense"}))

    def test_a_filter_holds(self, wordy: str) -> None:
        values = {"index": wordy, "query": "pump error", "mode": "lexical", "filter": {"even": True}}
        assert [hit["id"] for hit in search(make_config(SearchConfig, values))["results"]] == ["d0", "d2"]

    def test_a_file_of_queries(self, wordy: str, tmp_path: Path) -> None:
        values = {"index": wordy, "input": queries_file(tmp_path / "q.txt"), "mode": "lexical"}
        config = make_config(SearchConfig, {**values, "output": str(tmp_path / "out.jsonl")})
        result = search_one_or_many(config)
        counts = ("queries", "queries_without_hits", "queries_without_words", "mode")
        assert [result[name] for name in counts] == [4, 1, 1, "lexical"]
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        for query in QUERIES:
            found = {row["id"]: row["score"] for row in rows if row["query"] == query}
            assert found == pytest.approx(by_words(query), abs=1e-5)
        assert plan_one_or_many(config)["index_rows"] == len(TEXTS)

    def test_hybrid_of_one_and_of_many(self, world: str, tmp_path: Path) -> None:
        values = {"index": world, "mode": "hybrid", "hybrid": {"weight": 0.6}, "k": 4}
        output = {"input": queries_file(tmp_path / "q.txt"), "output": str(tmp_path / "out.jsonl")}
        result = search_one_or_many(make_config(SearchConfig, {**values, **output}))
        assert (result["queries_without_words"], result["queries_without_hits"]) == (1, 0)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        index = Index.open(world)
        vectors = ForwardEngine(Encoder.load(index.encoder)).encode(QUERIES)
        expected = search_hybrid(index, QUERIES, vectors, 4, HybridFusion(weight=0.6))
        dense = index.search(vectors, 4)
        for number, query in enumerate(QUERIES):
            found = [row for row in rows if row["query"] == query]
            assert [row["id"] for row in found] == [IDS[row] for row in expected.rows[number]]
            assert [row["score"] for row in found] == pytest.approx(
                expected.scores[number].tolist(), abs=1e-4
            )
            if query == "…":
                assert [row["id"] for row in found] == [IDS[row] for row in dense.rows[number]]
        one = search(make_config(SearchConfig, {**values, "query": QUERIES[0]}))["results"]
        assert [hit["id"] for hit in one] == [IDS[row] for row in expected.rows[0]]

    def test_one_query_without_words_is_told_of(self, world: str, capsys: pytest.CaptureFixture[str]) -> None:
        search(make_config(SearchConfig, {"index": world, "query": "…", "mode": "hybrid"}))
        assert "shares no token with a document" in capsys.readouterr().err

    def test_dense_is_what_it_was(self, world: str) -> None:
        found = search(make_config(SearchConfig, {"index": world, "query": "pump"}))
        index = Index.open(world)
        vectors = ForwardEngine(Encoder.load(index.encoder)).encode(["pump"])
        expected = index.search(vectors, 10)
        assert [hit["score"] for hit in found["results"]] == pytest.approx(
            expected.scores[0].tolist(), abs=1e-5
        )
        assert found["mode"] == "dense"

    def test_an_index_without_a_lexical_side(self, tmp_path: Path) -> None:
        embeddings = write_embeddings(tmp_path / "in", IDS, unit_vectors(len(TEXTS)), TEXTS)
        build(tmp_path / "index", embeddings, lexical=False)
        values = {"index": str(tmp_path / "index"), "mode": "lexical"}
        refused = pytest.raises(
            InputError, match=r"mode is lexical.*no lexical side.*`raytower index compact"
        )
        for run in (search, plan_search):
            with refused:
                run(make_config(SearchConfig, {**values, "query": "pump"}))
        with refused:
            output = {"input": queries_file(tmp_path / "q.txt"), "output": str(tmp_path / "out.tsv")}
            search_one_or_many(make_config(SearchConfig, {**values, **output}))


class TestPython:
    def test_three_modes(self, world: str) -> None:
        index = raytower.open_index(world)
        vectors = index.encoder.encode(["pump error"], role="query")
        dense, words = index.search("pump error"), index.search("pump error", mode="lexical")
        assert [hit.id for hit in dense] == [hit.id for hit in index.search_vectors(vectors)[0]]
        assert {hit.id: hit.score for hit in words} == pytest.approx(by_words("pump error"), abs=1e-5)
        for weight, expected in ((None, 0.3), (0.8, 0.8)):
            both = index.search(["pump error"], mode="hybrid", lexical_weight=weight)[0]
            by_hand = search_hybrid(
                Index.open(world), ["pump error"], vectors, 10, HybridFusion(weight=expected)
            )
            assert [hit.id for hit in both] == [IDS[row] for row in by_hand.rows[0]]
            assert [hit.score for hit in both] == pytest.approx(by_hand.scores[0].tolist(), abs=1e-5)

    def test_words_alone_need_no_encoder(self, wordy: str) -> None:
        assert [hit.id for hit in raytower.open_index(wordy).search("E-4021", mode="lexical")] == ["d0"]

    def test_a_mode_that_there_is_not(self, wordy: str) -> None:
        with pytest.raises(InputError, match="mode is 'sparse'; it must be one of dense, lexical, hybrid"):
            raytower.open_index(wordy).search("pump", mode="sparse")  # type: ignore[call-overload]


class TestEvaluate:
    ROWS = (("E-4021", TEXTS[0]), ("额度", TEXTS[4]), ("…", TEXTS[5]))

    def test_words_alone(self, wordy: str, tmp_path: Path) -> None:
        values = {
            "index": wordy,
            "queries": judged(tmp_path / "q.tsv", list(self.ROWS)),
            "mode": "lexical",
            "k": [1, 3],
        }
        config = make_config(EvaluateConfig, {**values, "output": str(tmp_path / "out")})
        result = evaluate(config)
        assert (result["mode"], result["queries_without_words"]) == ("lexical", 1)
        ranks = [list(by_words(query)).index(IDS[TEXTS.index(text)]) + 1 for query, text in self.ROWS[:2]]
        assert result["mrr@10"] == pytest.approx(sum(1 / rank for rank in ranks) / 3)
        assert result["recall@3"] == pytest.approx(2 / 3)
        assert plan_evaluate(config)["index_rows"] == len(TEXTS)

    def test_hybrid_says_how_it_fused(self, world: str, tmp_path: Path) -> None:
        values = {"index": world, "queries": judged(tmp_path / "q.tsv", list(self.ROWS)), "mode": "hybrid"}
        hybrid = {"fusion": "reciprocal_ranks", "weight": 0.5}
        config = {**values, "hybrid": hybrid, "output": str(tmp_path / "out")}
        result = evaluate(make_config(EvaluateConfig, config))
        assert (result["mode"], result["queries_without_words"], result["recall@10"]) == ("hybrid", 1, 1)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["settings"]["hybrid"] == {"way": "reciprocal_ranks", "weight": 0.5}


class TestMine:
    def test_negatives_by_words_need_no_encoder(self, wordy: str, tmp_path: Path) -> None:
        rows = judged(tmp_path / "pairs.tsv", [("pump error", TEXTS[0]), ("…", TEXTS[5])])
        values = {
            "index": wordy,
            "input": rows["path"],
            "output": str(tmp_path / "out.tsv"),
            "mode": "lexical",
        }
        config = make_config(MineConfig, {**values, "num_negatives": 2})
        result = mine(config)
        assert (result["pairs_without_negatives"], result["queries_without_words"]) == (1, 1)
        lines = (tmp_path / "out.tsv").read_text().splitlines()[1:]
        assert {line.split("\t")[2] for line in lines} == {TEXTS[1], TEXTS[2]}
        assert plan_mine(config)["index_rows"] == len(TEXTS)

    def test_likely_positives_are_told_by_vectors(self, world: str, tmp_path: Path) -> None:
        rows = judged(tmp_path / "pairs.tsv", [("pump error", TEXTS[1])])
        values = {
            "index": world,
            "input": rows["path"],
            "output": str(tmp_path / "out.tsv"),
            "num_negatives": 5,
        }
        engine = ForwardEngine(Encoder.load(Index.open(world).encoder))
        query, *documents = engine.encode(["pump error", *TEXTS])
        near = [
            text
            for text, vector in zip(TEXTS, documents, strict=True)
            if query @ vector <= query @ documents[1] * 0.99
        ]
        result = mine(make_config(MineConfig, {**values, "mode": "hybrid", "max_score_ratio": 0.99}))
        lines = (tmp_path / "out.tsv").read_text().splitlines()[1:]
        assert {line.split("\t")[2] for line in lines} == set(near) - {TEXTS[1]}
        assert result["dropped_likely_positives"] == len(TEXTS) - 1 - len(set(near) - {TEXTS[1]})

    def test_words_have_no_scores_of_vectors(self) -> None:
        values = {"index": "i", "input": "p", "output": "o", "mode": "lexical", "max_score_ratio": 0.9}
        with pytest.raises(InputError, match=r"max_score_ratio is 0\.9.*set mode to hybrid"):
            make_config(MineConfig, values)
        values = {**values, "max_score_ratio": None, "max_score_margin": 0.05}
        with pytest.raises(InputError, match=r"max_score_margin is 0\.05.*set mode to hybrid"):
            make_config(MineConfig, values)


class TestTuning:
    def test_the_best_weight_by_hand(self) -> None:
        # The answer is second by vectors and first by words; a third document is far down by both.
        one = Candidates(np.array([1, 2, 3]), np.array([0.9, 0.8, 0.0]), np.array([1.0, 2.0, 0.0]))
        tuned = tune_hybrid([one], [np.array([False, True, False])], "standardised")
        # z(dense) 0.825, 0.579, -1.404; z(lexical) 0, 1.225, -1.225: the answer leads from .2 / 1.42 on.
        lead = next(weight for weight in WEIGHTS if (1 - weight) * (0.82455 - 0.57719) < weight * 1.22474)
        assert (tuned.dense_mrr, tuned.lexical_mrr, tuned.fused_mrr) == (0.5, 1, 1)
        assert tuned.fusion == HybridFusion(weight=lead)
        assert (lead, len(tuned.curve), tuned.num_wordless) == (0.2, len(WEIGHTS), 0)

    def test_useless_words_get_no_weight(self) -> None:
        one = Candidates(np.array([1, 2]), np.array([0.9, 0.8]), np.array([0.0, 2.0]))
        for way in ("standardised", "reciprocal_ranks"):
            assert tune_hybrid([one], [np.array([True, False])], way).fusion.weight == 0  # type: ignore[arg-type]

    def test_nothing_to_tune_on(self) -> None:
        none = Candidates(np.empty(0, np.int64), np.empty(0), np.empty(0))
        with pytest.raises(InputError, match="no query has a candidate"):
            tune_hybrid([none], [np.empty(0, np.bool_)], "standardised")

    @pytest.mark.parametrize(
        ("more", "words"),
        [({"mode": "lexical"}, "mode is lexical"), ({"hybrid": {"weight": 0.4}}, r"hybrid\.weight is 0\.4")],
    )
    def test_keys_that_nothing_would_read(self, more: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=f"{words}.*name a reranker"):
            make_config(TuneFusionConfig, {"index": "i", "queries": "q", **more})

    def test_a_new_version_of_the_index_holds_it(self, tmp_path: Path, dummy_encoder_dir: Path) -> None:
        encoder = Encoder.load(dummy_encoder_dir)
        place = str(tmp_path / "index")
        made_by = {"fingerprint": encoder.fingerprint, "encoder": str(dummy_encoder_dir)}
        vectors = ForwardEngine(encoder).encode(TEXTS)
        build(place, write_embeddings(tmp_path / "in", IDS, vectors, TEXTS, **made_by))
        rows = judged(tmp_path / "dev.tsv", [("E-4021", TEXTS[0]), ("额度", TEXTS[3]), ("…", TEXTS[2])])
        values: dict[str, Any] = {"index": place, "queries": rows}
        shown = tune_fusion_on_dev(make_config(TuneFusionConfig, {**values, "store": False}))
        assert (shown["stored"], shown["index_version"], shown["queries_without_words"]) == (
            False,
            "000001",
            1,
        )
        assert open_manifest(place).version == "000001"
        tuned = tune_fusion_on_dev(make_config(TuneFusionConfig, values))
        assert {**tuned, "seconds": 0, "stored": False, "index_version": "000001"} == {**shown, "seconds": 0}
        manifest = open_manifest(place)
        assert (tuned["index_version"], manifest.version, manifest.operation) == ("000002", "000002", "tune")
        assert manifest.lexical is not None
        assert manifest.lexical.hybrid is not None
        assert manifest.lexical.hybrid.model_dump() == {**tuned["fusion"], "queries": 3}
        assert plan_tune_fusion(make_config(TuneFusionConfig, values))["pairs"] == 0
        # Searches take it without being told.
        found = search(make_config(SearchConfig, {"index": place, "query": "额度", "mode": "hybrid"}))
        expected = search_hybrid(
            Index.open(place),
            ["额度"],
            ForwardEngine(encoder).encode(["额度"]),
            10,
            HybridFusion(weight=tuned["weight"]),
        )
        assert [hit["score"] for hit in found["results"]] == pytest.approx(
            expected.scores[0].tolist(), abs=1e-4
        )


class TestRerankers:
    def test_a_fusion_serves_the_mode_that_it_was_tuned_in(self) -> None:
        fusion = Fusion(weight=0.4, mode="hybrid")
        assert fusion_in("hybrid", fusion, None) is fusion
        assert fusion_in("dense", fusion, None) is None
        assert fusion_in("dense", None, None) is None
        assert fusion_in("dense", fusion, 1) is None
        with pytest.raises(
            InputError, match=r"fusion_weight is 0\.4.*tuned.*mode hybrid.*tune-fusion --mode dense"
        ):
            fusion_in("dense", fusion, 0.4)

    def test_what_was_stored_before_there_were_modes_is_of_mode_dense(self) -> None:
        former: Mapping[str, float] = {
            name: value for name, value in Fusion(weight=0.5).to_dict().items() if name != "mode"
        }
        assert Fusion.from_dict(former) == Fusion(weight=0.5, mode="dense")
        assert Fusion.from_dict(Fusion(weight=0.5, mode="lexical").to_dict()).mode == "lexical"

    def test_tuning_notes_the_mode(self, wordy: str) -> None:
        scorer = TableScorer(dict.fromkeys(TEXTS, 1.0) | {TEXTS[0]: 9.0})
        retriever = Retriever(None, Index.open(wordy), scorer, mode="lexical")
        assert tune_on_queries(retriever, ["pump"], [{"d0": 1.0}]).fusion.mode == "lexical"


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (SearchConfig, {"query": "q"}),
        (EvaluateConfig, {"queries": "q.tsv"}),
        (MineConfig, {"encoder": "e", "input": "p.tsv", "output": "n.tsv"}),
    ],
)
def test_a_weight_that_the_mode_does_not_read_is_refused(config: Any, others: dict[str, Any]) -> None:
    values = {"index": "i", **others, "hybrid": {"weight": 0.9}}
    assert make_config(config, {**values, "mode": "hybrid"}).hybrid.weight == 0.9
    with pytest.raises(InputError, match="which mode dense does not read; set mode to hybrid"):
        make_config(config, values)
