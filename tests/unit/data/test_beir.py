"""BEIR folders as corpus, pairs and evaluation queries; pairs files as evaluation queries."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from raytower.data import beir
from raytower.data.queries import read_queries
from raytower.errors import InputError
from tests.support.data_files import beir_folder, quarantined, read, rows_of, survey_of, write, write_jsonl

_HEADER = "query-id\tcorpus-id\tscore\n"


def test_corpus(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    expected = [
        {"id": "d1", "text": "Tea green\u2028leaves", "title": "Tea", "source_text": "green\u2028leaves"},
        {"id": "d2", "text": "only a title", "title": "only a title", "source_text": ""},
        {"id": "d3", "text": "三号文档", "title": "", "source_text": None},
    ]
    assert read(folder, "corpus") == read(folder, "corpus", format="beir") == expected


@pytest.mark.parametrize("rows_per_piece", [1, 2, 10])
@pytest.mark.parametrize("compress", [False, True])
def test_pairs_join_positive_judgements(tmp_path: Path, rows_per_piece: int, compress: bool) -> None:
    folder = beir_folder(tmp_path)
    if compress:
        for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
            write(folder / f"{name}.gz", gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    surveyed = survey_of(folder, "pairs", rows_per_piece)
    assert rows_of(surveyed) == [
        {"query": "问题", "document": "三号文档", "query_id": "q2", "document_id": "d3"},
        {"query": "what is tea", "document": "Tea green\u2028leaves", "query_id": "q1", "document_id": "d1"},
        {"query": "what is tea", "document": "三号文档", "query_id": "q1", "document_id": "d3"},
    ]
    assert [piece.num_rows for piece in surveyed.pieces] == {1: [1, 1, 1], 2: [2, 1], 10: [3]}[rows_per_piece]
    assert surveyed.num_rows == 3


def test_pairs_of_another_split(tmp_path: Path) -> None:
    (row,) = read(beir_folder(tmp_path), "pairs", split="test")
    assert (row["query_id"], row["document_id"]) == ("q1", "d2")
    with pytest.raises(InputError, match=r"no .*qrels/dev\.tsv .* input\.split may be one of: test, train"):
        survey_of(tmp_path, "pairs", split="dev")


def test_pairs_fetch_texts_that_lie_far_apart(tmp_path: Path) -> None:
    """Judged lines beyond the distance that one read spans, and out of order."""
    folder = beir_folder(tmp_path)
    documents = [{"_id": f"d{n}", "title": "", "text": f"{n} " + "长" * 500} for n in range(400)]
    write_jsonl(folder / "corpus.jsonl", documents)
    judged = [399, 0, 200, 201, 0]
    write(
        folder / "qrels" / "train.tsv",
        _HEADER + "".join(f"q{1 + i % 2}\td{n}\t1\n" for i, n in enumerate(judged[:4])),
    )
    assert [row["document"] for row in read(folder, "pairs")] == [documents[n]["text"] for n in judged[:4]]


def test_judgements_of_unknown_ids(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    write(
        folder / "qrels" / "train.tsv", _HEADER + "q1\td1\t1\nq1\td9\t1\nq9\td1\t1\nq1\td1\t2\nq1\td2\tgood\n"
    )
    with pytest.raises(InputError, match=r"train\.tsv:6: score 'good' is not a finite number"):
        survey_of(folder, "pairs")
    surveyed, entries = quarantined(folder, "pairs", tmp_path / "q")
    assert {(entry["line"], entry["reason"], entry["raw"]) for entry in entries} == {
        (3, f"corpus-id 'd9' is not in {folder}/corpus.jsonl", "q1\td9\t1"),
        (4, f"query-id 'q9' is not in {folder}/queries.jsonl", "q9\td1\t1"),
        (5, "query-id 'q1' and corpus-id 'd1' are judged 1 in line 2 and 2 here", "q1\td1\t2"),
        (6, "score 'good' is not a finite number", "q1\td2\tgood"),
    }
    assert [row["document_id"] for row in rows_of(surveyed)] == ["d1"]
    assert surveyed.num_rejected == 4


def test_bad_rows_of_the_texts(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    with open(folder / "corpus.jsonl", "ab") as stream:
        stream.write(
            b'{"_id": "d4", "title": "", "text": ""}\n{"text": "no id"}\n{"_id": "d1", "text": "again"}\n'
        )
    with pytest.raises(InputError, match=r"corpus\.jsonl:4: empty text"):
        survey_of(folder, "pairs")
    for kind in ("pairs", "corpus"):
        _, entries = quarantined(folder, kind, tmp_path / "q")  # type: ignore[arg-type]
        assert [(entry["line"], entry["reason"]) for entry in entries] == [
            (4, "empty text"),
            (5, "missing key '_id' or 'id'"),
            (6, f"id 'd1' is already the id of {folder}/corpus.jsonl:1; ids must be unique"),
        ]


def test_what_is_no_beir_folder(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "beir")
    with pytest.raises(InputError, match="gives corpus and pairs records, no scored"):
        survey_of(folder, "scored")
    with pytest.raises(InputError, match="is no folder; check the path"):
        survey_of(folder / "corpus.jsonl", "corpus", format="beir")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"no .*queries\.jsonl \(nor compressed\)"):
        survey_of(folder, "pairs")
    write(folder / "qrels" / "train.tsv", "q1\td1\t1\n")
    with pytest.raises(InputError, match=r"train\.tsv:1: no header; .*query-id<TAB>corpus-id<TAB>score"):
        beir.read_qrels(str(folder), "train")


def test_no_positive_judgement(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    write(folder / "qrels" / "train.tsv", _HEADER + "q1\td1\t0\n")
    with pytest.raises(InputError, match=r"train\.tsv holds no judgement with a score above 0"):
        survey_of(folder, "pairs")
    with pytest.raises(InputError, match="no judgement of split 'train' has a score above 0"):
        read_queries(str(folder), split="train")


def test_qrels_keep_every_score(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    assert beir.read_qrels(str(folder), "train") == {
        "q2": {"d3": 2.0},
        "q1": {"d1": 1.0, "d2": 0.0, "d3": 1.0},
    }
    assert beir.read_queries(str(folder)) == {"q1": "what is tea", "q2": "问题"}


def test_changed_texts_are_noticed(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    surveyed = survey_of(folder, "pairs")
    content = (folder / "corpus.jsonl").read_text(encoding="utf-8")
    write(folder / "corpus.jsonl", content.replace('"d3"', '"d8"'))
    with pytest.raises(
        InputError, match="has changed since it was surveyed: id 'd3' is no longer where it was"
    ):
        rows_of(surveyed)


def test_evaluation_queries_from_beir(tmp_path: Path) -> None:
    queries = read_queries(str(beir_folder(tmp_path)))
    assert (queries.ids, queries.texts) == (["q1"], ["what is tea"])
    assert (queries.relevant, queries.relevant_texts) == ([{"d2": 1.0}], None)
    assert (len(queries), queries.num_without_relevant) == (1, 1)
    train = read_queries(str(tmp_path), "beir", "train")
    assert (train.ids, train.relevant) == (["q1", "q2"], [{"d1": 1.0, "d3": 1.0}, {"d3": 2.0}])


def test_evaluation_queries_need_their_texts_and_unique_ids(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path)
    write(folder / "qrels" / "test.tsv", _HEADER + "q7\td1\t1\n")
    with pytest.raises(InputError, match=r"judge query-id 'q7', which queries\.jsonl does not have"):
        read_queries(str(folder))
    with open(folder / "queries.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"_id": "q1", "text": "again"}))
    with pytest.raises(
        InputError, match=r"queries\.jsonl:3: id 'q1' is already the id of .*queries\.jsonl:1"
    ):
        read_queries(str(folder))


def test_evaluation_queries_from_pairs_group_equal_texts(tmp_path: Path) -> None:
    """The last query counts too, and a query's rows need not follow one another."""
    path = write(tmp_path / "dev.tsv", "a\t1\nb\t2\na\t3\na\t1\nc\t4")
    queries = read_queries(str(path))
    assert queries.ids == ["dev:1", "dev:2", "dev:5"]
    assert queries.texts == ["a", "b", "c"]
    assert queries.relevant_texts == [["1", "3"], ["2"], ["4"]]
    assert queries.relevant is None


def test_evaluation_queries_from_pairs_with_ids(tmp_path: Path) -> None:
    header = "query_id\tquery\tdocument\n"
    path = write(tmp_path / "dev.tsv", header + "7\ta\t1\n7\ta\t2\n8\tb\t1\n")
    assert read_queries(str(path), "pairs").ids == ["7", "8"]
    with pytest.raises(
        InputError, match=r"dev\.tsv:3: query 'a' has query_id '9', but '7' in an earlier row"
    ):
        read_queries(str(write(path, header + "7\ta\t1\n9\ta\t2\n")))
    with pytest.raises(InputError, match="two different queries have one query_id"):
        read_queries(str(write(path, header + "7\ta\t1\n7\tb\t2\n")))
