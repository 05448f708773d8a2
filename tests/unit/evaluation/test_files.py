"""Run files, reports, result rows and judgements: what is written can be read back, and nothing is half-written."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from raytower.annotation.rows_out import check_rows_output, open_rows, refuse_name_of_another_type
from raytower.data.queries import QuerySet
from raytower.errors import InputError
from raytower.evaluation.judgements import Judgements, absent_text, judge
from raytower.evaluation.page import render_page
from raytower.evaluation.reports import check_reports_output, open_run, write_reports
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig
from raytower.index.reader import Index
from raytower.metrics import ranking_metrics
from raytower.retrieval.lookup import find_documents
from raytower.storage import Location
from tests.support.index_cases import build, unit_vectors, write_embeddings
from tests.support.run_files import read_run

_IDS = st.text(min_size=1, max_size=8).filter(lambda text: "\x00" not in text and text.isprintable())


def test_run_lines_as_trec_eval_wants_them(tmp_path: Path) -> None:
    place = Location.of(tmp_path / "run.trec")
    with open_run(place) as run:
        run.write("q1", [("d7", 0.5), ("d2", 0.25)])
        run.write("q2", [])
    assert place.read_bytes() == b"q1 Q0 d7 1 0.5 raytower\nq1 Q0 d2 2 0.25 raytower\n"


@given(
    st.lists(
        st.tuples(_IDS, st.floats(-100, 100, width=32)),
        min_size=1,
        max_size=12,
        unique_by=lambda item: item[0],
    )
)
def test_runs_come_back_in_their_order(tmp_path_factory: pytest.TempPathFactory, ranked: list) -> None:
    place = Location.of(tmp_path_factory.mktemp("run") / "run.trec")
    with open_run(place, tag="a tag") as run:
        run.write("query 1%", ranked)  # any order of scores: the order given is the order meant
    back = read_run(place)
    assert list(back) == ["query 1%"]
    assert [doc for doc, _ in back["query 1%"]] == [doc for doc, _ in ranked]
    scores = [score for _, score in back["query 1%"]]
    assert all(high > low for high, low in itertools.pairwise(scores))
    assert scores[0] == pytest.approx(ranked[0][1], rel=1e-6)


def test_trec_eval_ranks_tied_scores_as_written(tmp_path: Path) -> None:
    # trec_eval breaks ties by document id, descending: without care it would put d9 first.
    place = Location.of(tmp_path / "run.trec")
    with open_run(place) as run:
        run.write("q", [("d1", 0.7), ("d9", 0.7)])
    run_of_q = dict(read_run(place)["q"])
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {"d1": 1}}, {"recip_rank"})
    assert evaluator.evaluate({"q": run_of_q})["q"]["recip_rank"] == 1
    assert ranking_metrics([["d1", "d9"]], [{"d1": 1}], [1])["mrr@10"][0] == 1


def test_a_run_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with open_run(Location.of(tmp_path / "run.trec")) as run:
            run.write("q1", [("d1", 1.0)])
            run.write("", [("d1", 1.0)])

    with pytest.raises(InputError, match="an id is empty"):
        fail_midway()
    assert list(tmp_path.iterdir()) == []


def _report() -> dict:
    metric = {"value": 0.5, "low": 0.25, "high": 0.75}
    return {
        "queries": 2,
        "counts": {"queries": 2, "relevant_missing": 1},
        "stages": [
            {"title": "recall alone", "metrics": {"recall@10": metric, "mrr@10": metric}},
            {
                "title": "recall, then rerank",
                "metrics": {"recall@10": metric, "mrr@10": {**metric, "value": 0.625}},
            },
        ],
        "settings": {"encoder": "<b>dir</b>", "k": [1, 5], "reranker": None},
        "worst_queries": [
            {
                "query_id": "q1",
                "query": "<script>alert('x')</script> & 问题",
                "mrr@10": 0.0,
                "relevant": ["d9: <i>the answer</i>"],
                "hits": [{"rank": 1, "score": 0.5, "id": "d1", "text": 'a "quoted" text', "relevant": False}],
            }
        ],
    }


_JUDGED = Judgements(
    ["a query", "b"],
    ["one", "two"],
    [{"d1": 2.0}, {"\x00gone": 1.0, "100%": 1.0}],
    num_missing=1,
    num_without_relevant=0,
    unwanted=[{"d3": 0.0}, {}],
)


def test_fractions_of_judgements_are_no_qrels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = Judgements(["a"], ["one"], [{"d1": 0.5}], 0, 0)
    write_reports(Location.of(tmp_path), _report(), half, {"mrr@10": np.array([1])})
    assert not (tmp_path / "qrels.trec").exists()
    assert "qrels.trec is not written: some judgements are no whole numbers" in capsys.readouterr().err


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_escapes_texts_and_needs_nothing_from_outside() -> None:
    page = render_page(_report())
    parsed = _Tags()
    parsed.feed(page)
    assert not {"script", "b", "i", "link", "img"} & set(parsed.tags)
    shown = "".join(parsed.text)
    assert "<script>alert('x')</script> & 问题" in shown
    for expected in ("0.5000", "[0.2500, 0.7500]", "0.6250", "recall alone", "<b>dir</b>", 'a "quoted" text'):
        assert expected in shown


def test_reports_are_written_beside_each_other(tmp_path: Path) -> None:
    report = {**_report(), "numpy": np.float32(0.5), "nothing": float("nan")}
    write_reports(Location.of(tmp_path / "out"), report, _JUDGED, {"mrr@10": np.array([0.5, 1])})
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == [
        "per_query.jsonl",
        "qrels.trec",
        "report.html",
        "report.json",
    ]
    assert (tmp_path / "out" / "qrels.trec").read_text() == (
        "a%20query raytower d1 2\na%20query raytower d3 0\n"
        "b raytower not%20in%20the%20index%201 1\nb raytower 100%25 1\n"
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_query.jsonl").read_text().splitlines()]
    assert rows == [
        {"query_id": "a query", "query": "one", "relevant": 1, "metrics": {"mrr@10": 0.5}},
        {"query_id": "b", "query": "two", "relevant": 2, "metrics": {"mrr@10": 1}},
    ]
    back = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (back["queries"], back["numpy"], back["nothing"]) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("name", "file_type", "message"),
    [
        ("a.tsv.gz", "tsv", "ends with .gz"),
        ("a.jsonl.zst", "jsonl", "ends with .zst"),
        ("a.jsonl", "tsv", "ends with .jsonl, and file_type is tsv"),
        ("a.tsv", "jsonl", "ends with .tsv, and file_type is jsonl"),
        ("a.csv", "tsv", "would read it as csv"),
        ("s3://bucket/a.csv?region=x", "tsv", "would read it as csv"),
    ],
)
def test_a_name_that_means_another_type(name: str, file_type: Literal["tsv", "jsonl"], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        refuse_name_of_another_type(name, file_type)


def test_a_name_that_means_the_type_or_nothing() -> None:
    for name in ("a.tsv", "a.txt", "a", "a.out", "runs.gz/a.tsv"):
        refuse_name_of_another_type(name, "tsv")
    for name in ("a.jsonl", "a.json", "a"):
        refuse_name_of_another_type(name, "jsonl")


@pytest.mark.parametrize("check", [check_reports_output, check_rows_output])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "/dev/null",
            "'/dev/null' is neither a file nor a folder: what is written there is not kept; name a f",
        ),
        ("pipe", "neither a file nor a folder"),
        ("dangling", "dangling is a link to '/no/such/place', which is not there"),
        ("dangling/below", "dangling is a link to '/no/such/place'"),
        ("file/below", "file is no folder that this user may write to"),
    ],
)
def test_an_output_that_keeps_nothing_is_refused(
    check: Callable[[str], None], output: str, message: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("/no/such/place")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=re.escape(message)):
        check(str(tmp_path / output))


@pytest.mark.parametrize(
    "name",
    ["report.json", "report.html", "run.trec", "qrels.trec", "per_query.jsonl", "comparison.json"],
)
def test_a_report_that_is_anothers_is_not_overwritten(name: str, tmp_path: Path) -> None:
    with open_run(Location.of(tmp_path / "run.trec")) as run:
        run.write("q1", [("d7", 0.5)])
    check_reports_output(str(tmp_path))  # an evaluation that was killed
    write_reports(Location.of(tmp_path), _report(), _JUDGED, {"mrr@10": np.array([0.5, 1])})
    check_reports_output(str(tmp_path))
    (tmp_path / "notes").touch()
    check_reports_output(str(tmp_path))
    for content in ("q1 Q0 d7 1 0.5 anserini\n", '{"passed": 3}\n', "[]\n", "\xff"):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=f"holds a '{name}' that no evaluation has written"):
            check_reports_output(str(tmp_path))


def test_rows_as_tsv_and_as_json_lines(tmp_path: Path) -> None:
    tsv, jsonl = Location.of(tmp_path / "rows.tsv"), Location.of(tmp_path / "rows.jsonl")
    with open_rows(tsv, "tsv", ["text", "label", "score"]) as writer:
        writer.write('a "b"', "A,B", 0.5, hidden=1)
    assert tsv.read_bytes() == b'text\tlabel\tscore\na "b"\tA,B\t0.500000\n'
    with open_rows(jsonl, "jsonl", ["text", "label", "score"]) as writer:
        writer.write("a\tb\nc", "甲", 0.5, labels=[["甲", 0.5]])
    assert json.loads(jsonl.read_bytes()) == {
        "text": "a\tb\nc",
        "label": "甲",
        "score": 0.5,
        "labels": [["甲", 0.5]],
    }


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "a\r"])
def test_a_tsv_refuses_what_it_cannot_carry_and_leaves_nothing(tmp_path: Path, text: str) -> None:
    def write() -> None:
        with open_rows(Location.of(tmp_path / "rows.tsv"), "tsv", ["text"]) as writer:
            writer.write("fine")
            writer.write(text)

    with pytest.raises(InputError, match=r"tab or a line break.*set file_type to jsonl"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Five documents; the text of three is equal."""
    folder = tmp_path_factory.mktemp("documents")
    embeddings = write_embeddings(
        folder / "embeddings",
        ["1", "2", "3", "4", "5"],
        unit_vectors(5),
        ["x", "y", "x", "z", "x"],
        {"label": pa.array([7, 8, 7, 8, 9])},
    )
    build(folder / "index", embeddings, shards=2)
    return Index.open(folder / "index")


