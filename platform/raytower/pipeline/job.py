"""`raytower pipeline`: jobs from one file, and again only those that a change concerns.

The state file remembers each step by its output. A step is finished while its key and its output are what they were.
The key hashes the job, the settings of its config, the content of what it reads, and the keys of the steps that made
any of that. A step that was killed is started again, and its job goes on where it was.

Some jobs change an index or a model in place and write no output of their own. Such a step is finished while its key is
what it was and what it changed is as it, or a later step, left it; all of them may be run again at any time.

What a job would refuse to write over, a model or embeddings of another config, is renamed before the step is made anew,
if this pipeline has written it. Everything else that lies in the way is refused before the first step runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, former_keys, make_config
from raytower.data.beir import is_beir
from raytower.data.config import InputConfig, PathConfig
from raytower.data.records import RecordKind
from raytower.data.sources import would_read
from raytower.encoding.job import JOB_NAME
from raytower.errors import FormatError, InputError, OtherOutputError
from raytower.evaluation.config import TuneFusionConfig
from raytower.evaluation.reports import check_reports_output
from raytower.index.build import build_identity, find_damage
from raytower.index.change_config import IndexSyncConfig
from raytower.index.config import IndexBuildConfig
from raytower.index.versions import index_folder, open_manifest, published_version
from raytower.models.directory import INFO_NAME
from raytower.only_job import only_job
from raytower.pipeline.apart import Processes
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
from raytower.pipeline.graph import Access, Work, run_graph, waits
from raytower.progress import log
from raytower.serving.config import ServeReloadConfig
from raytower.storage import Lease, Location, StorageError, lease_holder, output_folder, put_aside
from raytower.training.config import EVERY_STEPS, FREE_KEYS

_STATE_VERSION = 3
# Version 2 lacks the lineage, and when a step ran.
_READ_VERSIONS = (2, 3)
_FORMER_KEY = re.compile(r"[0-9a-f]{16}")
# A look at who holds the lock takes it for a moment.
_LOCK_SECONDS = 1.0
# Each job, and what it writes; None has no output: it changes something in place, or tells a server.
STEP_JOBS: dict[str, Kind | None] = {
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
    "tune-classify": "rows",
    "export": "export",
    "adapt": "rounds",
    "refresh": "rounds",
    "tune-fusion": None,
    "index sync": None,
    "index add": None,
    "index delete": None,
    "index set": None,
    "index compact": None,
    "index gc": None,
    "serve reload": None,
}
# Jobs that publish versions of the index that their key `index` names.
_CHANGE_INDEX = ("index sync", "index add", "index delete", "index set", "index compact")
# Jobs that are pipelines themselves, and who knows theirs: they stand on higher floors than this one.
_PIPELINES_OF = {
    "adapt": "raytower.adapt.job:pipelines_of",
    "refresh": "raytower.refresh.job:pipelines_of",
}
_ROUNDS_STATE = "pipeline.json"
# The keys that name files of rows which a job writes beside its output.
_BESIDE_OUTPUT = ("suspects",)
# What `serve reload` says in place of a model to serve without one.
_NO_MODEL = "none"
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
    ("index sync", "input.path"): "corpus",
}
# The split of a BEIR folder that is read where a config names none.
_SPLITS = {"dev": "dev"}
# Keys that change how a job goes and not its result.
_FREE_KEYS = {
    **dict.fromkeys(("train-retriever", "train-reranker", "train-classifier"), FREE_KEYS),
    "encode": frozenset({"workers", "tokens_per_batch"}),
    **dict.fromkeys(
        ("search", "rerank", "similarity", "mine", "classify", "evaluate"), frozenset({"workers"})
    ),
    # `num` decides into how many shards an index is built.
    **dict.fromkeys(
        ("index build", "index compact"),
        frozenset(f"workers.{name}" for name in ("num_cpus", "num_gpus", "resources", "label_selector")),
    ),
    **dict.fromkeys(("index add", "index delete"), frozenset({"workers"})),
    "index sync": frozenset({"workers", "tokens_per_batch"}),
    "serve reload": frozenset({"key_env", "timeout_s"}),
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
    "serve reload": {"mode": None, "hybrid": {"fusion": None, "weight": None}},
    # An index of before has no lexical side, which `index compact` adds; it is not built anew for it.
    "index build": {"lexical": True, "tokens": {"stemmer": None, "unspaced": "icu"}},
}
# What `evaluate` has gained; null and false are what was done before.
_NEWER_OF_EVALUATE = ("run", "compare", "metrics", "ignore_identical_ids", "stages", "plots", "figures")
# What mine and evaluate have gained for modes.
_BY_VECTORS = {"mode": "dense", "hybrid": {"fusion": None, "weight": None}}
_GAINED_WORKERS = ("similarity", "mine", "classify", "evaluate")
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
    config: Config
    inputs: tuple[_Input, ...]
    changes: str | None
    """The config's key that names what it changes in place; null changes nothing."""
    former_keys: tuple[str, str]
    """Its keys in state files of before: with the config's keys as they are named now, and as they were named once."""
    repeats: int = 0
    """How many earlier steps are the same job with the same settings, as a second compaction of an index is."""

    @property
    def title(self) -> str:
        return f"step {self.number} {self.job}"

    @property
    def output(self) -> str | None:
        return getattr(self.config, "output", None)

    @property
    def kind(self) -> Kind:
        """Of its output."""
        kind = STEP_JOBS[self.job]
        assert kind is not None
        return kind

    @property
    def changed(self) -> _Input | None:
        """What it changes in place."""
        return next((item for item in self.inputs if item.key == self.changes), None)

    @property
    def written(self) -> str | None:
        """Its output, or what it changes."""
        return self.output if self.changed is None else self.changed.name

    @property
    def beside(self) -> tuple[str, ...]:
        """Files of rows that it writes beside its output."""
        named = (getattr(self.config, key, None) for key in _BESIDE_OUTPUT)
        return tuple(place for place in named if isinstance(place, str))

    @property
    def all_written(self) -> tuple[str, ...]:
        return (*([] if self.written is None else [self.written]), *self.beside)

    @property
    def access(self) -> Access:
        return Access(tuple(item.name for item in self.inputs), self.all_written)

    @property
    def makers(self) -> set[int]:
        return {number for item in self.inputs for number in item.makers}

    @cached_property
    def settings(self) -> dict[str, Any]:
        return _without(_settings(self.config), _FREE_KEYS.get(self.job, frozenset()))

    @property
    def slot(self) -> str:
        """By which name the state file remembers it."""
        if self.output is not None:
            return self.output
        again = f" ({self.repeats + 1})" if self.repeats else ""
        return f"{self.job} without output {_hash(self.settings)}{again}"

    def origin(self, keys: Mapping[int, str]) -> _Origin:
        """What it comes from, once all that it reads is there. `keys` has those of its makers.

        Raises:
            InputError: an input is missing or damaged.
        """
        # What it changes would be another thing after it.
        read = {item.key: self._content_of(item) for item in self.inputs if item.key != self.changes}
        return _Origin(
            job=self.job,
            writes=self.written,
            settings=self.settings,
            inputs={item.key: {"name": item.name, "content": read.get(item.key)} for item in self.inputs},
            made_by=tuple(keys[number] for number in sorted(self.makers)),
        )

    def _content_of(self, item: _Input) -> str:
        try:
            return content_of(item.kind, item.name, item.rows, item.records)
        except InputError as error:
            raise InputError(f"{self.title}: {error}") from error

    def content(self) -> str | None:
        """Of its output, or of what it changes. Raises InputError where the latter is missing."""
        if self.changed is not None:
            return self._content_of(self.changed)
        return None if self.output is None else content_of_output(self.kind, self.output)

    def mark(self) -> str | None:
        return None if self.output is None else mark_of(self.kind, self.output)


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a step comes from. Its key names it, so that an output is known by all that it came from."""

    job: str
    writes: str | None
    settings: dict[str, Any]
    inputs: dict[str, dict[str, str | None]]
    """By the config's key `name` and `content`, as it was read; the content is null of what the step changes."""
    made_by: tuple[str, ...]
    """Keys of the steps that made any of the inputs, in their order."""

    @cached_property
    def key(self) -> str:
        read = {key: item["content"] for key, item in self.inputs.items() if item["content"] is not None}
        return _hash([self.job, self.settings, read, list(self.made_by)])


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the state file remembers of a step."""

    key: str
    finished: bool
    content: str | None = None
    """Of its output, or of what it changes, as the step left it; null where it has none, or has not finished one."""
    mark: str | None = None
    """By which its output is known where parts of it are gone."""
    figures: dict[str, Any] | None = None
    when: str | None = None
    """When it began last, in UTC."""
    seconds: float | None = None
    error: str | None = None
    """Why it has failed, empty where it was killed; null of one that is finished or at work."""
    others: bool = False
    """Whether what it changed in place holds changes by commands that are no steps, which no build may undo."""


class _State:
    """The state file: what was finished, of what it was made, and which outputs the pipeline has written.

    Any thread may put a record; one process writes the file (`only_job`).

    Args:
        lease: is held as long as the file may be written; None where the storage has none, or nothing is written.
    """

    def __init__(self, place: Location, steps: Sequence[_Step], lease: Lease | None = None) -> None:
        self._place = place
        self._steps = steps
        self._lease = lease
        self._lock = threading.RLock()
        values: Any = place.read_json() if place.exists() else {"format_version": _STATE_VERSION, "steps": {}}
        self._records: dict[str, _Record] = {}
        self._lineage: dict[str, dict[str, Any]] = {}
        if not _is_state(values):
            raise FormatError(
                f"{place} is no state of a pipeline that this raytower reads (version {_STATE_VERSION}); name another "
                "file as state"
            )
        if "format_version" in values:
            try:
                self._records = {name: _Record(**record) for name, record in values["steps"].items()}
                self._lineage = dict(values.get("lineage", {}))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise FormatError(
                    f"{place} is damaged, or was changed by hand ({error}); bring it back, or name another file as "
                    "state"
                ) from error
        else:
            self._adopt(values, steps)

    def _adopt(self, finished: Mapping[str, Any], steps: Sequence[_Step]) -> None:
        """Take over the steps of a state file of before, which held keys of configs alone, up to the first change."""
        keys: dict[int, str] = {}
        for step in steps:
            figures = next((finished[key] for key in step.former_keys if key in finished), None)
            if figures is None or (step.output is not None and is_empty(step.output)):
                break
            try:
                origin = step.origin(keys)
            except InputError:  # what it reads is gone, which is said where the step's turn comes
                break
            keys[step.number] = origin.key
            self._note(origin)
            self._records[step.slot] = _finished(step, origin.key, figures)
        log(
            f"{self._place} was written by an older version of raytower, which did not look at what steps read: "
            f"{len(self._records)} of {len(steps)} steps count as finished with their inputs as they are now"
        )

    def of(self, step: _Step) -> _Record | None:
        return self._records.get(step.slot)

    def put(self, step: _Step, record: _Record, origin: _Origin | None = None) -> None:
        """Remember a record, and what the step comes from; writes the file."""
        with self._lock:
            self._records[step.slot] = record
            if origin is not None:
                self._note(origin)
            self.write()

    def _note(self, origin: _Origin) -> None:
        self._lineage[origin.key] = {
            "job": origin.job,
            "writes": origin.writes,
            "settings": origin.settings,
            "inputs": origin.inputs,
            "made_by": list(origin.made_by),
        }

    def lineage(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """By their keys these origins, and those of all that they came from, nearest first."""
        found: dict[str, dict[str, Any]] = {}
        waiting = list(keys)
        while waiting:
            key = waiting.pop(0)
            if key in self._lineage and key not in found:
                found[key] = self._lineage[key]
                waiting += found[key]["made_by"]
        return found

    def take_over(self) -> None:
        """Write the file as one of this version, in which no step is at work: those that were have been killed."""
        for name, record in self._records.items():
            if not record.finished and record.error is None:
                self._records[name] = replace(record, error="")
        self.write()

    def write(self) -> None:
        """Raises StorageError, and RaytowerError where another process may write the file."""
        with self._lock:
            if self._lease is not None:
                self._lease.check()
            steps = {name: vars(each) for name, each in self._records.items()}
            # No more than what records came from.
            self._lineage = self.lineage([record.key for record in self._records.values()])
            self._place.write_json(
                {"format_version": _STATE_VERSION, "steps": steps, "lineage": self._lineage}
            )

    def owns(self, step: _Step) -> bool:
        """Whether what lies at the step's output was written by it, or begun."""
        record = self.of(step)
        return record is not None and record.mark in (None, step.mark())

    def why(self, step: _Step, key: str) -> str | None:
        """Why a step of this key is to run, and None where it is finished. Raises InputError as `_Step.content`."""
        record = self.of(step)
        if record is None:
            return "it did not run before"
        if not record.finished:
            return f"it failed: {record.error}" if record.error else "it was not finished"
        if record.key != key:
            return "its config or what it reads has changed"
        if step.changed is not None:
            return None if self._is_as_left(step) else f"something else has changed {step.written} since"
        if record.content != step.content():
            return "its output is gone, or not whole"
        gone = next((place for place in step.beside if is_empty(place)), None)
        return None if gone is None else f"{gone} is gone"

    def _is_as_left(self, step: _Step) -> bool:
        """Whether what a step changed is as it, or a later step, left it, or as one that was killed may have."""
        now = step.content()
        records = [
            self.of(step),
            *(self.of(other) for other in self._changes_of(step) if other.number > step.number),
        ]
        return any(record.content == now or not record.finished for record in records if record is not None)

    def _changes_of(self, step: _Step) -> list[_Step]:
        """The steps that change what a step writes, or changes too."""
        return [
            other
            for other in self._steps
            if other.changed is not None
            and step.written is not None
            and is_inside(other.changed.name, step.written)
        ]

    def has_changed(self, step: _Step) -> bool:
        """Whether a step's output is as steps that change it in place left it, so that nothing of others is in it."""
        slots = {other.slot for other in self._changes_of(step)} | self._slots_of_changes(step.output or "")
        now = content_of(step.kind, step.output or "")
        known = [
            record.others for name, record in self._records.items() if name in slots and record.content == now
        ]
        return bool(known) and not any(known)

    def _slots_of_changes(self, output: str) -> set[str]:
        """By their slots what has changed an output in place, steps with former settings too."""
        made = {name: self._lineage.get(record.key) for name, record in self._records.items()}
        return {
            name
            for name, origin in made.items()
            if origin is not None
            and STEP_JOBS.get(origin["job"]) is None
            and origin["writes"] is not None
            and is_inside(origin["writes"], output)
        }

    def holds_others(self, step: _Step) -> bool:
        """Whether what a step is about to change holds changes by commands that are no steps, and will hold them then.

        A synchronisation that deletes leaves nothing but its input. What a killed step has left counts as its own.
        """
        changed = step.changed
        if changed is None or changed.kind != "index":
            return False
        if isinstance(step.config, IndexSyncConfig) and step.config.gone == "delete":
            return False
        records = [
            record
            for other in self._steps
            if other.changed is not None
            and is_inside(other.changed.name, changed.name)
            and (record := self.of(other)) is not None
        ]
        now = step.content()
        known = [record.others for record in records if record.content == now]
        if not known and any(not record.finished for record in records):
            known = [record.others for record in records]
        return any(known) if known else bool(open_manifest(changed.name).applied)


