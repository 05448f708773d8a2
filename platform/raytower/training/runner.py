"""Running a training job: survey, plan, Ray Train, and the best checkpoint published as the output directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.config import ScalingConfig
from torch import nn

from raytower.config import WorkersConfig
from raytower.data.config import DevRows, NamedInput, TrainRows
from raytower.data.pieces import Survey, files_read
from raytower.data.records import RecordKind
from raytower.errors import InputError, OtherOutputError, RaytowerError, find_cause
from raytower.models.content import hash_model
from raytower.models.device import fast_dtype, warn_of_slow_dtype
from raytower.models.directory import INFO_NAME
from raytower.only_job import only_job
from raytower.progress import log
from raytower.runtime import check_room, ensure_ray, find_nodes, hold_on_head
from raytower.shared_storage import check_shared
from raytower.storage import (
    Lease,
    Location,
    check_output,
    former_place,
    output_folder,
    publish_directory,
    put_aside,
)
from raytower.training.backbone import narrow_base
from raytower.training.batches import count_steps, count_unused
from raytower.training.checkpoint import MODEL_DIR
from raytower.training.config import ALONE, EVERY_STEPS, FREE_KEYS, TrainClassifierConfig, TrainJobConfig
from raytower.training.copies import copy_where_needed, pieces_to_copy
from raytower.training.elastic import ElasticTrainer, TakeSigterm, TellOfDrainedNodes
from raytower.training.inputs import content_hash
from raytower.training.loop import TrainingPlan, probe_storage, train_worker
from raytower.training.model_card import FILE_NAME as CARD_NAME
from raytower.training.model_card import model_card
from raytower.training.row_stream import MixedPlan, StreamPlan
from raytower.training.sets import MixedSurvey, batches_of_sets, configs_of, surveys_of
from raytower.training.sharding import layers_of
from raytower.training.task import Task
from raytower.training.trackers import TrackedRun, check_trackers, tracked_run
from raytower.workers import fit_workers

# Between two looks for room for more workers. All start anew where there is some, which takes about as long.
_RESIZE_S = 60.0
TaskT = TypeVar("TaskT", bound=Task[Any])
TrainJobConfigT = TypeVar("TrainJobConfigT", bound=TrainJobConfig)


def plan_training(task_class: type[TaskT], config: TrainJobConfig) -> tuple[dict[str, Any], TaskT]:
    """The plan for --dry-run and the task: makes every check that training would make, and trains nothing.

    Raises:
        InputError: as `fit`.
    """
    _check_output(config)
    check_trackers(config)
    surveyed = task_class.survey(config)
    config, asked = with_dtype(config), config
    identity = run_identity(config, surveyed)
    if finished_run(asked, identity) is not None:
        log(f"{config.output} is finished; there is nothing to do")
    elif (left := _checkpoints_of_another_run(Location.of(config.output), run_key(identity))) is not None:
        former_place(str(left))
    task = task_class.prepare(config.model_copy(update={"compile": False}), surveyed)
    model = task.build(None)
    if config.workers.sharding == "full":
        layers_of(model)
    return _describe_plan(config, surveyed, model, _workers(config)), task


def with_dtype(config: TrainJobConfigT) -> TrainJobConfigT:
    """The config with the precision that auto stands for, by what its workers compute on.

    It is settled once: workers of unlike machines would each choose their own.
    """
    num_gpus = config.workers.num_gpus
    on_gpu = any(node.gpus for node in find_nodes()) if num_gpus is None else num_gpus > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    if config.dtype != "auto":
        warn_of_slow_dtype(config.dtype, device.type)
        return config
    return config.model_copy(update={"dtype": fast_dtype(device)})


def _check_output(config: TrainJobConfig) -> None:
    """Raises InputError where the output cannot be written, or holds what no training has made."""
    if Location.of(config.output).is_local:
        output_folder(config.output, INFO_NAME)
    else:  # it may be half published, which is gone on with
        check_output(config.output, is_folder=True)


def _describe_plan(
    config: TrainJobConfig, survey: Survey, model: nn.Module, workers: WorkersConfig
) -> dict[str, Any]:
    """The figures of --dry-run: rows, steps, and the bytes of weights, gradients and Adam's moments on each worker.

    `model` is prepared as for training; frozen weights count once, trained ones four times (themselves, the gradient,
    two moments). Workers that share the model out have equal parts of it.
    """
    narrow_base(model, config)
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    sets = _batches_of_sets(config, survey)
    return {
        "rows": survey.num_rows,
        "rejected_rows": survey.num_rejected,
        "steps": _count_steps(config, survey),
        "unused_rows": _count_unused(config, survey, sets),
        **({"batches_of_sets": sets} if sets else {}),
        "copied_rows": _count_copied(survey),
        "batches_per_step": config.accumulate_batches,
        "rows_per_worker_and_batch": config.batch_size // workers.num,
        "workers": workers.num,
        "trainable_parameters": sum(size // 4 for size, trains in sizes if trains),
        "predicted_state_bytes_per_worker": sum(size * (4 if trains else 1) for size, trains in sizes)
        // (workers.num if config.workers.sharding == "full" else 1),
        "output": config.output,
    }


def run_identity(config: TrainJobConfig, survey: Survey) -> dict[str, Any]:
    """All that decides the result: the config, the content of every file it reads, and the model it starts from.

    Two runs with the same identity give the same output; with other numbers of workers, but for rounding and for what
    dropout draws. So a run goes on with as many as there is room for now.
    """
    values = config.model_dump(mode="json", exclude={*FREE_KEYS, "model", "init_from"})
    values["start"] = config.start
    for name, files in _files_read(config, survey).items():
        by_folder = getattr(getattr(config, name, None), "label_by", None) == "folder"
        values[f"content of {name}"] = content_hash(files, with_folders=by_folder)
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
    return _in_one_form(values)


def _files_read(config: TrainJobConfig, surveyed: Survey) -> dict[str, list[Location]]:
    """The files that a run reads, by what they are read for."""
    files: dict[str, list[Location]] = {}
    surveys = surveys_of(surveyed)
    for name, own in configs_of(config).items():
        # Only of a BEIR folder does it matter which rows are read.
        kind: RecordKind = "pairs" if "query" in surveys[name].schema.names else "lines"
        split = getattr(own.train, "split", None)
        files[_key_of("train", name)] = _files_at(own.train.places, TrainRows, split, kind)
    for name, dev in config.dev.each.items() if config.dev else ():
        if dev.places:
            split = getattr(dev, "split", None) or "dev"
            files[_key_of("dev", name)] = _files_at(dev.places, DevRows, split, "pairs")
        if (corpus := getattr(dev, "corpus", None)) is not None:
            files[f"{_key_of('dev', name)}.corpus"] = files_read(NamedInput(path=corpus), "corpus")
    if isinstance(config, TrainClassifierConfig) and config.labels is not None:
        files["labels"] = files_read(NamedInput(path=config.labels, format="lines"), "lines")
    return files


def _key_of(section: str, name: str) -> str:
    return section if name == ALONE else f"{section}.sets.{name}"


def _files_at(
    places: Sequence[str], rows: type[NamedInput], split: str | None, kind: RecordKind
) -> list[Location]:
    return [file for place in places for file in files_read(rows(path=place, split=split), kind)]


def run_key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finished_run(config: TrainJobConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished run with this identity, or None.

    Raises:
        OtherOutputError: another run made the output; the message names what differs.
        InputError: no training job wrote it.
    """
    output = check_output(config.output, is_folder=True)
    if _is_empty(output) or _is_half_published(output, identity):
        return None
    info = (output / INFO_NAME).read_json() if (output / INFO_NAME).is_file() else {}
    made_by = _in_one_form(info.get("run", {}))
    identity = _as_recorded(identity, made_by, _chosen(config, identity))
    if config.dtype == "auto" and "dtype" in made_by:  # another machine may have settled it in another way
        identity["dtype"] = made_by["dtype"]
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


