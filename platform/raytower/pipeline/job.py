"""`raytower pipeline`: jobs one after the other from one file, and again only those that a change concerns.

The state file remembers each step by its output. A step is finished while its key and its output are what they were.
The key hashes the job, the settings of its config, the content of what it reads, and the keys of the steps that made
any of that. A step that was killed is started again, and its job goes on where it was.

What a job would refuse to write over, a model or embeddings of another config, is renamed before the step is made anew,
if this pipeline has written it. Everything else that lies in the way is refused before the first step runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytower.commands import COMMANDS, Command, find_reference
from raytower.config import Config, former_keys, make_config
from raytower.data.config import InputConfig
from raytower.data.records import RecordKind
from raytower.encoding.job import JOB_NAME
from raytower.errors import FormatError, InputError, OtherOutputError
from raytower.evaluation.reports import check_reports_output
from raytower.index.build import build_identity
from raytower.index.config import IndexBuildConfig
from raytower.index.versions import index_folder, open_manifest, published_version
from raytower.models.directory import INFO_NAME
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.content import (
    Kind,
    content_of,
    content_of_output,
    is_empty,
    is_inside,
    mark_of,
    may_hold,
)
from raytower.progress import log
from raytower.storage import Location, output_folder, put_aside
from raytower.training.config import EVERY_STEPS, FREE_KEYS

_STATE_VERSION = 2
# Each job, and what it writes.
STEP_JOBS: dict[str, Kind] = {
    "pairs": "rows",
    "train-retriever": "model",
    "train-reranker": "model",
    "train-classifier": "model",
    "encode": "embeddings",
    "index build": "index",
    "search": "rows",
    "rerank": "rows",
    "mine": "rows",
    "evaluate": "report",
    "classify": "rows",
    "similarity": "rows",
}
# The keys that name what a job reads: one setting has one name in all commands.
INPUT_KEYS: dict[str, Kind] = {
    "train.path": "rows",
    "train.paths": "rows",
    "dev.path": "rows",
    "dev.paths": "rows",
    "dev.corpus": "rows",
    "labels": "rows",
    "tuned": "rows",
    "input.path": "rows",
    "apart_from.path": "rows",
    "queries.path": "rows",
    "run.path": "rows",
    "target.queries.path": "rows",
    "model": "model",
    "init_from": "model",
    "encoder": "model",
    "teacher": "model",
    "guide.encoder": "model",
    "generate.model": "model",
    "screen.reranker": "model",
    "reranker": "model",
    "classifier": "model",
    "compare": "report",
    "embeddings": "embeddings",
    "index": "index",
}
# What the rows of an input are read as, which decides the files that are read of a BEIR folder; of others as pairs.
_RECORDS: dict[tuple[str, str], RecordKind] = {
    ("encode", "input.path"): "corpus",
    ("pairs", "input.path"): "corpus",
    ("search", "input.path"): "lines",
    ("rerank", "input.path"): "ranked",
    ("classify", "input.path"): "lines",
}
# The split of a BEIR folder that is read where a config names none.
_SPLITS = {"dev": "dev"}
# Keys that change how a job goes and not its result.
_FREE_KEYS = {
    **dict.fromkeys(("train-retriever", "train-reranker", "train-classifier"), FREE_KEYS),
    "encode": frozenset({"workers", "tokens_per_batch"}),
    **dict.fromkeys(("search", "rerank", "similarity"), frozenset({"workers"})),
    # `num` decides into how many shards an index is built.
    "index build": frozenset(
        f"workers.{name}" for name in ("num_cpus", "num_gpus", "resources", "label_selector")
    ),
}
# Keys of `workers` that came later; empty is what was done before.
_GAINED_BY_WORKERS = ("resources", "label_selector")
# Keys that trainings have gained, and the values for what was done before.
_NEWER = {
    **dict.fromkeys(("split", "share", "every_epochs", "pooling", "labels", "label_by", "paths", "head_lr")),
    **dict.fromkeys(("wandb", "mlflow", "min", "sibling_labels")),
    "sharding": "none",
    "attention": "auto",
    "schedule": "linear",
    "guide": None,
    "more_negatives": None,
}
# What a config is filled with where it says nothing, beside the defaults of its fields.
_MEANT = {"every_steps": EVERY_STEPS}
# What a null among `workers` was before the machine decided.
_FORMER_WORKERS = {"num": 2, "num_cpus": 1.0, "num_gpus": 0.0}
# Likewise of annotating jobs.
_GAINED: dict[str, dict[str, Any]] = {
    "mine": {"sampling": "random", "sampling_temperature": 0.05, "max_score_margin": None, "screen": None},
    "similarity": {"reranker": None, "rerank_max_length": None},
    "classify": {
        **dict.fromkeys(("tuned", "positive", "cut", "abstain_below", "suspects", "report", "plots")),
        "votes": "similarity",
        "explain": False,
        "suspect_share": 0.02,
    },
    # An index of before has no lexical side, which `index compact` adds; it is not built anew for it.
    "index build": {"lexical": True, "tokens": {"stemmer": None, "unspaced": "icu"}},
}
# What `evaluate` has gained; null and false are what was done before.
_NEWER_OF_EVALUATE = ("run", "compare", "metrics", "ignore_identical_ids", "stages", "plots")
# What mine and evaluate have gained for modes.
_BY_VECTORS = {"mode": "dense", "hybrid": {"fusion": None, "weight": None}}
_GAINED_AN_ENGINE = ("mine", "evaluate", "classify", "similarity")


@dataclass(frozen=True)
class _Input:
    """What a step reads: the config's key, and by the numbers of their steps who has made any of it."""

    key: str
    kind: Kind
    name: str
    rows: InputConfig | None
    """How rows are read."""
    records: RecordKind
    """What rows are read as."""
    makers: tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    """A checked step."""

    number: int
    job: str
    command: Command
    config: Config
    inputs: tuple[_Input, ...]
    former_keys: tuple[str, str]
    """Its keys in state files of before: with the config's keys as they are named now, and as they were named once."""

    @property
    def title(self) -> str:
        return f"step {self.number} {self.job}"

    @property
    def output(self) -> str | None:
        return getattr(self.config, "output", None)

    @property
    def kind(self) -> Kind:
        return STEP_JOBS[self.job]

    @property
    def makers(self) -> set[int]:
        return {number for item in self.inputs for number in item.makers}

    @cached_property
    def settings(self) -> dict[str, Any]:
        return _without(_settings(self.config), _FREE_KEYS.get(self.job, frozenset()))

    @property
    def slot(self) -> str:
        """By which name the state file remembers it."""
        return self.output or f"{self.job} without output {_hash(self.settings)}"

    def key(self, keys: Mapping[int, str]) -> str:
        """Its key, once all that it reads is there.

        Raises:
            InputError: an input is missing or damaged.
        """
        try:
            read = {
                item.key: content_of(item.kind, item.name, item.rows, item.records) for item in self.inputs
            }
        except InputError as error:
            raise InputError(f"{self.title}: {error}") from error
        return _hash([self.job, self.settings, read, [keys[number] for number in sorted(self.makers)]])

    def content(self) -> str | None:
        return None if self.output is None else content_of_output(self.kind, self.output)

    def mark(self) -> str | None:
        return None if self.output is None else mark_of(self.kind, self.output)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the state file remembers of a step."""

    key: str
    finished: bool
    content: str | None = None
    """Of its output, as the step left it; null where it has none, or has not finished one yet."""
    mark: str | None = None
    """By which its output is known where parts of it are gone."""
    figures: dict[str, Any] | None = None


class _State:
    """The state file: what was finished, and which outputs the pipeline has written."""

    def __init__(self, place: Location, steps: Sequence[_Step]) -> None:
        self._place = place
        values = place.read_json() if place.exists() else {"format_version": _STATE_VERSION, "steps": {}}
        self._records: dict[str, _Record] = {}
        if not isinstance(values, dict) or values.get("format_version", _STATE_VERSION) != _STATE_VERSION:
            raise FormatError(
                f"{place} is no state of a pipeline that this raytower reads (version {_STATE_VERSION}); name another "
                "file as state"
            )
        if "format_version" in values:
            self._records = {name: _Record(**record) for name, record in values["steps"].items()}
        else:
            self._adopt(values, steps)

    def _adopt(self, finished: Mapping[str, Any], steps: Sequence[_Step]) -> None:
        """Take over the steps of a state file of before, which held keys of configs alone, up to the first change."""
        keys: dict[int, str] = {}
        for step in steps:
            figures = next((finished[key] for key in step.former_keys if key in finished), None)
            if figures is None or (step.output is not None and is_empty(step.output)):
                break
            keys[step.number] = step.key(keys)
            self._records[step.slot] = _finished(step, keys[step.number], figures)
        log(
            f"{self._place} was written by an older version of raytower, which did not look at what steps read: "
            f"{len(self._records)} of {len(steps)} steps count as finished with their inputs as they are now"
        )

    def of(self, step: _Step) -> _Record | None:
        return self._records.get(step.slot)

    def put(self, step: _Step, record: _Record) -> None:
        self._records[step.slot] = record
        self.write()

    def write(self) -> None:
        """Raises StorageError."""
        steps = {name: vars(each) for name, each in self._records.items()}
        self._place.write_json({"format_version": _STATE_VERSION, "steps": steps})

    def owns(self, step: _Step) -> bool:
        """Whether what lies at the step's output was written by it, or begun."""
        record = self.of(step)
        return record is not None and record.mark in (None, step.mark())

    def why(self, step: _Step, keys: Mapping[int, str]) -> str | None:
        """Why a step is to run, and None where it is finished. Its makers are finished, and `keys` has their keys."""
        record = self.of(step)
        if record is None:
            return "it did not run before"
        if not record.finished:
            return "it was not finished"
        if record.key != step.key(keys):
            return "its config or what it reads has changed"
        if record.content != step.content():
            return "its output is gone, or not whole"
        return None


