"""Dev recall during training and `evaluate` of an index of the same corpus: one figure of one encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.evaluation.config import EvaluateConfig, TuneFusionConfig
from raytower.evaluation.evaluate import evaluate
from raytower.evaluation.tuning import tune_fusion_on_dev
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.training.config import RetrieverDevConfig
from raytower.training.dev_recall import evaluate_recall, load_dev_set
from tests.support.data_files import write, write_jsonl
from tests.support.encoding_here import encode_here
from tests.support.index_cases import build

NAMES = ("recall@1", "recall@2", "recall@10", "mrr@10", "ndcg@10")


def indexed(encoder: Path, corpus: Path, folder: Path, **settings: Any) -> str:
    values = {"encoder": str(encoder), "input": str(corpus), "output": str(folder / "embeddings")}
    encode_here(make_config(EncodeConfig, values))
    build(folder / "index", str(folder / "embeddings"), **settings)
    return str(folder / "index")


def evaluated(index: str, queries: Path, **settings: Any) -> dict[str, Any]:
    values = {"index": index, "queries": {"path": str(queries), "split": "dev"}, "k": [1, 2, 10], **settings}
    return evaluate(make_config(EvaluateConfig, values))


def dev_figures(encoder: Path, **dev: Any) -> dict[str, float]:
    engine = ForwardEngine(Encoder.load(encoder))
    return evaluate_recall(engine, load_dev_set(RetrieverDevConfig(**dev)), "recall@2", ("", ""))


def same(found: dict[str, Any], measured: dict[str, float]) -> None:
    assert {name: found[name] for name in NAMES if name in measured} == pytest.approx(
        {name: measured[name] for name in NAMES if name in measured}
    )


def beir(folder: Path, documents: list[tuple[str, str]], qrels: str, query: str = "red apple") -> Path:
    write_jsonl(
        folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in documents]
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": "q1", "text": query}])
    write(folder / "qrels" / "dev.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    return folder


OTHERS = [(f"x{number}", f"lemon train {number}") for number in range(4)]


@pytest.mark.parametrize("named", [None, "corpus.jsonl", "."])
def test_a_copy_under_another_id_is_unjudged_both_ways(
    dummy_encoder_dir: Path, tmp_path: Path, named: str | None
) -> None:
    """Equal texts counted once in dev recall, so the judged copy behind was found at rank 1: 1.0, evaluate 0.0."""
    documents = [("copy", "red apple pie"), *OTHERS, ("judged", "red apple pie")]
    folder = beir(tmp_path / "set", documents, "q1\tjudged\t1\n", query="red apple pie")
    found = evaluated(indexed(dummy_encoder_dir, folder, tmp_path), folder)
    corpus = None if named is None else str(folder / named)
    measured = dev_figures(dummy_encoder_dir, path=str(folder), corpus=corpus)
    assert (found["recall@1"], found["recall@2"], measured["recall@1"]) == (0.0, 1.0, 0.0)
    same(found, measured)


def test_a_judged_copy_before_the_other_is_found_first_both_ways(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    """Three copies, the first and the last of them judged: ranks 1 and 3 of equal scores, by row."""
    documents = [*OTHERS, ("one", "red apple"), ("two", "red apple"), ("three", "red apple")]
    folder = beir(tmp_path / "set", documents, "q1\tone\t1\nq1\tthree\t2\n")
    found = evaluated(indexed(dummy_encoder_dir, folder, tmp_path), folder)
    measured = dev_figures(dummy_encoder_dir, path=str(folder))
    assert (measured["recall@1"], measured["recall@2"], measured["recall@10"]) == (0.5, 0.5, 1.0)
    same(found, measured)


def test_another_corpus_without_the_ids_is_judged_by_text(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", [("1", "red apple")], "q1\t1\t1\n")
    corpus = write(tmp_path / "other.tsv", "1\tlemon train\n2\tred apple\n3\tred apple\n")
    dev = load_dev_set(RetrieverDevConfig(path=str(folder), corpus=str(corpus)))
    assert (dev.corpus, dev.relevant) == (["lemon train", "red apple"], [[1]])


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_query_in_the_corpus_is_no_answer_to_itself_both_ways(
    dummy_encoder_dir: Path,
    dummy_reranker_dir: Path,
    tmp_path: Path,
    mode: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """q stands twice in the corpus; dev recall left it out, and evaluate ranked it first: 1.0 and 0.0."""
    pairs = write(tmp_path / "dev.tsv", "red apple\tred apple pie\nlemon\tlemon\n")
    texts = ["red apple", "red apple pie", "lemon", "red apple"]
    corpus = write(tmp_path / "corpus.txt", "".join(text + "\n" for text in texts))
    index = indexed(dummy_encoder_dir, corpus, tmp_path, lexical=True)
    found = evaluated(index, pairs, mode=mode, stages=mode != "lexical", output=str(tmp_path / "report"))
    assert "1 queries stand in the corpus themselves: left out of their own answers" in capfd.readouterr().err
    assert (found["queries_in_corpus"], found["hit@2"]) == (1, 1.0)
    if mode == "dense":
        same(found, dev_figures(dummy_encoder_dir, path=str(pairs), corpus=str(corpus)))
    ranked = [line.split() for line in (tmp_path / "report" / "run.trec").read_text().splitlines()]
    assert not {"corpus:1", "corpus:4"} & {hit[2] for hit in ranked if hit[0] == "dev:1"}
    for stage in found.get("loss_by_stage", ()):
        assert stage["metrics"]["recall@2"]["value"] == 1, stage["stage"]

    reranked = evaluated(index, pairs, mode=mode, reranker=str(dummy_reranker_dir), recall_k=2)
    assert reranked["recall@2"] == reranked["recall_stage"]["recall@2"] == 1
    tuning = {"index": index, "queries": str(pairs), "mode": mode, "store": False, "recall_k": 3}
    tuned = tune_fusion_on_dev(make_config(TuneFusionConfig, {**tuning, "reranker": str(dummy_reranker_dir)}))
    assert tuned["recall_mrr"] == pytest.approx(found["mrr@10"])
    if mode == "hybrid":
        words = tune_fusion_on_dev(make_config(TuneFusionConfig, {**tuning, "mode": "dense"}))
        assert words["lexical_mrr"] == 1


def test_a_run_of_pairs_leaves_the_query_out_too(tmp_path: Path) -> None:
    pairs = write(tmp_path / "dev.tsv", "q\ta\nb\tb\n")
    rows = [("q", "q", 3.0), ("q", "a", 2.0), ("b", "b", 3.0), ("b", "a", 1.0)]
    run = [{"query": query, "text": text, "score": score} for query, text, score in rows]
    values = {"run": {"path": str(write_jsonl(tmp_path / "run.jsonl", run))}, "queries": str(pairs), "k": [1]}
    found = evaluate(make_config(EvaluateConfig, values))
    assert (found["recall@1"], found["queries_in_corpus"]) == (1.0, 1)