def _is_empty(output: Location) -> bool:
    """Whether nothing lies there. Hidden names count for nothing, as in `output_folder`."""
    return all(child.name.startswith(".") for child in output.children())


def _is_half_published(output: Location, identity: dict[str, Any]) -> bool:
    """Whether a job of this identity was killed while it published; its checkpoint is there.

    Object stores have no rename, so that a part of the output is left there.
    """
    is_begun = not output.is_local and not _is_empty(output) and not (output / INFO_NAME).is_file()
    return is_begun and _run_folder(output, identity).exists()


def _clear_half_published(output: Location, identity: dict[str, Any]) -> None:
    if _is_half_published(output, identity):
        log(f"{output} is half published; publishing again")
        output.delete()


def _in_one_form(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as earlier versions wrote it, so that what they finished, or left unfinished, is known."""
    # The number of workers made another run.
    values = {key: value for key, value in identity.items() if key != "workers.num"}
    dev = values.get("dev")
    # Null was written where nothing was said, which means so many steps.
    if isinstance(dev, dict) and dev.get("every_steps") == EVERY_STEPS and dev.get("every_epochs") is None:
        values["dev"] = {**dev, "every_steps": None}
    return values


def _chosen(config: TrainJobConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """Of an identity what is no key of the config, and the keys that are not at their default."""
    others = {key: value for key, value in identity.items() if key not in type(config).model_fields}
    return {**others, **config.model_dump(mode="json", exclude_defaults=True)}


def _as_recorded(
    identity: dict[str, Any], recorded: dict[str, Any], chosen: dict[str, Any]
) -> dict[str, Any]:
    """`identity` without the keys that `recorded` lacks and nobody has chosen: they came with a newer version.

    A new key's default is what was done before there was one, so they tell no run from another.
    """
    return {
        key: _as_recorded(value, recorded[key], chosen.get(key) or {})
        if isinstance(value, dict) and isinstance(recorded.get(key), dict)
        else value
        for key, value in identity.items()
        if key in recorded or key in chosen
    }


def fit(task_class: type[Task[Any]], config: TrainJobConfig) -> dict[str, Any]:
    """Train and publish; a finished run is not repeated, a killed one continues from its last checkpoint.

    The model is loaded and checked against the rows only where there is something to train.

    Raises:
        InputError: bad data or config; RaytowerError: training failed (a loss that is no number, lost workers), or an
            extra is not installed.
    """
    _check_output(config)
    check_trackers(config)
    survey = task_class.survey(config)
    output = Location.of(config.output)
    config, asked = with_dtype(config), config
    identity = run_identity(config, survey)
    run_folder = _run_folder(output, identity)
    done = finished_run(asked, identity)
    if done is None:
        probe_storage(output.parent)
        with only_job(
            output.parent / f".{output.name}.train.lock",
            str(output),
            owner="a training",
            doing="trained by another job",
        ) as lease:
            done = finished_run(asked, identity)  # another job may have been at it
            if done is None:
                _clear_half_published(output, identity)
                return _train(task_class, config, survey, identity, lease)
    log(f"{config.output} is finished; nothing to do")
    # A job killed between publishing and cleaning up leaves its checkpoints.
    run_folder.delete()
    return done


def _train(
    task_class: type[Task[Any]],
    config: TrainJobConfig,
    survey: Survey,
    identity: dict[str, Any],
    lease: Lease | None,
) -> dict[str, Any]:
    """As `fit`, of a run that is not finished, while no other job writes this output."""
    output = Location.of(config.output)
    run_folder = _run_folder(output, identity)
    _name_other_runs(output, run_folder)
    _make_room_for_checkpoints(output, run_key(identity))
    workers = _workers(config)
    task = task_class.prepare(config, survey)
    readable = _copied_where_needed(survey, run_folder / "rows")
    plan = _make_plan(
        config,
        readable,
        task,
        workers,
        run_folder / "failure.json",
        tracked_run(config, run_key(identity)),
    )
    plan.failure_file.delete()  # of an earlier try, which a job that was killed leaves
    ensure_ray(min_cpus=workers.num * workers.num_cpus + 1)
    check_room(workers)
    check_shared(run_folder)
    _compare_with_cluster(workers, config.workers.min or workers.num)
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
    if lease is not None:
        lease.check()
    _leave_checkpoints(result, config.num_left_checkpoints, output, run_key(identity))
    _publish(checkpoint, output, info, model_card(config, figures, info["history"]))
    run_folder.delete()
    return figures


def _workers(config: TrainJobConfig) -> WorkersConfig:
    return fit_workers(config.workers, find_nodes, share=config.batch_size, least=config.workers.min)


def _count_copied(survey: Survey) -> int:
    """Rows that `_copied_where_needed` copies."""
    return sum(
        own.pieces[position].num_rows
        for own in surveys_of(survey).values()
        for position in pieces_to_copy(own.pieces)
    )


def _copied_where_needed(survey: Survey, folder: Location) -> Survey:
    """The survey, with pieces that can be read in the order of training; see `copy_where_needed`."""
    if not isinstance(survey, MixedSurvey):
        return dataclasses.replace(survey, pieces=copy_where_needed(survey.pieces, folder))
    # Each set has columns of its own, and files of copies.
    return MixedSurvey.of(
        {
            name: dataclasses.replace(own, pieces=copy_where_needed(own.pieces, folder / name))
            for name, own in survey.sets.items()
        }
    )


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
    config: TrainJobConfig,
    survey: Survey,
    task: Task[Any],
    workers: WorkersConfig,
    failure_file: Location,
    tracked: TrackedRun | None = None,
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
        tracked=tracked,
    )


def _publish(checkpoint: ray.train.Checkpoint, output: Location, info: dict[str, Any], card: str) -> None:
    """The checkpoint's model directory as the job's output, with its card and the run's record in raytower.json."""
    with checkpoint.as_directory() as folder, publish_directory(output) as target:
        shutil.copytree(Path(folder) / MODEL_DIR, target, dirs_exist_ok=True)
        (target / CARD_NAME).write_text(card, encoding="utf-8")
        _add_info(target, info)


def _add_info(folder: Path, info: dict[str, Any]) -> None:
    path = folder / INFO_NAME
    own = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**own, **info}, ensure_ascii=False, indent=2), encoding="utf-8")


