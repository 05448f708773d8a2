"""Labels of the same parent as hard negatives of labelled rows, and labels that are nobody's negative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytower.config import make_config
from raytower.errors import InputError
from raytower.objectives.config import InBatchNegatives
from raytower.objectives.in_batch_negatives import in_batch_negatives
from raytower.training.columns import text_columns
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import RetrieverTask, plan_train_retriever
from raytower.training.sibling_labels import draw_siblings, siblings_of

LABELS = ["A##B", "A##C", "A##D", "E##F", "A", "E##G##H"]


def test_siblings_have_one_parent() -> None:
    assert siblings_of([*LABELS, "A##B"]) == {
        "A##B": ["A##C", "A##D"],
        "A##C": ["A##B", "A##D"],
        "A##D": ["A##B", "A##C"],
        "E##F": [],
        "A": [],  # it is above A##B, and not beside it
        "E##G##H": [],
    }
    # Labels without levels are the root's.
    assert siblings_of(["x", "y", "z"])["y"] == ["x", "z"]


def test_what_a_text_gets_depends_on_the_seed_and_the_text_alone() -> None:
    siblings = siblings_of([f"A##{number}" for number in range(20)])
    texts = [f"text {number}" for number in range(40)]
    drawn = draw_siblings(texts, ["A##3"] * 40, siblings, 2, seed=5)
    assert len(drawn) == 2
    alone = [draw_siblings([text], ["A##3"], siblings, 2, seed=5) for text in texts]
    assert [[column[0] for column in own] for own in alone] == [list(row) for row in zip(*drawn, strict=True)]
    pairs = list(zip(*drawn, strict=True))
    assert all(first != second and "A##3" not in (first, second) for first, second in pairs)
    assert len({label for pair in pairs for label in pair}) > 15  # together the texts meet nearly all 19
    assert draw_siblings(["t"], ["A##3"], siblings, 2, seed=6) != draw_siblings(
        ["t"], ["A##3"], siblings, 2, seed=5
    )


def test_a_label_with_fewer_siblings_has_none_in_the_last_columns() -> None:
    siblings = siblings_of(LABELS)
    first, second, third = draw_siblings(["t", "u"], ["A##B", "E##F"], siblings, 3, seed=0)
    assert {first[0], second[0]} == {"A##C", "A##D"}
    assert (third[0], first[1], second[1]) == (None, None, None)


def test_a_sibling_is_no_negative_of_the_rows_that_it_is_right_for() -> None:
    """Rows of A##B and A##C, each with the other as its hard negative: the loss by hand, over one negative each."""
    rows = {"text": ["one", "two"], "label": ["A##B", "A##C"]}
    columns = text_columns(rows, None, [["A##C", "A##B"]])
    assert [list(column) for column in columns.documents] == [["A##B", "A##C"], ["A##C", "A##B"]]
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b, c = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    settings = InBatchNegatives(scale=1.0)
    loss = in_batch_negatives(settings, [queries, torch.stack([b, c]), torch.stack([c, b])], columns.targets)
    # Of row 0: its own label .8; A##C stands twice, as the other row's label and as its own negative: .6 and .6; its
    # label A##B in the other row's negatives is known to be right. Row 1 is its mirror image.
    own, other = torch.tensor(0.8).exp(), torch.tensor(0.6).exp()
    assert float(loss) == pytest.approx(float(-(own / (own + 2 * other)).log()))


def test_two_texts_of_one_label_are_never_negatives() -> None:
    """Also where texts are compared with texts (query_query): the third row alone is a negative of the first two."""
    rows = {"text": ["one", "two", "three"], "label": ["A", "A", "B"]}
    columns = text_columns(rows)
    queries = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    documents = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    settings = InBatchNegatives(scale=1.0, more_negatives=["query_query"])
    loss = in_batch_negatives(settings, [queries, documents], columns.targets)
    document_QD, query_QQ = (queries @ documents.T).exp(), (queries @ queries.T).exp()
    expected = 0.0
    for row, negatives in ((0, [2]), (1, [2]), (2, [0, 1])):
        own = document_QD[row, row]
        others = sum(document_QD[row, other] + query_QQ[row, other] for other in negatives)
        expected -= float((own / (own + others)).log()) / 3
    assert float(loss) == pytest.approx(expected)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"text {n}\t{LABELS[n % 4]}\n" for n in range(16)))
    return path


def _config(encoder: Path, train: Any, tmp_path: Path, **more: Any) -> TrainRetrieverConfig:
    values = {"model": str(encoder), "output": str(tmp_path / "out"), "batch_size": 4, "max_length": 16}
    return make_config(TrainRetrieverConfig, {**values, "train": train, **more})


def test_a_training_gives_each_row_its_siblings(
    dummy_encoder_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    train = {"path": str(labelled), "format": "labelled", "sibling_labels": 1}
    config = _config(dummy_encoder_dir, train, tmp_path)
    task = RetrieverTask.prepare(config, RetrieverTask.survey(config))
    assert task.siblings["A##B"] == ["A##C", "A##D"]
    assert task.set_of({"text": []}).siblings == task.siblings


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("a\tb\nc\td\ne\tf\ng\th\n", {"format": "pairs"}, "these rows have no labels"),
        ("a\tA\nb\tA##B\nc\tA\nd\tA##B\n", {"format": "labelled"}, "no two of the 2 labels have one parent"),
    ],
)
def test_rows_without_siblings_are_refused(
    dummy_encoder_dir: Path, tmp_path: Path, rows: str, more: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.tsv").write_text(rows)
    train = {"path": str(tmp_path / "rows.tsv"), "sibling_labels": 1, **more}
    with pytest.raises(InputError, match=message):
        plan_train_retriever(_config(dummy_encoder_dir, train, tmp_path))


def test_another_objective_takes_no_siblings(dummy_encoder_dir: Path, labelled: Path, tmp_path: Path) -> None:
    train = {"path": str(labelled), "format": "labelled", "sibling_labels": 1}
    with pytest.raises(InputError, match="objective hardest_negative takes no more negatives"):
        plan_train_retriever(
            _config(dummy_encoder_dir, train, tmp_path, objective={"name": "hardest_negative"})
        )


def test_a_run_without_siblings_is_known_as_before(
    dummy_encoder_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    config = _config(dummy_encoder_dir, {"path": str(labelled), "format": "labelled"}, tmp_path)
    assert "sibling_labels" not in config.model_dump(mode="json")["train"]
