"""Rounds of training. Jobs run in this process; a training writes a model whose quality the test decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError
from raytower.models.encoder import Encoder
from raytower.refresh.config import RefreshConfig
from raytower.refresh.job import plan_refresh, refresh, round_steps
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import finished_run, run_identity
from tests.support.stand_in_jobs import stand_in
from tests.support.tiny_models import build_tiny_encoder

WORDS = ("river", "stone", "cloud", "tiger", "piano", "lemon", "train", "ocean")


class Killed(BaseException):
    """As if the process had ended."""


class Work:
    """A folder of pairs and a corpus. `qualities` says of each training in turn how many dev queries it gets right."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.chdir(folder)
        build_tiny_encoder(Path("start"))
        texts = [f"{first} {second}" for first in WORDS for second in WORDS]
        Path("corpus.txt").write_text("".join(f"{text}\n" for text in texts))
        Path("train.tsv").write_text("".join(f"{text} ?\t{text}\n" for text in texts[:16]))
        Path("dev.tsv").write_text("".join(f"{text} !\t{text}\n" for text in texts[16:]))
        self.texts = texts
        self.ran: list[str] = []
        self.trained_from: list[str] = []
        self.right: list[int] = []
        self.kill_before: str | None = None
        stand_in(patch, {"train-retriever": self.train, "evaluate": self.evaluate}, self._begin)

    def _begin(self, job: str) -> None:
        if self.kill_before == job:
            self.kill_before = None
            raise Killed
        self.ran.append(job)

    def train(self, config: Any) -> dict[str, Any]:
        rows = [json.loads(line) for line in Path(config.train.path).read_text().splitlines()]
        assert all(row["documents"][0] == row["query"].removesuffix(" ?") for row in rows)
        assert all(len(row["documents"]) > 1 for row in rows)
        self.trained_from.append(config.start)
        identity = run_identity(config, RetrieverTask.survey(config))
        if (done := finished_run(config, identity)) is not None:
            return done
        output = build_tiny_encoder(Path(config.output), seed=len(self.trained_from))
        info = json.loads((output / "raytower.json").read_text())
        (output / "raytower.json").write_text(json.dumps({**info, "run": identity, "figures": {"steps": 1}}))
        return {"steps": 1}

    def evaluate(self, config: Any) -> dict[str, Any]:
        """A report in which as many of the 48 queries are right as the test says."""
        right = self.right.pop(0)
        output = Path(config.output)
        output.mkdir(exist_ok=True)
        lines = [
            {"query_id": str(n), "query": text, "metrics": {"recall@1": float(n < right)}}
            for n, text in enumerate(self.texts[16:])
        ]
        (output / "per_query.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (output / "report.json").write_text("{}")
        return {"recall@1": right / 48}

    def config(self, **changes: Any) -> RefreshConfig:
        values = {
            "model": "start",
            "train": "train.tsv",
            "corpus": "corpus.txt",
            "queries": "dev.tsv",
            "output": "runs",
            "metric": "recall@1",
            "training": {"batch_size": 8, "workers": {"num": 1}},
            "indexing": {"kind": "flat"},
            "mining": {"num_negatives": 2, "recall_k": 8},
        }
        return make_config(RefreshConfig, {**values, **changes})


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(tmp_path, monkeypatch)


ROUND_0 = ["encode", "index build", "evaluate"]
ROUND = ["mine", "train-retriever", *ROUND_0]


def test_rounds_go_on_while_they_are_better(work: Work) -> None:
    """12 of 48 queries, 36, then 37: one more query is chance, whose interval reaches 0."""
    work.right = [12, 36, 37, 48]
    result = refresh(work.config())
    assert work.ran == [*ROUND_0, *ROUND, *ROUND]
    first_round = Path("runs/round-1").resolve()
    assert (result["best"], result["encoder"]) == (1, str(first_round / "encoder"))
    assert result["index"] == str(first_round / "index")
    zero, first, second = result["rounds"]
    assert (zero["value"], zero["difference"], zero["is_better"]) == (0.25, None, False)
    assert (first["best_before"], first["difference"], first["is_better"]) == (0, 0.5, True)
    assert first["low"] > 0
    assert (second["best_before"], second["is_better"]) == (1, False)
    assert second["difference"] == pytest.approx(1 / 48)
    assert result["stopped"] == "1 round in a row no better than round 1 by more than chance"
    assert json.loads(Path("runs/refresh.json").read_text()) == result
    # Each round begins with the weights that were given, unless told otherwise.
    assert work.trained_from == ["start", "start"]
    work.ran.clear()
    again = refresh(work.config())
    assert work.ran == []
    assert again["rounds"] == result["rounds"]


def test_a_training_that_betters_nothing_leaves_the_encoder_that_was_given(work: Work) -> None:
    work.right = [24, 24, 10, 10]
    result = refresh(work.config(patience=2))
    assert (result["best"], result["encoder"], len(result["rounds"])) == (0, "start", 3)


def test_a_round_may_go_on_with_the_weights_before_it(work: Work) -> None:
    work.right = [0, 24, 48]
    result = refresh(work.config(continued=True, rounds=2))
    assert work.trained_from == ["start", str(Path("runs/round-1/encoder").resolve())]
    assert (result["best"], result["stopped"]) == (2, "all 2 rounds ran")


def test_a_killed_job_goes_on_and_a_change_makes_anew_what_it_concerns(work: Work) -> None:
    work.right = [0, 24, 24]
    work.kill_before = "train-retriever"
    with pytest.raises(Killed):
        refresh(work.config(rounds=1))
    assert work.ran == [*ROUND_0, "mine"]
    plan = plan_refresh(work.config(rounds=1))["steps"]
    assert [step["job"] for step in plan if not step["skipped"]] == ROUND[1:]
    work.ran.clear()
    refresh(work.config(rounds=1))
    assert work.ran == ROUND[1:]
    work.ran.clear()
    work.right = [30]
    result = refresh(work.config(rounds=1, mining={"num_negatives": 3, "recall_k": 8}))
    # A job that finds another one's output is called again when that is out of the way.
    assert list(dict.fromkeys(work.ran)) == ROUND
    assert result["rounds"][1]["value"] == pytest.approx(30 / 48)


def test_all_configs_are_checked_before_anything_runs(work: Work) -> None:
    with pytest.raises(InputError, match="training has 'output', which each round sets itself"):
        work.config(training={"output": "elsewhere"})
    with pytest.raises(InputError, match="batch_sise"):
        refresh(work.config(training={"batch_sise": 8}))
    Path("full").mkdir()
    Path("full/mine.txt").write_text("x")
    with pytest.raises(InputError, match="full"):
        refresh(work.config(output="full"))
    assert work.ran == []


def test_nothing_is_mined_for_a_round_that_does_not_come(work: Work) -> None:
    config = work.config()
    assert [step["job"] for step in round_steps(config, 0)] == ROUND_0
    assert [step["job"] for step in round_steps(config, 2)] == ROUND
    mined = round_steps(config, 2)[0]["config"]
    former = Path("runs/round-1").resolve()
    assert (mined["encoder"], mined["index"]) == (str(former / "encoder"), str(former / "index"))
    assert Encoder.load(config.model).dim == 32
    shutil.rmtree("start")
    with pytest.raises(InputError):
        refresh(config)
    assert work.ran == []
