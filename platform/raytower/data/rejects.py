"""Rows that break a rule: the first one fails the input, or each goes to a quarantine file with its reason."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from raytower.config import OnError
from raytower.data.row_batch import Rejection
from raytower.data.sources import QUARANTINE_SUFFIX, SourceFile
from raytower.errors import InputError
from raytower.storage import Location

_SPOOL_BYTES = 4 * 1024 * 1024
_EXCERPT_CHARACTERS = 80
_QUARANTINE_REMEDY = ", or set on_error: quarantine to leave such rows out and have them listed"


def quarantine_of(output: str | Location) -> Location:
    """The folder for the rows that a job with this output rejects: `<output>.quarantine`, beside it."""
    place = Location.of(output)
    return place.parent / f"{place.name}{QUARANTINE_SUFFIX}"


class Rejects:
    """Takes rejected rows as they are found.

    Under `fail`, and None (`fail` of a command without that key), the first one raises. Under `quarantine` all are
    written, one JSON object a line (`file`, `line`, `reason`, `raw`, and `raw_base64` where the row is not UTF-8), to
    one file named after the input, which `finish` publishes in the quarantine folder.
    """

    def __init__(self, on_error: OnError | None, folder: Location | None, input_path: str, kind: str):
        if on_error == "quarantine" and folder is None:
            raise InputError(
                "on_error is quarantine, but there is no quarantine location to write bad rows to; give one"
            )
        self.count = 0
        self._remedy = _QUARANTINE_REMEDY if on_error == "fail" else ""
        self.file = folder / _file_name(input_path, kind) if folder and on_error == "quarantine" else None
        self._spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *exception: object) -> None:
        self._spool.close()

    def add(self, file: SourceFile, rejections: Iterable[Rejection], raw: Callable[[int], bytes]) -> None:
        """Take rows of `file`; `raw` gives a row's bytes by its line number.

        Raises:
            InputError: under `fail`, for the first of them, naming file, line and rule.
        """
        for rejection in rejections:
            content = raw(rejection.line)
            if self.file is None:
                raise InputError(_message(file, rejection, content) + self._remedy)
            self.count += 1
            self._spool.write(_entry(file, rejection, content))

    def finish(self) -> Location | None:
        """Publish the quarantine file and return its location.

        If nothing was rejected, return None and leave no file there.
        """
        if self.file is None:
            return None
        if self.count == 0:
            # A list that an earlier run left would mislead: the input has been corrected since.
            self.file.delete()
            return None
        self._spool.seek(0)
        with self.file.open_write() as sink:
            shutil.copyfileobj(self._spool, sink)
        return self.file


def _file_name(input_path: str, kind: str) -> str:
    name = re.sub(r"[^\w.-]+", "_", PurePosixPath(input_path).name).strip("_") or "input"
    digest = hashlib.sha256(f"{kind}\n{input_path}".encode()).hexdigest()[:8]
    return f"{name}-{kind}-{digest}.jsonl"


def _message(file: SourceFile, rejection: Rejection, raw: bytes) -> str:
    row = raw[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", errors="backslashreplace")
    excerpt = row if len(row) <= _EXCERPT_CHARACTERS else row[:_EXCERPT_CHARACTERS] + "…"
    return f"{file}:{rejection.line}: {rejection.reason}. The row is {excerpt!r}. Correct it"


def _entry(file: SourceFile, rejection: Rejection, raw: bytes) -> bytes:
    entry: dict[str, str | int] = {"file": str(file), "line": rejection.line, "reason": rejection.reason}
    try:
        entry["raw"] = raw.decode("utf-8")
    except UnicodeDecodeError:
        entry["raw"] = raw.decode("utf-8", errors="backslashreplace")
        entry["raw_base64"] = base64.b64encode(raw).decode("ascii")
    return json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"
