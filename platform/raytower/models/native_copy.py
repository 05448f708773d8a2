"""The copy of a model directory, in the cache, that holds what is read here: safetensors, and another config.json.

The directory itself is never written to. A copy is known by the content of what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytower.errors import RaytowerError
from raytower.models.fetching import cached_folder
from raytower.progress import log
from raytower.storage import Location, cache_dir, explaining, known_sha256

# Counts up where the same directory would be copied otherwise; older copies in caches are then left alone.
_VERSION = 1
# Bounds of the process that reads pickles: torch itself takes 1 GB; the tensors are in memory once, and their bytes
# once more while they are written. The slowest disks read 10 MB a second.
_BASE_BYTES = 4 * 2**30
_BYTES_PER_BYTE = 3
_BASE_SECONDS = 120
_BYTES_PER_SECOND = 10_000_000


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """What goes into a copy, each by its name there."""

    files: Mapping[str, Path]
    """Taken as they are."""
    pickles: Mapping[str, Path] = field(default_factory=dict)
    """Safetensors files, and the pickled weights that they are made of."""
    indexes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Indexes of weights in parts, and the names in `pickles` of their parts."""
    objects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files that are written anew."""

    def key(self) -> str:
        """Hash over names and contents of everything that goes in."""
        sources = [
            [kind, name, known_sha256(Location.of(path))]
            for kind, group in (("file", self.files), ("pickle", self.pickles))
            for name, path in sorted(group.items())
        ]
        written = [sorted(self.indexes.items()), sorted(self.objects.items())]
        told = json.dumps([_VERSION, sources, written], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


class PickleError(Exception):
    """Pickled weights that cannot be converted."""

    def __init__(self, file: Path, kind: str, reason: str) -> None:
        """`kind` is damaged, memory, or refused: a whole file that holds more than tensors."""
        super().__init__(f"{file}: {kind}: {reason}")
        self.file = file
        self.kind = kind
        self.reason = reason


def native_copy(plan: CopyPlan, name: str) -> Path:
    """The folder of the cache that a plan asks for. Any number of processes may ask: one copies, the others wait.

    Args:
        plan: what goes in.
        name: the model, for the log.

    Raises:
        PickleError: weights that cannot be converted.
        RaytowerError: the process that reads them took too long or was killed.
        StorageError: the cache cannot be written.
    """
    return cached_folder(cache_dir() / "models" / plan.key(), lambda beside: _fill(beside, plan, name))


def _fill(folder: Path, plan: CopyPlan, name: str) -> None:
    with explaining(folder):
        for place, source in plan.files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / place)
    for place, value in plan.objects.items():
        _write_object(folder / place, value)
    if not plan.pickles:
        return
    size = sum(path.stat().st_size for path in plan.pickles.values())
    log(
        f"model {name!r} has pickled weights ({size / 1e9:.2f} GB in {len(plan.pickles)} files): they are converted to "
        "safetensors once, in a process of its own, and kept in the cache"
    )
    names = _convert({path: folder / place for place, path in plan.pickles.items()}, size)
    for place, parts in plan.indexes.items():
        parent = Path(place).parent
        weight_map = {
            tensor: str(Path(part).relative_to(parent)) for part in parts for tensor in names[folder / part]
        }
        _write_object(folder / place, {"metadata": {}, "weight_map": weight_map})


def _convert(targets: Mapping[Path, Path], size: int) -> dict[Path, list[str]]:
    """Have a process of its own convert pickles of `size` bytes in all; the names of the tensors in each target."""
    seconds = _BASE_SECONDS + size // _BYTES_PER_SECOND
    job = {
        "files": [[str(source.absolute()), str(target)] for source, target in targets.items()],
        "memory_bytes": _BASE_BYTES + _BYTES_PER_BYTE * size,
        "seconds": seconds,
    }
    script = Path(__file__).with_name("unpickle.py")
    # -P: the names of the files beside the script must not hide other modules.
    command = [sys.executable, "-P", str(script), json.dumps(job)]
    # The process ends when this pipe closes: with us, however we end.
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            command, stdin=reading, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    finally:
        os.close(reading)
        os.close(writing)
    if done.returncode == -signal.SIGALRM:
        raise RaytowerError(
            f"converting {', '.join(map(str, targets))} took longer than {seconds} s; convert the weights to "
            "safetensors with save_pretrained(), or copy them to a faster disk"
        )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RaytowerError(
            f"the process that converts {', '.join(map(str, targets))} ended with {done.returncode}, perhaps for want "
            f"of memory ({said[:300]}); convert the weights to safetensors with save_pretrained()"
        )
    answer = json.loads(done.stdout)
    if "kind" in answer:
        file = next(source for source in targets if str(source.absolute()) == answer["file"])
        raise PickleError(file, answer["kind"], answer["reason"])
    return dict(zip(targets.values(), answer["names"], strict=True))


def _write_object(file: Path, value: Mapping[str, Any]) -> None:
    with explaining(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
