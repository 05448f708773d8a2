"""`raytower evaluate` as a job: `python jobs/evaluate.py`, or the same behind `ray job submit`; the config lies beside."""

import sys
from pathlib import Path

from raytower.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", default_config=Path(__file__).with_suffix(".yaml")))
