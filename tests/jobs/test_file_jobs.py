"""Jobs from file to file as Ray tasks: they write what one process writes, and say what went wrong in its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytower.annotation import classify as classify_module
from raytower.annotation import mine as mine_module
from raytower.annotation import similarity as similarity_module
from raytower.annotation.classify import classify
from raytower.annotation.config import ClassifyConfig, MineConfig, SimilarityConfig
from raytower.annotation.mine import mine
from raytower.annotation.similarity import similarity
from raytower.config import make_config
from raytower.errors import InputError
from raytower.evaluation import in_shares as evaluation_module
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.ranked import rerank as rerank_module
from raytower.ranked import search as search_module
from raytower.ranked.config import RerankFileConfig
from raytower.ranked.rerank import rerank
from raytower.ranked.search import search_one_or_many
from raytower.retrieval.config import SearchConfig
from tests.support.served_index import TEXTS, write_version

WORKERS = {"num": 2, "num_cpus": 0.5, "num_gpus": 0}


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_MAX_QUERIES_PER_SHARE", 2)
    monkeypatch.setattr(rerank_module, "_MAX_PAIRS_PER_SHARE", 4)
    monkeypatch.setattr(similarity_module, "_MAX_PAIRS_PER_SHARE", 4)
    monkeypatch.setattr(mine_module, "_MAX_PAIRS_PER_SHARE", 4)
    monkeypatch.setattr(classify_module, "_MAX_TEXTS_PER_SHARE", 4)
    monkeypatch.setattr(evaluation_module, "_MAX_QUERIES_PER_SHARE", 4)


def test_search_rerank_and_similarity_on_ray(
    ray_cluster: None, dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    (tmp_path / "q.txt").write_text("sun 3\nmoon\na star\nnothing\nmoon 7\n")
    pairs = "".join(f"{text}\t{TEXTS[-1]}\t{place % 2}\n" for place, text in enumerate(TEXTS[:10]))
    (tmp_path / "pairs.tsv").write_text("query\ttitle\tlabel\n" + pairs)
    figures: dict[str, list[Any]] = {"search": [], "rerank": [], "similarity": []}
    for where, workers in (("here", {}), ("ray", WORKERS)):
        values = {"index": str(tmp_path / "index"), "input": str(tmp_path / "q.txt"), "workers": workers}
        recall = {**values, "output": str(tmp_path / f"{where}.jsonl"), "k": 6}
        figures["search"].append(search_one_or_many(make_config(SearchConfig, recall)))
        values = {"reranker": str(dummy_reranker_dir), "workers": workers}
        ranked = {**values, "input": recall["output"], "output": str(tmp_path / f"{where}.parquet")}
        figures["rerank"].append(rerank(make_config(RerankFileConfig, ranked)))
        scored = {**values, "input": str(tmp_path / "pairs.tsv"), "output": str(tmp_path / f"{where}.tsv")}
        figures["similarity"].append(similarity(make_config(SimilarityConfig, scored)))
    for suffix in ("jsonl", "parquet", "tsv"):
        assert (tmp_path / f"ray.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()
    for here, ray in figures.values():
        told = here.keys() - {"seconds", "queries_per_second", "pairs_per_second", "output"}
        assert {name: ray[name] for name in told} == {name: here[name] for name in told}
    assert not [place.name for place in tmp_path.iterdir() if place.name.startswith(".")]


def test_mine_and_classify_on_ray(
    ray_cluster: None, dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    texts = [*TEXTS[:9], "nothing of it"]
    pairs = "".join(f"{text}\t{TEXTS[-place]}\n" for place, text in enumerate(texts, start=1))
    (tmp_path / "pairs.tsv").write_text(pairs)
    (tmp_path / "rows.tsv").write_text("".join(f"{text}\t7\n" for text in texts))
    found: dict[str, list[dict[str, Any]]] = {"mine": [], "classify": []}
    for where, workers in (("here", {}), ("ray", WORKERS)):
        values = {"index": str(tmp_path / "index"), "workers": workers, "rows_per_batch": 4}
        mined = {**values, "input": str(tmp_path / "pairs.tsv"), "output": str(tmp_path / f"{where}.mined")}
        more = {"num_negatives": 2, "format": "scored", "teacher": str(dummy_reranker_dir), "recall_k": 9}
        found["mine"].append(mine(make_config(MineConfig, {**mined, **more})))
        rows = {**values, "input": str(tmp_path / "rows.tsv"), "output": str(tmp_path / f"{where}.labels")}
        votes = {"encoder": str(dummy_encoder_dir), "mode": "votes", "label_field": "number", "k": 3}
        doubted = {"suspects": str(tmp_path / f"{where}.suspects"), "suspect_share": 0.4}
        found["classify"].append(classify(make_config(ClassifyConfig, {**rows, **votes, **doubted})))
    for suffix in ("mined", "labels", "suspects"):
        assert (tmp_path / f"ray.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()
    for here, ray in found.values():
        told = here.keys() - {"seconds", "output", "suspects"}
        assert {name: ray[name] for name in told} == {name: here[name] for name in told}
    assert found["classify"][0]["suspected"] > 0
    assert not [place.name for place in tmp_path.iterdir() if place.name.startswith(".")]


def test_evaluate_on_ray(
    ray_cluster: None, dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    queries = "".join(f"{text}\t{TEXTS[(place * 3) % 20]}\n" for place, text in enumerate(TEXTS[:10]))
    (tmp_path / "q.tsv").write_text(queries)
    found = []
    for where, workers in (("here", {}), ("ray", WORKERS)):
        values = {"index": str(tmp_path / "index"), "queries": str(tmp_path / "q.tsv"), "k": [1, 5]}
        more = {"reranker": str(dummy_reranker_dir), "recall_k": 10, "rows_per_batch": 4, "workers": workers}
        config = {**values, **more, "output": str(tmp_path / where)}
        found.append(evaluate(make_config(EvaluateConfig, config)))
    here, ray = found
    for name in ("run.trec", "qrels.trec", "per_query.jsonl"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    told = here.keys() - {"seconds", "queries_per_second", "output"}
    assert {name: ray[name] for name in told} == {name: here[name] for name in told}
    pages = [json.loads((tmp_path / where / "report.json").read_text()) for where in ("here", "ray")]
    assert pages[0]["worst_queries"] == pages[1]["worst_queries"]
    assert pages[0]["figures"] == pages[1]["figures"]


def test_a_task_says_what_went_wrong(ray_cluster: None, dummy_encoder_dir: Path, tmp_path: Path) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir, 1, ["one\tcolumn"])
    (tmp_path / "q.txt").write_text("sun 3\nmoon\na star\n")
    values = {"index": str(tmp_path / "index"), "input": str(tmp_path / "q.txt"), "workers": WORKERS}
    with pytest.raises(InputError, match="holds a tab or a line break"):
        search_one_or_many(make_config(SearchConfig, {**values, "output": str(tmp_path / "a.tsv")}))
    assert not (tmp_path / "a.tsv").exists()
    search_one_or_many(make_config(SearchConfig, {**values, "output": str(tmp_path / "a.jsonl")}))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["query"] for row in rows] == ["sun 3", "moon", "a star"]
