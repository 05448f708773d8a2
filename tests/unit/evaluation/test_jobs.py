"""The jobs over a real (tiny) encoder and a real two-shard index: evaluate, mine, classify, similarity, search."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import raytower
from raytower.annotation.classify import classify, plan_classify
from raytower.annotation.config import ClassifyConfig, MineConfig, SimilarityConfig
from raytower.annotation.cosines import pair_cosines
from raytower.annotation.labels import count_votes, label_logits, rank_labels
from raytower.annotation.mine import Miner, mine, plan_mine
from raytower.annotation.similarity import average_precision, measure_scores, plan_similarity, similarity
from raytower.cli.tables import render_evaluation, render_tuning
from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.errors import FormatError, InputError
from raytower.evaluation.config import EvaluateConfig, TuneFusionConfig
from raytower.evaluation.evaluate import evaluate, plan_evaluate
from raytower.evaluation.page import evaluation_plots
from raytower.evaluation.tuning import plan_tune_fusion, tune_fusion_on_dev
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig
from raytower.index.hits import Hits
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.search import plan_search, render_search, search
from raytower.retrieval.tune_fusion import store_fusion
from raytower.storage import Location
from tests.support.data_files import read
from tests.support.encoding_here import encode_here
from tests.support.index_cases import build
from tests.support.run_files import read_run
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker

WORDS = ["apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "train", "ocean", "candle"]
# 30 distinct texts; the last two rows of the corpus repeat the first two.
TEXTS = [f"{first} {second}" for number, first in enumerate(WORDS) for second in WORDS[number : number + 3]]
CORPUS = [*TEXTS, TEXTS[0], TEXTS[1]]


@dataclass(frozen=True)
class World:
    """An encoder, an index over CORPUS (ids c0, c1, … and the label of each text) and brute-force vectors."""

    encoder: str
    index: str
    vectors: np.ndarray

    def encode(self, texts: list[str]) -> np.ndarray:
        return ForwardEngine(Encoder.load(self.encoder)).encode(texts).astype(np.float64)

    def nearest(self, text: str, k: int) -> list[int]:
        return np.argsort(-(self.vectors @ self.encode([text])[0]), kind="stable")[:k].tolist()


def _build(folder: Path, encoder: str, rows: list[dict[str, Any]]) -> str:
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "encoder": encoder,
        "input": {"path": str(folder / "corpus.jsonl")},
        "max_length": 64,
    }
    encode_here(make_config(EncodeConfig, {**values, "output": str(folder / "embeddings")}))
    build(folder / "index", str(folder / "embeddings"), shards=min(2, len(rows)))
    return str(folder / "index")


@pytest.fixture(scope="module")
def world(dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    rows = [
        {"id": f"c{place}", "text": text, "label": f"things##{text.split()[0]}"}
        for place, text in enumerate(CORPUS)
    ]
    index = _build(tmp_path_factory.mktemp("world"), str(dummy_encoder_dir), rows)
    vectors = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(CORPUS).astype(np.float64)
    return World(str(dummy_encoder_dir), index, vectors)


def _write(path: Path, rows: list[tuple[str, ...]]) -> str:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


QUERIES = [
    # The query is a corpus text: exact match at rank 1 or 2 (that text stands in the corpus twice).
    (TEXTS[0], TEXTS[0]),
    (TEXTS[5], TEXTS[5]),
    (TEXTS[5], TEXTS[9]),
    (TEXTS[7], TEXTS[12]),
    ("tiger lemons", TEXTS[20]),
    ("candle river", "not in the corpus"),
]


def _evaluate(world: World, tmp_path: Path, **more: Any) -> dict[str, Any]:
    queries = {"path": _write(tmp_path / "queries.tsv", QUERIES)}
    values = {"encoder": world.encoder, "index": world.index, "queries": queries, "k": [1, 3, 10]}
    return evaluate(make_config(EvaluateConfig, {**values, "output": str(tmp_path / "out"), **more}))


def _qrels(queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Query id → judgements by id, worked out from QUERIES and CORPUS alone."""
    qrels: dict[str, dict[str, int]] = {query_id: {} for query_id in queries}
    for query_id, text in queries.items():
        for query, wanted in QUERIES:
            if query == text:
                ids = [f"c{place}" for place, document in enumerate(CORPUS) if document == wanted]
                qrels[query_id] |= dict.fromkeys(ids or [f"missing {wanted}"], 1)
    return qrels


def _without_copies(judged: dict[str, int], ranked: list[tuple[str, float]]) -> dict[str, int]:
    """Of each judged text the document that is ranked first, or one that is not ranked."""
    order = [doc_id for doc_id, _ in ranked if doc_id in judged]
    kept: dict[str, str] = {}
    for doc_id in [*order, *judged]:
        kept.setdefault(CORPUS[int(doc_id[1:])] if doc_id[1:].isdigit() else doc_id, doc_id)
    return dict.fromkeys(kept.values(), 1)


QUERY_IDS = {"queries:1": TEXTS[0], "queries:2": TEXTS[5], "queries:4": TEXTS[7], "queries:5": "tiger lemons"}
QUERY_IDS |= {"queries:6": "candle river"}


def test_evaluate_agrees_with_brute_force_and_trec_eval(world: World, tmp_path: Path) -> None:
    result = _evaluate(world, tmp_path, rows_per_batch=2)
    assert (result["queries"], result["relevant_missing"], result["queries_without_relevant"]) == (5, 1, 0)
    run = read_run(Location.of(tmp_path / "out" / "run.trec"))
    assert list(run) == list(QUERY_IDS)
    for query_id, text in QUERY_IDS.items():
        # A query that is a text of the corpus is no answer to itself, unless it is judged so.
        own = text in CORPUS and (text, text) not in QUERIES
        kept = [place for place, document in enumerate(CORPUS) if not (own and document == text)]
        expected = sorted(world.vectors[kept] @ world.encode([text])[0], reverse=True)[:10]
        assert [score for _, score in run[query_id]] == pytest.approx(expected, abs=1e-5)
    measures = {"recall.1,3,10", "success.1,3,10", "ndcg_cut.10", "recip_rank"}
    # Of two documents with one text the first ranked is judged, and its copy is as any other document.
    once = {
        query_id: _without_copies(judged, run[query_id]) for query_id, judged in _qrels(QUERY_IDS).items()
    }
    theirs = pytrec_eval.RelevanceEvaluator(once, measures).evaluate(
        {query_id: dict(ranked) for query_id, ranked in run.items()}
    )
    names = {f"recall@{k}": f"recall_{k}" for k in (1, 3, 10)} | {
        f"hit@{k}": f"success_{k}" for k in (1, 3, 10)
    }
    for ours, name in {**names, "ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank"}.items():
        assert result[ours] == pytest.approx(np.mean([values[name] for values in theirs.values()])), ours
        low, high = result["intervals"][ours]
        assert low <= result[ours] <= high
    # The exact matches are found, the missing document is not: neither 0 nor 1 by accident.
    assert 0 < result["hit@1"] < 1
    assert result["recall@1"] <= result["recall@10"]


