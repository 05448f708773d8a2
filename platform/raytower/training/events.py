"""TensorBoard event files: written beside the rank that logs, and carried to where the job stores its output."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from raytower.storage import Location


class EventLog:
    """Scalars of one run; a run that continues appends, and TensorBoard drops what it had logged beyond that step."""

    def __init__(self, place: Location, first_step: int) -> None:
        """`first_step` is the next step that will be logged."""
        self._place = place
        self._folder = Path(place.path) if place.is_local else Path(tempfile.mkdtemp(prefix="events"))
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step if first_step > 1 else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by name at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Make everything logged so far visible at the place."""
        self._writer.flush()
        if not self._place.is_local:
            for file in sorted(self._folder.iterdir()):
                (self._place / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if not self._place.is_local:
            shutil.rmtree(self._folder)