def _is_state(values: Any) -> bool:
    """Whether a JSON file is a state of this version or of one before; the first ones had keys of steps alone."""
    if not isinstance(values, dict):
        return False
    if "format_version" in values:
        return values["format_version"] in _READ_VERSIONS
    return all(_FORMER_KEY.fullmatch(key) for key in values)


def run_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run the steps that are not finished; returns the figures of every step, or `pipeline_status` if `status` is true.

    Raises:
        InputError: an unknown job, a config that its job refuses, steps in the wrong order, or an output that holds
            something else. All steps are checked before the first one runs. An input that is missing. Another pipeline
            is at work on the state.
        Any error of a step: of the first one, where several failed.
    """
    if config.status:
        return pipeline_status(config)
    steps = _prepare(config)
    place = Location.of(config.state)
    with only_job(
        _lock_of(place),
        config.state,
        owner="a pipeline",
        doing="written by another pipeline",
        wait_seconds=_LOCK_SECONDS,
    ) as lease:
        state = _State(place, steps, lease)
        _check_outputs(steps, state)
        state.take_over()
        return {"steps": _run_steps(steps, state, config.parallel)}


def _run_steps(steps: Sequence[_Step], state: _State, parallel: int) -> list[dict[str, Any]]:
    """Figures of all steps, in their order. Raises what the first one that failed has raised, once all others ended."""
    keys: dict[int, str] = {}
    results: dict[int, dict[str, Any]] = {}
    processes = Processes()

    def begin(position: int) -> Work | None:
        step = steps[position]
        name = f"step {step.number}/{len(steps)} {step.job}"
        origin = step.origin(keys)
        why = state.why(step, origin.key)
        keys[step.number] = origin.key
        record = state.of(step)
        if why is None and record is not None:
            log(f"{name}: finished before, skipped")
            if not state.lineage([origin.key]):  # of a state that had none yet
                state.put(step, record, origin)
            results[position] = {"job": step.job, "skipped": True, **(record.figures or {})}
            return None
        log(f"{name}: running ({why})")
        run = _run_here if parallel == 1 else partial(processes.run, title=name)
        return partial(_run_recorded, step, origin, state, run)

    def end(position: int, figures: dict[str, Any]) -> None:
        results[position] = {"job": steps[position].job, "skipped": False, **figures}

    failed = run_graph(_order(steps), parallel, begin, end, stop=processes.stop)
    if failed:
        first, *others = sorted(failed)
        for position in others:
            log(f"{steps[position].title} failed: {failed[position]}")
        raise failed[first]
    return [results[position] for position in range(len(steps))]


def _order(steps: Sequence[_Step]) -> list[frozenset[int]]:
    """For each step the positions of those that have to end before it. A server takes one change at a time."""
    servers = [step.config.url if isinstance(step.config, ServeReloadConfig) else None for step in steps]
    return [
        others | {n for n in range(number) if servers[number] is not None and servers[n] == servers[number]}
        for number, others in enumerate(waits([step.access for step in steps], may_hold))
    ]


# Runs a job by its name and config; returns its figures.
_Runner = Callable[[str, Config], dict[str, Any]]


def _run_here(job: str, config: Config) -> dict[str, Any]:
    figures: dict[str, Any] = find_reference(COMMANDS[job].run)(config)
    return figures


def _run_recorded(step: _Step, origin: _Origin, state: _State, run: _Runner) -> dict[str, Any]:
    """Run a step, and remember how it ended; returns its figures."""
    when, started = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()

    def timed(record: _Record) -> _Record:
        return replace(record, when=when, seconds=round(time.perf_counter() - started, 3))

    try:
        figures = _run(step, origin, state, run, when)
    except Exception as error:
        record = state.of(step)
        if record is not None and not record.finished:
            state.put(step, timed(replace(record, error=str(error) or type(error).__name__)))
        raise
    begun = state.of(step)
    finished = replace(_finished(step, origin.key, figures), others=begun is not None and begun.others)
    state.put(step, timed(finished))
    return figures


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
        # Of a step that never ran nothing has to be read, which need not be there yet.
        why = "it did not run before" if state.of(step) is None else _why_now(step, state, keys)[0]
        planned.append({"job": step.job, "skipped": why is None, "why": why})
    return {"steps": planned}


def _why_now(step: _Step, state: _State, keys: dict[int, str]) -> tuple[str | None, str | None]:
    """Why a step would run now, None where it is finished, which then gets its key in `keys`; and its key if it is
    known. Raises InputError as `_Step.origin`."""
    if not step.makers <= keys.keys():
        return "what it reads is made anew", None
    origin = step.origin(keys)
    why = state.why(step, origin.key)
    if why is None:
        keys[step.number] = origin.key
    return why, origin.key


def pipeline_status(config: PipelineConfig) -> dict[str, Any]:
    """How each step stands, without running or writing anything.

    Returns:
        `steps`, a record each: `step` (its number), `job`, `state`, `why` (it would run again; null if finished),
        `output` (or what it changes), `key`, `when` (it began last, UTC), `seconds` and `lineage` (by their keys the
        origins of what lies there, and of all that this came from). States: `finished`; `changed` (it would run again),
        `missing` (what it writes is not there, or what it reads), `running` (by another process, now). `running_by`:
        who holds the state, or null.

    Raises:
        InputError: as `run_pipeline`, of configs and their order.
    """
    steps = _prepare(config)
    place = Location.of(config.state)
    state = _State(place, steps)
    try:
        holder = lease_holder(_lock_of(place))
    except StorageError:
        raise
    except InputError:  # storage without locks, where nobody can be seen
        holder = None
    keys: dict[int, str] = {}
    return {
        "steps": [_status_of(step, state, keys, is_held=holder is not None) for step in steps],
        "running_by": holder,
    }


def _status_of(step: _Step, state: _State, keys: dict[int, str], *, is_held: bool) -> dict[str, Any]:
    record, key = state.of(step), None
    try:
        why, key = _why_now(step, state, keys)
        found = "finished" if why is None else "changed"
        is_there = step.output is None or not is_empty(step.output)
        if why is not None and (record is None or not record.finished or not is_there):
            found = "missing"
    except InputError as error:
        found, why = "missing", str(error)
    try:
        _check_output(step, state)
    except InputError as error:
        found, why = "changed", str(error)
    if is_held and record is not None and not record.finished and record.error is None:
        found, why = "running", None
    return {
        "step": step.number,
        "job": step.job,
        "state": found,
        "why": why,
        "output": step.written,
        "key": record.key if record is not None and key is None else key,
        "when": record and record.when,
        "seconds": record and record.seconds,
        "lineage": state.lineage([record.key]) if record is not None else {},
    }


def _lock_of(state: Location) -> Location:
    return state.parent / f".{state.name}.lock"


def _check_outputs(steps: Sequence[_Step], state: _State) -> None:
    """Raises InputError where an output holds what its step did not leave there."""
    for step in steps:
        _check_output(step, state)


def _check_output(step: _Step, state: _State) -> None:
    if step.output is None or is_empty(step.output):
        return
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
    if kind in ("model", "export"):
        output_folder(output, INFO_NAME)
    elif kind == "embeddings":
        output_folder(output, JOB_NAME)
    elif kind == "rounds":
        output_folder(output, _ROUNDS_STATE)
    elif kind == "index":
        index_folder(output)
    elif kind == "report":
        check_reports_output(output)
    else:
        raise InputError(
            f"output {output!r} exists, and this pipeline did not write it; move it away, or name another output"
        )


def _run(step: _Step, origin: _Origin, state: _State, run: _Runner, when: str) -> dict[str, Any]:
    """Run a step's job; an output of another config makes room for it, where the pipeline has written that."""
    record = state.of(step)
    owned = step.output is None or is_empty(step.output) or state.owns(step)
    begun = _Record(key=origin.key, finished=False, when=when)
    if step.changed is not None:
        # What steps left there last is still what to know it by.
        content = record.content if record else None
        state.put(step, replace(begun, content=content, others=state.holds_others(step)), origin)
    elif owned:
        # From now on the job may write there. Only what a job refuses to write over is known by what it was.
        content = step.content() if _is_kept(step) else None
        state.put(step, replace(begun, content=content, mark=content and step.mark()), origin)
        if (
            step.output is not None
            and step.kind in ("model", "export")
            and content is None
            and record is not None
            and record.mark == step.mark() is not None
        ):
            _make_room(step, begun, state)  # the job would take what is left of it for finished
    config = step.config
    if owned and isinstance(config, IndexBuildConfig):
        config = _in_place_of_later_builds(config, step.title, is_ours=partial(state.has_changed, step))
    try:
        figures = run(step.job, config)
    except OtherOutputError:
        if not owned:
            raise
        _make_room(step, begun, state)
        figures = run(step.job, config)
    found: dict[str, Any] = json.loads(json.dumps(figures, default=str))
    return found


