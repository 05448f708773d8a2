"""How far a training has come, as its folder says it while it runs."""

from __future__ import annotations

import json
from pathlib import Path


def registered_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that Ray Train counts as whole, of the run whose output is `folder`/out."""
    steps = []
    for snapshot in folder.glob(".out.*.train/checkpoint_manager_snapshot.json"):
        text = snapshot.read_text()
        if text:
            results = json.loads(text)["checkpoint_results"]
            steps = [result["metrics"]["step"] for result in results]
    return steps
