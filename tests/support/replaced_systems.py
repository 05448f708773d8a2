"""Small files in the shapes of the five systems that docs/migration.md takes its readers from, and tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import BertModel

from tests.support.tiny_models import tiny_config, tiny_tokenizer
from tests.support.tiny_training import answer, other_answer, question

SYSTEMS = "ABCDE"
_AREAS = "abcd"


class OwnClassifier(nn.Module):
    """A classifier as such users write it: BERT, and a linear layer over its pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(tiny_config(max_position_embeddings=512, initializer_range=0.2))
        self.linear = nn.Linear(32, 2)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.bert(**inputs).pooler_output)
        return logits


def write_system(name: str, folder: Path) -> None:
    """`data/` as the system's users have it, and `models/start`, from which its trainings begin."""
    (folder / "data").mkdir(parents=True)
    torch.manual_seed(0)
    BertModel(tiny_config(max_position_embeddings=512)).save_pretrained(folder / "models" / "start")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder / "models" / "start")
    _FILES[name](folder)


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _path_of(number: int) -> str:
    """A label path of one, two or three levels."""
    area = _AREAS[number % 4]
    return f"{area * 4}##{area}{number % 8}" if number % 4 else area * 4


def _labels_by_retrieval(folder: Path) -> None:
    data = folder / "data"
    _write(data / "label.txt", dict.fromkeys(_path_of(number) for number in range(8)))
    _write(data / "train.txt", (f"{question(number)}\t{_path_of(number)}" for number in range(32)))
    _write(data / "dev.txt", (f"{question(number)}\t{_path_of(number)}" for number in range(32, 40)))
    _write(data / "data.txt", (question(number) for number in range(40, 44)))


def _semantic_recall(folder: Path) -> None:
    data = folder / "data"

    def title(number: int) -> str:
        return f"{answer(number)}, a study; {number} in brief"

    _write(data / "train_unsupervised.csv", (title(number) for number in range(32)))
    _write(data / "train.csv", (f"{question(number)}\t{title(number)}" for number in range(32)))
    _write(data / "dev.csv", (f"{question(number)}\t{title(number)}" for number in range(32, 40)))
    _write(data / "test.csv", (f"{question(number)}\t{title(number)}" for number in range(40, 48)))
    _write(data / "corpus.csv", (title(number) for number in range(60)))


def _sentence_pairs(folder: Path) -> None:
    rows = [
        {
            "sentence1": question(number),
            "sentence2": other_answer(number) if number % 2 else answer(number),
            "label": str(1 - number % 2),
        }
        for number in range(40)
    ]
    _write(folder / "data" / "pairs.json", (json.dumps(row) for row in rows))


def _rankers(folder: Path) -> None:
    data = folder / "data"
    triples = (f"{question(number)}\t{answer(number)}\t{other_answer(number)}" for number in range(32))
    _write(data / "train_pairwise.csv", ["query\ttitle\tneg_title", *triples])

    def judged(numbers: range) -> list[str]:
        return [
            f"{question(number)}\t{text}\t{label}"
            for number in numbers
            for text, label in ((answer(number), 1), (other_answer(number), 0))
        ]

    _write(data / "dev_pairwise.csv", ["query\ttitle\tlabel", *judged(range(32, 40))])
    _write(data / "train.csv", judged(range(32)))
    _write(data / "test.csv", judged(range(40, 48)))
    recalled = (
        f"{question(number)}\t{text}\t{score}"
        for number in range(40, 44)
        for text, score in (
            (other_answer(number), 0.9),
            (answer(number), 0.8),
            (other_answer(number, 2), 0.7),
        )
    )
    _write(data / "recall_result.txt", recalled)


def _classifier_online(folder: Path) -> None:
    data = folder / "data"
    _write(data / "legal.json", (json.dumps({"text": f"legal {question(number)}"}) for number in range(20)))
    _write(data / "other.json", (json.dumps({"text": answer(number)}) for number in range(20)))
    _write(data / "posts.txt", (question(number) for number in range(6)))
    torch.manual_seed(3)
    torch.save(OwnClassifier().state_dict(), folder / "model.pt")


_FILES = {
    "A": _labels_by_retrieval,
    "B": _semantic_recall,
    "C": _sentence_pairs,
    "D": _rankers,
    "E": _classifier_online,
}