def _is_kept(step: _Step) -> bool:
    """Whether a job of its kind never writes over what is there."""
    return step.output is not None and step.kind in ("model", "export", "embeddings")


def _in_place_of_later_builds(
    config: IndexBuildConfig, title: str, *, is_ours: Callable[[], bool]
) -> IndexBuildConfig:
    """`config`, with `replace` where the index was built by it once and by another config later.

    The job itself takes such a build for finished, since it never undoes what came later. Nor does it undo changes of
    its index, which later steps make again where they are theirs (`is_ours`).

    Raises:
        InputError: the index was also changed since, by commands that are no steps.
    """
    index = Location.of(config.output)
    if config.replace or published_version(index) is None:
        return config
    newest, identity = open_manifest(index), build_identity(config)
    is_whole = find_damage(index, newest) is None
    if identity in newest.built[-1:] and (is_whole or not newest.applied):
        return config
    if newest.applied and is_ours():
        return config.model_copy(update={"replace": True})
    if identity not in newest.built:
        return config
    if newest.applied:
        raise InputError(
            f"{title}: {index} was changed {len(newest.applied)} times since it was built; a new build takes the "
            "place of all that: set replace: true, or build into another folder"
        )
    return config.model_copy(update={"replace": True})


def _make_room(step: _Step, begun: _Record, state: _State) -> None:
    assert step.output is not None
    former = put_aside(step.output)
    log(
        f"{step.title}: what an earlier config or other data made of {step.output} is {former} now; remove it if not "
        "wanted"
    )
    state.put(step, begun)


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
        inputs = tuple(_inputs(step.job, job_config, steps, f"step {number} ({step.job})"))
        changes = _changed_key(step.job, job_config)
        made = _Step(number, step.job, job_config, inputs, changes, (key, former_key))
        repeats = sum((other.job, other.settings) == (made.job, made.settings) for other in steps)
        steps.append(replace(made, repeats=repeats))
    _check_order(steps)
    _check_state(config.state, steps)
    return steps


