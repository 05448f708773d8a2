"""The worker's loop without Ray: Ray Train's calls answer as for a single worker, and keep what is reported."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch

from raytower.config import WorkersConfig, make_config
from raytower.errors import InputError
from raytower.models.text_classifier import TextClassifier
from raytower.storage import Location, writer_lease
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRetrieverConfig
from raytower.training.loop import train_worker
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import (
    _leave_checkpoints,
    _make_plan,
    _make_room_for_checkpoints,
    _num_to_keep,
    fit,
)
from tests.support.tensorboard_events import read_scalars
from tests.support.tiny_models import build_tiny_encoder
from tests.support.tiny_training import batches_of, retriever_config, write_labelled, write_pairs


def _kept_checkpoints_are_left(
    reported: list[tuple[Any, dict[str, Any]]],
    num_left: int | None,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All of a run, the last two, or none, beside its output; those of another run are put aside, and said to be."""
    # Ray gives the best first where there is a metric.
    result: Any = SimpleNamespace(best_checkpoints=[reported[2], reported[0], reported[1]])
    output = Location.of(folder / "out")
    _leave_checkpoints(result, num_left, output, "a")
    kept = sorted((folder / "out.checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-12", "step-4", "step-8"]
    assert all(TextClassifier.load(path).labels[0] == "topics##a" for path in kept)
    _leave_checkpoints(result, 2, Location.of(folder / "last"), "a")
    assert sorted(path.name for path in (folder / "last.checkpoints").iterdir()) == ["step-12", "step-8"]
    _leave_checkpoints(result, 0, Location.of(folder / "none"), "a")
    assert not (folder / "none.checkpoints").exists()
    # They stay where the run that made them goes on, and make room for those of another, whose steps are fewer.
    _make_room_for_checkpoints(output, "a")
    assert len(list((folder / "out.checkpoints").iterdir())) == 3
    _make_room_for_checkpoints(output, "b")
    _leave_checkpoints(result, 1, output, "b")
    assert [path.name for path in (folder / "out.checkpoints").iterdir()] == ["step-12"]
    former = folder / ".out.checkpoints.former-1"
    assert sorted(path.name for path in former.iterdir()) == ["step-12", "step-4", "step-8"]
    assert TextClassifier.load(former / "step-12").labels[0] == "topics##a"
    assert str(former) in capfd.readouterr().err


def test_measurements_by_epochs_accuracy_and_kept_checkpoints(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """64 rows at 16 a step: 12 steps are 3 epochs, measured after each; no value ends the run."""
    train = write_labelled(tmp_path / "train.tsv", 64)
    values = {
        "model": str(still_encoder),
        "train": str(train),
        "output": str(tmp_path / "out"),
        "batch_size": 16,
        "max_length": 32,
        "epochs": 3,
        "dtype": "float32",
        "optimizer": {"lr": 1e-9},
        "log_every_steps": 4,
        "dev": {"path": str(train), "every_epochs": 1, "patience": None},
        "keep_checkpoints": "all",
        "workers": {"num": 1},
    }
    config = make_config(TrainClassifierConfig, values)
    surveyed = ClassifierTask.survey(config)
    failure_file = Location.of(tmp_path / "failure.json")
    task = ClassifierTask.prepare(config, surveyed)
    plan = _make_plan(config, surveyed, task, WorkersConfig(num=1), failure_file)
    reported: list[tuple[Any, dict[str, Any]]] = []

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        folder = tmp_path / f"checkpoint{len(reported)}"
        shutil.copytree(checkpoint.path, folder)
        reported.append((ray.train.Checkpoint.from_directory(str(folder)), metrics))

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda consistency_mode: reported)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        "raytower.training.loop.stream_batches", lambda *_, **__: batches_of(surveyed, config)
    )
    outcome = train_worker({"plan": plan})
    assert [row["step"] for row in outcome["history"]] == [4, 8, 12]
    assert [row["step"] for row in outcome["curve"]] == [4, 8, 12]
    logged = read_scalars(tmp_path / "out.tensorboard")
    assert logged["train/accuracy"] == pytest.approx(
        {row["step"]: row["accuracy"] for row in outcome["curve"]}, rel=1e-5
    )
    # All three measure the same; the first is the best, whichever of them Ray keeps.
    ranks = [metrics["accuracy"] for _, metrics in reported]
    assert len({row["accuracy"] for row in outcome["history"]}) == 1
    assert ranks[0] == outcome["best"] > ranks[1] == ranks[2]
    _kept_checkpoints_are_left(reported, config.num_left_checkpoints, tmp_path, capfd)


