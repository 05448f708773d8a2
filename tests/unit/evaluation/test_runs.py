"""Run files and qrels, ours and anybody's: read in their order, odd rows counted, and measured without an index."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from raytower.config import make_config
from raytower.data.qrels import is_trec_qrels, read_trec_qrels
from raytower.data.queries import read_queries
from raytower.errors import InputError
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate, plan_evaluate
from raytower.evaluation.runs import read_run


def _write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_a_run_is_ordered_by_score_and_equal_scores_as_written(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "anserini.txt",
        "q1 Q0 d3 1 0.5 x",
        "q1 Q0 d9 2 0.9 x",
        "q2 Q0 d1 1 2 x",
        "q1\tQ0\td1\t3\t0.5\tx",
    )
    run = read_run(path, "auto", "id")
    assert run.lists["q1"].documents == ["d9", "d3", "d1"]  # trec_eval would order d3 before d1 by id alone
    assert run.lists["q1"].scores == [0.9, 0.5, 0.5]
    assert run.lists["q2"].documents == ["d1"]
    # d9 stands second and d3 first, each where the other belongs; d1 is third.
    assert (run.num_tied, run.num_wrong_ranks, run.num_repeated) == (1, 2, 0)


def test_ranks_from_zero_are_no_wrong_ranks_and_files_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "run.trec.gz"
    path.write_bytes(gzip.compress(b"q Q0 a 0 3 x\nq Q0 b 1 2 x\n\nq Q0 c 2 1 x\n"))
    run = read_run(str(path), "auto", "id")
    assert (run.lists["q"].documents, run.num_wrong_ranks) == (["a", "b", "c"], 0)


def test_a_document_that_stands_twice_is_left_out_and_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "r", "q Q0 a 1 3 x", "q Q0 a 2 2 x", "q Q0 b 3 1 x")
    run = read_run(path, "trec", "id")
    assert (run.lists["q"].documents, run.num_repeated) == (["a", "b"], 1)


def test_ids_of_our_own_runs_come_back_and_those_of_others_stay(tmp_path: Path) -> None:
    ours = _write(tmp_path / "ours", "a%20b Q0 100%25 1 1 raytower")
    theirs = _write(tmp_path / "theirs", "a%20b Q0 100%25 1 1 bm25")
    assert read_run(ours, "auto", "id").lists["a b"].documents == ["100%"]
    assert read_run(theirs, "auto", "id").lists["a%20b"].documents == ["100%25"]


def test_batch_recall_by_text(tmp_path: Path) -> None:
    tsv = _write(tmp_path / "r.tsv", "问 题\tone text\t0.5", "问 题\tanother\t0.75", "b\tx\t1")
    run = read_run(tsv, "auto", "text")
    assert {query: each.documents for query, each in run.lists.items()} == {
        "问 题": ["another", "one text"],
        "b": ["x"],
    }
    rows: list[dict[str, Any]] = [
        {"query_id": "1", "query": "问 题", "rank": 1, "id": "d7", "score": 0.5, "text": "one text"},
        {"query_id": "1", "query": "问 题", "rank": 2, "id": "d8", "score": 0.25, "text": "one text"},
        {"query_id": 2, "query": "b", "rank": 1, "id": 9, "score": 3, "text": "x"},
    ]
    jsonl = _write(tmp_path / "r.jsonl", *(json.dumps(row) for row in rows))
    # Two documents with one text are two places; by their ids they are two documents.
    assert read_run(jsonl, "auto", "text").lists["问 题"].documents == ["one text", "one text"]
    by_id = read_run(jsonl, "auto", "id")
    assert {query: each.documents for query, each in by_id.lists.items()} == {"1": ["d7", "d8"], "2": ["9"]}
    assert by_id.num_wrong_ranks == 0


def test_the_auc_of_a_run_is_scikit_learns(tmp_path: Path) -> None:
    """Of each judged query by itself, and of all scores; documents that nobody judged are not relevant."""
    lists = {
        "q1": [("a", 9.0), ("b", 8.0), ("c", 8.0), ("d", 1.0)],
        "q2": [("a", 0.5), ("b", 0.25)],
        "q3": [("x", 3.0), ("y", 2.0)],
        "q4": [("z", 7.0)],
    }
    wanted = {"q1": {"b": 1, "d": 2}, "q2": {"b": 1}, "q3": {"x": 1, "y": 1}, "q4": {"z": 1}}
    run = [f"{query} Q0 {doc} 1 {score} x" for query, ranked in lists.items() for doc, score in ranked]
    qrels = [f"{query} 0 {doc} {grade}" for query, judged in wanted.items() for doc, grade in judged.items()]
    files = (_write(tmp_path / "run.trec", *run), _write(tmp_path / "qrels.txt", *qrels, "q1 0 a 0"))
    result = evaluate(make_config(EvaluateConfig, {"run": files[0], "queries": files[1]}))
    rows = {
        query: ([doc in wanted[query] for doc, _ in ranked], [score for _, score in ranked])
        for query, ranked in lists.items()
    }
    both = [rows[query] for query in ("q1", "q2")]  # the others have found nothing that is not relevant
    assert result["auc"]["by_query"] == pytest.approx(np.mean([roc_auc_score(*row) for row in both]))
    assert result["auc"]["queries"] == 2
    every = [[value for row in rows.values() for value in row[side]] for side in (0, 1)]
    assert result["auc"]["pooled"] == pytest.approx(roc_auc_score(*every))
    assert result["queries"] == 4


def test_a_query_that_was_asked_twice_counts_once(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.tsv", "a\tx\t2", "a\ty\t1", "b\tx\t1", "a\tx\t2", "a\ty\t1")
    run = read_run(path, "auto", "text")
    assert run.lists["a"].documents == ["x", "y"]
    assert run.num_repeated == 2


@pytest.mark.parametrize(
    ("lines", "by", "message"),
    [
        (["q Q0 d 1 0.5"], "id", r"run:1: 'q Q0 d 1 0.5' begins no run file; a line is `query Q0 document"),
        (["q Q0 d 1 0.5 x", "q Q0 d 1 0.5"], "id", "run:2: 'q Q0 d 1 0.5' is no row of this run file"),
        (["q Q0 d 1 nan x"], "id", "run:1: score 'nan' is not finite"),
        (["q Q0 d 1 high x"], "id", "run:1: .* is no row of this run file"),
        (["q Q0 d first 1 x"], "id", "run:1: rank 'first' is no whole number from 0 to 2147483647"),
        (["q Q0 d 9223372036854775808 1 x"], "id", "run:1: rank '9223372036854775808' is no whole number"),
        (
            ['{"query": "q", "text": "t", "score": 1, "rank": Infinity}'],
            "text",
            "run:1: rank 'inf' is no whole",
        ),
        (
            ['{"query": "q", "text": "t", "score": 1' + "0" * 400 + "}"],
            "text",
            "run:1: score '10+' is not finite",
        ),
        (["q Q0 d 1 1 x"], "text", "run:1: the row has no texts .*; give the qrels of this run's ids"),
        (["query\ttext\tscore"], "text", r"run:1: 'query\\ttext\\tscore' is no row"),
        (["q\ta text\t1"], "id", "run:1: the row has no ids .*; give a TREC run or JSON lines"),
        (
            ['{"query": "q", "text": "t"}'],
            "text",
            "run:1: .* with query_id or query, id or text, and a number",
        ),
        (['{"query": "q", "text": ["t"], "score": 1}'], "text", "run:1: .* is no row"),
        (['{"query": '], "text", "run:1: not valid JSON"),
        ([], "id", "begins no run file"),
    ],
)
def test_what_is_no_run(tmp_path: Path, lines: list[str], by: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_run(_write(tmp_path / "run", *lines), "auto", by)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file at"):
        read_run(str(tmp_path / "none"), "auto", "id")
    (tmp_path / "bad").write_bytes(b"q Q0 d 1 1 x\nq\xff Q0 d 2 0 x\n")
    with pytest.raises(InputError, match="bad:2: not UTF-8"):
        read_run(str(tmp_path / "bad"), "auto", "id")


# --- qrels ---------------------------------------------------------------------------------------------------------


def test_trec_qrels_are_told_from_pairs(tmp_path: Path) -> None:
    assert is_trec_qrels(_write(tmp_path / "a", "q1 0 d1 2"))
    assert is_trec_qrels(_write(tmp_path / "b", "q1\t0\td1\t-1"))
    assert not is_trec_qrels(_write(tmp_path / "c", "page 0\tis 1"))
    assert not is_trec_qrels(_write(tmp_path / "d", "four words of text"))
    assert not is_trec_qrels(str(tmp_path))
    assert not is_trec_qrels(str(tmp_path / "none"))


def test_trec_qrels_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    path = _write(tmp_path / "qrels", "q1 0 d1 2", "q1 0 d2 0", "q2 0 d1 -1", "q1 0 d1 2", "q3 0 d9 1")
    expected: dict[str, dict[str, float]] = {}
    for each in ir_measures.read_trec_qrels(path):
        expected.setdefault(each.query_id, {})[each.doc_id] = each.relevance
    assert read_trec_qrels(path) == expected
    queries = read_queries(path, need_texts=False)
    assert (queries.ids, queries.relevant) == (["q1", "q3"], [{"d1": 2}, {"d9": 1}])
    assert (queries.unwanted, queries.num_without_relevant) == ([{"d2": 0}, {}], 1)
    with pytest.raises(InputError, match="TREC qrels, which judge ids and have no texts to search for"):
        read_queries(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["q 0 d"], "qrels:1: 'q 0 d' is no judgement"),
        (["q 0 d 1", "q 0 d 0.5"], "qrels:2: .* is no judgement"),
        (["q 0 d 1", "q 0 d 2"], "qrels:2: document 'd' is judged 2 for query 'q' here, and 1 in an earlier"),
        ([], "no judgements; the file is empty"),
        (["q 0 d 0"], "no judgement is above 0"),
    ],
)
def test_what_is_no_qrels(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_queries(_write(tmp_path / "qrels", *lines), "trec", need_texts=False)


# --- evaluate --run ------------------------------------------------------------------------------------------------

QRELS = ["q1 0 d1 2", "q1 0 d2 1", "q1 0 d5 0", "q2 0 d3 1", "q3 0 d1 1", "q4 0 d1 0"]
RUN = [
    "q1 Q0 d2 1 3.5 x",
    "q1 Q0 d7 2 3.5 x",
    "q1 Q0 d1 3 1 x",
    "q2 Q0 d9 1 2 x",
    "q2 Q0 q2 2 1.5 x",
    "q2 Q0 d3 3 1 x",
    "q9 Q0 d3 1 1 x",
]


def _evaluate(tmp_path: Path, **more: Any) -> dict[str, Any]:
    values = {
        "run": _write(tmp_path / "run", *RUN),
        "queries": _write(tmp_path / "qrels", *QRELS),
        "k": [1, 3],
    }
    return evaluate(make_config(EvaluateConfig, {**values, **more}))


def test_a_run_of_anybody_is_measured_without_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["nDCG@10", "MRR@10", "R@100", "AP", "Judged@10"]
    result = _evaluate(tmp_path, metrics=names)
    # q4 has nothing relevant; q3 was not searched for and counts as 0, q9 is not judged.
    measures = [ir_measures.parse_measure(name) for name in names]
    # The library orders the tie of q1 by id, d7 first; its score here says what the file's order says.
    run = [line.replace("d7 2 3.5", "d7 2 3.4") for line in RUN]
    theirs = ir_measures.calc_aggregate(
        measures,
        [each for each in ir_measures.read_trec_qrels("\n".join(QRELS)) if each.query_id != "q4"],
        [each for each in ir_measures.read_trec_run("\n".join(run)) if each.query_id != "q9"],
    )
    for name, measure in zip(names, measures, strict=True):
        assert result[name] == pytest.approx(theirs[measure], abs=1e-9), name
    assert result["AP"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3 + 0) / 3)
    counts = ("queries", "queries_without_relevant", "queries_without_hits", "queries_not_judged")
    assert [result[name] for name in counts] == [3, 1, 1, 1]
    assert (result["tied"], result["wrong_ranks"], result["repeated_rows"]) == (1, 0, 0)
    assert result["unjudged"] == {"1": 1, "3": 3}  # d9; d7, d9 and q2
    assert (result["relevant_missing"], result["index_version"]) == (None, None)
    said = capsys.readouterr().err
    assert "1 judged queries have no hit in the run" in said
    assert "1 hits have the score of the hit before; they stay in the order of the file" in said


def test_the_query_among_the_documents_is_left_out_when_told_so(tmp_path: Path) -> None:
    assert _evaluate(tmp_path)["mrr@10"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    without = _evaluate(tmp_path, ignore_identical_ids=True)
    assert without["mrr@10"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert without["identical_ids"] == 1


def test_a_run_read_back_gives_the_same_figures(tmp_path: Path) -> None:
    names = ["nDCG@10", "AP", "Judged@3", "recall@3", "mrr@10"]
    first = _evaluate(tmp_path, metrics=names, output=str(tmp_path / "out"))
    folder = tmp_path / "out"
    values = {"run": str(folder / "run.trec"), "queries": str(folder / "qrels.trec"), "metrics": names}
    again = evaluate(make_config(EvaluateConfig, {**values, "k": [1, 3]}))
    for name in names:
        assert again[name] == first[name]
    assert again["unjudged"] == first["unjudged"]
    assert sorted(place.name for place in folder.iterdir()) == [
        "per_query.jsonl",
        "qrels.trec",
        "report.html",
        "report.json",
        "run.trec",
    ]
    rows = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert [row["query_id"] for row in rows] == ["q1", "q2", "q3"]
    assert np.mean([row["metrics"]["nDCG@10"] for row in rows]) == pytest.approx(first["nDCG@10"])


def test_batch_recall_is_judged_by_pairs(tmp_path: Path) -> None:
    pairs = _write(tmp_path / "dev.tsv", "how much\tit costs", "how much\tprices", "who\tthe owner")
    run = _write(tmp_path / "r.tsv", "how much\tprices\t0.9", "how much\tother\t0.5", "who\tother\t0.5")
    config = make_config(EvaluateConfig, {"run": run, "queries": pairs, "k": [1, 2]})
    result = evaluate(config)
    assert (result["recall@1"], result["hit@1"], result["mrr@10"]) == (0.25, 0.5, 0.5)
    assert plan_evaluate(config) == {
        "queries": 2,
        "queries_without_hits": 0,
        "queries_not_judged": 0,
        "hits": 3,
    }


def test_judgements_of_another_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds none of the 3 queries of .*qrels, such as 'q1'; its own are"
    ):
        _evaluate(tmp_path, run=_write(tmp_path / "other", "x1 Q0 d1 1 1 x"))
    pairs = _write(tmp_path / "dev.tsv", "how much\tit costs")
    with pytest.raises(InputError, match="run:1: the row has no texts of a query and a document"):
        _evaluate(tmp_path, queries=pairs)
