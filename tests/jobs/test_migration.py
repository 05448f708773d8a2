"""docs/migration.md: what each system's users type, on small files of their shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from raytower.models.text_classifier import TextClassifier
from tests.support.replaced_systems import SYSTEMS, OwnClassifier, write_system
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker, tiny_config, tiny_tokenizer
from tests.support.typed_commands import Line, Typist, output_of, read_lines, without_ray

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")


def stand_in(line: Line) -> None:
    """A tiny random model where a training would put its own."""
    place = Path(output_of(line))
    if line.text.startswith("raytower train-retriever"):
        build_tiny_encoder(place)
    elif line.text.startswith("raytower train-reranker"):
        build_tiny_reranker(place, num_labels=1 + ("cross_entropy" in line.text))
        if "--labels" in line.text:
            _name_classes(place, ["different", "same"])
    else:
        labels = Path("data/label.txt")
        names = labels.read_text().split() if labels.exists() else ["legal", "other"]
        model = BertForSequenceClassification(
            tiny_config(
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
                problem_type="single_label_classification",
            )
        )
        TextClassifier(model, tiny_tokenizer(), max_length=64).eval().save(place)


def _name_classes(place: Path, names: list[str]) -> None:
    config = json.loads((place / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    (place / "config.json").write_text(json.dumps(config))


def type_all(name: str, typist: Typist, folder: Path, train: Callable[[Line], None]) -> None:
    write_system(name, folder)
    lines = read_lines(PAGE, f"{name}. ")
    assert sum(line.is_training for line in lines) >= 1
    with without_ray():
        for line in lines:
            train(line) if line.is_training else typist.type(line)


def rows_of(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]


def check_outcome(name: str, typist: Typist, folder: Path) -> None:
    """The files that the system wrote, in its shapes."""
    runs = folder / "runs"
    if name == "A":
        labels = {row[0] for row in rows_of(folder / "data" / "label.txt")}
        recalled = rows_of(runs / "recall_result.txt")
        assert len(recalled) == 4 * len(labels)  # all labels, of which there are fewer than 10
        assert {row[1] for row in recalled} == labels
        assert [row[0] for row in recalled[:: len(labels)]] == [
            row[0] for row in rows_of(folder / "data" / "data.txt")
        ]
        (figures,) = map(json.loads, (runs / "results.jsonl").read_text().splitlines())
        assert {"accuracy", "hit@5", "hit@10", "hit@20"} <= set(figures)
        for file in ("votes.tsv", "classified.tsv"):
            assert {row[1] for row in rows_of(runs / file)[1:]} <= labels
    elif name == "B":
        titles = {row[0] for row in rows_of(folder / "data" / "corpus.csv")}
        recalled = rows_of(runs / "recall_result.txt")
        assert len(recalled) == 8 * 50
        assert {row[1] for row in recalled} <= titles
        judged = dict(rows_of(folder / "data" / "test.csv"))
        first = {row[0]: row[1] for row in reversed(recalled)}
        report = json.loads((runs / "report" / "report.json").read_text())
        right = np.mean([first[query] == title for query, title in judged.items()])
        assert report["recall@1"] == pytest.approx(right)
        assert rows_of(runs / "negatives.tsv")[0] == ["query", "title", "neg_title"]
        cosines = [float(row[0]) for row in rows_of(runs / "cosines.txt")]
        of_graph = [float(row[2]) for row in rows_of(runs / "similarity-onnx.tsv")[1:]]
        assert of_graph == pytest.approx(cosines, abs=2e-6)
        assert [hit["text"] in titles for hit in typist.names["hits"]] == [True] * 3
    elif name == "C":
        assert -1 <= typist.names["cosine"] <= 1
        assert len(typist.names["vectors"]) == 2
        assert typist.names["judged"]["label"] in ("different", "same")
        for file in ("one-tower.tsv", "regression.tsv", "two-towers.tsv"):
            rows = rows_of(runs / file)
            assert rows[0] == ["query", "title", "label", "score"]
            assert len(rows) == 41
    elif name == "D":
        ranked = [json.loads(line) for line in (runs / "ranked.jsonl").read_text().splitlines()]
        candidates = rows_of(folder / "data" / "recall_result.txt")
        assert {(row["query"], row["text"]) for row in ranked} == {tuple(row[:2]) for row in candidates}
        for first in range(0, 12, 3):
            scores = [row["score"] for row in ranked[first : first + 3]]
            assert scores == sorted(scores, reverse=True)
            assert 0 <= scores[-1] <= scores[0] <= 1
        by_graph = [float(row[2]) for row in rows_of(runs / "ranked.tsv")]
        assert by_graph == pytest.approx([row["score"] for row in ranked], abs=1e-5)
    else:
        posts = [row[0] for row in rows_of(folder / "data" / "posts.txt")]
        for file in ("posts.tsv", "why.tsv", "former.tsv"):
            assert [row[0] for row in rows_of(runs / file)[1:]] == posts
        check_former_model(folder, posts)


def check_former_model(folder: Path, posts: list[str]) -> None:
    """The labels and scores of model.pt are those that its own class gives."""
    model = OwnClassifier().eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    inputs = tiny_tokenizer()(posts, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).softmax(1).max(1)
    rows = rows_of(folder / "runs" / "former.tsv")[1:]
    assert [row[1] for row in rows] == [("other", "legal")[number] for number in best.indices.tolist()]
    assert [float(row[2]) for row in rows] == pytest.approx(best.values.tolist(), abs=2e-6)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_systems_lines_on_its_own_files(name: str, typist: Typist, tmp_path: Path) -> None:
    """Trainings are checked and planned; tiny models stand for what they would make."""

    def plan(line: Line) -> None:
        typist.plan(line)
        stand_in(line)

    type_all(name, typist, tmp_path, plan)
    check_outcome(name, typist, tmp_path)


@pytest.mark.processes
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_systems_trainings(name: str, typist: Typist, tmp_path: Path) -> None:
    """Run as they are typed; what follows them is run above."""
    write_system(name, tmp_path)
    for line in read_lines(PAGE, f"{name}. "):
        if line.is_training:
            typist.type(line)
            assert (
                json.loads((tmp_path / output_of(line) / "raytower.json").read_text())["figures"]["steps"] > 0
            )
        elif line.text.startswith("cp data/"):
            typist.type(line)
    if name == "B":
        assert (tmp_path / "runs" / "encoder.checkpoints" / "step-2" / "config.json").is_file()


def test_a_line_that_fails_is_named(typist: Typist) -> None:
    with pytest.raises(AssertionError, match="line 7 failed"):
        typist.type(Line(7, "raytower classify --encoder none --index none --input none --output x.tsv"))
    with pytest.raises(AssertionError, match="line 8 failed"):
        typist.type(Line(8, "cut -f 1 none"))
