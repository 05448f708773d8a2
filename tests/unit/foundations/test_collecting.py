"""Nothing is garbage while libraries are imported."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from raytower.collecting import collect_later, nothing_is_garbage


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """As a process begins, whatever a test leaves."""
    gc.enable()
    yield
    gc.enable()


class TestBlock:
    def test_nothing_is_collected_in_it(self) -> None:
        with nothing_is_garbage():
            assert not gc.isenabled()
        assert gc.isenabled()

    def test_an_import_that_fails_ends_it_too(self) -> None:
        with pytest.raises(ModuleNotFoundError), nothing_is_garbage():
            import no_such_library  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled()

    def test_a_process_that_never_collects_does_not_begin_to(self) -> None:
        gc.disable()
        with nothing_is_garbage():
            pass
        assert not gc.isenabled()


def test_a_worker_collects_after_its_first_seconds() -> None:
    collect_later(0.2)
    assert not gc.isenabled()
    deadline = time.monotonic() + 10
    while not gc.isenabled():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Of a process of its own: what is frozen here stays so for the tests that follow.
_PROGRAM = """
import gc, json, sys
from raytower.collecting import nothing_is_garbage
class Cycle:
    def __init__(self): self.me = self
    def __del__(self): ended.append(self.name)
ended, counts = [], []
def leave(name):
    Cycle().name = name
for name in ("first", "second"):
    with nothing_is_garbage():
        leave(name)
    counts.append(gc.get_freeze_count())
leave("later")
gc.collect()
print(json.dumps([counts, sorted(ended)]))
"""


def test_only_what_the_first_block_leaves_is_never_looked_at_again() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    (first, second), ended = json.loads(done.stdout)
    assert first > 1_000
    assert second <= first
    assert ended == ["later", "second"]


# A command's libraries are loaded without a collection; what it does then is collected as usual.
_COMMAND = """
import gc, sys
collections = {"import": 0, "work": 0}
where = "import"
gc.callbacks.append(lambda phase, info: collections.__setitem__(where, collections[where] + (phase == "start")))
import raytower.cli as cli
collections["import"] = 0
found = cli.find_reference
def find(reference):
    if reference.endswith(":run_it"):
        import torch
        return lambda config: {}
    return found(reference)
cli.find_reference = find
import dataclasses
cli.COMMANDS = {**cli.COMMANDS, "index list": dataclasses.replace(cli.COMMANDS["index list"], run="x:run_it")}
gc.collect()
collections["import"] = 0
assert cli.main(["index", "list", "here", "--json"]) == 0
print(collections["import"], gc.isenabled(), gc.get_freeze_count() > 10_000)
"""


def test_a_command_loads_its_libraries_in_it() -> None:
    done = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, check=True)
    collections, enabled, frozen = done.stdout.splitlines()[-1].split()
    assert (enabled, frozen) == ("True", "True")
    # torch alone makes dozens of collections; reading the config makes a few.
    assert int(collections) < 20