def run_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run the steps that are not finished; returns the figures of every step.

    Raises:
        InputError: an unknown job, a config that its job refuses, steps in the wrong order, or an output that holds
            something else. All steps are checked before the first one runs. An input that is missing.
    """
    steps = _prepare(config)
    state = _State(Location.of(config.state), steps)
    _check_outputs(steps, state)
    state.write()  # one of an older version becomes one of this
    keys: dict[int, str] = {}
    results = []
    for step in steps:
        name = f"step {step.number}/{len(steps)} {step.job}"
        why = state.why(step, keys)
        keys[step.number] = step.key(keys)
        record = state.of(step)
        if why is None and record is not None:
            log(f"{name}: finished before, skipped")
            results.append({"job": step.job, "skipped": True, **(record.figures or {})})
            continue
        log(f"{name}: running ({why})")
        figures = _run(step, keys[step.number], state)
        state.put(step, _finished(step, keys[step.number], figures))
        results.append({"job": step.job, "skipped": False, **figures})
    return {"steps": results}


def plan_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Which steps would run, and why. Later steps read what earlier ones write, so only the order can be planned.

    Raises:
        InputError: as `run_pipeline`.
    """
    steps = _prepare(config)
    state = _State(Location.of(config.state), steps)
    _check_outputs(steps, state)
    keys: dict[int, str] = {}
    planned = []
    for step in steps:
        why = state.why(step, keys) if step.makers <= keys.keys() else "what it reads is made anew"
        if why is None:
            keys[step.number] = step.key(keys)
        planned.append({"job": step.job, "skipped": why is None, "why": why})
    return {"steps": planned}


