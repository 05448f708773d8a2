"""In place of Ray's `setup_worker.py`: a worker is forked from the warm interpreter (see warm.py)."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.warm import ADDRESS, ask

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--serialized-runtime-env-context", default="{}")
parser.add_argument("--language")
told, arguments = parser.parse_known_args()
context = json.loads(told.serialized_runtime_env_context)
environment = {**os.environ, **(context.get("env_vars") or {})}
ask(os.environ[ADDRESS], arguments, environment, os.getcwd(), (0, 1, 2))
