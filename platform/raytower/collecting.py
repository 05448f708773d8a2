"""Python's collector of cyclic garbage, where libraries are imported."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """Do not collect in this block, and never look again at what it leaves.

    Importing torch, transformers and Ray makes half a million objects that stay. Collections in the meantime look at
    all of them again and again, which is a quarter of the time of the imports, and full collections of later do too.
    For a process of our own: what is garbage when the first such block ends stays for ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if was_enabled:
            gc.enable()


def collect_later(seconds: float) -> None:
    """Do not collect in the first seconds of a process that imports its libraries as it comes to them.

    For workers, which no block surrounds: what they are to do is what imports the libraries.
    """
    gc.disable()
    begin = threading.Timer(seconds, gc.enable)
    begin.daemon = True
    begin.start()
