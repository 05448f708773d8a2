"""Gradient caching: the exact gradient of a large batch with the memory of a small chunk.

Objectives that compare the rows of a batch need the embeddings of all of them at once, but not all activations:

    1. embed every chunk without a graph, remembering the state of the random generators before each
    2. compute the loss from those embeddings, and its gradient g with respect to each of them
    3. embed every chunk again, now with a graph and with the remembered random state (dropout draws the same masks),
       and propagate sum(embedding · g), whose gradient is the chunk's share of the gradient of the loss

It costs a second forward pass, about a third more time. Use it when batches that fill a device are too small for good
in-batch negatives; plain gradient accumulation would not do, because it shrinks the set of negatives.
Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.

Shape legend: r texts of a chunk, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

ChunkT = TypeVar("ChunkT")


def backward_cached(
    embed: Callable[[ChunkT], Tensor],
    chunks: Sequence[ChunkT],
    backward_loss: Callable[[Sequence[Tensor]], Tensor],
    *,
    device: torch.device,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add the gradient of the loss to the parameters' `.grad` and return the loss, detached.

    Args:
        embed: the embeddings (r, D) of a chunk. Called twice for each chunk; randomness must come from torch alone.
        chunks: what `embed` takes, at least one.
        backward_loss: computes the loss of the chunks' embeddings, propagates it back to them (scaled, if the caller
            scales losses) and returns it.
        device: where `embed` computes; its random generator is saved besides the CPU's.
        no_sync: suspends the gradient exchange of data parallelism; used for all chunks but the last, so that each
            worker exchanges once, however many chunks it has.
    """
    states: list[_RandomState] = []
    leaves: list[Tensor] = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState(device))
            leaves.append(embed(chunk))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = backward_loss(leaves)
    for number, (chunk, state, leaf) in enumerate(zip(chunks, states, leaves, strict=True)):
        assert leaf.grad is not None
        with nullcontext() if number == len(chunks) - 1 else no_sync():
            with state.restored():
                vectors_rD = embed(chunk)
            (vectors_rD * leaf.grad).sum().backward()
    return loss.detach()


class _RandomState:
    """The random generators' state at one moment, on the CPU and on one accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._accelerators = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block the generators repeat their draws from that moment on; afterwards they stand as before."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._accelerators, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