def _leave_checkpoints(result: ray.train.Result, num_left: int | None, output: Location, key: str) -> None:
    """The model directories of the last checkpoints, None is all, as `<output>.checkpoints/step-<number>`.

    The raytower.json of each says by `run_key` which run made it.
    """
    by_step = sorted(result.best_checkpoints or [], key=lambda item: item[1]["step"])
    for checkpoint, metrics in by_step if num_left is None else by_step[max(len(by_step) - num_left, 0) :]:
        target = _left_checkpoints(output) / f"step-{metrics['step']}"
        if (
            target.exists()
        ):  # of a job that was killed while it published; the steps of a run are the same every time
            target.delete()
        with checkpoint.as_directory() as folder, publish_directory(target) as place:
            shutil.copytree(Path(folder) / MODEL_DIR, place, dirs_exist_ok=True)
            _add_info(place, {"run_key": key})


def _left_checkpoints(output: Location) -> Location:
    return output.parent / f"{output.name}.checkpoints"


def _checkpoints_of_another_run(output: Location, key: str) -> Location | None:
    """The folder of left checkpoints, where any of them is not of the run with this key; else None.

    What lacks raytower.json is no checkpoint, or one that is half published.
    """
    left = _left_checkpoints(output)
    infos = [place / INFO_NAME for place in left.children()]
    is_other = any(info.is_file() and info.read_json().get("run_key") != key for info in infos)
    return left if is_other else None


