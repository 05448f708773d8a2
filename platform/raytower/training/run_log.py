"""Where the figures of a run go while it trains: TensorBoard's files, and the trackers that the config names."""

from __future__ import annotations

from collections.abc import Mapping

from raytower.storage import Location
from raytower.training.events import EventLog
from raytower.training.trackers import PatientTracker, TrackedRun, trackers_of


class RunLog:
    """Scalars of one run, in all places; worker 0 has the only one."""

    def __init__(self, place: Location, first_step: int, run: TrackedRun | None) -> None:
        """Open all places.

        Args:
            place: the folder of TensorBoard's files.
            first_step: the next step that will be logged.
            run: what trackers know of it; None without trackers.

        Raises:
            InputError: a tracker cannot be written to, and no step has been made.
        """
        self._events = EventLog(place, first_step)
        self._trackers = [
            PatientTracker(name, open_run, is_new=first_step == 1)
            for name, open_run in trackers_of(run).items()
        ]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by name at `step`."""
        self._events.write(step, values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def flush(self) -> None:
        """Bring everything logged so far where it belongs; a tracker that failed is tried again."""
        self._events.flush()
        for tracker in self._trackers:
            tracker.send()

    def close(self) -> None:
        """Flush for the last time; the run has all its steps."""
        for tracker in self._trackers:
            tracker.close(failed=False)
        self._events.close()

    def fail(self) -> None:
        """Tell the trackers that the run has failed."""
        for tracker in self._trackers:
            tracker.close(failed=True)