def _check_outputs(steps: Sequence[_Step], state: _State) -> None:
    """Raises InputError where an output holds what its step did not leave there."""
    for step in steps:
        if step.output is None or is_empty(step.output):
            continue
        record = state.of(step)
        if record is not None and record.content not in (None, step.content()) and step.content() is not None:
            raise InputError(
                f"{step.title}: output {step.output!r} is not as the step left it, something else has written there "
                "since; move it away to have it made anew, or name another output"
            )
        try:
            if not state.owns(step):
                _refuse_foreign(step.kind, step.output)
        except InputError as error:
            raise InputError(f"{step.title}: {error}") from error


def _refuse_foreign(kind: Kind, output: str) -> None:
    """Raises InputError where no job of this kind has begun the output; if one has, the step's job looks closer."""
    if kind in ("model", "embeddings"):
        output_folder(output, INFO_NAME if kind == "model" else JOB_NAME)
    elif kind == "index":
        index_folder(output)
    elif kind == "report":
        check_reports_output(output)
    else:
        raise InputError(
            f"output {output!r} exists, and this pipeline did not write it; move it away, or name another output"
        )


def _run(step: _Step, key: str, state: _State) -> dict[str, Any]:
    """Run a step's job; an output of another config makes room for it, where the pipeline has written that."""
    record = state.of(step)
    owned = step.output is None or is_empty(step.output) or state.owns(step)
    if owned:
        # From now on the job may write there. Only a model and embeddings are never written over.
        content = step.content() if step.kind in ("model", "embeddings") else None
        state.put(step, _Record(key=key, finished=False, content=content, mark=content and step.mark()))
        if (
            step.kind == "model"
            and content is None
            and record is not None
            and record.mark == step.mark() is not None
        ):
            _make_room(step, key, state)  # the job would take what is left of it for finished
    run = find_reference(step.command.run)
    config = step.config
    if owned and isinstance(config, IndexBuildConfig):
        config = _in_place_of_later_builds(config, step.title)
    try:
        figures = run(config)
    except OtherOutputError:
        if not owned:
            raise
        _make_room(step, key, state)
        figures = run(config)
    found: dict[str, Any] = json.loads(json.dumps(figures, default=str))
    return found


