"""Starting Ray, beside what other programs have left on the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

START = """
import ray
from raytower.runtime import ensure_ray
ensure_ray()
print("logical CPUs", ray.cluster_resources()["CPU"] >= 4)
ray.shutdown()
"""


def test_a_cluster_that_was_left_on_the_machine_is_not_joined_unless_named() -> None:
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    session = tempfile.mkdtemp(prefix="rt")
    try:
        # What `ray start` leaves in this file; nothing listens there any more.
        marker = Path(session) / "ray" / "ray_current_cluster"
        marker.parent.mkdir()
        marker.write_text("127.0.0.1:9")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": session, "PYTHONPATH": str(ROOT / "platform")}
        command = [sys.executable, "-c", START]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        shutil.rmtree(session, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "logical CPUs True" in done.stdout
