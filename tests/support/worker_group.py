"""Data-parallel processes of a test: how they find each other, and how they end."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed as dist


def join_group(folder: Path, rank: int, workers: int = 2) -> None:
    """Join the processes that meet in `folder`, which holds no other group of so many."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'rendezvous{workers}'}",
        rank=rank,
        world_size=workers,
        # An exchange that another worker leaves out, or waits for too often, fails in place of hanging.
        timeout=timedelta(seconds=120),
    )


def end_worker() -> NoReturn:
    """End one of several data-parallel processes well, and at once.

    Destroying the process group can hang for ever (torch 2.13): the destructor joins a thread of gloo's, which may be
    waiting for the interpreter lock, to let its last tensor go, while the destructor's caller holds that lock.
    """
    dist.barrier()
    os._exit(0)