def _in_place_of_later_builds(config: IndexBuildConfig, title: str) -> IndexBuildConfig:
    """`config`, with `replace` where the index was built by it once and by another config later.

    The job itself takes such a build for finished, since it never undoes what came later.

    Raises:
        InputError: the index was also changed since, by commands that are no steps.
    """
    index = Location.of(config.output)
    if config.replace or published_version(index) is None:
        return config
    newest, identity = open_manifest(index), build_identity(config)
    if identity not in newest.built or identity == newest.built[-1]:
        return config
    if newest.applied:
        raise InputError(
            f"{title}: {index} was changed {len(newest.applied)} times since it was built; a new build takes the "
            "place of all that: set replace: true, or build into another folder"
        )
    return config.model_copy(update={"replace": True})


def _make_room(step: _Step, key: str, state: _State) -> None:
    assert step.output is not None
    former = put_aside(step.output)
    log(
        f"{step.title}: what an earlier config or other data made of {step.output} is {former} now; remove it if not "
        "wanted"
    )
    state.put(step, _Record(key=key, finished=False))


def _finished(step: _Step, key: str, figures: dict[str, Any]) -> _Record:
    return _Record(key=key, finished=True, content=step.content(), mark=step.mark(), figures=figures)


# --- checking ------------------------------------------------------------------------------------------------------


def _prepare(config: PipelineConfig) -> list[_Step]:
    steps: list[_Step] = []
    key = former_key = ""
    for number, step in enumerate(config.steps, start=1):
        if step.job not in STEP_JOBS:
            raise InputError(f"steps.{number}.job is {step.job!r}; it must be one of {', '.join(STEP_JOBS)}")
        command = COMMANDS[step.job]
        job_config = make_config(
            find_reference(command.config), step.config, source=f"step {number} ({step.job})"
        )
        key = _key_after(key, step.job, _without_newer(step.job, job_config.model_dump(mode="json")))
        former_key = _key_after(former_key, step.job, _former_values(step.job, job_config))
        inputs = tuple(_inputs(step.job, job_config, steps))
        steps.append(_Step(number, step.job, command, job_config, inputs, (key, former_key)))
    _check_order(steps)
    return steps


def _inputs(job: str, config: Config, earlier: Sequence[_Step]) -> list[_Input]:
    found = []
    for key, kind, section in _places(config):
        value = getattr(section, key.rpartition(".")[2], None)
        if key == "model" and getattr(config, "init_from", None) is not None:
            continue
        # Null, and the names that `labels` of a reranker are, name nothing to read.
        named = {key: value} if isinstance(value, str) else {}
        if key == "compare" and value is not None:
            named = {f"{key}.{number}": place for number, place in enumerate(value)}
        if isinstance(value, Mapping):
            named = {f"{key}.{label}": place for label, place in value.items()}
        records = _RECORDS.get((job, key), "corpus" if key.endswith(".corpus") else "pairs")
        for full_key, place in named.items():
            makers = [step.number for step in earlier if step.output and may_hold(place, step.output)]
            rows = _rows_at(key, place, section) if kind == "rows" else None
            found.append(_Input(full_key, kind, place, rows, records, tuple(makers)))
    return found


def _places(config: Config) -> Iterator[tuple[str, Kind, Any]]:
    """The keys of a job that may name what it reads, each with the section that holds it.

    Sets of a training have names of their own; their sections are as they hold for each.
    """
    for key, kind in INPUT_KEYS.items():
        section: Any = config
        for name in key.split(".")[:-1]:
            section = getattr(section, name, None)
        yield key, kind, section
    for name in ("train", "dev"):
        owner = getattr(config, name, None)
        for own in getattr(owner, "sets", None) or ():
            section = owner.of_set(own)  # type: ignore[union-attr]
            yield f"{name}.sets.{own}.path", "rows", section
            yield f"{name}.sets.{own}.corpus", "rows", section


def _rows_at(key: str, place: str, section: Any) -> InputConfig:
    if isinstance(section, InputConfig):
        return section
    return InputConfig(path=place, split=getattr(section, "split", None) or _SPLITS.get(key.split(".")[0]))


def _check_order(steps: Sequence[_Step]) -> None:
    """Raises InputError where two steps write to one place, or one reads what it or a later one writes."""
    writing = [(step, step.output) for step in steps if step.output is not None]
    for place, (step, output) in enumerate(writing):
        for other, other_output in writing[place + 1 :]:
            if is_inside(output, other_output) or is_inside(other_output, output):
                raise InputError(
                    f"{step.title} and {other.title} write to {output!r} and {other_output!r}, of which one holds the "
                    "other; give each step an output of its own"
                )
        for reader in steps[: step.number]:
            for item in reader.inputs:
                if is_inside(item.name, output):
                    raise InputError(
                        f"{reader.title} reads {item.key} {item.name!r}, which {step.title} writes; put the step that "
                        "writes it first, or name another output"
                    )


