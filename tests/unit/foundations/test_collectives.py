"""Gathering over two processes against torch's own gather with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather

from raytower.collectives import gather_constants, gather_rows
from tests.support.worker_group import end_worker, join_group

WORKERS = 2


def _loss(everyone_ND: Tensor, rank: int) -> Tensor:
    """Another one on each worker, that reads the rows of all."""
    return (
        everyone_ND * torch.arange(1.0, everyone_ND.numel() + 1).reshape_as(everyone_ND)
    ).square().sum() * (rank + 1)


def _worker(rank: int, folder: Path) -> None:
    join_group(folder, rank, WORKERS)
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(rank))
    seen: dict[str, Any] = {}
    for name, gather in (("own", gather_rows), ("torch", lambda given: torch.cat(all_gather(given)))):
        leaf = rows.clone().requires_grad_()
        everyone = gather(leaf)
        _loss(everyone, rank).backward()
        seen[name] = {"rows": everyone.detach(), "gradient": leaf.grad}
    # Rows that lie elsewhere than one behind the other, as a slice of columns does, and keys.
    seen["strided"] = gather_constants(rows[:, ::2])
    seen["keys"] = gather_constants(torch.tensor([[rank + 1, 2**60]]))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gathered into a list, or summed over more than a worker's own rows")

    dist.all_gather = dist.all_reduce = refuse
    leaf = rows.clone().requires_grad_()
    gather_rows(leaf).sum().backward()
    torch.save(seen, folder / f"seen{rank}.pt")
    end_worker()


@pytest.mark.processes
def test_rows_and_their_gradients_are_gathered(tmp_path: Path) -> None:
    multiprocessing.spawn(_worker, (tmp_path,), nprocs=WORKERS)
    seen = [torch.load(tmp_path / f"seen{rank}.pt", weights_only=True) for rank in range(WORKERS)]
    rows = [torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(WORKERS)]
    for own in seen:
        assert torch.equal(own["own"]["rows"], torch.cat(rows))
        assert torch.equal(own["strided"], torch.cat(rows)[:, ::2])
        assert own["keys"].tolist() == [[1, 2**60], [2, 2**60]]
        assert torch.allclose(own["own"]["gradient"], own["torch"]["gradient"])
        assert float(own["own"]["gradient"].abs().min()) > 0
