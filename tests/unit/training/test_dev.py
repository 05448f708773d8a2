"""Dev measurements: when they are due, when they end training, and dev rows that the training rows give."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.config import make_config
from raytower.data.config import NamedInput
from raytower.data.pieces import Survey, read_piece, survey
from raytower.errors import InputError
from raytower.training.classifier import ClassifierTask
from raytower.training.config import (
    ALONE,
    DevConfig,
    TrainClassifierConfig,
    TrainRerankerConfig,
    TrainRetrieverConfig,
)
from raytower.training.dev_split import _are_among, choose_keys, give_back, set_dev_aside
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from tests.support.tiny_training import (
    TOPICS,
    answer,
    write_candidates,
    write_labelled,
    write_lines,
    write_pairs,
    write_rows,
    write_scored,
    write_triples,
)


def due(num_steps: int, rows_per_step: int, num_rows: int, **settings: float | None) -> list[int]:
    dev = DevConfig.model_validate({"path": "x", "metric": "auc", **settings})
    return [step for step in range(1, num_steps + 1) if dev.is_due(step, rows_per_step, num_rows)]


def test_measurements_are_due_by_steps_or_by_epochs() -> None:
    assert due(450, 8, 1000) == [200, 400]
    assert due(30, 8, 1000, every_steps=12) == [12, 24]
    # 6.25 steps an epoch: the steps that bring the rows seen to 100, 200, 300 and 400.
    assert due(30, 16, 100, every_epochs=1) == [7, 13, 19, 25]
    # 3 of 10 steps; 0.3 × 100 in floating point is not 30.
    assert due(13, 10, 100, every_epochs=0.3) == [3, 6, 9, 12]
    # Oftener than every step is every step.
    assert due(4, 10, 100, every_epochs=0.01) == [1, 2, 3, 4]


def test_without_patience_nothing_stops_training() -> None:
    patient = DevConfig(path="x", metric="auc", patience=None)
    assert not patient.is_over(10_000)
    assert [DevConfig(path="x", metric="auc", patience=2).is_over(stale) for stale in (1, 2)] == [False, True]


def test_each_label_gives_the_rows_nearest_to_its_share() -> None:
    """Label 0 has 10 keys of a row each, label 1 two keys of 3 and 1 rows, label 2 one key."""
    hashes = np.array([*range(10), 20, 20, 20, 21, 30], dtype=np.uint64)
    strata = np.array([0] * 10 + [1] * 4 + [2])
    assert choose_keys(hashes, strata, 0.2).tolist() == [0, 1]
    # 0.5 × 4 rows of label 1: 3 rows are as near as none are; fewer are taken.
    assert choose_keys(hashes, strata, 0.51).tolist() == [0, 1, 2, 3, 4, 20, 30]


def test_keys_are_found_among_sorted_ones() -> None:
    hashes = np.array([3, 0, 9, 5, 2**64 - 1], dtype=np.uint64)
    chosen = np.array([0, 5, 7], dtype=np.uint64)
    assert (
        _are_among(hashes, chosen).tolist()
        == np.isin(hashes, chosen).tolist()
        == [False, True, False, True, False]
    )
    assert _are_among(hashes, chosen[:0]).tolist() == [False] * 5


def split(path: Path, kind: Any, share: float, seed: int = 0) -> tuple[list[Any], list[Any], Survey]:
    whole = survey(NamedInput(path=str(path)), kind, rows_per_piece=7)
    divided = set_dev_aside(whole, share, seed)
    trained, dev = (
        [row for piece in pieces for row in read_piece(piece).to_pylist()]
        for pieces in (divided.pieces, divided.set_aside)
    )
    assert sum(piece.num_rows for piece in divided.pieces) == divided.num_rows == len(trained)
    assert [piece.first_row for piece in divided.pieces] == [
        *accumulate((piece.num_rows for piece in divided.pieces[:-1]), initial=0)
    ]
    rows = [row for piece in whole.pieces for row in read_piece(piece).to_pylist()]
    assert sorted(map(str, trained + dev)) == sorted(map(str, rows))
    return trained, dev, divided


def test_a_query_lies_on_one_side(tmp_path: Path) -> None:
    """Also where it is written in another case, with other spaces, or in wide letters."""
    forms = ("Query {}", "query  {}", "ｑｕｅｒｙ {}")
    lines = [f"{form.format(i)}\tanswer {i} {form}" for form in forms for i in range(100)]
    trained, dev, _ = split(write_rows(tmp_path / "pairs.tsv", lines), "pairs", 0.1)
    assert len(dev) == 30
    numbers = [{row["query"].split()[-1] for row in rows} for rows in (trained, dev)]
    assert not numbers[0] & numbers[1]
    again = split(tmp_path / "pairs.tsv", "pairs", 0.1)[1]
    other = split(tmp_path / "pairs.tsv", "pairs", 0.1, seed=1)[1]
    assert again == dev != other
    # The draw is by the queries, not by where they stand.
    turned = split(write_rows(tmp_path / "turned.tsv", lines[::-1]), "pairs", 0.1)[1]
    assert sorted(map(str, turned)) == sorted(map(str, dev))


def test_every_label_keeps_its_share(tmp_path: Path) -> None:
    lines = [f"text {i}\t{'rare' if i % 10 == 0 else 'common'}" for i in range(400)]
    _, dev, _ = split(write_rows(tmp_path / "train.tsv", lines), "labelled", 0.1)
    assert Counter(row["label"] for row in dev) == {"rare": 4, "common": 36}


def test_every_label_keeps_a_row_that_is_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its only row is nearer to 0.6 of it than none is. A label without a dev row is said."""
    lines = [*(f"text {i}\tcommon" for i in range(20)), "alone\trare", "a\ttwo", "b\ttwo"]
    trained, dev, _ = split(write_rows(tmp_path / "train.tsv", lines), "labelled", 0.6)
    assert Counter(row["label"] for row in trained) == {"common": 8, "rare": 1, "two": 1}
    assert Counter(row["label"] for row in dev) == {"common": 12, "two": 1}
    assert "1 of 3 labels have no dev row: 'rare'" in capfd.readouterr().err