# --- keys ----------------------------------------------------------------------------------------------------------


def _settings(config: Config) -> dict[str, Any]:
    """What a config sets otherwise than by default, so that a key that is added later changes no step's key."""
    dumped = config.model_dump(mode="json")
    fields = type(config).model_fields
    return {
        name: _settings(value) if isinstance(value, Config) else dumped[name]
        for name, value in config
        # The name of an objective is its class's default, and tells it from others.
        if name == "name" or not _is_default(name, value, fields[name].get_default(call_default_factory=True))
    }


def _is_default(name: str, value: Any, default: Any) -> bool:
    return bool(value == default or value == _MEANT.get(name, default))


def _without(settings: Mapping[str, Any], keys: Set[str]) -> dict[str, Any]:
    """The settings without these keys, which may be dotted; a section that held nothing else goes too."""
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        below = {key.partition(".")[2] for key in keys if key.partition(".")[0] == name}
        if "" in below:
            continue
        part = _without(value, below) if below and isinstance(value, Mapping) else value
        if part or not below:
            kept[name] = part
    return kept


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _key_after(key: str, job: str, values: Mapping[str, Any]) -> str:
    content = json.dumps([key, job, values], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _without_newer(job: str, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that came later, where they say what was done before them: a finished step stays finished."""
    gained = _GAINED.get(job, {})
    values = {name: value for name, value in values.items() if name not in gained or value != gained[name]}
    if job == "similarity":
        values = {name: value for name, value in values.items() if name != "workers"}
        # What null means of an encoder, and the default was.
        values["threshold"] = 0.8 if values["threshold"] is None else values["threshold"]
        if isinstance(below := values.get("compute"), dict):  # as keys were named once
            kept = {name: value for name, value in below.items() if name not in gained or value is not None}
            values["compute"] = kept
    if isinstance(workers := values.get("workers"), dict):
        # `num` had the name `max` where workers come and go.
        values = {
            **values,
            "workers": {
                name: _FORMER_WORKERS.get("num" if name == "max" else name) if value is None else value
                for name, value in workers.items()
                if value or name not in _GAINED_BY_WORKERS
            },
        }
    if job in ("mine", "evaluate") and values["mode"] == "dense":
        values = {
            name: value
            for name, value in values.items()
            if name not in _BY_VECTORS or value != _BY_VECTORS[name]
        }
    if job == "evaluate":
        values = {name: value for name, value in values.items() if name not in _NEWER_OF_EVALUATE or value}
    if job in _GAINED_AN_ENGINE and values["engine"] == "torch":
        return {name: value for name, value in values.items() if name != "engine"}
    if job.startswith("train-"):
        kept = _as_before(values)
        for section in ("train", "dev", "optimizer", "objective", "workers"):
            if isinstance(own := kept.get(section), dict):
                kept[section] = _as_before(own)
        if isinstance(dev := kept.get("dev"), dict) and dev["every_steps"] is None:
            dev["every_steps"] = EVERY_STEPS  # what null means, and the default was
        return kept
    return values


def _as_before(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _NEWER or value != _NEWER[name]}


def _former_values(job: str, config: Config) -> dict[str, Any]:
    """The config of a step as it was dumped before keys were renamed."""
    if job.startswith("train-"):  # none of their keys was renamed
        values = _without_newer(job, config.model_dump(mode="json"))
        # It was the default where auto is now.
        return {**values, "dtype": "bfloat16"} if values["dtype"] == "auto" else values
    values = _without_newer(job, _under_former_keys(config))
    if isinstance(config, IndexBuildConfig) and config.target.queries is not None:
        values["target"]["queries"] = config.target.queries.path_alone
    if job == "mine":  # its `format` was what `file_type` is now
        values["format"] = values.pop("file_type")
    if job in ("classify", "similarity"):  # they had this key and never read it
        values["compute"]["rerank_max_length"] = None
    return values


def _under_former_keys(config: Config) -> dict[str, Any]:
    names = {new: old for old, new in former_keys(type(config)).items()}
    dumped = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for name, value in config:
        *section, last = names.get(name, name).split(".")
        part = values.setdefault(section[0], {}) if section else values
        part[last] = _under_former_keys(value) if isinstance(value, Config) else dumped[name]
    return values
