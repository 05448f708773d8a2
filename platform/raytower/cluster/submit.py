"""`raytower submit`: a job of jobs/ on a cluster, by Ray's job submission, refused here where it cannot run there.

`_prepare` asks all that can be asked before anything starts, `submit` uploads and starts, `_follow` shows the log and
ends as the job ends. The job's own stdout and stderr come as one log, which is progress here: it goes to stderr, and
the last line of the job's stdout, its result, is part of the result here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytower import escapes
from raytower.cli.arguments import read_arguments
from raytower.cluster.config import SubmitConfig
from raytower.cluster.dashboard import JOB_KEY, OUTPUT_KEY, Dashboard, is_loopback, refuse_second_job
from raytower.cluster.jobs import check_job, driver_work, written_by
from raytower.cluster.paths import lacking_paths, named_paths, named_variables
from raytower.cluster.resources import Demand, demands, driver_cpus, undecided, unmet
from raytower.cluster.there import There, ask_head
from raytower.cluster.upload import (
    ARCHIVE_NAME,
    ConfigFile,
    Upload,
    entrypoint,
    pack,
    plan_upload,
    runtime_environment,
)
from raytower.commands import COMMANDS, find_reference
from raytower.config import load_config, make_config, read_config_file
from raytower.ending import TERMINATED
from raytower.errors import EndedJobError, InputError, RaytowerError, import_extra
from raytower.progress import log
from raytower.workers import nobody_decides

# Handed over where a config asks for what they are for, and they are set here; a login of another kind will do too.
_WANDB_VARIABLE = "WANDB_API_KEY"
_POLL_S = 0.5
_LAST_LINE_CHARACTERS = 2**20
_MAY_COME = 2
"""Machines that are counted where more may come than are there."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A job and its config, checked."""

    name: str
    arguments: tuple[str, ...]
    """Its own, without --config."""
    config_file: ConfigFile | None
    values: dict[str, Any]
    """Its config as plain values; of a pipeline with the configs of its steps as their jobs read them."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """All that a submission needs, and nothing left to refuse it."""

    dashboard: Dashboard
    job: _Job
    upload: Upload
    variables: Mapping[str, str]
    driver: dict[str, float]
    output: str | None
    versions: dict[str, str]
    num_nodes: int

    @property
    def entrypoint(self) -> str:
        return shlex.join(entrypoint(self.job.name, self.upload, self.job.arguments, bool(self.variables)))

    @property
    def metadata(self) -> dict[str, str]:
        return {JOB_KEY: self.job.name, **({OUTPUT_KEY: self.output} if self.output else {})}


def plan_submit(config: SubmitConfig) -> dict[str, Any]:
    """What would be submitted, after all that `submit` would refuse was refused.

    Raises:
        InputError: as `submit`.
    """
    if config.follow is not None:
        return {"follow": config.follow, "address": Dashboard.at(config.address).address}
    ready = _prepare(config)
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(ready.upload, ready.variables, Path(folder) / ARCHIVE_NAME)
    return {
        "address": ready.dashboard.address,
        "job": ready.job.name,
        "entrypoint": ready.entrypoint,
        "output": ready.output,
        "upload_bytes": packed,
        "files": len(ready.upload.files),
        "variables": sorted(ready.variables),
        "driver": ready.driver,
        "nodes": ready.num_nodes,
        **ready.versions,
    }


def submit(config: SubmitConfig) -> dict[str, Any]:
    """Submit a job and show its log until it ends; with `follow` show that of one that was submitted before.

    Returns:
        id, job, status, upload_bytes, seconds_to_start (from submission to the first line of its log), seconds (to
        its end), and `result`, the job's own figures.

    Raises:
        InputError: the cluster does not answer, refuses the token, or runs another Ray or Python; it lacks what the
            job asks for, paths or variables that its config names; too much would be uploaded; a job on the same
            output runs.
        EndedJobError: the job failed or was stopped; its exit code is this command's.
        RaytowerError: the cluster could not be asked, or the connection was lost.
    """
    if config.follow is not None:
        dashboard = Dashboard.at(config.address)
        dashboard.check_versions()
        dashboard.check_job(config.follow)
        return _follow(_client(dashboard), config.follow, dashboard.address)
    ready = _prepare(config)
    client = _client(ready.dashboard)
    named = f"{ready.job.name.replace(' ', '-')}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / ARCHIVE_NAME
        packed = pack(ready.upload, ready.variables, archive)
        log(
            f"uploading {len(ready.upload.files):,} files, {packed:,} bytes packed, to {ready.dashboard.address}"
        )
        _warn_of_variables(ready)
        begun = time.perf_counter()
        try:
            client.submit_job(
                submission_id=named,
                entrypoint=ready.entrypoint,
                runtime_env=runtime_environment(archive, bool(ready.variables), ready.driver["CPU"]),
                metadata=ready.metadata,
                entrypoint_num_cpus=ready.driver["CPU"],
                entrypoint_memory=int(ready.driver["memory"]),
            )
        except Exception as error:  # of Ray's client, which has no class of its own
            raise RaytowerError(
                f"the cluster at {ready.dashboard.address} did not take the job: {_short(str(error))}; `ray job list` "
                f"says whether {named} is there all the same"
            ) from error
    log(f"submitted {named}: {ready.entrypoint}")
    if config.detach:
        log(_how_to_follow(named, ready.dashboard.address))
        return {"id": named, "job": ready.job.name, "status": "PENDING", "upload_bytes": packed}
    return {"upload_bytes": packed, **_follow(client, named, ready.dashboard.address, begun)}


# --- before anything starts ---------------------------------------------------------------------------------------


def _prepare(config: SubmitConfig) -> _Prepared:
    job = _read_job(config)
    upload = plan_upload(job.config_file, config.max_upload)
    variables, unset = _variables(config, job, os.environ)
    dashboard = Dashboard.at(config.address)
    versions = dashboard.check_versions()
    nodes = dashboard.nodes()
    working = [node for node in nodes if node.get("CPU", 0) > 0]
    driver = {
        "CPU": driver_cpus(config.driver_cpus, driver_work(job.name), working),
        "memory": float(config.driver_memory or 0),
    }
    # A head without CPUs runs the job's own process, and other machines its workers.
    num_nodes = len(nodes) if working == nodes else max(len(nodes), _MAY_COME)
    _refuse_paths(config, job, upload, num_nodes)
    output = written_by(job.name, job.values)
    refuse_second_job(output, dashboard.running_jobs(), dashboard.address)
    asked = [*demands(job.values, bool(working), job.name.startswith("train-")), *_driver_demand(driver)]
    _refuse_undecided(job, working)
    if unset or unmet(asked, nodes, ()):
        _refuse_lacking(unset, asked, nodes, ask_head(_client(dashboard), [name for _, name in unset]))
    return _Prepared(
        dashboard=dashboard,
        job=job,
        upload=upload,
        variables=variables,
        driver=driver,
        output=output,
        versions=versions,
        num_nodes=len(nodes),
    )


def _read_job(config: SubmitConfig) -> _Job:
    """The job with its config as its own command would read it. Raises InputError as that would."""
    name = check_job(config.job or "")
    command = COMMANDS[name]
    config_class = find_reference(command.config)
    given = read_arguments(config_class, command.positions, config.arguments)
    if given.dry_run or given.as_json or given.help:
        raise InputError(
            "arguments hold --dry-run, --json or --help, which are those of submit; name them once"
        )
    content = None if given.config_path is None else read_config_file(given.config_path)
    read = load_config(config_class, given.config_path, given.overrides, content)
    values = read.model_dump(mode="json")
    for number, step in enumerate(values.get("steps") or [] if name == "pipeline" else []):
        source = f"step {number + 1} {step['job']}"
        if step["job"] not in COMMANDS:
            raise InputError(f"{source}: there is no such job; `raytower --help` lists them")
        step_class = find_reference(COMMANDS[step["job"]].config)
        step["config"] = make_config(step_class, step["config"], source).model_dump(mode="json")
    return _Job(
        name=name,
        arguments=tuple(_without_config(config.arguments)),
        config_file=None
        if given.config_path is None or content is None
        else ConfigFile(name=Path(given.config_path).name, content=content),
        values=values,
    )


def _without_config(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments without --config FILE, which has another name in the upload."""
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--config":
            waiting.pop(0)
        elif not argument.startswith("--config="):
            yield argument