def test_an_index_is_measured_by_any_metric_and_its_run_read_back_gives_the_same(
    world: World, tmp_path: Path
) -> None:
    """Without the two texts that the corpus holds twice, since a run file counts every document."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "c3", "title": "", "text": CORPUS[3]}) + "\n")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"c{n}", "text": TEXTS[n]}) + "\n" for n in range(3, 8))
    )
    qrels = "c3\tc4\t2\nc3\tc5\t1\nc4\tc4\t1\nc5\tc9\t1\nc5\tc5\t0\nc7\tgone\t1\n"
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    names = ["nDCG@10", "MRR@10", "R@20", "AP", "Judged@10"]
    values = {"index": world.index, "queries": str(folder), "k": [1, 10], "metrics": names}
    # The encoder is the one that the index names.
    result = evaluate(make_config(EvaluateConfig, {**values, "output": str(tmp_path / "out")}))
    run = read_run(Location.of(tmp_path / "out" / "run.trec"))
    assert {len(ranked) for ranked in run.values()} == {20}
    judged: dict[str, dict[str, int]] = {}
    for query, document, score in (line.split("\t") for line in qrels.splitlines()):
        judged.setdefault(query, {})[document] = int(score)
    measures = [ir_measures.parse_measure(name) for name in names]
    theirs = ir_measures.calc_aggregate(
        measures, judged, {query: dict(ranked) for query, ranked in run.items()}
    )
    for name, measure in zip(names, measures, strict=True):
        assert result[name] == pytest.approx(theirs[measure], abs=1e-9), name
        assert result["intervals"][name][0] <= result[name] <= result["intervals"][name][1]
    assert result["unjudged"]["10"] == sum(
        document not in judged[query] for query, ranked in run.items() for document, _ in ranked[:10]
    )
    again = {**values, "index": None, "run": str(tmp_path / "out" / "run.trec")}
    for queries in (str(folder), str(tmp_path / "out" / "qrels.trec")):
        read_back = evaluate(make_config(EvaluateConfig, {**again, "queries": queries}))
        assert [read_back[name] for name in names] == [result[name] for name in names]
        assert read_back["unjudged"] == result["unjudged"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["encoder"] == world.encoder
    assert list(report["stages"][0]["metrics"]) == names

    # The query stands in the corpus under its own id, where it is the nearest.
    without = evaluate(make_config(EvaluateConfig, {**values, "ignore_identical_ids": True}))
    kept = {query: {doc: s for doc, s in ranked if doc != query} for query, ranked in run.items()}
    assert without["identical_ids"] == 4
    expected = ir_measures.calc_aggregate(measures, judged, kept)
    # All but AP and R@20, for which one document more was recalled.
    for name in ("nDCG@10", "MRR@10", "Judged@10"):
        assert without[name] == pytest.approx(expected[ir_measures.parse_measure(name)], abs=1e-9)
    assert without["MRR@10"] != result["MRR@10"]


def test_evaluate_does_not_depend_on_the_batch(world: World, tmp_path: Path) -> None:
    for name, rows in (("one", 1), ("all", 256)):
        (tmp_path / name).mkdir()
        _evaluate(world, tmp_path / name, rows_per_batch=rows)
    one, every = (
        json.loads((tmp_path / name / "out" / "report.json").read_text()) for name in ("one", "all")
    )
    for key in ("recall@1", "recall@10", "mrr@10", "ndcg@10", "intervals"):
        assert one[key] == every[key]


def test_reports_name_settings_and_the_worst_queries(world: World, tmp_path: Path) -> None:
    _evaluate(world, tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    worst = report["worst_queries"]
    assert [item["mrr@10"] for item in worst] == sorted(item["mrr@10"] for item in worst)
    by_query = {item["query"]: item for item in worst}
    assert by_query["candle river"]["relevant"] == ["not in the corpus (not in the index)"]
    assert by_query["candle river"]["mrr@10"] == 0
    nearest = CORPUS[world.nearest("candle river", 1)[0]]
    assert by_query["candle river"]["hits"][0]["text"] == nearest
    assert TEXTS[0] not in by_query  # answered at rank 1
    assert by_query["tiger lemons"]["relevant"] == [f"c20: {TEXTS[20]}"]
    assert report["settings"]["index_version"] == report["index_version"]
    assert report["settings"]["fingerprint"] == Encoder.load(world.encoder).fingerprint
    page = (tmp_path / "out" / "report.html").read_text()
    assert "candle river" in page
    assert nearest in page


def test_evaluate_a_beir_folder_with_grades(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "c3", "title": "", "text": CORPUS[3]}) + "\n")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS[3:6]))
    )
    qrels = "query-id\tcorpus-id\tscore\nq0\tc3\t2\nq0\tc7\t1\nq1\tgone\t1\nq2\tc5\t0\n"
    (folder / "qrels" / "test.tsv").write_text(qrels)
    values = {"encoder": world.encoder, "index": world.index, "queries": {"path": str(folder)}, "k": [1]}
    result = evaluate(make_config(EvaluateConfig, values))
    assert (result["queries"], result["relevant_missing"], result["queries_without_relevant"]) == (2, 1, 1)
    assert (result["recall@1"], result["hit@1"]) == (0.25, 0.5)  # q0: one of two; q1: its document is gone
    assert result["output"] is None
    assert sorted(place.name for place in tmp_path.iterdir()) == ["beir"]


def test_reranking_is_the_scorers_order_over_the_recalled(
    world: World, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    result = _evaluate(world, tmp_path, reranker=str(dummy_reranker_dir), recall_k=5)
    run = read_run(Location.of(tmp_path / "out" / "run.trec"))
    scorer = CrossScorer(CrossEncoder.load(dummy_reranker_dir))
    recalled = world.nearest("tiger lemons", 10)
    head = [CORPUS[place] for place in recalled[:5]]
    logits = scorer.score(["tiger lemons"] * 5, head)
    order = [recalled[place] for place in np.argsort(-logits, kind="stable")]
    assert [doc for doc, _ in run["queries:5"]] == [f"c{place}" for place in [*order, *recalled[5:]]]
    plain = _evaluate(world, tmp_path)
    assert result["recall_stage"] == {name: plain[name] for name in result["recall_stage"]}
    assert (result["reranked"], plain["reranked"], plain["recall_stage"]) == (True, False, None)
    assert result["recall@10"] == plain["recall@10"]  # a new order of the same ten


def test_the_rerankers_stored_fusion_is_used(world: World, dummy_reranker_dir: Path, tmp_path: Path) -> None:
    reranker = tmp_path / "reranker"
    CrossEncoder.load(dummy_reranker_dir).save(reranker)
    with pytest.raises(InputError, match="stores no fusion"):
        _evaluate(world, tmp_path, reranker=str(reranker), fusion_weight=0.5)
    with pytest.raises(InputError, match="no reranker"):
        _evaluate(world, tmp_path, fusion_weight=0.5)
    alone = _evaluate(world, tmp_path, reranker=str(reranker), fusion_weight=1)
    store_fusion(str(reranker), Fusion(weight=0.0, recall_mean=0.3))
    plain, fused = _evaluate(world, tmp_path), _evaluate(world, tmp_path, reranker=str(reranker))
    assert fused["mrr@10"] == plain["mrr@10"]  # weight 0 trusts recall alone
    assert _evaluate(world, tmp_path, reranker=str(reranker), fusion_weight=1)["mrr@10"] == alone["mrr@10"]
    assert alone["mrr@10"] != plain["mrr@10"]


def _without(world: World, folder: Path, ids: list[str]) -> World:
    """A copy of the world's index from which documents were deleted."""
    index = shutil.copytree(world.index, folder / "smaller")
    delete_from_index(IndexDeleteConfig(index=str(index), ids=ids))
    return World(world.encoder, str(index), world.vectors)


def test_a_deleted_document_is_relevant_to_nothing(world: World, tmp_path: Path) -> None:
    # TEXTS[0] stands in the corpus twice, TEXTS[9] once.
    smaller = _without(world, tmp_path, [f"c{len(TEXTS)}", "c9"])
    queries = _write(tmp_path / "q.tsv", [(TEXTS[0], TEXTS[0]), (TEXTS[9], TEXTS[9])])
    values = {"encoder": world.encoder, "queries": {"path": queries}, "k": [1]}
    before = evaluate(make_config(EvaluateConfig, {**values, "index": world.index}))
    after = evaluate(make_config(EvaluateConfig, {**values, "index": smaller.index}))
    # The first of two equal texts, and the only one.
    assert (before["recall@1"], before["relevant_missing"]) == (1, 0)
    # Whole recall of the one that is left, and a miss.
    assert (after["recall@1"], after["relevant_missing"]) == (0.5, 1)


