"""The warm interpreter itself (see warm.py): `python -m tests.support.warm_server FILE`, a number of a socket."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
from contextlib import suppress

from tests.support.warm import SIZE, read

SLOW = (
    "transformers.models.bert.modeling_bert",
    "pandas",
    "pyarrow.dataset",
    "faiss",
    "starlette.applications",
    "pytest",
)


def serve(listening: socket.socket) -> list[str] | None:
    """Fork for whoever asks, until stdin ends. In the new process it returns what that has to run."""
    running: dict[int, socket.socket] = {}
    noted, note = socket.socketpair()
    note.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(note.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        for source in (listening, noted, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:
                return None
            if noted in ready:
                noted.recv(4096)
                _tell_ends(running)
            if listening in ready:
                connection, _ = listening.accept()
                size, files, _, _ = socket.recv_fds(connection, SIZE, 3)
                command = json.loads(read(connection, int.from_bytes(size, "big")))
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for opened in (listening, noted, note, connection, *running.values()):
                        opened.close()
                    return _become(*command, files)
                for file in files:
                    os.close(file)
                connection.sendall(pid.to_bytes(SIZE, "big"))
                running[pid] = connection


def _tell_ends(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as connection, suppress(OSError):  # who asked may be gone
            connection.sendall(status.to_bytes(SIZE, "big"))


def _become(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> list[str]:
    os.setsid()
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    known = set(os.environ["PYTHONPATH"].split(os.pathsep))
    os.environ.clear()
    os.environ.update(environment)
    searched = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*map(os.path.abspath, searched), *(path for path in sys.path[1:] if path not in known)]
    return arguments


def run(arguments: list[str]) -> None:
    """As `python` runs `-m MODULE`, `-c TEXT` or a file."""
    import numpy

    numpy.random.seed()
    option, *rest = arguments
    if option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    gc.disable()
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    # What its processes import besides, Ray above all, is not looked through again and again either.
    gc.set_threshold(50_000, 10, 10)
    told = serve(socket.socket(fileno=int(sys.argv[1])))
    if told is None:
        os._exit(0)
    run(told)
