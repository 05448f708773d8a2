"""A warm interpreter: a process that has imported what takes seconds to import, and forks one for each command.

`Popen` starts commands of this Python there; `workers_are_forked` has Ray do so with its workers. Ray is not among what
it has imported: its settings are read from the environment when it is, and gRPC does not outlive a fork. A test about a
start of its own (of what is imported when, of Ray's processes, of the environment that others see) takes a fresh one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_SEARCHED = {"PYTHONPATH": f"{_ROOT / 'platform'}{os.pathsep}{_ROOT}"}
# What `warm_server.SLOW` reads from the environment when it is imported.
_READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "OPENBLAS_", "MKL_", "LD_", "ARROW_")
ADDRESS = "RAYTOWER_TESTS_WARM_INTERPRETER"
FORKING_WORKER = str(Path(__file__).with_name("warm_worker.py"))
SIZE = 8


@functools.cache
def address() -> str:
    """The socket of this process's warm interpreter, which ends with this process."""
    _environment_of_imports()  # of now
    folder = tempfile.TemporaryDirectory(prefix="warm")
    place = f"{folder.name}/socket"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen(64)
    command = [sys.executable, "-m", "tests.support.warm_server", str(listening.fileno())]
    server = subprocess.Popen(
        command,
        env={**os.environ, **_SEARCHED},
        stdin=subprocess.PIPE,
        pass_fds=[listening.fileno()],
        start_new_session=True,
    )
    listening.close()
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # the end of its stdin tells it to end
    return place


@functools.cache
def _environment_of_imports() -> dict[str, str]:
    return _read_at_import(os.environ)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_READ_AT_IMPORT)}


def ask(
    place: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, files: Sequence[int]
) -> tuple[int, socket.socket]:
    """Fork a process that runs `python *arguments`; its id, and where its wait status will come."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    text = json.dumps([list(arguments), dict(environment), folder]).encode()
    socket.send_fds(connection, [len(text).to_bytes(SIZE, "big")], list(files))
    connection.sendall(text)
    return int.from_bytes(read(connection), "big"), connection


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` of a command of this Python, forked from the warm interpreter in a session of its own.

    Fresh all the same where the environment says otherwise than what has been imported has read.
    """

    _status: socket.socket | None = None

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:
        _, _, _, _, cwd, env, *_ = others
        environment = dict(os.environ if env is None else env)
        if args[0] != sys.executable or _read_at_import(environment) != _environment_of_imports():
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        pipes = others[9:15]
        files = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        folder = os.path.abspath(cwd or ".")
        self.pid, self._status = ask(address(), args[1:], environment, folder, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*given, **named)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            ended, status = self._try_wait(os.WNOHANG)
            if ended:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        self._status.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = int.from_bytes(read(self._status), "big")
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, status


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """`function(rank, *arguments)` for ranks 0 and 1, at the same time; both must end well."""
    in_processes(2, function, *arguments)


def in_processes(number: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(rank, *arguments)` for so many ranks, at the same time; all must end well."""
    code = "import pickle, sys; f, a = pickle.load(open(sys.argv[1], 'rb')); f(int(sys.argv[2]), *a)"
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function, arguments)))
        command = [sys.executable, "-c", code, str(call)]
        with (Path(folder) / "errors").open("w+") as errors:
            environment = {**os.environ, **_SEARCHED}
            started = [Popen([*command, str(rank)], env=environment, stderr=errors) for rank in range(number)]
            codes = [process.wait(timeout=300) for process in started]
            errors.seek(0)
            assert codes == [0] * number, errors.read()


@contextmanager
def workers_are_forked() -> Iterator[None]:
    """Have a Ray that is started here fork its workers from the warm interpreter."""
    import pytest
    from ray._private.parameter import RayParams

    complete = RayParams.update_if_absent
    instead = {"setup_worker_path": FORKING_WORKER}

    def update_if_absent(self: RayParams, **given: Any) -> None:
        complete(self, **{**given, **(instead if "setup_worker_path" in given else {})})

    # Ray gives its own processes half a minute to start, which imports beside them would take from them.
    Popen([sys.executable, "-c", ""]).wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayParams, "update_if_absent", update_if_absent)
        patch.setenv(ADDRESS, address())
        yield


def read(connection: socket.socket, size: int = SIZE) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the warm interpreter has ended")
        data += more
    return data