def test_evaluate_refuses_another_encoder(world: World, tmp_path: Path) -> None:
    other = str(build_tiny_encoder(tmp_path / "other", seed=7))
    with pytest.raises(FormatError, match="fingerprint"):
        _evaluate(World(other, world.index, world.vectors), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [[], [0], [5, 5]])
def test_evaluate_refuses_wrong_cutoffs(k: list[int]) -> None:
    with pytest.raises(InputError, match="k"):
        make_config(EvaluateConfig, {"encoder": "e", "index": "i", "queries": {"path": "q"}, "k": k})


def _values(world: World, rows: str) -> dict[str, Any]:
    """What jobs over a file of rows read."""
    return {"encoder": world.encoder, "index": world.index, "input": {"path": rows}}


def _mine(
    world: World, tmp_path: Path, pairs: list[tuple[str, ...]], **more: Any
) -> tuple[dict[str, Any], list]:
    values = _values(world, _write(tmp_path / "pairs.tsv", pairs))
    output = tmp_path / "mined.tsv"
    result = mine(make_config(MineConfig, {**values, "output": str(output), **more}))
    header, *rows = (line.split("\t") for line in output.read_text().splitlines())
    return result, [header, *rows]


def test_mined_negatives_are_the_nearest_that_are_no_positives(world: World, tmp_path: Path) -> None:
    query = "tiger lemons"
    near = [CORPUS[place] for place in world.nearest(query, len(CORPUS))]
    distinct = list(dict.fromkeys(near))
    # The two nearest texts are positives of the query in different rows: neither may come back for either row.
    pairs = [(query, distinct[0]), (query, distinct[1]), (TEXTS[9], distinct[0])]
    result, (header, *rows) = _mine(world, tmp_path, pairs, recall_k=6, num_negatives=6)
    assert header == ["query", "title", "neg_title"]
    expected = [text for text in dict.fromkeys(near[:6]) if text not in distinct[:2]]
    assert [row[2] for row in rows if row[:2] == [query, distinct[0]]] == expected
    assert [row[2] for row in rows if row[:2] == [query, distinct[1]]] == expected
    others = [row[2] for row in rows if row[0] == TEXTS[9]]
    assert others
    assert TEXTS[9] not in others  # the query's own text is no negative
    assert (result["pairs"], result["negatives"]) == (3, len(rows))
    assert result["pairs_with_fewer"] == 3


def test_mining_samples_by_seed_and_place_and_not_by_batch(world: World, tmp_path: Path) -> None:
    pairs = [(text, f"the positive of {text}") for text in TEXTS]
    settings = {"recall_k": 20, "num_negatives": 2}
    _, first = _mine(world, tmp_path, pairs, **settings, rows_per_batch=3)
    _, second = _mine(world, tmp_path, pairs, **settings, rows_per_batch=256)
    _, other = _mine(world, tmp_path, pairs, **settings, seed=1)
    assert first == second
    assert first != other
    assert len(first) == 1 + 2 * len(TEXTS)
    for text in TEXTS:
        negatives = [row[2] for row in first if row[0] == text]
        assert len(set(negatives)) == 2
        assert set(negatives) <= {CORPUS[place] for place in world.nearest(text, 20)} - {text}


def test_mining_skips_the_top_and_what_scores_too_high(world: World, tmp_path: Path) -> None:
    query, positive = "tiger lemons", TEXTS[3]
    near = world.nearest(query, 12)
    settings = {"recall_k": 12, "num_negatives": 9}
    _, (_, *rows) = _mine(world, tmp_path, [(query, positive)], **settings, skip_top=3)
    expected = dict.fromkeys(CORPUS[place] for place in near[3:])
    assert [row[2] for row in rows] == [text for text in expected if text != positive]

    vector = world.encode([query, positive])
    limit = float(vector[0] @ vector[1]) * 0.9
    result, (_, *rows) = _mine(
        world, tmp_path, [(query, positive)], recall_k=32, num_negatives=32, max_score_ratio=0.9
    )
    scores = world.vectors @ vector[0]
    left = {text for text, score in zip(CORPUS, scores, strict=True) if score <= limit}
    assert {row[2] for row in rows} == left
    assert 0 < len(left) < len(TEXTS)
    above = sum(score > limit and text != positive for text, score in zip(CORPUS, scores, strict=True))
    assert result["dropped_likely_positives"] == above


