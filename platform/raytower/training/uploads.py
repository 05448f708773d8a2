"""Checkpoints on their way to storage: Ray Train copies one while the next steps are made, never two at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray.train

from raytower.ending import remove_at_end, remove_left_behind

_PREFIX = "rtcheckpoint-"


class Uploads:
    """The checkpoints of the first worker; every other one reports its figures at the same steps. Of a model that is
    shared out each worker has its part of every checkpoint, and Ray Train puts the parts into one folder.

    As a context it waits at its end.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._is_begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wait()

    def begin(self, figures: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Have `write` fill a local folder, and Ray Train store it in the background and then remove it.

        Waits for the checkpoint before, so that this machine holds one at most besides the one that is written. Where
        one cannot be stored, Ray Train logs why and ends the workers as by any other failure.

        Args:
            figures: what is reported with the checkpoint.
            write: fills the folder that it gets.
        """
        self.wait()
        folder = tempfile.mkdtemp(dir=self._own_folder())
        write(Path(folder))
        ray.train.report(
            dict(figures),
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
        self._is_begun = True

    def wait(self) -> None:
        """Until the last checkpoint is stored and counts."""
        if self._is_begun:
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED
            )
            self._is_begun = False

    def _own_folder(self) -> Path:
        if self._folder is None:
            place = Path(tempfile.gettempdir())
            # A worker that was killed during an upload leaves a checkpoint, which may be gigabytes.
            remove_left_behind(place, _PREFIX)
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            remove_at_end(self._folder)
        return self._folder
