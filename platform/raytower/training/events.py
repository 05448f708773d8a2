"""TensorBoard event files: written on the machine of worker 0, and copied to where the job stores its output."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from raytower.storage import Location


class EventLog:
    """Scalars of one run; a run that continues appends, and TensorBoard drops what it had logged beyond that step.

    Events are written at once: the library's usual writer queues them, and its flush does not wait for the queue.
    """

    def __init__(self, place: Location, first_step: int) -> None:
        """`first_step` is the next step that will be logged."""
        self._place = place
        self._folder = Path(place.path) if place.is_local else Path(tempfile.mkdtemp(prefix="events"))
        self._folder.mkdir(parents=True, exist_ok=True)
        # The library's file names hold whole seconds; a run may start again sooner, so the step is added.
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{first_step}")
        # Makes void what a killed or replaced run has logged from this step on.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by name at `step`."""
        for name, value in values.items():
            # Not the library's `scalar`, which renames recall@10, and warns of that and of an infinite threshold.
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Copy everything logged so far to the output's location."""
        self._writer.flush()
        if not self._place.is_local:
            self._place.make_dir()
            for file in sorted(self._folder.iterdir()):
                (self._place / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Flush for the last time."""
        self.flush()
        self._writer.close()
        if not self._place.is_local:
            shutil.rmtree(self._folder)