def test_a_screen_drops_what_a_cross_encoder_takes_for_positives(
    world: World, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    """The first in drawn order that pass, however many are scored at a time."""
    query, positive = "tiger lemons", TEXTS[3]
    near = list(dict.fromkeys(CORPUS[place] for place in world.nearest(query, 30)))
    near = [text for text in near if text not in (query, positive)]
    logits = _logits(dummy_reranker_dir, query, [positive, *near])
    for margin in (0.0, 0.3, -0.3):
        passed = [text for text, logit in zip(near, logits[1:], strict=True) if logit < logits[0] - margin]
        screen = {"reranker": str(dummy_reranker_dir), "margin": margin}
        settings = {"recall_k": 30, "num_negatives": 3, "sampling": "top", "screen": screen}
        result, (_, *rows) = _mine(world, tmp_path, [(query, positive)], **settings)
        assert [row[2] for row in rows] == passed[:3]
        assert bool(result["screened_out"]) == (near[:3] != passed[:3])
    # All are screened out: the pair is not written.
    screen["margin"] = 1e9
    result, rows = _mine(world, tmp_path, [(query, positive)], **settings)
    assert (result["pairs_without_negatives"], result["screened_out"], len(rows)) == (1, len(near), 1)
    pairs = _write(tmp_path / "p.tsv", [(query, positive)])
    values = _values(world, pairs)
    plan = plan_mine(make_config(MineConfig, {**values, "output": str(tmp_path / "o.tsv"), **settings}))
    assert plan["screened_pairs"] == 1 + 2 * 3


def test_a_screen_scores_few_more_than_it_needs(
    world: World, dummy_reranker_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 30 candidates the first 2, then 4 more, then 8: as many as one that passes takes."""
    query, positive = "tiger lemons", TEXTS[3]
    near = list(dict.fromkeys(CORPUS[place] for place in world.nearest(query, 30)))
    near = [text for text in near if text not in (query, positive)]
    logits = _logits(dummy_reranker_dir, query, [positive, *near])
    # One of the third to sixth that lies below all before it; the margin lets it pass, and none before it.
    first = next(place for place in range(2, 6) if logits[place + 1] < min(logits[1 : place + 1]))
    margin = float(logits[0] - (min(logits[1 : first + 1]) + logits[first + 1]) / 2)
    scored: list[int] = []
    logits_of = Miner._logits

    def counted(self: Miner, scorer: Any, queries: Any, texts: Sequence[Sequence[str]]) -> Any:
        scored.append(sum(map(len, texts)))
        return logits_of(scorer, queries, texts)

    monkeypatch.setattr(Miner, "_logits", counted)
    screen = {"reranker": str(dummy_reranker_dir), "margin": margin}
    _, (_, row) = _mine(
        world, tmp_path, [(query, positive)], recall_k=30, num_negatives=1, sampling="top", screen=screen
    )
    assert row[2] == near[first]
    assert scored == [1, 2, 4]


def test_mining_takes_the_nearest_and_leaves_a_margin(world: World, tmp_path: Path) -> None:
    query, positive = "tiger lemons", TEXTS[3]
    settings = {"recall_k": 30, "num_negatives": 2, "sampling": "top"}
    vectors = world.encode([query, positive])
    limit = float(vectors[0] @ vectors[1]) - 0.2
    _, (_, *rows) = _mine(world, tmp_path, [(query, positive)], **settings, max_score_margin=0.2)
    scores = world.vectors @ vectors[0]
    left = [CORPUS[place] for place in world.nearest(query, 30) if scores[place] <= limit]
    assert [row[2] for row in rows] == list(dict.fromkeys(left))[:2]


def test_mining_drops_positives_by_their_id(world: World, tmp_path: Path) -> None:
    query = "tiger lemons"
    nearest = world.nearest(query, 3)
    row = {"query": query, "document": "another wording", "query_id": "q", "document_id": f"c{nearest[0]}"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    values = _values(world, str(tmp_path / "pairs.jsonl"))
    config = {
        **values,
        "output": str(tmp_path / "mined.jsonl"),
        "recall_k": 3,
        "num_negatives": 3,
        "file_type": "jsonl",
    }
    result = mine(make_config(MineConfig, config))
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [item["neg_title"] for item in rows] == [CORPUS[place] for place in nearest[1:]]
    assert rows[0]["title"] == "another wording"
    assert result["dropped_positives"] == 1


def test_scored_pairs_and_pairs_without_a_negative(world: World, tmp_path: Path) -> None:
    nearest = CORPUS[world.nearest("tiger lemons", 1)[0]]
    pairs = [("tiger lemons", nearest), ("candle river", "some positive")]
    result, (header, *rows) = _mine(world, tmp_path, pairs, format="scored", recall_k=1)
    assert header == ["query", "title", "label"]
    negative = CORPUS[world.nearest("candle river", 1)[0]]
    assert rows == [["candle river", "some positive", "1"], ["candle river", negative, "0"]]
    assert (result["pairs"], result["negatives"], result["pairs_without_negatives"]) == (2, 1, 1)


CANDIDATES = {"format": "candidates", "file_type": "jsonl"}


def _mine_lists(
    world: World, tmp_path: Path, pairs: list[tuple[str, ...]], **more: Any
) -> tuple[dict[str, Any], list]:
    values = _values(world, _write(tmp_path / "pairs.tsv", pairs))
    output = tmp_path / "mined.jsonl"
    result = mine(make_config(MineConfig, {**values, "output": str(output), "file_type": "jsonl", **more}))
    return result, [json.loads(line) for line in output.read_text().splitlines()]


def _logits(reranker: Path, query: str, documents: list[str]) -> list[float]:
    """One pair at a time through the bare model."""
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    model = AutoModelForSequenceClassification.from_pretrained(reranker).eval()
    with torch.inference_mode():
        return [
            float(model(**tokenizer(query, text, return_tensors="pt")).logits[0, 0]) for text in documents
        ]


def test_mined_candidates_hold_the_pair_first_and_read_back(world: World, tmp_path: Path) -> None:
    query, nearest = "tiger lemons", CORPUS[world.nearest("tiger lemons", 1)[0]]
    pairs = [(query, "own document"), ("candle river", "another"), (query, nearest)]
    result, rows = _mine_lists(world, tmp_path, pairs, **CANDIDATES, recall_k=3, num_negatives=3)
    expected = []
    for asked, document in pairs:
        own = {text for other, text in pairs if other == asked}
        near = dict.fromkeys(CORPUS[place] for place in world.nearest(asked, 3))
        negatives = [text for text in near if text not in own]
        expected.append(
            {"query": asked, "documents": [document, *negatives], "scores": [1, *[0] * len(negatives)]}
        )
    assert rows == expected
    counts = (result["pairs"], result["negatives"], result["pairs_without_negatives"])
    assert counts == (3, sum(len(row["documents"]) - 1 for row in expected), 0)
    assert read(tmp_path / "mined.jsonl", "candidates") == expected
    # The one document recalled for the first query is a positive of it: nothing to compare, so nothing is written.
    result, rows = _mine_lists(world, tmp_path, pairs, **CANDIDATES, recall_k=1)
    assert [row["query"] for row in rows] == ["candle river"]
    assert (result["pairs_without_negatives"], result["negatives"]) == (2, 1)


def test_a_teacher_scores_the_mined_candidates(
    world: World, tmp_path: Path, dummy_reranker_dir: Path
) -> None:
    pairs = [("tiger lemons", "own document"), ("candle river", TEXTS[4]), (TEXTS[0], TEXTS[1])]
    settings = {"recall_k": 8, "num_negatives": 3, "rows_per_batch": 2}
    _, plain = _mine_lists(world, tmp_path, pairs, **CANDIDATES, **settings)
    teacher = {"teacher": str(dummy_reranker_dir)}
    _, rows = _mine_lists(world, tmp_path, pairs, **CANDIDATES, **settings, **teacher)
    assert [row["documents"] for row in rows] == [row["documents"] for row in plain]
    assert [row["query"] for row in rows] == [query for query, _ in pairs]
    logits = [_logits(dummy_reranker_dir, row["query"], row["documents"]) for row in rows]
    assert [len(scores) for scores in logits] == [4, 4, 4]
    for row, scores in zip(rows, logits, strict=True):
        np.testing.assert_allclose(row["scores"], scores, atol=1e-5)
    read_back = read(tmp_path / "mined.jsonl", "candidates")
    assert [row["scores"] for row in read_back] == [sorted(row["scores"], reverse=True) for row in rows]

    _, scored = _mine_lists(world, tmp_path, pairs, format="scored", **settings, **teacher)
    assert [row["title"] for row in scored] == [text for row in rows for text in row["documents"]]
    labels = [row["label"] for row in scored]
    np.testing.assert_allclose(labels, [score for scores in logits for score in scores], atol=1e-5)


def _broken_reranker(folder: Path, bias: float) -> Path:
    reranker = build_tiny_reranker(folder)
    weights = load_file(reranker / "model.safetensors")
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], bias)
    save_file(weights, reranker / "model.safetensors", {"format": "pt"})
    return reranker


@pytest.mark.parametrize("where", ["evaluate", "stages", "tune-fusion", "search", "library"])
def test_a_reranker_whose_logits_are_no_numbers_is_named_wherever_it_orders(
    world: World, tmp_path: Path, where: str
) -> None:
    """NaN left the order of recall, which was measured and answered as the reranker's."""
    reranker = str(_broken_reranker(tmp_path / "damaged", math.nan))
    values: dict[str, Any] = {"encoder": world.encoder, "index": world.index, "reranker": reranker}
    values["queries"] = {"path": _write(tmp_path / "queries.tsv", QUERIES)}
    rank: dict[str, Callable[[], object]] = {
        "evaluate": lambda: _evaluate(world, tmp_path, reranker=reranker),
        "stages": lambda: _evaluate(world, tmp_path, reranker=reranker, stages=True),
        "tune-fusion": lambda: tune_fusion_on_dev(make_config(TuneFusionConfig, values)),
        "search": lambda: raytower.open_index(world.index).search("tiger lemons", rerank=reranker),
        "library": lambda: raytower.load_reranker(reranker).rank("moon", ["a", "b"]),
    }
    with pytest.raises(
        InputError, match=r"reranker '.*damaged' scores query .* with nan; scores must be fin"
    ):
        rank[where]()


def test_mining_refuses_a_teacher_whose_logits_are_no_numbers(world: World, tmp_path: Path) -> None:
    reranker = _broken_reranker(tmp_path / "broken", float("inf"))
    with pytest.raises(InputError, match="scores query 'tiger lemons' with inf; scores must be finite"):
        _mine_lists(world, tmp_path, [("tiger lemons", "x")], **CANDIDATES, teacher=str(reranker))
    assert not (tmp_path / "mined.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"format": "candidates"}, "format is candidates, .* fit file_type tsv; set file_type to jsonl"),
        ({"teacher": "t"}, "teacher is 't', but triples hold no scores; set format to candidates or scored"),
    ],
)
def test_mining_refuses_settings_that_do_not_go_together(more: dict[str, str], message: str) -> None:
    values = {"encoder": "e", "index": "i", "input": {"path": "p"}, "output": "o"}
    with pytest.raises(InputError, match=message):
        make_config(MineConfig, {**values, **more})


def test_mining_into_tsv_refuses_tabs(world: World, tmp_path: Path) -> None:
    row = {"query": "tiger lemons", "document": "with a\ttab"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    values = _values(world, str(tmp_path / "pairs.jsonl"))
    with pytest.raises(InputError, match="set file_type to jsonl"):
        mine(make_config(MineConfig, {**values, "output": str(tmp_path / "mined.tsv")}))
    assert not (tmp_path / "mined.tsv").exists()


def test_mining_refuses_a_folder_of_several_splits(world: World, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).with_suffix(".tsv").write_text("tiger lemons\tx\n")
    values = {**_values(world, str(tmp_path)), "output": str(tmp_path.parent / "mined.tsv")}
    with pytest.raises(InputError, match=r"more than one split .*test\.tsv.* such as '.*/train\.tsv'"):
        plan_mine(make_config(MineConfig, values))


def test_mining_refuses_a_depth_that_cannot_do() -> None:
    values = {"encoder": "e", "index": "i", "input": {"path": "p"}, "output": "o"}
    with pytest.raises(InputError, match="raise recall_k"):
        make_config(MineConfig, {**values, "recall_k": 10, "skip_top": 8, "num_negatives": 3})


def test_votes_and_ranked_labels_by_hand() -> None:
    neighbours = [("a", 0.9), ("b", 0.8), ("b", 0.8), ("c", 0.1)]
    votes = count_votes(neighbours, temperature=0.1)
    weights = [1, np.exp(-1), np.exp(-1), np.exp(-8)]
    assert [item.label for item in votes] == ["a", "b", "c"]
    assert [item.score for item in votes] == pytest.approx(
        [1 / sum(weights), 2 * np.exp(-1) / sum(weights), np.exp(-8) / sum(weights)]
    )
    assert count_votes(neighbours, temperature=100)[0].label == "b"  # heads count
    assert [(item.label, item.score) for item in rank_labels(neighbours)] == [
        ("a", 0.9),
        ("b", 0.8),
        ("c", 0.1),
    ]
    assert [item.label for item in count_votes([("x", 0.5), ("y", 0.5)], 0.05)] == ["x", "y"]


def _classify(
    world: World, tmp_path: Path, rows: list[tuple[str, ...]], **more: Any
) -> tuple[dict[str, Any], Any]:
    values = _values(world, _write(tmp_path / "texts.tsv", rows))
    output = tmp_path / "labels.out"
    result = classify(make_config(ClassifyConfig, {**values, "output": str(output), **more}))
    return result, output.read_text().splitlines()


def test_the_label_of_a_deleted_document_is_missing(world: World, tmp_path: Path) -> None:
    smaller = _without(
        world, tmp_path, [f"c{place}" for place, text in enumerate(CORPUS) if "piano " in text]
    )
    rows = [(TEXTS[0], "things##apple"), (TEXTS[15], "things##piano")]
    assert _classify(world, tmp_path, rows, mode="votes", k=1)[0]["labels_missing"] == 0
    assert _classify(smaller, tmp_path, rows, mode="votes", k=1)[0]["labels_missing"] == 1


def test_votes_of_labelled_texts(world: World, tmp_path: Path) -> None:
    rows = [(TEXTS[0], "things##apple"), (TEXTS[4], "things##river"), (TEXTS[8], "things##absent")]
    result, lines = _classify(world, tmp_path, rows, mode="votes", k=1)
    assert lines[0] == "text\tlabel\tscore"
    assert lines[1] == f"{TEXTS[0]}\tthings##apple\t1.000000"
    assert lines[3].split("\t")[1] == f"things##{TEXTS[8].split()[0]}"
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["labels_missing"] == 1
    # Two classes of four are always right: of the third row neither the expected nor the predicted one is.
    assert (result["precision_macro"], result["recall_macro"], result["f1_macro"]) == (0.5, 0.5, 0.5)
    assert set(result["intervals"]) == {"accuracy"}  # one neighbour has no second label


def test_votes_are_counted_over_the_k_nearest(world: World, tmp_path: Path) -> None:
    rows = [("tiger lemons", "things##tiger")]
    _, lines = _classify(world, tmp_path, rows, mode="votes", k=7, temperature=0.2, file_type="jsonl")
    row = json.loads(lines[0])
    places = world.nearest("tiger lemons", 7)
    scores = (world.vectors @ world.encode(["tiger lemons"])[0])[places]
    weights = np.exp(scores / 0.2) / np.exp(scores / 0.2).sum()
    shares: dict[str, float] = {}
    for place, weight in zip(places, weights, strict=True):
        label = f"things##{CORPUS[place].split()[0]}"
        shares[label] = shares.get(label, 0) + weight
    assert dict(row["labels"]) == pytest.approx(shares, abs=1e-5)
    assert row["label"] == max(shares, key=lambda label: shares[label])
    assert row["expected"] == "things##tiger"


def test_labels_are_their_own_texts(world: World, tmp_path: Path) -> None:
    labels = ["fruit##apple", "fruit##lemon", "water##river", "water##ocean"]
    folder = tmp_path / "labels"
    folder.mkdir()
    index = _build(folder, world.encoder, [{"id": str(n), "text": label} for n, label in enumerate(labels)])
    there = World(world.encoder, index, world.vectors)
    result, lines = _classify(there, tmp_path, [("water##ocean", "water##ocean"), ("fruit##lemon", "x##y")])
    assert [line.split("\t")[:2] for line in lines[1:]] == [
        ["water##ocean", "water##ocean"],
        ["fruit##lemon", "fruit##lemon"],
    ]
    assert float(lines[1].split("\t")[2]) == pytest.approx(1, abs=1e-5)
    assert (result["accuracy"], result["hit@20"], result["labels_missing"]) == (0.5, 0.5, 1)
    with pytest.raises(InputError, match="has no 'label', so it cannot vote"):
        _classify(there, tmp_path, [("water##ocean", "water##ocean")], mode="votes")


def test_a_comma_in_a_label_parts_nothing(world: World, tmp_path: Path) -> None:
    """`A,B` and `A##B` are two labels; a name such as `Smith, John` is no path."""
    labels = ["fruit,apple", "fruit##apple", "Smith, John"]
    (tmp_path / "labels").mkdir()
    rows = [{"id": str(n), "text": text, "label": labels[n]} for n, text in enumerate(TEXTS[:3])]
    index = _build(tmp_path / "labels", world.encoder, rows)
    there = World(world.encoder, index, world.vectors)
    asked = list(zip(TEXTS[:3], ["fruit##apple", "fruit##apple", "Smith, John"], strict=True))
    result, lines = _classify(there, tmp_path, [*asked, (TEXTS[3], "Smith##John")], mode="votes", k=1)
    assert [line.split("\t")[1] for line in lines[1:4]] == labels
    # The first is wrong although a comma is how some write a path, and nothing holds the last one's label.
    assert (result["accuracy"], result["labels_missing"]) == (0.5, 1)


def test_labels_of_logits_by_hand() -> None:
    logits = np.log(np.array([[1, 3, 4], [2, 1, 1]], np.float32))
    ranked = label_logits(["A##B", "A,B", "C"], logits, 2)
    assert [[item.label for item in row] for row in ranked] == [["C", "A,B"], ["A##B", "A,B"]]
    assert [[item.score for item in row] for row in ranked] == [
        [pytest.approx(0.5), pytest.approx(0.375)],
        [pytest.approx(0.5), pytest.approx(0.25)],
    ]
    with pytest.raises(InputError, match="text number 1 the logits"):
        label_logits(["a", "b"], np.array([[0, 1], [np.nan, 0]], np.float32), 2)


def test_pairs_of_vectors_have_a_cosine_or_a_named_error() -> None:
    left = np.array([[3, 4], [1, 0], [1, 1]], np.float32)
    right = np.array([[4, 3], [0, 2], [-2, -2]], np.float32)
    assert pair_cosines(left, right).tolist() == pytest.approx([0.96, 0, -1])
    with pytest.raises(InputError, match=r"pairs\[1\]: the vector of its second text is zero"):
        pair_cosines(left, right * np.array([[1], [0], [1]], np.float32))
    with pytest.raises(InputError, match=r"pairs\[2\]: the vector of its first text holds NaN"):
        pair_cosines(np.array([[1, 1], [1, 1], [np.nan, 1]], np.float32), right)
    with pytest.raises(InputError, match="one shape"):
        pair_cosines(left[:2], right)


def test_a_fusion_is_tuned_stored_and_used(world: World, dummy_reranker_dir: Path, tmp_path: Path) -> None:
    reranker = tmp_path / "reranker"
    CrossEncoder.load(dummy_reranker_dir).save(reranker)
    queries = _write(tmp_path / "dev.tsv", [(text.split()[0], text) for text in TEXTS])
    values = {"index": world.index, "queries": {"path": queries}, "reranker": str(reranker), "recall_k": 10}
    config = make_config(TuneFusionConfig, {**values, "store": False})
    assert plan_tune_fusion(config)["pairs"] == 10 * len({text.split()[0] for text in TEXTS})
    shown = tune_fusion_on_dev(config)
    assert CrossEncoder.load(reranker).fusion is None
    tuned = tune_fusion_on_dev(make_config(TuneFusionConfig, values))
    assert {**tuned, "seconds": 0} == {**shown, "stored": True, "seconds": 0}
    stored = CrossEncoder.load(reranker).fusion
    assert stored is not None
    assert stored.to_dict() == tuned["fusion"]
    best = max(point["mrr@10"] for point in tuned["curve"])
    assert tuned["fused_mrr"] == best
    measured = evaluate(make_config(EvaluateConfig, {**values, "encoder": world.encoder}))
    assert measured["mrr@10"] == pytest.approx(best, abs=1e-9)
    assert measured["recall_stage"]["mrr@10"] == pytest.approx(tuned["recall_mrr"], abs=1e-9)
    drawn = [line for line in render_tuning(tuned).splitlines() if line.startswith("→")]
    assert len(drawn) == 1
    assert f"{tuned['weight']:.4f}" in drawn[0]
    with pytest.raises(InputError, match="copy a hub model into a directory first"):
        plan_tune_fusion(make_config(TuneFusionConfig, {**values, "reranker": "org/model"}))


def test_texts_without_labels_get_labels_and_no_metrics(world: World, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(f"{TEXTS[0]}\n{TEXTS[4]}\n")
    values = {"encoder": world.encoder, "index": world.index, "input": {"path": str(tmp_path / "plain.txt")}}
    config = {**values, "output": str(tmp_path / "labels.tsv"), "labelled": False, "mode": "votes"}
    result = classify(make_config(ClassifyConfig, config))
    assert len((tmp_path / "labels.tsv").read_text().splitlines()) == 3
    assert result["rows"] == 2
    assert "accuracy" not in result


def _similarity(
    world: World, tmp_path: Path, rows: list[tuple[str, ...]], **more: Any
) -> tuple[dict[str, Any], Any]:
    values = {"encoder": world.encoder, "input": {"path": _write(tmp_path / "scored.tsv", rows)}}
    output = tmp_path / "similarity.out"
    result = similarity(make_config(SimilarityConfig, {**values, "output": str(output), **more}))
    return result, output.read_text().splitlines()


SCORED = [
    ("query", "title", "label"),
    (TEXTS[0], TEXTS[0], "1"),
    (TEXTS[0], TEXTS[20], "0"),
    (TEXTS[3], TEXTS[9], "0"),
]


def test_similarity_is_the_cosine_and_auc_its_order(world: World, tmp_path: Path) -> None:
    result, lines = _similarity(world, tmp_path, SCORED, threshold=0.999, rows_per_batch=2)
    assert lines[0] == "query\ttitle\tlabel\tscore"
    assert [line.split("\t")[2] for line in lines[1:]] == ["1", "0", "0"]
    for line in lines[1:]:
        query, title, _, score = line.split("\t")
        left, right = world.encode([query, title])
        assert float(score) == pytest.approx(left @ right, abs=2e-6)
    assert (result["rows"], result["auc"], result["accuracy"], result["f1"]) == (3, 1, 1, 1)
    assert result["best_accuracy"] == 1


def test_similarity_prefixes_change_what_is_encoded(world: World, tmp_path: Path) -> None:
    _, lines = _similarity(
        world, tmp_path, SCORED, query_prefix="a ", document_prefix="b ", file_type="jsonl"
    )
    left, right = world.encode([f"a {TEXTS[0]}", f"b {TEXTS[20]}"])
    assert json.loads(lines[1])["score"] == pytest.approx(left @ right, abs=1e-6)


def test_similarity_by_a_reranker_is_what_the_peer_library_predicts(
    dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    rows = [*SCORED, (TEXTS[4], TEXTS[5], "1"), (TEXTS[8], TEXTS[2], "0")]
    scored = _write(tmp_path / "scored.tsv", rows)
    values = {"reranker": str(dummy_reranker_dir), "input": scored, "output": str(tmp_path / "out.tsv")}
    result = similarity(make_config(SimilarityConfig, {**values, "rows_per_batch": 2}))
    header, *lines = (line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines())
    assert header == ["query", "title", "label", "score"]
    expected = PeerCrossEncoder(str(dummy_reranker_dir), device="cpu").predict([row[:2] for row in rows[1:]])
    assert [float(line[3]) for line in lines] == pytest.approx(expected, abs=2e-6)
    labels = np.array([int(row[2]) for row in rows[1:]])
    assert result["auc"] == pytest.approx(roc_auc_score(labels, expected))
    assert result["average_precision"] == pytest.approx(average_precision_score(labels, expected))
    assert (result["rows"], result["threshold"]) == (5, 0.5)
    assert result["accuracy"] == np.mean((expected >= 0.5) == labels)
    # The tuned cut by hand: of all cuts at a score the lowest with the highest accuracy.
    cuts = [*np.sort(expected), 2]
    accuracies = [np.mean((expected >= cut) == labels) for cut in cuts]
    best = cuts[int(np.argmax(accuracies))]
    assert result["best_threshold"] == pytest.approx(best, abs=1e-6)
    assert result["best_accuracy"] == max(accuracies)
    assert result["best_f1"] == pytest.approx(f1_score(labels, expected >= best))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "and neither is given; name one of them"),
        ({"encoder": "e", "reranker": "r"}, "and both are given; name one of them"),
        ({"encoder": "e", "threshold": 1.5}, "a cosine lies between -1 and 1"),
        ({"reranker": "r", "query_prefix": "q: "}, "query_prefix is given, which only an encoder reads"),
    ],
)
def test_similarity_has_one_way_to_score(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(SimilarityConfig, {"input": "i.tsv", "output": "o.tsv", **values})


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    scores, labels = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    if labels.any():
        assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))


