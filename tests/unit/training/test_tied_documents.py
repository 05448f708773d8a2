"""Candidate lists whose best score several documents share, for objectives that take the first one for relevant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytower.config import make_config
from raytower.errors import InputError
from raytower.objectives.config import InBatchNegatives
from raytower.training.columns import judged_pairs, text_columns, without_ties
from raytower.training.config import TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.reranker import plan_train_reranker
from raytower.training.retriever import plan_train_retriever
from tests.support.data_files import write_jsonl

ROWS: dict[str, list[Any]] = {
    "query": ["q0", "q1"],
    "documents": [["a", "b", "c"], ["d", "e"]],
    "scores": [[1.0, 1.0, 0.0], [2.0, -1.0]],
}


def test_documents_as_good_as_the_first_are_no_negatives() -> None:
    rows = without_ties(ROWS)
    assert rows["documents"] == [["a", "c"], ["d", "e"]]
    assert rows["scores"] == [[1.0, 0.0], [2.0, -1.0]]
    assert judged_pairs(rows, 3).list_lengths == [2, 2]
    # The loss of q0 by hand: b is nowhere in it. Both vectors of q0 and b are the same.
    columns = text_columns(rows, 3)
    assert "b" not in columns.present_documents
    queries = torch.eye(2)
    vectors = {"a": [1.0, 0.0], "c": [0.6, 0.8], "d": [0.0, 1.0], "e": [0.8, 0.6]}
    placed = columns.place(torch.tensor([vectors[text] for text in columns.present_documents]))
    loss = InBatchNegatives(scale=1.0)([queries, *placed], columns.targets)
    first = torch.tensor([1.0, 0.6, 0.0, 0.8]).exp()  # a c d e
    second = torch.tensor([1.0, 0.6, 0.0, 0.8]).exp()  # d e a c
    expected = -((first[0] / first.sum()).log() + (second[0] / second.sum()).log()) / 2
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("objective", ["in_batch_negatives", "hardest_negative"])
def test_lists_of_an_encoder(
    objective: str, still_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_train_retriever(
        make_config(TrainRetrieverConfig, _values(still_encoder, tmp_path, [1, 1, 0], objective))
    )
    assert "1 of 2 rows have several documents with the best score" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"rows\.jsonl: the 3 documents of query 'q0' have one score"):
        plan_train_retriever(
            make_config(TrainRetrieverConfig, _values(still_encoder, tmp_path, [0, 0, 0], objective))
        )


@pytest.mark.parametrize("objective", ["listwise_softmax", "pairwise_margin"])
def test_lists_of_a_reranker(
    objective: str, still_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_train_reranker(
        make_config(TrainRerankerConfig, _values(still_encoder, tmp_path, [1, 1, 0], objective))
    )
    assert "1 of 2 rows have several documents with the best score" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"rows\.jsonl: the 3 documents of query 'q0' have one score"):
        plan_train_reranker(
            make_config(TrainRerankerConfig, _values(still_encoder, tmp_path, [0, 0, 0], objective))
        )


def _values(encoder: Path, tmp_path: Path, scores: list[float], objective: str) -> dict[str, Any]:
    rows = [
        {"query": "q0", "documents": ["a", "b", "c"], "scores": scores},
        {"query": "q1", "documents": ["d", "e"], "scores": [2, 1]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "model": str(encoder),
        "train": {"path": str(path), "format": "candidates"},
        "output": str(tmp_path / "out"),
        "objective": objective,
        "batch_size": 2,
        "max_length": 32,
        "workers": {"num": 1},
    }
