"""Trackers of experiments: W&B and MLflow, by their own clients. Nothing is sent where the config does not ask for it.

Ray's helpers for both are not used: they know Ray's name of a run and not ours, by which a run that continues finds the
one that it was. Worker 0 alone writes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytower.errors import InputError, RaytowerError, import_extra
from raytower.progress import log
from raytower.storage import Location
from raytower.training.config import FREE_KEYS, MlflowConfig, TrainJobConfig, WandbConfig

Points = Sequence[tuple[int, Mapping[str, float]]]
"""Steps, and the values by name at each."""
# What a server of MLflow takes at once.
_METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100
_PARAM_CHARACTERS = 500
_RUN_TAG = "raytower.run"
_SQLITE = "sqlite:///"
# How long a client may hold up a training: left alone, MLflow's would try for minutes, and W&B's wait for ever.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_WANDB_SECONDS = 60
_WANDB: dict[str, Any] = {
    "init_timeout": _WANDB_SECONDS,
    "finish_timeout": _WANDB_SECONDS,
    "finish_timeout_raises": True,
    "silent": True,
    "console": "off",
    # Figures of the training alone: no code, no command line, nothing of the machine.
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
}


class Tracker(Protocol):
    """A run, opened at a tracker. Any method may raise whatever its client raises."""

    def send(self, points: Points) -> None:
        """Store values; some of them may be there already."""

    def close(self, failed: bool) -> None:
        """Say how the run has ended."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as trackers know it; made on the driver."""

    key: str
    """The same whenever this run continues, and of no other run."""
    name: str
    settings: Mapping[str, Any]
    """The config by dotted keys, but for what may change when the run continues."""
    wandb: WandbConfig | None
    """With its folder."""
    mlflow: MlflowConfig | None
    """With its tracking_uri."""


def check_trackers(config: TrainJobConfig) -> None:
    """Refuse what could not be tracked, before any work.

    Raises:
        MissingExtraError: a client is not installed.
        InputError: a tracker's files would lie in storage that its client cannot write.
    """
    if config.wandb is not None:
        import_client("wandb")
    if config.mlflow is not None:
        import_client("mlflow")
    tracked_run(config, "")


def tracked_run(config: TrainJobConfig, identity_key: str) -> TrackedRun:
    """What trackers are told of a run.

    Args:
        config: of the run.
        identity_key: hash of all that decides the result. Together with the output it names the run: a copy of it with
            another output is another run.

    Raises:
        InputError: a tracker's files would lie in storage that its client cannot write.
    """
    output = Location.of(config.output)
    wandb, mlflow = config.wandb, config.mlflow
    if wandb is not None:
        folder = Location.of(wandb.dir) if wandb.dir else output.parent / f"{output.name}.wandb"
        place = _local(folder, "wandb.dir", "a folder")
        wandb = wandb.model_copy(update={"dir": place})
    if mlflow is not None:
        mlflow = mlflow.model_copy(update={"tracking_uri": _tracking_uri(mlflow, output)})
    return TrackedRun(
        key=hashlib.sha256(f"{output} {identity_key}".encode()).hexdigest()[:16],
        name=output.name,
        settings=_dotted(config.model_dump(mode="json", exclude=set(FREE_KEYS))),
        wandb=wandb,
        mlflow=mlflow,
    )


def _tracking_uri(config: MlflowConfig, output: Location) -> str:
    """The config's, or that of a file beside the output; workers run in folders of their own."""
    given = config.tracking_uri
    if given is not None and not given.startswith(_SQLITE):
        return given
    file = output.parent / "mlflow.db"
    if given is not None:
        file = Location.of(given.removeprefix(_SQLITE))
    return _SQLITE + _local(file, "mlflow.tracking_uri", "sqlite:///FILE, or a server's address,")


def trackers_of(run: TrackedRun | None) -> dict[str, Callable[[], Tracker]]:
    """How the run is opened at each tracker that its config asks for, by the tracker's name."""
    found: dict[str, Callable[[], Tracker]] = {}
    if run is not None and run.wandb is not None:
        wandb = run.wandb
        found["W&B"] = lambda: WandbRun(run, wandb)
    if run is not None and run.mlflow is not None:
        mlflow = run.mlflow
        found["MLflow"] = lambda: MlflowRun(run, mlflow)
    return found