def test_similarity_of_pairs_without_labels(world: World, tmp_path: Path) -> None:
    result, lines = _similarity(world, tmp_path, [(TEXTS[0], TEXTS[1])], labelled=False)
    assert lines[0] == "query\ttitle\tscore"
    assert set(result) == {"rows", "rejected_rows", "seconds", "output"}


def test_similarity_measures_what_the_labels_allow() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.4])
    one_class = measure_scores(scores, np.ones(4), 0.5)
    assert (one_class["auc"], one_class["accuracy"]) == (None, 0.5)
    assert measure_scores(scores, np.array([5.0, 4.0, 0.0, 2.0]), 0.5) == {"spearman": pytest.approx(1)}
    mixed = measure_scores(scores, np.array([1.0, 0.0, 0.0, 1.0]), 0.85)
    assert (mixed["auc"], mixed["accuracy"], mixed["f1"]) == (0.75, 0.75, pytest.approx(2 / 3))


def test_search_one_question(world: World, dummy_reranker_dir: Path) -> None:
    config = make_config(SearchConfig, {"index": world.index, "query": "tiger lemons", "k": 3})
    found = search(config)  # the encoder is the one that the index names
    assert [item["id"] for item in found["results"]] == [
        f"c{place}" for place in world.nearest("tiger lemons", 3)
    ]
    assert json.loads(json.dumps(found)) == found
    lines = render_search(found).splitlines()
    assert len(lines) == 3
    assert found["results"][0]["text"] in lines[0]
    many = {"index": world.index, "query": "tiger lemons", "k": 500, "reranker": str(dummy_reranker_dir)}
    reranked = search(make_config(SearchConfig, many))["results"]
    assert len(reranked) == len(CORPUS)
    assert all(item["rerank_score"] is not None for item in reranked)
    for nothing in ("  ", "\u200b\ufeff", "\xad", "\x01\x02"):
        with pytest.raises(InputError, match="shows nothing; give a text to search for"):
            make_config(SearchConfig, {"index": world.index, "query": nothing})


