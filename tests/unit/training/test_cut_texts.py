"""The share of training texts that max_length cuts: counted by the tokenizer's own call, and said before training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raytower.config import make_config
from raytower.data.config import NamedInput
from raytower.data.pieces import survey
from raytower.errors import InputError
from raytower.models.tokenising import tokenise
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.cut_texts import cut_shares, spaced_rows
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from tests.support.tiny_training import write_lines, write_rows

SHORT, LONG = "a b", "a b c a b c a b c a b c"


def test_shares_are_those_of_the_tokenizers_own_call(dummy_encoder_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dummy_encoder_dir)
    texts = ["a" * length + " b" * length for length in range(1, 30)]
    others = [*reversed(texts)]
    tokens = [len(tokenizer(text).input_ids) for text in texts]
    pairs = [len(tokenizer(*pair).input_ids) for pair in zip(texts, others, strict=True)]
    for limit in (3, *sorted({*tokens, *pairs})):
        if limit <= 3:
            continue
        shares = cut_shares(partial(tokenise, tokenizer), {"text": [texts], "pair": [texts, others]}, limit)
        assert shares == {
            "text": pytest.approx(sum(count > limit for count in tokens) / 29),
            "pair": pytest.approx(sum(count > limit for count in pairs) / 29),
        }


def test_a_length_without_room_is_named_as_given(dummy_encoder_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dummy_encoder_dir)
    with pytest.raises(InputError, match="max_length is 2, and this tokenizer puts 2 special tokens"):
        cut_shares(partial(tokenise, tokenizer), {"text": [["a"]]}, 2)


def test_the_sample_is_spread_over_the_whole_input(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", 100)
    surveyed = survey(NamedInput(path=str(path)), "lines", rows_per_piece=10)
    # Of pieces 0 to 9 those in the middle of each quarter: 1, 3, 6 and 8; of each the rows 0, 3 and 6.
    texts = spaced_rows(surveyed, 12)["text"]
    assert [int(text.split()[-1].strip("?")) for text in texts] == [
        *(10, 13, 16),
        *(30, 33, 36),
        *(60, 63, 66),
        *(80, 83, 86),
    ]
    # Where a few pieces hold less than that, more are read.
    assert len(spaced_rows(surveyed, 40)["text"]) == 40
    assert len(spaced_rows(surveyed, 60)["text"]) == 60
    assert len(spaced_rows(surveyed, 1000)["text"]) == 100


CASES: list[tuple[Any, Any, str, list[str], str]] = [
    (
        RetrieverTask,
        TrainRetrieverConfig,
        "train.tsv",
        [
            "query\ttitle\tneg_title",
            f"{SHORT}\t{LONG}\tb",
            f"b\ta\t{LONG}",
            f"c\t{SHORT}\tc",
            f"a\tb\t{SHORT}",
        ],
        "query 0.0%, document 25.0%, negative 25.0%",
    ),
    (
        RetrieverTask,
        TrainRetrieverConfig,
        "train.jsonl",
        [
            f'{{"query": "{word}", "documents": ["{word}", "{LONG}"], "scores": [1, 0]}}'
            for word in ("a", "b", "c", "a b")
        ],
        "query 0.0%, documents 50.0%",
    ),
    (
        RerankerTask,
        TrainRerankerConfig,
        "train.tsv",
        ["query\ttitle\tlabel", f"{SHORT}\ta\t1", f"b\t{LONG}\t0", f"{LONG}\tc\t0", "a\tb\t1"],
        "pair of query and document 50.0%",
    ),
    (
        ClassifierTask,
        TrainClassifierConfig,
        "train.tsv",
        [f"{SHORT}\tA", f"{LONG}\tB", "a\tA", "b\tB"],
        "text 25.0%",
    ),
]


@pytest.mark.parametrize(("task_class", "config_class", "name", "rows", "words"), CASES)
def test_the_share_cut_is_said_before_training(
    task_class: Any,
    config_class: Any,
    name: str,
    rows: list[str],
    words: str,
    dummy_encoder_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write_rows(tmp_path / name, rows))},
        "output": str(tmp_path / "out"),
        "batch_size": 4,
        "max_length": 12,
        "workers": {"num": 1},
    }
    config = make_config(config_class, values)
    task_class.prepare(config, task_class.survey(config))
    said = capsys.readouterr().err
    assert f"max_length 12 cuts, in a sample of 4 rows: {words}; raise max_length" in said


def test_a_prefix_takes_room_too(
    dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write_rows(tmp_path / "train.tsv", [f"a {i}\tb {i}" for i in range(4)]))},
        "output": str(tmp_path / "out"),
        "batch_size": 4,
        "max_length": 12,
        "query_prefix": LONG,
        "workers": {"num": 1},
    }
    config = make_config(TrainRetrieverConfig, values)
    RetrieverTask.prepare(config, RetrieverTask.survey(config))
    assert "query 100.0%, document 0.0%" in capsys.readouterr().err
