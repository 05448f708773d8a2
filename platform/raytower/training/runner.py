"""Running a training job: survey, plan, Ray Train, and the best checkpoint published as the output directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
from torch import nn

from raytower.config import WorkersConfig
from raytower.data.pieces import Survey
from raytower.errors import InputError, OtherOutputError, RaytowerError, find_cause
from raytower.models.content import hash_model
from raytower.models.directory import INFO_NAME
from raytower.progress import log
from raytower.runtime import ensure_ray, find_nodes
from raytower.storage import Location, check_output, output_folder, publish_directory
from raytower.training.batches import count_steps, count_unused
from raytower.training.checkpoint import MODEL_DIR
from raytower.training.config import FREE_KEYS, TrainClassifierConfig, TrainJobConfig
from raytower.training.inputs import content_hash
from raytower.training.loop import TrainingPlan, probe_storage, train_worker
from raytower.training.model_card import FILE_NAME as CARD_NAME
from raytower.training.model_card import model_card
from raytower.training.row_stream import CPUS_PER_READER, MixedPlan, StreamPlan
from raytower.training.sets import MixedSurvey, batches_of_sets
from raytower.training.task import Task
from raytower.workers import fit_workers

TaskT = TypeVar("TaskT", bound=Task[Any])


def plan_training(task_class: type[TaskT], config: TrainJobConfig) -> tuple[dict[str, Any], TaskT]:
    """The plan for --dry-run and the task: makes every check that training would make, and trains nothing.

    Raises:
        InputError: as `fit`.
    """
    if Location.of(config.output).is_local:  # a remote one may be half published, which is gone on with
        output_folder(config.output, INFO_NAME)
    surveyed = task_class.survey(config)
    task = task_class.prepare(config.model_copy(update={"compile": False}), surveyed)
    return _describe_plan(config, surveyed, task.build(None), _workers(config)), task


def _describe_plan(
    config: TrainJobConfig, survey: Survey, model: nn.Module, workers: WorkersConfig
) -> dict[str, Any]:
    """The figures of --dry-run: rows, steps, and the bytes of weights, gradients and Adam's moments on each worker.

    `model` is prepared as for training; frozen weights count once, trained ones four times (themselves, the gradient,
    two moments).
    """
    sizes = [(p.numel() * 4, p.requires_grad) for p in model.parameters()]
    sets = _batches_of_sets(config, survey)
    return {
        "rows": survey.num_rows,
        "rejected_rows": survey.num_rejected,
        "steps": _count_steps(config, survey),
        "unused_rows": _count_unused(config, survey, sets),
        **({"batches_of_sets": sets} if sets else {}),
        "batches_per_step": config.accumulate_batches,
        "rows_per_worker_and_batch": config.batch_size // workers.num,
        "workers": workers.num,
        "trainable_parameters": sum(size // 4 for size, trains in sizes if trains),
        "predicted_state_bytes_per_worker": sum(size * (4 if trains else 1) for size, trains in sizes),
        "output": config.output,
    }


def run_identity(config: TrainJobConfig, survey: Survey) -> dict[str, Any]:
    """All that decides the result: the config, the content of every file it reads, and the model it starts from.

    Two runs with the same identity give the same output; with other numbers of workers, but for rounding and for what
    dropout draws. So a run goes on with as many as there is room for now.
    """
    values = config.model_dump(mode="json", exclude={*FREE_KEYS, "model", "init_from"})
    values["start"] = config.start
    paths = {
        **config.train.inputs,
        **(config.dev.inputs if config.dev else {}),
        "labels": config.labels if isinstance(config, TrainClassifierConfig) else None,
    }
    for name, path in paths.items():
        if path is not None:
            values[f"content of {name}"] = content_hash(path)
    guide = getattr(config, "guide", None)
    models = {
        "start": config.start,
        "teacher": values.get("teacher"),
        "guide": guide.encoder if guide else None,
    }
    for name, model in models.items():
        if model is not None:
            values[f"content of {name}"] = hash_model(model)
    values["rows"] = survey.num_rows
    return values


def run_key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finished_run(config: TrainJobConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished run with this identity, or None.

    Raises:
        OtherOutputError: another run made the output; the message names what differs.
        InputError: no training job wrote it.
    """
    output = check_output(config.output, is_folder=True)
    if not output.exists() or (output.is_dir() and not output.children()):
        return None
    info = (output / INFO_NAME).read_json() if (output / INFO_NAME).is_file() else {}
    if not info and not output.is_local and _run_folder(output, identity).exists():
        # Object stores have no rename, so a job killed while it published leaves part of it. Its checkpoint is there.
        log(f"{config.output} is half published; publishing again")
        output.delete()
        return None
    # Earlier versions took another number of workers for another run.
    made_by = {key: value for key, value in info.get("run", {}).items() if key != "workers.num"}
    if made_by == identity:
        if not any(
            (output / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
        ):
            raise InputError(
                f"output {config.output!r} has lost its weights; remove it, and run the job again"
            )
        return dict(info["figures"])
    other = sorted(key for key in {*made_by, *identity} if made_by.get(key) != identity.get(key))
    error = OtherOutputError if made_by else InputError
    older = (
        "; an older version of raytower wrote it, which did not record the content of every starting model"
        if "weights of start" in made_by
        else ""
    )
    raise error(
        f"output {config.output!r} exists and was made by another config or other data "
        f"({', '.join(other) if made_by else 'no training job wrote it'}){older}; choose a new output, or remove it "
        "first"
    )


def fit(task_class: type[Task[Any]], config: TrainJobConfig) -> dict[str, Any]:
    """Train and publish; a finished run is not repeated, a killed one continues from its last checkpoint.

    The model is loaded and checked against the rows only where there is something to train.

    Raises:
        InputError: bad data or config; RaytowerError: training failed (a loss that is no number, lost workers).
    """
    survey = task_class.survey(config)
    output = Location.of(config.output)
    identity = run_identity(config, survey)
    run_folder = _run_folder(output, identity)
    done = finished_run(config, identity)
    if done is not None:
        log(f"{config.output} is finished; nothing to do")
        # A job killed between publishing and cleaning up leaves its checkpoints.
        run_folder.delete()
        return done
    probe_storage(output.parent)
    _name_other_runs(output, run_folder)
    workers = _workers(config)
    plan = _make_plan(
        config, survey, task_class.prepare(config, survey), workers, run_folder / "failure.json"
    )
    plan.failure_file.delete()  # of an earlier try, which a job that was killed leaves
    ensure_ray(min_cpus=workers.num * workers.num_cpus + 1)
    _compare_with_cluster(workers)
    result = _run_trainer(plan, run_folder.name)
    outcome: dict[str, Any] = result.return_value  # type: ignore[attr-defined]
    if "failure" in outcome:
        kept = (
            f"the last good checkpoint is {result.checkpoint.path}"
            if result.checkpoint
            else "there is no checkpoint"
        )
        plan.failure_file.delete()
        if outcome.get("is_input"):
            raise InputError(outcome["failure"])
        raise RaytowerError(f"{outcome['failure']}; {kept}")
    checkpoint, metrics = _chosen_checkpoint(result, plan.task.dev.metric if plan.task.dev else None)
    figures = {**outcome, "best_step": metrics.get("step", outcome["steps"]), "output": config.output}
    info = {
        "run": identity,
        "config": config.model_dump(mode="json"),
        "history": figures.pop("history"),
        "curve": figures.pop("curve"),
        "figures": figures,
    }
    _leave_checkpoints(result, config.num_left_checkpoints, output)
    _publish(checkpoint, output, info, model_card(config, figures, info["history"]))
    run_folder.delete()
    return figures


def _workers(config: TrainJobConfig) -> WorkersConfig:
    return fit_workers(config.workers, find_nodes, share=config.batch_size)


def _batches_of_sets(config: TrainJobConfig, survey: Survey) -> dict[str, int]:
    """How many batches of the run are of each set of rows; empty where the rows are one."""
    if not isinstance(survey, MixedSurvey):
        return {}
    return batches_of_sets(config, survey, _count_steps(config, survey) * config.accumulate_batches)


def _count_unused(config: TrainJobConfig, survey: Survey, sets: Mapping[str, int]) -> int:
    """Rows that fill no step, which is said: of few rows they may be half. Of several sets, rows that are never read.

    `sets` are the batches of each, which have been said.
    """
    if isinstance(survey, MixedSurvey):
        return sum(max(own.num_rows - sets[name] * config.batch_size, 0) for name, own in survey.sets.items())
    batch_rows = config.batch_size * config.accumulate_batches
    unused = count_unused(survey.num_rows, batch_rows, config.epochs)
    if unused:
        log(
            f"{unused:,} of {survey.num_rows:,} rows are not trained on in the last pass: a step takes {batch_rows:,} "
            "rows, and they fill none; a smaller batch_size uses more of them"
        )
    return unused


def _make_plan(
    config: TrainJobConfig, survey: Survey, task: Task[Any], workers: WorkersConfig, failure_file: Location
) -> TrainingPlan:
    num_steps = _count_steps(config, survey)
    sets = _batches_of_sets(config, survey)
    _count_unused(config, survey, sets)
    output = Location.of(config.output)
    stream = StreamPlan(
        pieces=survey.pieces,
        batch_size=config.batch_size,
        num_batches=num_steps * config.accumulate_batches,
        seed=config.seed,
        window_rows=config.shuffle_rows,
        distinct_columns=task.distinct_columns,
        num_documents=task.num_documents,
    )
    if isinstance(survey, MixedSurvey):
        parts = {
            name: dataclasses.replace(
                stream,
                pieces=survey.sets[name].pieces,
                num_batches=count,
                distinct_columns=task.sets[name].distinct_columns,
                num_documents=task.sets[name].num_documents,
            )
            for name, count in sets.items()
        }
        stream = MixedPlan(**vars(stream), sets=parts)
    return TrainingPlan(
        config=config,
        task=task,
        stream=stream,
        num_steps=num_steps,
        workers=workers,
        storage=output.parent,
        log_dir=Location.of(config.log_dir or output.parent / f"{output.name}.tensorboard"),
        failure_file=failure_file,
    )


def _publish(checkpoint: ray.train.Checkpoint, output: Location, info: dict[str, Any], card: str) -> None:
    """The checkpoint's model directory as the job's output, with its card and the run's record in raytower.json."""
    with checkpoint.as_directory() as folder, publish_directory(output) as target:
        shutil.copytree(Path(folder) / MODEL_DIR, target, dirs_exist_ok=True)
        (target / CARD_NAME).write_text(card, encoding="utf-8")
        path = target / INFO_NAME
        own = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**own, **info}, ensure_ascii=False, indent=2), encoding="utf-8")