def test_plans_count_and_do_nothing(world: World, tmp_path: Path, dummy_reranker_dir: Path) -> None:
    pairs = _write(tmp_path / "pairs.tsv", QUERIES)
    scored = _write(tmp_path / "scored.tsv", SCORED)
    base = {"encoder": world.encoder, "index": world.index, "rows_per_batch": 2}
    output = str(tmp_path / "output")
    queries = {"queries": {"path": pairs}, "reranker": str(dummy_reranker_dir), "recall_k": 7}
    plan = plan_evaluate(make_config(EvaluateConfig, {**base, **queries, "output": output}))
    assert (plan["queries"], plan["batches"], plan["reranked_pairs"], plan["index_rows"]) == (
        5,
        3,
        35,
        len(CORPUS),
    )
    plan = plan_mine(make_config(MineConfig, {**base, "input": {"path": pairs}, "output": output}))
    assert (plan["rows"], plan["batches"], plan["rejected_rows"]) == (6, 3, 0)
    assert "teacher_pairs" not in plan
    taught = {**base, **CANDIDATES, "teacher": str(dummy_reranker_dir), "num_negatives": 4}
    with_teacher = plan_mine(make_config(MineConfig, {**taught, "input": {"path": pairs}, "output": output}))
    assert with_teacher["teacher_pairs"] == 6 * 5
    assert with_teacher["predicted_memory_bytes"] > plan["predicted_memory_bytes"]
    plan = plan_classify(make_config(ClassifyConfig, {**base, "input": {"path": pairs}, "output": output}))
    assert plan["rows"] == 6
    values = {"encoder": world.encoder, "input": {"path": scored}, "output": output}
    small = plan_similarity(make_config(SimilarityConfig, values))
    assert small["rows"] == 3
    parameters = sum(parameter.numel() for parameter in Encoder.load(world.encoder).parameters())
    assert small["predicted_memory_bytes"] > 8 * parameters
    plan = plan_search(make_config(SearchConfig, {"index": world.index, "query": "q"}))
    assert plan["rows"] == 1
    assert sorted(place.name for place in tmp_path.iterdir()) == ["pairs.tsv", "scored.tsv"]


