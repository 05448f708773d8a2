"""W&B and MLflow beside TensorBoard: what their clients are asked for, and that their failures end no run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError, MissingExtraError
from raytower.storage import Location
from raytower.training.config import TrainRetrieverConfig
from raytower.training.run_log import RunLog
from raytower.training.trackers import (
    MlflowRun,
    PatientTracker,
    TrackedRun,
    WandbRun,
    check_trackers,
    tracked_run,
)
from tests.support.tensorboard_events import read_scalars


def config_of(output: str | Path, **changes: Any) -> TrainRetrieverConfig:
    return make_config(
        TrainRetrieverConfig, {"model": "m", "train": "t.tsv", "output": str(output), **changes}
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it was afterwards: the clients are told things by it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class TestPlan:
    def test_a_run_has_one_key_whatever_may_change_when_it_continues(self, tmp_path: Path) -> None:
        config = config_of(tmp_path / "out", wandb="questions")
        run = tracked_run(config, "identity")
        again = config_of(tmp_path / "out", wandb={"mode": "online"}, log_every_steps=3)
        assert tracked_run(again, "identity").key == run.key
        assert tracked_run(again, "identity").settings == run.settings
        assert tracked_run(config, "other").key != run.key
        assert tracked_run(config_of(tmp_path / "copy"), "identity").key != run.key
        assert run.name == "out"
        assert run.settings["optimizer.lr"] == 2e-5
        assert run.settings["train.path"] == "t.tsv"
        assert not [name for name in run.settings if name.startswith(("wandb", "mlflow", "output"))]

    def test_files_lie_beside_the_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        run = tracked_run(config_of("runs/out", wandb={}, mlflow={}), "identity")
        assert run.wandb is not None
        assert run.wandb.dir == f"{tmp_path}/runs/out.wandb"
        assert run.wandb.mode == "offline"
        assert run.mlflow is not None
        assert run.mlflow.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
        given = tracked_run(
            config_of("out", wandb={"dir": "there"}, mlflow={"tracking_uri": "sqlite:///runs.db"}), "identity"
        )
        assert given.wandb is not None
        assert given.wandb.dir == f"{tmp_path}/there"
        assert given.mlflow is not None
        assert given.mlflow.tracking_uri == f"sqlite:///{tmp_path}/runs.db"

    @pytest.mark.parametrize(("key", "said"), [("wandb", "wandb.dir"), ("mlflow", "mlflow.tracking_uri")])
    def test_remote_storage_is_refused(self, key: str, said: str) -> None:
        config = config_of("gs://bucket/out", **{key: {}})
        with pytest.raises(InputError, match=f"is no local place, .*set {said} to"):
            tracked_run(config, "identity")

    @pytest.mark.parametrize(
        ("uri", "said"),
        [
            ("https://me:secret@host", "holds a user or a password.*MLFLOW_TRACKING_USERNAME"),
            (
                "postgresql://host/db",
                "is 'postgresql://host/db'; give sqlite:///FILE, or the http:// or https://",
            ),
            ("mlruns", "is 'mlruns'; give sqlite"),
        ],
    )
    def test_other_stores_of_mlflow_are_refused(self, uri: str, said: str) -> None:
        with pytest.raises(InputError, match=said) as refused:
            config_of("out", mlflow={"tracking_uri": uri})
        assert "secret" not in str(refused.value)

    @pytest.mark.parametrize("name", ["wandb", "mlflow"])
    def test_a_missing_client_is_refused_before_any_work(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        check_trackers(config_of("out"))
        with pytest.raises(MissingExtraError, match=rf"{name} needs.*pip install 'raytower\[{name}\]'"):
            check_trackers(config_of("out", **{name: {}}))


class FakeTracker:
    """Stores what it is sent; fails while `is_down`."""

    def __init__(self) -> None:
        self.points: dict[int, Mapping[str, float]] = {}
        self.opened = 0
        self.ended: list[bool] = []
        self.is_down = False

    def open(self) -> FakeTracker:
        self._answer()
        self.opened += 1
        return self

    def send(self, points: Any) -> None:
        self._answer()
        self.points |= dict(points)

    def close(self, failed: bool) -> None:
        self._answer()
        self.ended.append(failed)

    def _answer(self) -> None:
        if self.is_down:
            raise ConnectionError("no route\nto host")


class TestPatience:
    def test_what_is_logged_while_a_tracker_is_down_is_sent_when_it_answers(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake = FakeTracker()
        tracker = PatientTracker("W&B", fake.open, is_new=True)
        tracker.write(1, {"loss": 1.0})
        fake.is_down = True
        tracker.write(2, {"loss": 0.5})
        tracker.write(3, {"loss": 0.25})
        tracker.send()
        assert fake.points.keys() == {1}
        fake.is_down = False
        tracker.write(4, {"loss": 0.125})
        assert fake.points.keys() == {1}, (
            "only a checkpoint tries again, so that no step waits for a dead server"
        )
        tracker.send()
        assert fake.points == {1: {"loss": 1.0}, 2: {"loss": 0.5}, 3: {"loss": 0.25}, 4: {"loss": 0.125}}
        tracker.close(failed=False)
        assert (fake.opened, fake.ended) == (1, [False])
        said = capsys.readouterr().err
        assert said.count("warning") == 1
        assert "warning: W&B failed: ConnectionError: no route to host; training goes on" in said
        assert "W&B answers again" in said

    def test_what_never_arrives_is_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        fake = FakeTracker()
        tracker = PatientTracker("MLflow", fake.open, is_new=True)
        fake.is_down = True
        tracker.write(10, {"loss": 1.0})
        tracker.write(20, {"loss": 1.0})
        tracker.close(failed=True)
        said = capsys.readouterr().err
        assert "warning: MLflow lacks the values of 2 logged steps, from step 10 on; TensorBoard's" in said
        assert "warning: MLflow was not told that the run has ended: ConnectionError" in said

    def test_a_new_run_is_refused_where_nothing_can_be_written(self) -> None:
        fake = FakeTracker()
        fake.is_down = True
        with pytest.raises(
            InputError, match=r"MLflow cannot be written to: .*no route to host.*remove mlflow"
        ):
            PatientTracker("MLflow", fake.open, is_new=True)

    def test_a_run_that_continues_waits_for_its_tracker(self) -> None:
        fake = FakeTracker()
        fake.is_down = True
        tracker = PatientTracker("MLflow", fake.open, is_new=False)
        tracker.write(11, {"loss": 1.0})
        fake.is_down = False
        tracker.send()
        assert (fake.opened, fake.points) == (1, {11: {"loss": 1.0}})


class FakeWandb(ModuleType):
    """What of W&B's module is used; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.ended: list[int] = []
        self.held = False
        self.is_down = False
        self.Settings = SimpleNamespace

    def teardown(self) -> None:
        self.held = False

    def init(self, **given: Any) -> Any:
        if self.held:
            raise RuntimeError("run ID is in use")  # as of a run that could not be opened before
        self.begun.append(given)
        if self.is_down:
            self.held = True
            raise TimeoutError("connection refused")
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=self.logged.append,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


