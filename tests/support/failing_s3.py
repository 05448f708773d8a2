"""The S3 server of the tests, which fails as a file says: `python -m tests.support.failing_s3 FILE`.

FILE is read at each request. It holds JSON, {"every": 7, "faults": ["500", "reset"]}: every seventh request meets one
of these, in turn. `every` 1 is a store that is away; without the file all is well.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

FAULTS = ("500", "503", "reset", "cut", "slow")
SLOW_S = 3.0
_REASONS = {"500": "500 Internal Server Error", "503": "503 Slow Down"}
_CODES = {"500": "InternalError", "503": "SlowDown"}
# The tests' own requests meet no fault.
_OURS = "Boto3"


class Failing:
    """A WSGI application around moto's."""

    def __init__(self, application: Callable[..., Iterable[bytes]], plan: Path) -> None:
        self._application, self._plan = application, plan
        self._requests, self._faults = count(1), count()
        self.debug = True

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        fault = None if environ.get("HTTP_USER_AGENT", "").startswith(_OURS) else self._next()
        if fault is None:
            return self._application(environ, start_response)
        print(f"fault {fault}: {environ['REQUEST_METHOD']} {environ['PATH_INFO']}", flush=True)
        if fault in _REASONS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(_REASONS[fault], [("Content-Type", "application/xml")])
            return [f"<Error><Code>{_CODES[fault]}</Code><Message>asked for</Message></Error>".encode()]
        if fault == "slow":
            time.sleep(SLOW_S)
            return self._application(environ, start_response)
        if fault == "cut":  # the request is done, and its answer ends in the middle
            return _cut(b"".join(self._application(environ, start_response)), environ)
        _drop(environ)
        return []

    def _next(self) -> str | None:
        if not self._plan.exists():
            return None
        plan = json.loads(self._plan.read_text() or "{}")
        if not plan or next(self._requests) % plan["every"]:
            return None
        return str(plan["faults"][next(self._faults) % len(plan["faults"])])


def _cut(body: bytes, environ: dict[str, Any]) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    _drop(environ)


def _drop(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("asked for")


def main(plan: Path) -> None:
    application: Any = DomainDispatcherApplication(create_backend_app)
    application.debug = True
    failing: Any = Failing(application, plan)
    run_simple("127.0.0.1", 0, failing, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
