"""The development data, read whole: counts as its README gives them, and the three rows that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytower.data.pieces import read_piece
from raytower.data.queries import read_queries
from raytower.data.records import RecordKind
from raytower.errors import InputError
from tests.support.data_files import quarantined, survey_of

pytestmark = pytest.mark.shared


@pytest.mark.parametrize(
    ("name", "kind", "num_rows", "first"),
    [
        ("zh_questions/recall/corpus.tsv", "corpus", 406_955, {"id": "corpus:1"}),
        ("zh_questions/recall/train_unsupervised.txt", "lines", 397_824, {"text": "importmarble"}),
        ("zh_questions/recall/train.tsv", "pairs", 54_679, {"document": "这是她的香水。", "query_id": None}),
        ("zh_questions/recall/dev.tsv", "pairs", 4_594, {"document": "'我要开通微粒贷"}),
        ("zh_questions/sort/train_labeled.tsv", "scored", 161_932, {"label": 0.0}),
        ("zh_questions/sort/dev_labeled.tsv", "scored", 6_768, {"label": 1.0}),
        (
            "sentence_similarity/train_pair_1w.json",
            "scored",
            10_000,
            {"query": "找一部小时候的动画片", "label": 1.0},
        ),
        ("csl_disciplines/train.txt", "labelled", 5_916, {"label": "医学##药学"}),
        ("csl_disciplines/dev.txt", "labelled", 946, {}),
        ("csl_disciplines/label.txt", "lines", 67, {"id": "label:1", "text": "军事学##军事学"}),
        ("finance_questions/train.jsonl", "labelled", 22_000, {"text": "天津什么有名", "label": "general"}),
        ("finance_questions/dev.jsonl", "corpus", 4_000, {"id": "dev:1", "label": "general"}),
    ],
)
def test_counts(
    shared_dir: Path, name: str, kind: RecordKind, num_rows: int, first: dict[str, object]
) -> None:
    surveyed = survey_of(shared_dir / "data" / name, kind)
    assert (surveyed.num_rows, surveyed.num_rejected) == (num_rows, 0)
    row = read_piece(surveyed.pieces[0]).slice(0, 1).to_pylist()[0]
    assert row == {**row, **first}


def test_the_three_triples_whose_negative_is_their_document(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "data" / "zh_questions" / "sort" / "train_pairwise.tsv"
    with pytest.raises(InputError, match=r"tsv:3496: negative is the document itself.*on_error: quarantine"):
        survey_of(path, "triples")
    surveyed, entries = quarantined(path, "triples", tmp_path)
    assert (surveyed.num_rows, surveyed.num_rejected) == (18_908, 3)
    assert [entry["line"] for entry in entries] == [3_496, 9_814, 12_851]
    row = read_piece(surveyed.pieces[0]).slice(0, 1).to_pylist()[0]
    assert row["negative"] == "怎样知道手机被窃听"


def test_pieces_give_the_lines_of_the_file(shared_dir: Path) -> None:
    path = shared_dir / "data" / "zh_questions" / "recall" / "corpus.tsv"
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    surveyed = survey_of(path, "corpus", rows_per_piece=50_000)
    texts = [text for piece in surveyed.pieces for text in read_piece(piece)["text"].to_pylist()]
    assert texts == [line.decode() for line in lines]


def test_dev_queries(shared_dir: Path) -> None:
    queries = read_queries(str(shared_dir / "data" / "zh_questions" / "recall" / "dev.tsv"))
    assert len(queries) == 4_000
    assert queries.relevant_texts is not None
    counts = [len(texts) for texts in queries.relevant_texts]
    assert (min(counts), max(counts), sum(counts)) == (1, 11, 4_594)