def test_what_wandb_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    config = config_of(tmp_path / "out", wandb={"project": "questions", "entity": "us"})
    run = tracked_run(config, "identity")
    for first_step in (1, 11):
        log = RunLog(Location.of(tmp_path / "events"), first_step, run)
        log.write(first_step + 9, {"train/loss": 0.5, "dev/recall@10": 0.25})
        log.close()
    first, second = fake.begun
    assert (first["project"], first["entity"], first["name"]) == ("questions", "us", "out")
    assert (first["id"], first["resume"], first["mode"]) == (run.key, "allow", "offline")
    assert second["id"] == first["id"]
    assert first["config"]["batch_size"] == 64
    assert Path(first["dir"]) == tmp_path / "out.wandb"
    assert Path(first["dir"]).is_dir()
    quiet = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    assert all(getattr(first["settings"], name) for name in quiet)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert fake.logged == [
        {"step": 10, "train/loss": 0.5, "dev/recall@10": 0.25},
        {"step": 20, "train/loss": 0.5, "dev/recall@10": 0.25},
    ]
    assert fake.ended == [0, 0]
    assert read_scalars(tmp_path / "events")["train/loss"] == {10: 0.5, 20: 0.5}


def test_a_run_that_fails_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    RunLog(Location.of(tmp_path), 1, tracked_run(config_of(tmp_path / "out", wandb={}), "identity")).fail()
    assert fake.ended == [1]


def test_wandb_is_asked_again_for_a_run_that_it_could_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    fake.is_down = True
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tracked_run(config_of(tmp_path / "out", wandb={}), "identity")
    log = RunLog(Location.of(tmp_path), 11, run)
    log.write(11, {"train/loss": 0.5})
    fake.is_down = False
    log.flush()
    assert fake.logged == [{"step": 11, "train/loss": 0.5}]


def opened(tmp_path: Path, **changes: Any) -> tuple[TrackedRun, Callable[[], Any]]:
    run = tracked_run(config_of(tmp_path / "out", **changes), "identity")
    if run.wandb is not None:
        wandb = run.wandb
        return run, lambda: WandbRun(run, wandb)
    mlflow = run.mlflow
    assert mlflow is not None
    return run, lambda: MlflowRun(run, mlflow)


def test_mlflow_s_own_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed and continues is one run, with a curve of all its steps."""
    monkeypatch.chdir(tmp_path)
    mlflow = pytest.importorskip("mlflow")
    run, open_run = opened(tmp_path, mlflow="questions")
    first = open_run()
    first.send([(10, {"train/loss": 0.5, "dev/recall@10": 0.25, "dev/threshold": math.inf})])
    second = open_run()
    second.send([(10, {"train/loss": 0.5}), (20, {"train/loss": 0.25})])
    second.close(failed=False)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("questions")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "out"
    assert found.data.params["optimizer.lr"] == "2e-05"
    assert found.data.tags["raytower.run"] == run.key
    curve = client.get_metric_history(found.info.run_id, "train/loss")
    assert {(point.step, point.value) for point in curve} == {(10, 0.5), (20, 0.25)}
    assert found.data.metrics["dev/recall_at_10"] == 0.25
    third = open_run()
    third.close(failed=True)
    assert client.get_run(found.info.run_id).info.status == "FAILED"
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlartifacts"}


def test_wandb_s_own_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: all lies in the folder, under the run's id, and nothing of the machine."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("wandb")
    run, _ = opened(tmp_path, wandb="questions")
    for first_step in (1, 11):
        log = RunLog(Location.of(tmp_path / "events"), first_step, run)
        log.write(first_step + 9, {"train/loss": 0.5, "dev/recall@10": 0.25})
        log.close()
    folders = sorted((tmp_path / "out.wandb" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{run.key}") for folder in folders)
    assert {path.name for path in tmp_path.iterdir()} == {"out.wandb", "events"}