def test_a_text_of_two_labels_is_given_back_to_both() -> None:
    """Stratum 1 has the key 7 alone, which stratum 0 has given away; stratum 2 has given away both of its own."""
    hashes = np.array([3, 7, 9, 7, 4, 5], dtype=np.uint64)
    strata = np.array([0, 0, 0, 1, 2, 2])
    chosen = np.array([3, 4, 5, 7], dtype=np.uint64)
    assert give_back(chosen, hashes, strata).tolist() == [3, 4]


def test_candidates_of_a_row_stay_together(tmp_path: Path) -> None:
    path = write_candidates(tmp_path / "train.jsonl", 40)
    _, dev, _ = split(path, "candidates", 0.25)
    assert len(dev) == 10


@pytest.mark.parametrize(("share", "side"), [(0.01, "dev"), (0.99, "training")])
def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path, share: float, side: str) -> None:
    path = write_rows(tmp_path / "pairs.tsv", [f"query {i % 2}\tanswer {i}" for i in range(20)])
    message = f"dev.share is {share:g}, and of 20 rows with 2 different queries it leaves no {side} rows"
    with pytest.raises(InputError, match=message):
        split(path, "pairs", share)


def prepared(task_class: Any, config_class: Any, model: Path, train: Path, **changes: Any) -> Any:
    values = {
        "model": str(model),
        "train": {"path": str(train)},
        "output": str(train.parent / "out"),
        "batch_size": 8,
        "max_length": 32,
        "workers": {"num": 1},
        **changes,
    }
    config = make_config(config_class, values)
    surveyed = task_class.survey(config)
    return task_class.prepare(config, surveyed), surveyed


@pytest.mark.parametrize("write", [write_pairs, write_triples, write_candidates])
def test_recall_is_measured_of_the_documents_that_queries_are_trained_to_find(
    dummy_encoder_dir: Path, tmp_path: Path, write: Any
) -> None:
    train = write(tmp_path / ("train.jsonl" if write is write_candidates else "train.tsv"), 40)
    task, surveyed = prepared(
        RetrieverTask, TrainRetrieverConfig, dummy_encoder_dir, train, dev={"share": 0.2}
    )
    assert surveyed.num_rows == 32
    dev = task.dev_sets[ALONE].rows
    numbers = [int(query.split()[-1].strip("?")) for query in dev.queries]
    assert len(numbers) == 8
    assert [[dev.corpus[place] for place in places] for places in dev.relevant] == [
        [answer(i)] for i in numbers
    ]


