"""Pickled weights to safetensors, in a process of its own: `native_copy` starts this file, and nothing imports it.

    python -P unpickle.py '{"files": [["pytorch_model.bin", "model.safetensors"]], "memory_bytes": N, "seconds": N}'

The file comes from anywhere. torch's own unpickler makes tensors and plain values alone and calls no other code, and
what it can use up is bounded here: memory, time, and the life of the process that asked, whose end is the end of
stdin. The answer is one line of JSON on stdout: the names of the tensors of each file, or the first file that is
refused and why. Imports nothing of raytower, whose libraries would take seconds and memory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# The first bytes of a zip file, the form of torch.save since 1.6; the form of before cannot be mapped into memory.
_ZIP = b"PK\x03\x04"
_FOREIGN = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
_NO_MEMORY = re.compile("allocate memory|alloc_cpu|not enough memory", re.IGNORECASE)


class _RefusedError(Exception):
    """The file is whole, and holds something else than named tensors."""


class _UnwrittenError(Exception):
    """The safetensors file cannot be written."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Convert `files`, pairs of a pickle and the safetensors file to write.

    Returns:
        `names`: of each file, in order, the names of its tensors; or `file`, `kind` (refused, memory, damaged or
        unwritten) and `reason` of the first that cannot be converted.
    """
    names = []
    for source, target in job["files"]:
        try:
            names.append(_convert(Path(source), Path(target)))
        except Exception as error:  # whatever a file of any content can make the reader raise
            kind, reason = _explained(error, Path(source))
            return {"file": source, "kind": kind, "reason": reason}
    return {"names": names}


def bound(memory_bytes: int, seconds: int) -> None:
    """End this process where it takes more, or where the process that asked has ended."""
    with suppress(ValueError, OSError):  # an account may have a lower bound already
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Not sys.stdin: its lock, held by a waiting thread, ends Python with an error.
    while os.read(0, 1024):
        pass
    os._exit(1)


def _convert(source: Path, target: Path) -> list[str]:
    with open(source, "rb") as stream:
        is_zip = stream.read(len(_ZIP)) == _ZIP
    held = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    tensors = dict(_apart(_named_tensors(held)))
    try:
        _write(tensors, target)
    except Exception as error:
        raise _UnwrittenError(str(error)) from error
    return sorted(tensors)


def _write(tensors: dict[str, torch.Tensor], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The library writes 0600; others may read a cache as the umask allows.
    target.touch()
    mode = stat.S_IMODE(target.stat().st_mode)
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(mode)


def _named_tensors(held: object) -> dict[str, torch.Tensor]:
    if not isinstance(held, dict):
        raise _RefusedError(f"it holds a {type(held).__name__}, not tensors by name")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _RefusedError(f"it holds {name!r}, a {type(value).__name__} and no tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise _RefusedError(f"it holds {name!r}, a sparse, quantised or empty tensor")
    return held


def _apart(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor with memory of its own: safetensors holds no two names for one, as tied weights are."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        place = whole.untyped_storage().data_ptr()
        yield name, whole.clone() if place in seen else whole
        seen.add(place)


def _explained(error: Exception, source: Path) -> tuple[str, str]:
    words = " ".join(str(error).split())
    if isinstance(error, _RefusedError):
        return "refused", words
    if isinstance(error, _UnwrittenError):
        return "unwritten", words[:300]
    if isinstance(error, pickle.UnpicklingError):
        foreign = _FOREIGN.search(words)
        if foreign:
            return "refused", f"it names {foreign.group(1)}"
        words = words.rpartition("WeightsUnpickler error:")[2].strip() or words
        if words.startswith("Unsupported operand") and _is_pickle(source):
            return "refused", words
    if isinstance(error, MemoryError) or _NO_MEMORY.search(words):
        return "memory", words[:300]
    return "damaged", f"{type(error).__name__}: {words[:300]}"


def _is_pickle(source: Path) -> bool:
    with open(source, "rb") as stream:
        return stream.read(len(_ZIP)).startswith((_ZIP, pickle.PROTO))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    bound(asked["memory_bytes"], asked["seconds"])
    print(json.dumps(main(asked)), flush=True)