@pytest.mark.parametrize(
    ("given", "left", "kept_with_dev", "kept_without"),
    [(3, 0, 3, 3), ("all", None, None, None), ("last 3", 3, None, 3)],
)
def test_which_checkpoints_are_kept_and_left(
    given: int | str, left: int | None, kept_with_dev: int | None, kept_without: int | None
) -> None:
    config = make_config(
        TrainClassifierConfig, {"model": "m", "train": "t", "output": "o", "keep_checkpoints": given}
    )
    assert config.num_left_checkpoints == left
    assert [_num_to_keep(config, has_dev) for has_dev in (True, False)] == [kept_with_dev, kept_without]


def test_other_words_for_kept_checkpoints_are_refused() -> None:
    with pytest.raises(InputError, match=r"keep_checkpoints is 'last 0': give all.*'last 3'"):
        make_config(
            TrainClassifierConfig, {"model": "m", "train": "t", "output": "o", "keep_checkpoints": "last 0"}
        )


def test_a_run_that_goes_on_has_the_layer_into_the_teachers_space(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published directory lacks it, and a checkpoint keeps it: steps 3 and 4 are as without the interruption."""
    train = write_pairs(tmp_path / "train.tsv", 64)
    values = {
        "model": str(still_encoder),
        "train": str(train),
        "output": str(tmp_path / "out"),
        "objective": "embedding_distillation",
        "teacher": str(build_tiny_encoder(tmp_path / "teacher", 3, 12)),
        "batch_size": 16,
        "max_length": 32,
        "dtype": "float32",
        "optimizer": {"lr": 1e-2},
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
        "workers": {"num": 1},
    }
    config = make_config(TrainRetrieverConfig, values)
    surveyed = RetrieverTask.survey(config)
    failure_file = Location.of(tmp_path / "failure.json")
    reported: list[Any] = []

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        folder = tmp_path / f"checkpoint{len(reported)}"
        shutil.copytree(checkpoint.path, folder)
        reported.append(ray.train.Checkpoint.from_directory(str(folder)))

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda consistency_mode: reported)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        "raytower.training.loop.stream_batches",
        lambda stream, skipped, *_: (rows for rows in islice(batches_of(surveyed, config), skipped, None)),
    )
    curves = []
    for checkpoint in (lambda: None, lambda: reported[0]):
        monkeypatch.setattr(ray.train, "get_checkpoint", checkpoint)
        task = RetrieverTask.prepare(config, surveyed)
        plan = _make_plan(config, surveyed, task, WorkersConfig(num=1), failure_file)
        curves.append(train_worker({"plan": plan})["curve"])
    assert [row["step"] for row in curves[0]] == [1, 2, 3, 4]
    assert curves[0][0]["loss"] > curves[0][3]["loss"] + 0.05
    for whole, continued in zip(*curves, strict=True):
        assert continued["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_a_second_training_with_one_output_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    """They shared their checkpoints, or the one that ended last replaced what the other had published."""
    config = retriever_config(still_encoder, write_pairs(tmp_path / "pairs.tsv", 16), tmp_path / "out")
    lock = Location.of(tmp_path / ".out.train.lock")
    said = r"is being trained by another job: .* is held by the first .* choose another output"
    with writer_lease(lock, owner="the first"), pytest.raises(InputError, match=said):
        fit(RetrieverTask, config)
