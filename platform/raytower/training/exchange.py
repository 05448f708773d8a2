"""What workers send each other of the rows that they read. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import distributed as dist


class Exchange(Protocol):
    """One worker's end. Every worker makes the same calls in the same order, and each waits for all."""

    @property
    def rank(self) -> int:
        """Which of the workers this one is."""

    @property
    def num_workers(self) -> int: ...

    def to_all(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """What each worker gave, in rank order: arrays of one type, of any length, with equal further dimensions."""

    def to_each(self, tables: Sequence[pa.Table]) -> list[pa.Table]:
        """Give each worker the table at its rank; what each worker gave to this one, in rank order."""

    def branch(self) -> Exchange:
        """Another one between the same workers, whose calls may come between this one's in any order.

        All workers make it together.
        """


class Alone:
    """The only worker."""

    rank = 0
    num_workers = 1

    def to_all(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        return [values]

    def to_each(self, tables: Sequence[pa.Table]) -> list[pa.Table]:
        return list(tables)

    def branch(self) -> Alone:
        return self


class GroupExchange:
    """Between the workers of the default process group.

    Over a group of its own: its calls come from another thread than those of the steps, with which they must not be
    mixed up, and NCCL moves nothing that lies in the CPU's memory.
    """

    def __init__(self) -> None:
        """All workers make it together."""
        self._group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.num_workers = dist.get_world_size()

    def to_all(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        arrived = self._send([values.tobytes()] * self.num_workers)
        return [np.frombuffer(part, values.dtype).reshape(-1, *values.shape[1:]) for part in arrived]

    def to_each(self, tables: Sequence[pa.Table]) -> list[pa.Table]:
        return [pa.ipc.open_stream(part).read_all() for part in self._send(list(map(_as_bytes, tables)))]

    def branch(self) -> GroupExchange:
        return GroupExchange()

    def _send(self, messages: Sequence[bytes]) -> list[pa.Buffer]:
        """A message to each worker; those to this one, in rank order."""
        sizes = torch.tensor([len(message) for message in messages])
        sizes_here = torch.empty_like(sizes)
        dist.all_to_all_single(sizes_here, sizes, group=self._group)
        content = torch.frombuffer(bytearray(b"".join(messages)) or bytearray(1), dtype=torch.uint8)
        arrived = torch.empty(int(sizes_here.sum()), dtype=torch.uint8)
        dist.all_to_all_single(
            arrived, content[: int(sizes.sum())], sizes_here.tolist(), sizes.tolist(), group=self._group
        )
        return [pa.py_buffer(part.numpy()) for part in arrived.split(sizes_here.tolist())]


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