def _changed_key(job: str, config: Config) -> str | None:
    """The key that names what a job changes in place, if it does."""
    if isinstance(config, TuneFusionConfig):
        stored = "index" if config.reranker is None else "reranker"
        return stored if config.store else None
    return "index" if job in _CHANGE_INDEX else None


def _inputs(job: str, config: Config, earlier: Sequence[_Step], title: str) -> list[_Input]:
    """What a step reads.

    Raises:
        InputError: a reload that does not name its index, or a pipeline inside the step that is refused.
    """
    if job in _PIPELINES_OF:
        return _inputs_of_pipelines(job, config, earlier, title)
    if isinstance(config, ServeReloadConfig) and config.index is None:
        raise InputError(
            f"{title}: index is null, so that the pipeline cannot know what the server is to serve; name the index"
        )
    found = []
    for key, kind, section in _places(config):
        value = getattr(section, key.rpartition(".")[2], None)
        if key == "model" and getattr(config, "init_from", None) is not None:
            continue
        # Null, and the names that `labels` of a reranker are, name nothing to read.
        named = {key: value} if isinstance(value, str) else {}
        if job == "serve reload" and value == _NO_MODEL:
            continue
        if key == "compare" and value is not None:
            named = {f"{key}.{number}": place for number, place in enumerate(value)}
        if isinstance(value, Mapping):
            named = {f"{key}.{label}": place for label, place in value.items()}
        records = _RECORDS.get((job, key), "corpus" if key.endswith(".corpus") else "pairs")
        for full_key, place in named.items():
            if kind == "rows" and type(section) is PathConfig:  # ids, and values of documents
                found.append(_Input(full_key, "file", place, None, records, _makers(place, earlier)))
                continue
            rows = _rows_at(key, place, section) if kind == "rows" else None
            found.append(_Input(full_key, kind, place, rows, records, _makers(place, earlier)))
    return found


