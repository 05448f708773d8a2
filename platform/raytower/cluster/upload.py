"""What travels with a submitted job: the checkout or the installed package, the job's config file, and its variables.

One archive, packed here: it holds the config file wherever that lies, is compressed, which Ray's own is not, and is the
same for the same files, so that Ray uploads it once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import raytower
from raytower.cluster.environment import FILE_VARIABLE
from raytower.errors import InputError
from raytower.workers import DRIVER_CPUS_VARIABLE

# Beside platform/ and jobs/ in the upload; no file of a checkout is called so.
_OWN_FOLDER = ".submitted"
_ENVIRONMENT_FILE = f"{_OWN_FOLDER}/environment.json"
_SOURCE_ROOT = "platform"
# A fifth of the bytes; a zip file, which packs each file alone, has two fifths. Ray knows it by the end of its name.
ARCHIVE_NAME = "upload.tar.xz"
_NAMED = 5
# raytower ends within 8 s of SIGTERM (`ending.GRACE_S`); Ray kills after 3 s unless told otherwise.
_STOP_WAIT_S = "10"


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A job's config file as it was read: what was checked is what travels, of a pipe too."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files by their names in the upload."""

    root: Path | None
    """The checkout; None where the installed package is uploaded, which brings no jobs/."""
    files: Mapping[str, Path]
    config_file: ConfigFile | None

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def plan_upload(config_file: ConfigFile | None, max_bytes: int) -> Upload:
    """What would be uploaded: what Ray's `--working-dir` takes of the checkout, else the installed package.

    Raises:
        InputError: the files have more bytes than `max_bytes`.
    """
    package = Path(raytower.__file__).resolve().parent
    root = package.parents[1] if _is_checkout(package) else None
    files = _files_of_checkout(root) if root else _files_of_package(package)
    _refuse_large({name: path.stat().st_size for name, path in files.items()}, max_bytes)
    return Upload(root=root, files=files, config_file=config_file)


def _is_checkout(package: Path) -> bool:
    return package.parent.name == _SOURCE_ROOT and (package.parents[1] / "jobs").is_dir()


def _files_of_package(package: Path) -> dict[str, Path]:
    return {
        f"{_SOURCE_ROOT}/{path.relative_to(package.parent).as_posix()}": path
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _files_of_checkout(root: Path) -> dict[str, Path]:
    """As Ray chooses them: without what .gitignore and .rayignore name."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    found: dict[str, Path] = {}

    def take(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path

    excludes = [packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())]
    packaging._dir_travel(root, excludes, take, include_gitignore=True, logger=logging.getLogger(__name__))
    return dict(sorted(found.items()))


def _refuse_large(sizes: Mapping[str, int], max_bytes: int) -> None:
    """Raises InputError that names the largest entries, where the files have more than `max_bytes` together."""
    total = sum(sizes.values())
    if total <= max_bytes:
        return
    entries: dict[str, int] = {}
    for name, size in sizes.items():
        entry = "/".join(name.split("/")[:2])
        entries[entry] = entries.get(entry, 0) + size
    largest = sorted(entries.items(), key=lambda item: -item[1])[:_NAMED]
    named = ", ".join(f"{name} ({size:,} bytes)" for name, size in largest)
    raise InputError(
        f"max_upload is {max_bytes:,} bytes, and the files that would travel with the job have {total:,}: the largest "
        f"are {named}; name them in .rayignore (a slash before a name holds it to the top of the checkout), put "
        "data where every node sees it, or raise --max-upload (Ray takes 500 MiB at most)"
    )


def entrypoint(job: str, upload: Upload, arguments: Sequence[str], with_variables: bool) -> list[str]:
    """The command that a job's process is, in the folder of the upload.

    The command itself and no file of jobs/, whose configs say more than the command's defaults: `raytower submit encode
    …` means what `raytower encode …` means.
    """
    start = ["-m", "raytower.cli", *job.split(" ")]
    config = [] if upload.config_file is None else ["--config", _name_of_config(upload.config_file)]
    through = ["-m", "raytower.cluster.environment"] if with_variables else []
    return ["python", *through, *start, *config, *arguments]


def _name_of_config(file: ConfigFile) -> str:
    return f"{_OWN_FOLDER}/config/{file.name}"


def runtime_environment(archive: Path, with_variables: bool, driver_cpus: float) -> dict[str, object]:
    """Ray's runtime environment of a job whose upload is `archive`, and whose own process holds so many CPUs."""
    environment: dict[str, object] = {"working_dir": str(archive)}
    variables = {
        "PYTHONPATH": _SOURCE_ROOT,
        "RAY_JOB_STOP_WAIT_TIME_S": _STOP_WAIT_S,
        DRIVER_CPUS_VARIABLE: f"{driver_cpus:g}",
    }
    if with_variables:
        variables[FILE_VARIABLE] = _ENVIRONMENT_FILE
        environment["worker_process_setup_hook"] = "raytower.cluster.environment.take"
    return {**environment, "env_vars": variables}


def pack(upload: Upload, variables: Mapping[str, str], archive: Path) -> int:
    """Write the archive and return its bytes. Config and variables are for their owner alone where it is unpacked."""
    with tarfile.open(archive, "w:xz") as packed:
        for name, path in upload.files.items():
            _add(packed, name, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
        if upload.config_file is not None:
            _add(packed, _name_of_config(upload.config_file), upload.config_file.content, 0o600)
        if variables:
            _add(packed, _ENVIRONMENT_FILE, json.dumps(dict(sorted(variables.items()))).encode(), 0o600)
    return archive.stat().st_size


def _add(packed: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)  # without date and owner: they would make each upload another
    info.size, info.mode = len(content), mode
    packed.addfile(info, io.BytesIO(content))