def import_client(name: str) -> Any:
    """The client `wandb` or `mlflow`, which then tells its makers nothing of its use.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Both look at the environment when they are imported. Whoever has set it has decided.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for key, value in _MLFLOW_PATIENCE.items():
        os.environ.setdefault(key, value)
    return import_extra(name)


class WandbRun:
    """A run of Weights & Biases. Its folder holds all that is sent, whether or not anything can be sent."""

    def __init__(self, run: TrackedRun, config: WandbConfig) -> None:
        """Start the run, or continue the one with this key."""
        wandb = import_client("wandb")
        folder = Path(str(config.dir))
        folder.mkdir(parents=True, exist_ok=True)  # the client would quietly take another one
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                id=run.key,
                name=run.name,
                config=dict(run.settings),
                dir=str(folder),
                mode=config.mode,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(**_WANDB),
            )
        except Exception:
            # The client keeps hold of a run that it could not open, and would refuse it at the next try.
            wandb.teardown()
            raise
        # By W&B's own count a run that continues before its last step would lose what it logs.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        sent = "sent as it goes" if config.mode == "online" else "kept there; `wandb sync` sends it"
        log(f"W&B run {run.key} of project {config.project} lies in {folder}, {sent}")

    def send(self, points: Points) -> None:
        """Hand the values over; the client sends them later, and keeps what it cannot send in the run's folder."""
        for step, values in points:
            self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """Raises TimeoutError if the client has not sent everything in a minute; `wandb sync` does so later."""
        self._run.finish(exit_code=int(failed))


class MlflowRun:
    """A run of MLflow, found again by a tag. No global state of the client is used."""

    def __init__(self, run: TrackedRun, config: MlflowConfig) -> None:
        """Start the run, or continue the one with this key."""
        mlflow = import_client("mlflow")
        self._entities = import_extra("mlflow.entities")
        uri = str(config.tracking_uri)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(config.experiment)
        number = (
            self._make_experiment(config.experiment, uri) if experiment is None else experiment.experiment_id
        )
        found = self._client.search_runs([number], f"tags.`{_RUN_TAG}` = '{run.key}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._start(number, run)
        log(f"MLflow run {self._id} of experiment {config.experiment} lies in {uri}")

    def _make_experiment(self, name: str, uri: str) -> str:
        if not uri.startswith(_SQLITE):
            return str(self._client.create_experiment(name))
        # The client's own choice for artifacts is where the worker happens to run; none are written.
        beside = Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"
        return str(self._client.create_experiment(name, artifact_location=str(beside)))

    def _start(self, experiment: str, run: TrackedRun) -> str:
        number = self._client.create_run(experiment, run_name=run.name, tags={_RUN_TAG: run.key}).info.run_id
        params = [
            self._entities.Param(name, str(value)[:_PARAM_CHARACTERS]) for name, value in run.settings.items()
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(number, params=params[start : start + _PARAMS_AT_ONCE])
        return str(number)

    def send(self, points: Points) -> None:
        """Store the values; they are there when this returns."""
        now_ms = int(time.time() * 1000)
        metrics = [
            # Names may not have an @ there.
            self._entities.Metric(name.replace("@", "_at_"), float(value), now_ms, step)
            for step, values in points
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS_AT_ONCE])

    def close(self, failed: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


# By which key of the config a tracker is asked for.
_KEYS = {"W&B": "wandb", "MLflow": "mlflow"}


class PatientTracker:
    """A tracker whose failures do not end the run: values wait, and are sent again at the next checkpoint."""

    def __init__(self, name: str, open_run: Callable[[], Tracker], *, is_new: bool) -> None:
        """Open the run at the tracker.

        Args:
            name: the tracker's.
            open_run: opens the run.
            is_new: whether no step has been made, so that a failure is better told than waited for.

        Raises:
            InputError: a new run cannot be opened.
        """
        self._name = name
        self._open_run = open_run
        self._run: Tracker | None = None
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._is_down = False
        if not is_new:
            self.send()
            return
        try:
            self._run = open_run()
        except RaytowerError:
            raise
        except Exception as error:
            raise InputError(
                f"{name} cannot be written to: {_told(error)}; mend that, or remove {_KEYS[name]} from the config: "
                "nothing has been trained yet"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send `values` of `step`, or keep them while the tracker does not answer."""
        self._waiting.append((step, dict(values)))
        if not self._is_down:
            self.send()

    def send(self) -> None:
        """Send what waits. The first failure of several is logged."""
        try:
            if self._run is None:
                self._run = self._open_run()
            self._run.send(self._waiting)
        except Exception as error:
            if not self._is_down:
                log(
                    f"warning: {self._name} failed: {_told(error)}; training goes on, and what is logged waits for the "
                    "next checkpoint, when it is sent again"
                )
            self._is_down = True
            return
        if self._is_down:
            log(f"{self._name} answers again; all that waited is there")
        self._is_down = False
        self._waiting.clear()

    def close(self, failed: bool) -> None:
        """Send what waits for the last time, and end the run at the tracker."""
        self.send()
        if self._waiting:
            log(
                f"warning: {self._name} lacks the values of {len(self._waiting)} logged steps, from step "
                f"{self._waiting[0][0]} on; TensorBoard's files have them"
            )
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.close(failed)
        except Exception as error:
            log(f"warning: {self._name} was not told that the run has ended: {_told(error)}")


def _told(error: Exception) -> str:
    """The first 300 characters of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _local(place: Location, key: str, what: str) -> str:
    if not place.is_local:
        raise InputError(
            f"{place} is no local place, and the client writes to no other; set {key} to {what} that the workers share"
        )
    return place.path


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 8}}` is `{"lora.rank": 8}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
