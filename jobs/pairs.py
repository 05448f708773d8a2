"""`raytower pairs` as a job, on a laptop or behind `ray job submit`; its config lies beside it."""

import sys
from pathlib import Path

from raytower.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("pairs", default_config=Path(__file__).with_suffix(".yaml")))
