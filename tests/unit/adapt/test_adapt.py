"""`raytower adapt`. Pairs, mining, encoding and indexing run as they are; a training writes a model whose quality the
test decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raytower.adapt.config import AdaptConfig
from raytower.adapt.job import adapt, plan_adapt, rounds_of
from raytower.annotation.config import MineConfig
from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config
from raytower.errors import InputError
from tests.support.stand_in_jobs import stand_in
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker

NUM = 60


class Work:
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.chdir(folder)
        build_tiny_encoder(Path("start"))
        self.rows = [
            {"id": str(n), "title": f"title {spelt(n)}", "text": f"this is the text of {spelt(n * 7)}"}
            for n in range(NUM)
        ]
        Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.right: list[float] = []
        self.ran: list[str] = []
        self.trained_on: list[dict[str, Any]] = []
        self.objective = ""
        pairs = find_reference(COMMANDS["pairs"].run)
        jobs = {"pairs": pairs, "train-retriever": self.train, "evaluate": self.evaluate}
        stand_in(patch, jobs, self.ran.append)

    def train(self, config: Any) -> dict[str, Any]:
        self.trained_on = [json.loads(line) for line in Path(config.train.path).read_text().splitlines()]
        self.objective = config.objective.name
        build_tiny_encoder(Path(config.output), seed=1)
        return {"steps": 1}

    def evaluate(self, config: Any) -> dict[str, Any]:
        """A report in which a share of the dev queries, as the test says, is right."""
        queries = [json.loads(line) for line in Path(config.queries.path).read_text().splitlines()]
        right = round(self.right.pop(0) * len(queries))
        output = Path(config.output)
        output.mkdir(exist_ok=True)
        lines = [
            {"query_id": str(n), "query": row["query"], "metrics": {"recall@1": float(n < right)}}
            for n, row in enumerate(queries)
        ]
        (output / "per_query.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (output / "report.json").write_text("{}")
        return {"recall@1": right / len(queries)}

    def config(self, **changes: Any) -> AdaptConfig:
        values = {
            "model": "start",
            "corpus": "corpus.jsonl",
            "output": "runs",
            "metric": "recall@1",
            "dev_share": 0.4,
            "training": {"batch_size": 8, "workers": {"num": 1}},
            "indexing": {"kind": "flat"},
            "mining": {"num_negatives": 2, "recall_k": 8, "max_score_ratio": None},
        }
        return make_config(AdaptConfig, {**values, **changes})


def spelt(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(tmp_path, monkeypatch)


ROUND_0 = ["encode", "index build", "evaluate"]
ROUND_1 = ["mine", "train-retriever", *ROUND_0]


def test_a_gain_beyond_the_interval_names_the_trained_encoder(work: Work) -> None:
    work.right = [0.25, 0.75]
    result = adapt(work.config())
    assert work.ran == ["pairs"] * 3 + ROUND_0 + ROUND_1
    folder = Path("runs/rounds/round-1").resolve()
    assert (result["adapted"], result["encoder"]) == (True, str(folder / "encoder"))
    assert "better than round 0 on the pseudo-dev set" in result["why"]
    # What was trained on, with mined negatives, holds no text of the pseudo-dev set.
    dev = [json.loads(line) for line in Path("runs/pseudo-dev.jsonl").read_text().splitlines()]
    assert len(dev) + result["pairs"]["pairs"] == NUM
    trained = {row["query"] for row in work.trained_on} | {row["documents"][0] for row in work.trained_on}
    assert not trained & {text for row in dev for text in (row["query"], row["document"])}
    assert result["passages"] == NUM
    assert work.objective == "in_batch_negatives"
    assert json.loads(Path("runs/adapt.json").read_text()) == result
    work.ran.clear()
    assert adapt(work.config())["encoder"] == result["encoder"]
    assert work.ran == []


def test_without_a_gain_the_encoder_that_was_given_stays_and_the_result_says_why(work: Work) -> None:
    work.right = [0.5, 0.5]
    result = adapt(work.config())
    assert (result["adapted"], result["encoder"]) == (False, "start")
    assert result["why"].startswith("the encoder that was given stays")
    assert "+0.0000 [+0.0000, +0.0000], which is no gain beyond chance" in result["why"]


def test_every_output_says_that_its_dev_set_is_pseudo(work: Work) -> None:
    work.right = [0.5, 0.5]
    result = adapt(work.config())
    num = result["dev_pairs"]["pairs"]
    assert result["judged_by"] == (
        f"pseudo-dev: {num} pairs ({num} title) made of the structure of {result['dev_pairs']['documents']} documents "
        "that do not train; nobody has judged them"
    )
    assert result["metric"] == "pseudo-dev recall@1"


def test_a_teacher_scores_candidates_and_the_encoder_follows_it(work: Work) -> None:
    rounds = rounds_of(work.config(teacher="teacher", mining={}))
    assert rounds.mining == {"num_negatives": 4, "mode": "hybrid", "teacher": "teacher"}
    assert rounds.training["objective"] == {"name": "margin_mse"}
    mined = {**rounds.mining, "index": "i", "input": "p", "output": "o.jsonl", "encoder": "e"}
    assert (
        make_config(MineConfig, {**mined, "format": "candidates", "file_type": "jsonl"}).teacher == "teacher"
    )
    kl = rounds_of(work.config(teacher="teacher", training={"objective": {"name": "kl_divergence"}}))
    assert kl.training["objective"] == {"name": "kl_divergence"}
    plain = rounds_of(work.config(mining={}))
    assert plain.mining == {"num_negatives": 4, "mode": "hybrid", "max_score_ratio": 0.95}
    assert "objective" not in plain.training


def test_what_trains_are_candidates_with_the_logits_of_the_teacher(work: Work) -> None:
    """transformers' own classifier gives the same logits."""
    build_tiny_reranker(Path("teacher"), seed=5)
    work.right = [0.5, 0.5]
    adapt(work.config(teacher="teacher"))
    assert work.objective == "margin_mse"
    row = work.trained_on[0]
    assert 2 <= len(row["documents"]) == len(row["scores"]) <= 3
    model = AutoModelForSequenceClassification.from_pretrained("teacher").eval()
    tokens = AutoTokenizer.from_pretrained("teacher")(
        [row["query"]] * len(row["documents"]),
        row["documents"],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(**tokens).logits[:, 0].tolist()
    assert row["scores"] == pytest.approx(logits, abs=1e-5)


def test_all_configs_are_checked_before_anything_runs(work: Work) -> None:
    with pytest.raises(InputError, match="pairs has 'part', which adapt sets itself"):
        work.config(pairs={"part": "all"})
    with pytest.raises(InputError, match="mining has 'teacher', which adapt sets itself"):
        work.config(mining={"teacher": "x"})
    wrong: list[dict[str, Any]] = [{"training": {"batch_sise": 8}}, {"pairs": {"rulez": []}}]
    for changes in wrong:
        with pytest.raises(InputError, match=r"batch_sise|rulez"):
            adapt(work.config(**changes))
    assert work.ran == []
    plan = plan_adapt(work.config())["steps"]
    assert [step["job"] for step in plan] == ["pairs"] * 3 + ROUND_0 + ROUND_1
    assert not any(step["skipped"] for step in plan)
