"""TensorBoard event files: where they go, and what a run that continues leaves in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from raytower.storage import Location
from raytower.training.events import EventLog
from raytower.training.loop import probe_storage
from tests.support.tensorboard_events import read_scalars


def elsewhere(folder: Path) -> Location:
    """A place that is not the local filesystem to us, as a bucket is not."""
    location = Location(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), "bucket/run")
    assert not location.is_local
    return location


def test_events_reach_a_local_folder(tmp_path: Path) -> None:
    log = EventLog(Location.of(tmp_path / "log"), first_step=1)
    log.write(10, {"train/loss": 0.5, "train/lr": 0.25})
    log.close()
    assert read_scalars(tmp_path / "log") == {"train/loss": {10: 0.5}, "train/lr": {10: 0.25}}


def test_events_are_carried_to_other_storage(tmp_path: Path) -> None:
    log = EventLog(elsewhere(tmp_path), first_step=1)
    log.write(10, {"train/loss": 0.5})
    log.flush()
    assert read_scalars(tmp_path / "bucket" / "run") == {"train/loss": {10: 0.5}}
    log.write(20, {"train/loss": 0.25})
    log.close()
    assert read_scalars(tmp_path / "bucket" / "run") == {"train/loss": {10: 0.5, 20: 0.25}}


def test_a_run_that_continues_adds_a_file_of_its_own(tmp_path: Path) -> None:
    for first_step, loss in ((1, 0.5), (11, 0.25)):
        log = EventLog(Location.of(tmp_path), first_step)
        log.write(first_step + 9, {"train/loss": loss})
        log.close()
    assert read_scalars(tmp_path) == {"train/loss": {10: 0.5, 20: 0.25}}
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_other_storage_is_probed_too(tmp_path: Path) -> None:
    probe_storage(elsewhere(tmp_path), rank=1)
    assert list((tmp_path / "bucket" / "run").iterdir()) == []


def test_values_keep_their_names_and_nothing_is_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A dev metric has an @ in its name, and the best threshold of scored pairs may be infinite."""
    log = EventLog(Location.of(tmp_path), first_step=1)
    log.write(10, {"dev/recall@10": 0.5, "dev/threshold": math.inf})
    log.close()
    assert read_scalars(tmp_path) == {"dev/recall@10": {10: 0.5}, "dev/threshold": {10: math.inf}}
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