@pytest.mark.parametrize("job", ["mine", "classify", "similarity"])
def test_bad_rows_fail_or_go_to_quarantine(world: World, tmp_path: Path, job: str) -> None:
    header = [SCORED[0]] if job == "similarity" else []
    good = {"mine": ("a", "b"), "classify": ("a", "x"), "similarity": ("a", "b", "1")}[job]
    path = _write(tmp_path / "rows.tsv", [*header, good, ("only one column",), good])
    configs = {"mine": MineConfig, "classify": ClassifyConfig, "similarity": SimilarityConfig}
    jobs: dict[str, Any] = {"mine": mine, "classify": classify, "similarity": similarity}
    values: dict[str, Any] = {
        "encoder": world.encoder,
        "input": {"path": path},
        "output": str(tmp_path / "out.tsv"),
    }
    if job != "similarity":
        values["index"] = world.index
    with pytest.raises(InputError, match=r"rows\.tsv:[23]"):
        jobs[job](make_config(configs[job], values))
    assert not (tmp_path / "out.tsv").exists()
    result = jobs[job](make_config(configs[job], {**values, "on_error": "quarantine"}))
    assert result["rejected_rows"] == 1
    assert "only one column" in "".join(
        place.read_text() for place in (tmp_path / "out.tsv.quarantine").rglob("*") if place.is_file()
    )