def _variables(
    config: SubmitConfig, job: _Job, environment: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What is handed over; and keys of the config whose variables are not set here, with those.

    Raises:
        InputError: a variable that `env` names is not set.
    """
    lacking = [name for name in config.env if name not in environment]
    if lacking:
        raise InputError(
            f"env names {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not set here; export it, or "
            "leave it out where the cluster's nodes have it"
        )
    named = named_variables(job.values)
    wandb = job.values.get("wandb") or {}
    used = [name for _, name in named] + ([_WANDB_VARIABLE] if wandb.get("mode") == "online" else [])
    handed = {name: environment[name] for name in [*config.env, *used] if environment.get(name)}
    return handed, [(key, name) for key, name in named if name not in handed]


def _refuse_paths(config: SubmitConfig, job: _Job, upload: Upload, num_nodes: int) -> None:
    paths = named_paths(job.values, changes_index=job.name.startswith("index ") or job.name == "tune-fusion")
    places = [Path.cwd(), *([upload.root] if upload.root else [])]
    here = {
        path.value for path in paths if path.is_relative and any((p / path.value).exists() for p in places)
    }
    problems = lacking_paths(
        paths, uploaded=upload.files, shared=config.shared, num_nodes=num_nodes, exists_here=here
    )
    if problems:
        raise InputError("\n".join(problems))


def _driver_demand(driver: dict[str, float]) -> list[Demand]:
    bundle = {name: amount for name, amount in driver.items() if amount}
    key = "driver_memory" if bundle.keys() == {"memory"} else "driver_cpus"
    return [Demand(key=key, bundle=bundle)] if bundle else []


def _refuse_undecided(job: _Job, working: Sequence[object]) -> None:
    fitted = ("encode", "index sync", "train-retriever", "train-reranker", "train-classifier")
    if job.name in fitted and not working and undecided(job.values):
        raise nobody_decides()


def _refuse_lacking(
    unset: Sequence[tuple[str, str]],
    asked: Sequence[Demand],
    nodes: Sequence[dict[str, float]],
    there: There,
) -> None:
    """Raises InputError for variables that are set nowhere, and for what no machine has or will have."""
    problems = [
        f"{key} is {name!r}, an environment variable that is set neither here nor on the cluster: export it here, and "
        "it travels with the job, or set it where the cluster's nodes start"
        for key, name in unset
        if name in there.unset
    ]
    if there.types is None:
        log("warning: which machines the cluster's autoscaler may start cannot be known here")
    else:
        problems += unmet(asked, nodes, there.types)
    if problems:
        raise InputError("\n".join(problems))


def _warn_of_variables(ready: _Prepared) -> None:
    if ready.variables:
        log(
            f"with the values of {', '.join(sorted(ready.variables))}, in a file for the cluster's user alone"
        )


# --- Ray's client -------------------------------------------------------------------------------------------------


def _client(dashboard: Dashboard) -> Any:
    """Ray's client of the cluster's jobs. Raises MissingExtraError, or RaytowerError where it cannot be made."""
    jobs = import_extra("ray.job_submission")
    for name in (
        "job.sdk",
        "dashboard_sdk",
    ):  # which say on stderr what they upload, and that a log has ended
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    if is_loopback(dashboard.address):
        # Ray's client would send the token to a proxy that the environment names.
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"
    # Ray puts what the environment says in place of an address that it is given.
    taken = {
        name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ
    }
    try:
        return jobs.JobSubmissionClient(dashboard.address, headers=dict(dashboard.headers))
    except Exception as error:
        raise RaytowerError(f"the cluster at {dashboard.address} takes no jobs: {error}") from error
    finally:
        os.environ.update(taken)


def _how_to_follow(job: str, address: str) -> str:
    return (
        f"the job goes on: `raytower submit --address {address} --follow {job}` shows its log, `ray job stop --address "
        f"{address} {job}` ends it"
    )


def _follow(client: Any, job: str, address: str, begun: float | None = None) -> dict[str, Any]:
    """Show the log until the job ends; Ctrl-C ends the job, asking first where somebody can answer."""
    shown = _Log()
    started = time.perf_counter() if begun is None else begun
    with _interrupts_raised():
        try:
            info = _wait_until_shown(client, job, shown)
        except KeyboardInterrupt:
            if not _is_to_stop(job):
                log(_how_to_follow(job, address))
                raise
            _stop(client, job, address)
            raise
        except SystemExit:
            log(_how_to_follow(job, address))
            raise
        except Exception as error:
            raise RaytowerError(
                f"the log of {job} cannot be shown: {error}; {_how_to_follow(job, address)}"
            ) from error
    figures = {
        "id": job,
        "job": (info.metadata or {}).get(JOB_KEY),
        "status": str(info.status.value),
        "seconds_to_start": None if begun is None or shown.began is None else round(shown.began - begun, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if info.status.value == "SUCCEEDED":
        return {**figures, "result": shown.result()}
    if info.status.value == "STOPPED":
        raise EndedJobError(f"job {job} was stopped", TERMINATED)
    code = info.driver_exit_code
    why = f"failed with exit code {code}" if code is not None else f"failed: {_short(info.message)}"
    # Ray tells a signal by its number below zero, a shell by 128 and it.
    raise EndedJobError(f"job {job} {why}; its log is above", 128 - code if code and code < 0 else code or 1)


def _stop(client: Any, job: str, address: str) -> None:
    """Stop the job and wait for its end. Raises RaytowerError where it cannot be reached, and may go on."""
    try:
        client.stop_job(job)
        log(f"stopping {job}")
        _wait_for_end(client, job)
    except Exception as error:
        raise RaytowerError(
            f"{job} could not be stopped: {_short(str(error))}; {_how_to_follow(job, address)}"
        ) from error


def _wait_until_shown(client: Any, job: str, shown: _Log) -> Any:
    client.get_job_info(job)  # says by its own error that there is none of this id

    async def tail() -> None:
        async for chunk in client.tail_job_logs(job):
            shown.take(chunk)

    asyncio.run(tail())
    return _wait_for_end(client, job)


def _wait_for_end(client: Any, job: str) -> Any:
    """What Ray says of the job once it has ended."""
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(_POLL_S)
    return info


class _Log:
    """The job's log: shown as it comes, its last lines kept."""

    def __init__(self) -> None:
        self.began: float | None = None
        self._last = ""

    def take(self, chunk: str) -> None:
        if self.began is None:
            self.began = time.perf_counter()
        self._last = (self._last + chunk)[-_LAST_LINE_CHARACTERS:]
        sys.stderr.write(escapes.lines(chunk))
        sys.stderr.flush()

    def result(self) -> Any:
        """The object of the last line that is one: the job's result, as its command prints it."""
        for line in reversed(self._last.splitlines()):
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except ValueError:
                    return None
        return None


def _is_to_stop(job: str) -> bool:
    """Whether Ctrl-C is meant for the job too; a second one says so. Where nobody can be asked, it is."""
    if not sys.stdin.isatty():
        return True
    try:
        sys.stderr.write(f"\nstop the job {job} on the cluster? [y/N] ")
        sys.stderr.flush()
        return input().strip().lower() in ("y", "yes")
    except (KeyboardInterrupt, EOFError) as end:
        return isinstance(end, KeyboardInterrupt)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt without the limit of `bounded_ending`: to stop a job takes longer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _short(message: str | None) -> str:
    return " ".join((message or "Ray gave no reason").split())[:1000]