def _inputs_of_pipelines(job: str, config: Config, earlier: Sequence[_Step], title: str) -> list[_Input]:
    """What the steps of a job's own pipelines read, and none of them makes."""
    found: dict[tuple[Any, ...], _Input] = {}
    for pipeline in find_reference(_PIPELINES_OF[job])(config):
        try:
            steps = _prepare(pipeline)
        except InputError as error:
            raise InputError(f"{title}: {error}") from error
        for item in (item for step in steps for item in step.inputs):
            if not is_inside(item.name, config.output):  # type: ignore[attr-defined]
                same = (item.kind, item.name, item.records, repr(item.rows))
                key = f"{item.key} {len(found)}"
                found.setdefault(same, replace(item, key=key, makers=_makers(item.name, earlier)))
    return list(found.values())


def _makers(place: str, earlier: Sequence[_Step]) -> tuple[int, ...]:
    """Numbers of the steps that write, or change, any of what is read at a place."""
    return tuple(
        step.number for step in earlier if any(may_hold(place, written) for written in step.all_written)
    )


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
    """Raises InputError where two steps write to one place, or one reads what it or a later one writes.

    What a later step changes in place may only be read by a step that changes it too: what any other has read would
    never be there again.
    """
    writing = [
        (step, place)
        for step in steps
        for place in (*([] if step.output is None else [step.output]), *step.beside)
    ]
    for number, (step, output) in enumerate(writing):
        for other, other_output in writing[number + 1 :]:
            if is_inside(output, other_output) or is_inside(other_output, output):
                raise InputError(
                    f"{step.title} and {other.title} write to {output!r} and {other_output!r}, of which one holds the "
                    "other; give each step an output of its own"
                )
        for reader in steps[: step.number]:
            for item in reader.inputs:
                _refuse_reading(reader, item, step, output)
    for step in steps:
        if (changed := step.changed) is None:
            continue
        for reader in steps[: step.number - 1]:
            for item in reader.inputs:
                if item != reader.changed and may_hold(item.name, changed.name):
                    raise InputError(
                        f"{reader.title} reads {item.key} {item.name!r}, which {step.title} changes after it, so that "
                        "it would never count as finished; put the step that changes it first"
                    )