class TestOutputs:
    """What an output would destroy, or cannot become, is found before any work."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("id\ttext\n1\tmine\n", "exists and is no result of this job"),
            ('{"id": 1, "text": "mine"}\n', "exists and is no result of this job"),
            ("query\ttitle\tscore\n", None),
            ("query\ttitle\tlabel\tscore\n", None),
            ('{"query": "a", "title": "b", "score": 0.5, "more": 1}\n', None),
            ("", None),
        ],
    )
    @pytest.mark.parametrize("dry", [True, False])
    def test_a_file_of_something_else_is_not_overwritten(
        self, world: World, tmp_path: Path, content: str, message: str | None, dry: bool
    ) -> None:
        (tmp_path / "out").write_text(content)
        values = {"encoder": world.encoder, "input": _write(tmp_path / "scored.tsv", SCORED)}
        config = make_config(SimilarityConfig, {**values, "output": str(tmp_path / "out")})
        work = plan_similarity if dry else similarity
        if message is None:
            assert work(config)
        else:
            with pytest.raises(InputError, match=message):
                work(config)
            assert (tmp_path / "out").read_text() == content

    def test_the_input_is_not_overwritten(self, world: World, tmp_path: Path) -> None:
        pairs = _write(tmp_path / "pairs.tsv", [(TEXTS[0], TEXTS[1])])
        values = {"encoder": world.encoder, "index": world.index, "input": pairs, "output": pairs}
        with pytest.raises(InputError, match="inside the input"):
            mine(make_config(MineConfig, values))
        assert Path(pairs).read_text() == f"{TEXTS[0]}\t{TEXTS[1]}\n"

    @pytest.mark.parametrize(("output", "message"), [("", "is a folder"), ("file/out", "is no folder")])
    def test_what_can_be_no_file_is_refused(
        self, world: World, tmp_path: Path, output: str, message: str
    ) -> None:
        values = {"encoder": "/no/such/encoder", "input": _write(tmp_path / "scored.tsv", SCORED)}
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=message):
            similarity(make_config(SimilarityConfig, {**values, "output": str(tmp_path / output)}))

    def test_a_report_replaces_only_a_report(self, world: World, tmp_path: Path) -> None:
        values = {
            "encoder": "/no/such/encoder",
            "index": world.index,
            "queries": _write(tmp_path / "q.tsv", QUERIES),
        }
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes").write_text("mine")
        for output, message in (
            (world.index, "holds files of something else"),
            (tmp_path / "other", "'notes'"),
            (tmp_path / "q.tsv", "a file"),
        ):
            with pytest.raises(InputError, match=message):
                evaluate(make_config(EvaluateConfig, {**values, "output": str(output)}))


# --- stages and plots -----------------------------------------------------------------------------------------------


def test_stages_say_where_a_loss_comes_from(
    world: World, dummy_reranker_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Index.search

    def lossy(self: Index, vectors: np.ndarray, k: int, **more: Any) -> Hits:
        """An index that never finds the best document."""
        found = real(self, vectors, k + 1, **more)
        return Hits(found.scores[:, 1:], found.rows[:, 1:])

    monkeypatch.setattr(Index, "search", lossy)
    monkeypatch.setattr("raytower.evaluation.stages._BLOCK_BYTES", 1)  # a pass over the table for each batch
    more = {"stages": True, "rows_per_batch": 2, "plots": str(tmp_path / "plots")}
    result = _evaluate(world, tmp_path, reranker=str(dummy_reranker_dir), recall_k=5, **more)
    rows = {row["stage"]: row for row in result["loss_by_stage"]}
    assert list(rows) == ["encoder", "index", "reranker"]
    run = {
        query_id: {f"c{place}": float(-rank) for rank, place in enumerate(world.nearest(text, 10))}
        for query_id, text in QUERY_IDS.items()
    }
    once = {
        query: _without_copies(judged, list(run[query].items()))
        for query, judged in _qrels(QUERY_IDS).items()
    }
    theirs = pytrec_eval.RelevanceEvaluator(once, {"recall.1,3,10", "ndcg_cut.10"}).evaluate(run)
    for ours, name in {"recall@1": "recall_1", "recall@10": "recall_10", "ndcg@10": "ndcg_cut_10"}.items():
        expected = np.mean([values[name] for values in theirs.values()])
        assert rows["encoder"]["metrics"][ours]["value"] == pytest.approx(expected), ours
        lost = rows["index"]["metrics"][ours]["value"] - expected
        assert rows["index"]["differences"][ours]["value"] == pytest.approx(lost)
    assert rows["index"]["differences"]["recall@1"]["value"] < 0
    assert rows["reranker"]["metrics"]["ndcg@10"]["value"] == pytest.approx(result["ndcg@10"])
    assert (rows["index"]["against"], rows["reranker"]["against"]) == ("encoder", "index")
    table = render_evaluation(result)
    assert "where a loss comes from" in table
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["stage"] for each in report["figures"]["recall_by_k"]] == ["encoder", "index", "reranker"]
    assert sum(report["figures"]["scores"]["relevant"]) > 0
    assert "Where a loss comes from" in (tmp_path / "out" / "report.html").read_text()
    drawn = sorted(place.name for place in (tmp_path / "plots").iterdir())
    assert drawn == [
        f"{name}.svg" for name in ("by-length", "by-script", "recall-against-time", "recall-by-k", "scores")
    ]
    assert "loss_by_stage" not in _evaluate(world, tmp_path)


def test_stages_of_a_hybrid_search_and_of_words_alone(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "lexical"
    folder.mkdir()
    rows = [{"id": f"c{place}", "text": text, "label": "x"} for place, text in enumerate(CORPUS)]
    wordy = World(world.encoder, _build(folder, world.encoder, rows), world.vectors)
    result = _evaluate(wordy, tmp_path, mode="hybrid", stages=True)
    stages = {row["stage"]: row for row in result["loss_by_stage"]}
    assert [(name, row["against"]) for name, row in stages.items()] == [
        ("encoder", None),
        ("index", "encoder"),
        ("lexical", "index"),
        ("fusion", "index"),
    ]
    assert stages["fusion"]["metrics"]["recall@10"]["value"] == pytest.approx(result["recall@10"])
    dense, lexical = (_evaluate(wordy, tmp_path, mode=mode) for mode in ("dense", "lexical"))
    assert stages["index"]["metrics"]["ndcg@10"]["value"] == pytest.approx(dense["ndcg@10"])
    assert stages["lexical"]["metrics"]["ndcg@10"]["value"] == pytest.approx(lexical["ndcg@10"])
    assert stages["encoder"]["metrics"] == stages["index"]["metrics"]  # a flat index loses nothing
    alone = _evaluate(wordy, tmp_path, mode="lexical", stages=True)
    assert [row["stage"] for row in alone["loss_by_stage"]] == ["lexical"]


def test_recall_and_time_at_settings_of_the_index(world: World, tmp_path: Path) -> None:
    embeddings = str(Path(world.index).parent / "embeddings")
    build(tmp_path / "graph", embeddings, kind="hnsw")
    _evaluate(World(world.encoder, str(tmp_path / "graph"), world.vectors), tmp_path, stages=True)
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    points = figures["recall_against_time"]
    assert len(points) > 2
    assert sum(point["used"] for point in points) == 1
    assert {point["k"] for point in points} == {10}
    assert all(point["milliseconds"] > 0 for point in points)


def test_the_auc_of_an_index_is_scikit_learns(world: World, tmp_path: Path) -> None:
    """Every list is the whole corpus, by brute force; a judged text that stands there twice counts once."""
    result = _evaluate(world, tmp_path, rows_per_batch=2, k=[1, len(CORPUS)])
    judged = {wanted for _, wanted in QUERIES}
    areas, scores, labels = [], [], []
    for query in dict.fromkeys(query for query, _ in QUERIES):
        cosines = (world.vectors @ world.encode([query])[0]).tolist()
        names = [text if text in judged else f"{place} {text}" for place, text in enumerate(CORPUS)]
        once = dict(zip(names, cosines, strict=True))
        if (query, query) not in QUERIES:  # a query that stands in the corpus is no answer to itself
            once = {
                name: cosine
                for name, cosine in once.items()
                if name.split(" ", 1)[-1] != query and name != query
            }
        right = [(query, name) in QUERIES for name in once]
        if any(right):
            areas.append(roc_auc_score(right, list(once.values())))
        scores += once.values()
        labels += right
    assert result["auc"]["by_query"] == pytest.approx(np.mean(areas), abs=1e-9)
    assert result["auc"]["queries"] == len(areas) == 4
    # Queries that are texts of the corpus have cosines of 1 there, which float32 tells apart by its last digit.
    assert result["auc"]["pooled"] == pytest.approx(roc_auc_score(labels, scores), abs=0.005)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["auc"] == result["auc"]
    assert "Relevant documents above others" in (tmp_path / "out" / "report.html").read_text()


def test_plots_are_drawn_beside_the_page(world: World, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg_py, which the extra [png] brings, is not installed")
    _evaluate(world, tmp_path, figures="png")
    drawn = {place.stem for place in (tmp_path / "out").glob("*.png")}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert drawn == {plot.name for plot in evaluation_plots(report)} >= {"recall-by-k", "scores"}
    for name in ("a", "b"):
        _evaluate(world, tmp_path, output=str(tmp_path / name))
    values = {"compare": [str(tmp_path / "a"), str(tmp_path / "b")], "figures": "png"}
    evaluate(make_config(EvaluateConfig, {**values, "output": str(tmp_path / "compared")}))
    assert (tmp_path / "compared" / "differences.png").is_file()
    (tmp_path / "out" / "scores.png").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds a 'scores\.png' that raytower has not drawn"):
        _evaluate(world, tmp_path, figures="png")


def test_plots_are_drawn_beside_a_page_alone() -> None:
    with pytest.raises(InputError, match="figures is png, and there is no page to draw them beside"):
        make_config(EvaluateConfig, {"index": "i", "queries": "q", "figures": "png"})


def test_only_an_index_has_stages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only an index has stages"):
        make_config(EvaluateConfig, {"run": "r", "queries": {"path": "q"}, "stages": True})