def _leave_checkpoints(result: ray.train.Result, num_left: int | None, output: Location) -> None:
    """The model directories of the last checkpoints, None is all, as `<output>.checkpoints/step-<number>`."""
    by_step = sorted(result.best_checkpoints or [], key=lambda item: item[1]["step"])
    for checkpoint, metrics in by_step if num_left is None else by_step[max(len(by_step) - num_left, 0) :]:
        target = output.parent / f"{output.name}.checkpoints" / f"step-{metrics['step']}"
        if (
            target.exists()
        ):  # of a job that was killed while it published; the steps of a run are the same every time
            target.delete()
        with checkpoint.as_directory() as folder, publish_directory(target) as place:
            shutil.copytree(Path(folder) / MODEL_DIR, place, dirs_exist_ok=True)


def _num_to_keep(config: TrainJobConfig, has_dev: bool) -> int | None:
    """Checkpoints that Ray keeps while training runs; None is all. It orders them by metric or by time, not by both."""
    if isinstance(config.keep_checkpoints, int):
        return config.keep_checkpoints
    return None if has_dev else config.num_left_checkpoints


def _run_trainer(plan: TrainingPlan, name: str) -> ray.train.Result:
    config, dev, storage = plan.config, plan.task.dev, plan.storage
    checkpoints = ray.train.CheckpointConfig(
        num_to_keep=_num_to_keep(config, dev is not None),
        checkpoint_score_attribute=dev.metric if dev else None,
        checkpoint_score_order="max",
    )
    workers = plan.workers
    resources = {"CPU": workers.num_cpus, **({"GPU": workers.num_gpus} if workers.num_gpus else {})}
    trainer = ray.train.torch.TorchTrainer(
        train_worker,  # type: ignore[arg-type] # Ray's stub knows no return value
        train_loop_config={"plan": plan},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num, use_gpu=workers.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=checkpoints,
        ),
    )
    try:
        return trainer.fit()
    except Exception as error:
        cause = find_cause(error)
        if isinstance(cause, RaytowerError):
            raise cause from error
        if plan.failure_file.is_file():  # max_failures 0: no worker was started again to tell of it
            raise RaytowerError(plan.failure_file.read_json()["failure"]) from error
        raise RaytowerError(f"training failed: {error}") from error


