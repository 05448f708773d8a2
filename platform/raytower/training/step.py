"""One optimizer step, the same on a laptop and on every worker: forward, backward, clip, update. Imports no Ray.

The task decides a batch's loss and how it is propagated. This module does precision, loss scaling, gradient
accumulation and the exchange between workers, and refuses losses that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raytower.collectives import gather_constants, rank, world_size
from raytower.errors import RaytowerError
from raytower.models.chunks import Chunk, Shares
from raytower.objectives.gradient_cache import backward_cached
from raytower.training.sharding import Sharding, total_norm
from raytower.training.word_gradients import WordGradients

BatchT = TypeVar("BatchT")
ChunkT = TypeVar("ChunkT")


class NotANumberError(RaytowerError):
    """The loss or its gradient became NaN or infinite; training cannot go on."""

    def __init__(self, message: str, batch: int) -> None:
        """`batch` is the number of the accumulated batch that failed; the last one if that is unknown."""
        super().__init__(message)
        self.batch = batch


class TrainingStep:
    """Runs optimizer steps of one model at one precision."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        dtype: torch.dtype = torch.float32,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        num_shares: int | None = None,
        parallel: nn.Module | None = None,
        words: WordGradients | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """`num_shares` are the equal shares of a batch that dropout is drawn for, one or several of a worker; None is
        as many as workers. `parallel` is the model wrapped for data parallelism, where there is more than one worker;
        see `data_parallel`. `words` collects the gradient of the model's word embeddings, which else autograd does.
        `sharding` is the model's, where it is shared out; then there is no `parallel`, and no `words`, whose table
        would be one of many parts.
        """
        self.model = model
        self.parallel = parallel or model
        self.words = words
        self.sharding = sharding
        self.optimizer = optimizer
        self.schedule = schedule
        self.device = next(model.parameters()).device
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.num_shares = num_shares
        # Gradients underflow in float16 without loss scaling; bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        self.observed: dict[str, float] = {}
        """What the last step's batches observed beside their loss, by name: the mean over them and all workers."""
        self._observed: dict[str, list[Tensor]] = {}
        self._num_batches = 1
        self._batch = 0
        self._is_last_batch = True

    def run(
        self, number: int, batches: Sequence[BatchT], backward: Callable[[TrainingStep, BatchT], Tensor]
    ) -> float:
        """Make optimizer step `number` from the mean gradient over `batches`; returns the mean loss over all workers.

        Args:
            number: counts from 0. Dropout is a function of seed, batch and share alone, so a continued run draws what
                an undisturbed one would have drawn, with as many workers or, by `num_shares`, with others.
            batches: one batch, or several to accumulate; each is a batch of its own to its objective.
            backward: propagates one batch through `propagate` or `propagate_cached` and returns its loss, a scalar.

        Raises:
            NotANumberError: the loss of a batch, or the gradient, is NaN or infinite; the weights are as before the
                step. If a gradient overflows in float16, the step is left out and the loss scale lowered instead.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.words is not None:
            self.words.begin()
        self._num_batches = len(batches)
        self._observed = {}
        losses = []
        for place, batch in enumerate(batches):
            self._is_last_batch = place == len(batches) - 1
            self._batch = number * len(batches) + place
            torch.manual_seed(self._own_seeds()[0])
            losses.append(backward(self, batch).detach().float().reshape(1, 1))
        observed = [torch.stack(values).mean().reshape(1, 1) for values in self._observed.values()]
        # (workers, batches + names) → the mean of each over the workers, the same on all of them.
        means = gather_constants(torch.cat([*losses, *observed], dim=1)).mean(0)
        if self.words is not None:
            self.words.finish()
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        norm = total_norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        figures = self._fetch(torch.cat([norm.reshape(1), means]))
        self._check(figures[0], figures[1 : len(losses) + 1])
        self.observed = dict(zip(self._observed, figures[len(losses) + 1 :], strict=True))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return sum(figures[1 : len(losses) + 1]) / len(losses)

    @staticmethod
    def _fetch(figures: Tensor) -> list[float]:
        """The figures of a step: all that the process waits for the device for. So it is asked once, when all is queued
        that the answer does not change.
        """
        return cast(list[float], figures.tolist())

    def _check(self, norm: float, batch_losses: Sequence[float]) -> None:
        """Refuse a loss or a norm that is no number, with the weights as they were."""
        is_broken = not math.isfinite(norm)
        if is_broken and self.words is not None:
            self.words.drop()
        for place, loss in enumerate(batch_losses):
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss}", place)
        # An overflow in float16 lowers the loss scale and passes. If a scale below 1 does not help, it is no overflow.
        if is_broken and not (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            self._refuse(
                f"the gradient's norm is {norm} at a loss of {batch_losses[-1]:.4f}", len(batch_losses) - 1
            )

    def _refuse(self, message: str, batch: int) -> NoReturn:
        self.optimizer.zero_grad(set_to_none=True)
        raise NotANumberError(message, batch)

    def shares(self, rows_R: NDArray[np.int64], num_rows: int) -> Shares | None:
        """The shares of this worker in a batch of it; None where it has one alone. `seeded` gives their chunks seeds.

        Args:
            rows_R: (R,) of each text, or pair, of the batch its row.
            num_rows: of the batch.
        """
        own = self._num_own_shares()
        return None if own == 1 else Shares(rows_R * own // num_rows, own)

    def seeded(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks of the batch that is propagated now; those that begin a share have dropout draw for it.

        Of a model that is shared out all workers get equally many: see `Sharding.even_out`.
        """
        seeds = self._own_seeds()
        own = [chunk if chunk.share is None else replace(chunk, seed=seeds[chunk.share]) for chunk in chunks]
        return own if self.sharding is None else self.sharding.even_out(own)

    def _own_seeds(self) -> list[int]:
        """Of each of this worker's shares of the batch: worker 1 of 2 has 2 and 3 of 4 shares."""
        own = self._num_own_shares()
        first = (self.seed * 1_000_003 + self._batch) * 4099 + rank() * own
        return [first + share for share in range(own)]

    def _num_own_shares(self) -> int:
        return 1 if self.num_shares is None else self.num_shares // world_size()

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes at the step's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def observe(self, name: str, value: Tensor) -> None:
        """Note a figure of this worker's part of a batch, a scalar; every worker notes the same names."""
        self._observed.setdefault(name, []).append(value.detach().float())

    def propagate(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        """Compute a batch's loss with a graph and add its gradient; returns the loss, a scalar."""
        with self._exchange(self._is_last_batch), self._collecting():
            loss = compute_loss()
            self._backward(loss)
        return loss

    def propagate_cached(
        self,
        embed: Callable[[ChunkT], Tensor],
        chunks: Sequence[ChunkT],
        compute_loss: Callable[[Sequence[Tensor]], Tensor],
    ) -> Tensor:
        """As `propagate`, by gradient caching: memory holds one chunk's activations, not the whole batch's.

        `embed` gives the vectors (r, D) of a chunk of r texts; `compute_loss` gets those of all chunks.
        """

        def backward_loss(vectors: Sequence[Tensor]) -> Tensor:
            loss = compute_loss(vectors)
            self._backward(loss)
            return loss

        with self._exchange(self._is_last_batch), self._collecting():
            return backward_cached(
                embed, chunks, backward_loss, device=self.device, no_sync=lambda: self._exchange(False)
            )

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self._num_batches).backward()

    def _collecting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.words is None else self.words.collecting()

    def _exchange(self, wanted: bool) -> AbstractContextManager[Any]:
        """Whether backward passes inside average gradients over the workers."""
        if wanted or not isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[Any], self.parallel.no_sync())


def data_parallel(model: nn.Module, words: WordGradients | None) -> nn.Module:
    """The model as several workers train it: a backward pass averages over them what `words` does not collect."""
    collected = set() if words is None else set(words.names(model))
    if not any(p.requires_grad for name, p in model.named_parameters() if name not in collected):
        return model  # a table alone (StaticEmbedding), which `words` averages; torch refuses to wrap nothing
    if words is not None:
        # torch has this for its own wrappers alone; without it every worker would wait for gradients of the table.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, words.names(model)
        )
    # Every worker keeps the same buffers (positions, token types), so they need not be sent before each forward pass.
    return nn.parallel.DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
