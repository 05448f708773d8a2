"""Values of environment variables that travel with a submitted job, and are shown nowhere.

Ray's own way, `env_vars` of the runtime environment, shows them to `ray job list` and writes them into logs. Here they
lie in a file of the upload that its owner alone may read: the job's own process is started with them, and every worker
takes them when it starts. Both know the file by `FILE_VARIABLE`.

Imported in every worker of such a job: it imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FILE_VARIABLE = "RAYTOWER_ENVIRONMENT_FILE"


def take() -> None:
    """Set the variables of the file in this process, whose folder is the uploaded one."""
    os.environ.update(json.loads(Path(os.environ[FILE_VARIABLE]).read_text(encoding="utf-8")))


def main(command: Sequence[str]) -> None:
    """Become `python *command`, with the variables of the file."""
    take()
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
