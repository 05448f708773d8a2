"""Clients that ask a server without a pause while something is done to it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Self


class TwoClients(ABC):
    """Two threads that ask until the block ends."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    @abstractmethod
    def _ask(self) -> None:
        """Ask until `_stop` is set."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(2)
        self._clients = [self._pool.submit(self._ask) for _ in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