def _make_room_for_checkpoints(output: Location, key: str) -> None:
    """Put aside the checkpoints that another run left beside the output: they would be taken for this one's.

    Raises:
        InputError: object stores cannot rename.
    """
    left = _checkpoints_of_another_run(output, key)
    if left is not None:
        former = put_aside(str(left))
        log(f"the checkpoints that another run left as {left} are {former} now; remove them if not wanted")


def _num_to_keep(config: TrainJobConfig, has_dev: bool) -> int | None:
    """Checkpoints that Ray keeps while training runs; None is all. It orders them by metric or by time, not by both."""
    if isinstance(config.keep_checkpoints, int):
        return config.keep_checkpoints
    return None if has_dev else config.num_left_checkpoints


def _run_trainer(plan: TrainingPlan, name: str) -> ray.train.Result:
    hold_on_head()
    config, dev, storage = plan.config, plan.task.dev, plan.storage
    checkpoints = ray.train.CheckpointConfig(
        num_to_keep=_num_to_keep(config, dev is not None),
        checkpoint_score_attribute=dev.metric if dev else None,
        checkpoint_score_order="max",
    )
    workers = plan.workers
    least = config.workers.min or workers.num
    is_elastic = least < workers.num
    gpus = {"GPU": workers.num_gpus} if workers.num_gpus else {}
    resources = {"CPU": workers.num_cpus, **gpus, **workers.resources}
    trainer = (ElasticTrainer if is_elastic else ray.train.torch.TorchTrainer)(
        train_worker,  # type: ignore[arg-type] # Ray's stub knows no return value
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=(least, workers.num) if is_elastic else workers.num,
            use_gpu=workers.num_gpus > 0,
            resources_per_worker=resources,
            label_selector=workers.label_selector or None,
            elastic_resize_monitor_interval_s=_RESIZE_S,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[arg-type] # another class to a type checker, the same one to Python
            name=name,
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=checkpoints,
            callbacks=[TakeSigterm(), TellOfDrainedNodes()],  # type: ignore[list-item] # its stub knows others alone
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


def _compare_with_cluster(workers: WorkersConfig, least: int) -> None:
    """Warn if the cluster has no room for `least` workers: Ray waits for nodes that may never come."""
    there = ray.cluster_resources()
    cpus = least * workers.num_cpus
    gpus = least * workers.num_gpus
    if there.get("CPU", 0) < cpus or there.get("GPU", 0) < gpus:
        log(
            f"the job needs {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {there.get('CPU', 0):g} and "
            f"{there.get('GPU', 0):g} now: it waits until nodes are added; lower workers.num or workers.num_cpus "
            "if none will be"
        )


def _count_steps(config: TrainJobConfig, survey: Survey) -> int:
    return count_steps(survey.num_rows, config.batch_size * config.accumulate_batches, config.epochs)