def test_judged_pairs_are_set_aside_too(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_triples(tmp_path / "train.tsv", 40)
    task, _ = prepared(RerankerTask, TrainRerankerConfig, dummy_encoder_dir, train, dev={"share": 0.2})
    assert task.scored_dev.labels == [1.0, 0.0] * 8
    labelled = write_labelled(tmp_path / "labelled.tsv", 64)
    task, _ = prepared(
        ClassifierTask, TrainClassifierConfig, dummy_encoder_dir, labelled, dev={"share": 0.25}
    )
    assert Counter(task.dev_labels) == {f"topics##{topic}": 2 for topic in TOPICS}


@pytest.mark.parametrize(
    ("write", "changes", "words"),
    [
        (write_lines, {"objective": "simcse"}, "the training rows are single texts, to which no document"),
        (write_scored, {"objective": "cosine_embedding"}, "the training rows are scored pairs, of which"),
        (write_pairs, {"dev": {"share": 0.2, "metric": "auc"}}, "dev.share 0.2: all 8 labels are 1"),
        (
            write_lines,
            {"objective": "simcse", "dev": {"share": 0.2, "metric": "auc"}},
            "dev.metric auc needs judged pairs",
        ),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(
    dummy_encoder_dir: Path, tmp_path: Path, write: Any, changes: dict[str, Any], words: str
) -> None:
    train = write(tmp_path / ("train.txt" if write is write_lines else "train.tsv"), 40)
    values = {"dev": {"share": 0.2}, **changes}
    with pytest.raises(InputError, match=words):
        prepared(RetrieverTask, TrainRetrieverConfig, dummy_encoder_dir, train, **values)


@pytest.mark.parametrize(
    ("task_class", "config_class", "name", "train", "dev", "count"),
    [
        (
            RetrieverTask,
            TrainRetrieverConfig,
            "train.tsv",
            [*(f"q {i}\ta {i}" for i in range(8))],
            ["Q  1\tＡ 1", "q 2\ta 3", "q 9\ta 9", "q 4\ta 4"],
            "2 of 4",
        ),
        (
            RerankerTask,
            TrainRerankerConfig,
            "train.tsv",
            ["query\ttitle\tneg_title", *(f"q {i}\ta {i}\tb {i}" for i in range(8))],
            ["query\ttitle\tlabel", "q 1\tA 1\t1", "q 2\tb 2\t0", "q 2\tb 3\t0"],
            "2 of 3",
        ),
        (
            RerankerTask,
            TrainRerankerConfig,
            "train.jsonl",
            [f'{{"query": "q {i}", "documents": ["a {i}", "b {i}"], "scores": [1, 0]}}' for i in range(8)],
            ["query\ttitle\tlabel", "q 1\tA 1\t1", "q 2\tb 2\t0", "q 2\tb 3\t0"],
            "2 of 3",
        ),
        (
            ClassifierTask,
            TrainClassifierConfig,
            "train.tsv",
            [f"text {i}\t{'AB'[i % 2]}" for i in range(8)],
            ["TEXT 1\tA", "text 2\tA", "text 20\tB"],
            "2 of 3",
        ),
    ],
)
def test_dev_rows_that_are_trained_too_are_counted(
    task_class: Any,
    config_class: Any,
    name: str,
    train: list[str],
    dev: list[str],
    count: str,
    dummy_encoder_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / name, train)
    path = write_rows(tmp_path / "dev.tsv", dev)
    prepared(task_class, config_class, dummy_encoder_dir, rows, dev={"path": str(path)})
    assert f"warning: {count} rows of dev.path '{path}' are training rows too" in capsys.readouterr().err
    prepared(task_class, config_class, dummy_encoder_dir, rows, dev={"share": 0.25})
    assert "warning" not in capsys.readouterr().err