def _check_state(state: str, steps: Sequence[_Step]) -> None:
    """Raises InputError where the state would lie in what a step writes, or be read as rows."""
    for step in steps:
        for written in step.all_written:
            if is_inside(state, written) or is_inside(written, state):
                raise InputError(
                    f"state {state!r} lies where {step.title} writes ({written!r}), and one would destroy the other; "
                    "name a file outside of all that steps write"
                )
        for item in step.inputs:
            if item.rows is not None and would_read(item.name, state) and not is_beir(item.rows):
                raise InputError(
                    f"state {state!r} lies in {item.key} {item.name!r} of {step.title}, which would read it as rows; "
                    "name a file outside of all that steps read"
                )


def _refuse_reading(reader: _Step, item: _Input, writer: _Step, output: str) -> None:
    """Raises InputError where an input is, or would hold from the next run on, what the same or a later step writes."""
    if is_inside(item.name, output):
        raise InputError(
            f"{reader.title} reads {item.key} {item.name!r}, which {writer.title} writes; put the step that writes it "
            "first, or name another output"
        )
    # Folders of models, embeddings and indexes are no data; a BEIR folder is read by the names of its own files.
    is_data = output in writer.beside or writer.kind in ("rows", "report", "rounds")
    if is_data and item.rows is not None and would_read(item.name, output) and not is_beir(item.rows):
        raise InputError(
            f"{reader.title} reads {item.key} {item.name!r}, and {writer.title} writes {output!r} there, which the "
            "next run would read too; name another output, or an input that does not take it"
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
    if job in _GAINED_WORKERS:
        values = {name: value for name, value in values.items() if name != "workers"}
    if job == "similarity":
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