def _chosen_checkpoint(
    result: ray.train.Result, metric: str | None
) -> tuple[ray.train.Checkpoint, dict[str, Any]]:
    """The checkpoint to publish, and what was reported with it: the best by the metric, or the last."""
    if metric and result.best_checkpoints:
        return max(result.best_checkpoints, key=lambda item: item[1].get(metric, float("-inf")))
    if result.checkpoint is None:
        raise RaytowerError("training ended without a checkpoint; see the worker logs above")
    return result.checkpoint, result.metrics or {}


def _run_folder(output: Location, identity: dict[str, Any]) -> Location:
    """Where a run keeps its checkpoints: beside the output, hidden, one folder for each identity."""
    return output.parent / f".{output.name}.{run_key(identity)}.train"


def _name_other_runs(output: Location, own: Location) -> None:
    """Name the folders that unfinished runs of other configs left beside the output: hidden, and of gigabytes."""
    for place in output.parent.children():
        if (
            place.name.startswith(f".{output.name}.")
            and place.name.endswith(".train")
            and place.name != own.name
        ):
            log(
                f"{place} holds the checkpoints of an unfinished run with another config; remove it if not wanted"
            )


def _compare_with_cluster(workers: WorkersConfig) -> None:
    """Warn if the cluster has no room for the workers and their readers: Ray waits for nodes that may never come."""
    there = ray.cluster_resources()
    # At least one reader must fit beside the workers, or no row would ever be read.
    cpus = workers.num * workers.num_cpus + CPUS_PER_READER
    gpus = workers.num * workers.num_gpus
    if there.get("CPU", 0) < cpus or there.get("GPU", 0) < gpus:
        log(
            f"the job needs {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {there.get('CPU', 0):g} and "
            f"{there.get('GPU', 0):g} now: it waits until nodes are added; lower workers.num or workers.num_cpus "
            "if none will be"
        )


def _count_steps(config: TrainJobConfig, survey: Survey) -> int:
    return count_steps(survey.num_rows, config.batch_size * config.accumulate_batches, config.epochs)