def test_documents_are_found_by_any_column(documents: Index) -> None:
    assert find_documents(documents, "text", ["x", "z", "w"], "id") == {"x": ["1", "3", "5"], "z": ["4"]}
    assert find_documents(documents, "id", {"5", "9"}, "text") == {"5": ["x"]}
    assert find_documents(documents, "label", ["8"], "id") == {"8": ["2", "4"]}
    assert find_documents(documents, "id", [], "text") == {}


def test_deleted_documents_are_not_found(tmp_path: Path) -> None:
    embeddings = write_embeddings(tmp_path / "embeddings", ["1", "2"], unit_vectors(2), ["x", "x"])
    build(tmp_path / "index", embeddings)
    delete_from_index(IndexDeleteConfig(index=str(tmp_path / "index"), ids=["1"]))
    assert find_documents(Index.open(tmp_path / "index"), "text", ["x"], "id") == {"x": ["2"]}


def test_relevance_by_text_takes_every_equal_document_and_counts_what_is_missing(documents: Index) -> None:
    queries = QuerySet(
        ids=["a", "b"], texts=["qa", "qb"], relevant=None, relevant_texts=[["x", "gone"], ["z"]]
    )
    judged = judge(queries, documents)
    assert judged.num_missing == 1
    assert set(judged.relevant[1]) == {"4"}
    found = {doc_id for doc_id in judged.relevant[0] if absent_text(doc_id) is None}
    assert found == {"1", "3", "5"}
    assert [absent_text(doc_id) for doc_id in judged.relevant[0] if doc_id not in found] == ["gone"]
    # The missing document is a miss, not a smaller denominator.
    assert ranking_metrics([["1", "3", "5"], ["4"]], judged.relevant, [5])["recall@5"].tolist() == [0.75, 1]


def test_relevance_by_id_keeps_grades_and_counts_what_is_missing(documents: Index) -> None:
    relevant = [{"1": 2.0, "99": 1.0}, {"4": 1.0}]
    queries = QuerySet(["a", "b"], ["qa", "qb"], relevant, None, num_without_relevant=3)
    judged = judge(queries, documents)
    assert judged.relevant == relevant
    assert (judged.num_missing, judged.num_without_relevant) == (1, 3)
