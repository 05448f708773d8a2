"""The gradient of the table of word embeddings, by the few rows that a batch reads of it.

Left to autograd each chunk of a batch makes a gradient of the whole table, 250,000 rows of a multilingual model for the
few hundred that the chunk reads, and data parallelism sums the table over the workers. Here the lookups of a step add
their rows' gradients to one table that is kept from step to step, and workers exchange the rows that any of them read.
The optimizer gets the same dense gradient, with zeros in all other rows, so that the norm, decay and Adam's moments are
those of dense training.

Shape legend: V rows of the table, H its width, r texts of one chunk, L tokens, U rows that the workers read in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from raytower.collectives import world_size


class WordGradients:
    """Collects the gradient of one table in place of autograd and of data parallelism."""

    def __init__(self, lookups: Sequence[nn.Embedding]) -> None:
        """`lookups` are the modules that read the table; they share one weight (V, H) and one padding row."""
        self.lookups = tuple(lookups)
        self.weight = lookups[0].weight
        self._padding = lookups[0].padding_idx
        self._sum_VH: Tensor | None = None
        # Rows of the sum that are not zero, each at least once: those read since the last step. Listing them without
        # repetition would make each step wait for an accelerator.
        self._read: list[Tensor] = []
        self._is_read_elsewhere = False

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Those of the transformer within `model`; None where autograd has to do it.

        That is a table that does not train, none that the transformer names, and one whose lookup is more than that:
        scaled (Gemma), renormalised, or by a class of its own.
        """
        backbone = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        try:
            found = None if backbone is None else backbone.get_input_embeddings()
        except NotImplementedError:  # what transformers raises for a model without a table that it knows
            return None
        if not isinstance(found, nn.Embedding) or not found.weight.requires_grad:
            return None
        # T5 has two modules over one table, of which the encoder reads one.
        readers = [
            module
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.weight is found.weight
        ]
        is_plain = all(
            type(module) is nn.Embedding
            and module.max_norm is None
            and not (module.sparse or module.scale_grad_by_freq)
            and module.padding_idx == found.padding_idx
            for module in readers
        )
        return cls(readers) if is_plain else None

    def names(self, model: nn.Module) -> list[str]:
        """The names under which `model` holds the table."""
        named = model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if parameter is self.weight]

    def begin(self) -> None:
        """Forget the gradient of the step before."""
        if self._sum_VH is not None and self._is_read_elsewhere:
            self._sum_VH.zero_()
        elif self._sum_VH is not None and self._read:
            self._sum_VH.index_fill_(0, torch.cat(self._read), 0)
        self._read = []
        self._is_read_elsewhere = False

    def drop(self) -> None:
        """Forget it where no row can be told from the others: a norm that is no number was multiplied into all."""
        self._sum_VH = None
        self._read = []
        self._is_read_elsewhere = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block the lookups of forward passes with gradients add to the table's gradient here.

        The modules are as they were outside of it, so that copies, checkpoints and evaluation know nothing of it.
        """
        for module in self.lookups:
            module.forward = self._look_up  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in self.lookups:
                del module.forward

    def finish(self) -> None:
        """Put the step's gradient, (V, H), into `weight.grad`: the mean over the workers, which all call it together.

        What autograd has put there stays a part of it: a tied output layer reads the table too, all of it.
        """
        if self._sum_VH is None and self.weight.grad is None:
            return
        sum_VH = self._table()
        if self.weight.grad is not None:
            self._is_read_elsewhere = True
            sum_VH += self.weight.grad
            if world_size() > 1:
                dist.all_reduce(sum_VH)
                sum_VH /= world_size()
        elif world_size() > 1:
            rows_U = self._rows_of_all()
            sum_UH = sum_VH[rows_U] / world_size()
            dist.all_reduce(sum_UH)
            sum_VH.index_copy_(0, rows_U, sum_UH)
            self._read = [rows_U]
        self.weight.grad = sum_VH

    def add(self, ids_rL: Tensor, gradient_rLH: Tensor) -> None:
        """Add the gradients of the vectors that were looked up for `ids_rL`."""
        ids, gradient = ids_rL.reshape(-1), gradient_rLH.reshape(-1, self.weight.shape[1])
        if self._padding is not None:
            # Zeros rather than fewer rows: how many there are is not known without waiting for an accelerator.
            gradient = gradient.masked_fill((ids == self._padding).unsqueeze(1), 0)
        sum_VH = self._table()
        if ids.is_cuda:
            # Sorts first, so that two runs sum in one order.
            sum_VH.index_put_((ids,), gradient.to(sum_VH.dtype), accumulate=True)
        else:
            sum_VH.index_add_(0, ids, gradient.to(sum_VH.dtype))
        self._read.append(ids)

    # What a backward pass leaves outside of the graph, a compiler would not see.
    @torch.compiler.disable
    def _look_up(self, ids_rL: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.functional.embedding(ids_rL, self.weight)
        vectors_rLH: Tensor = _Lookup.apply(self.weight, ids_rL, self)
        return vectors_rLH

    def _table(self) -> Tensor:
        if self._sum_VH is None:
            self._sum_VH = torch.zeros_like(self.weight, requires_grad=False)
        return self._sum_VH

    def _rows_of_all(self) -> Tensor:
        """(U,) the rows that any worker read, each once."""
        read_V = torch.zeros(len(self.weight), dtype=torch.uint8, device=self.weight.device)
        for ids in self._read:
            read_V[ids] = 1
        dist.all_reduce(read_V, op=dist.ReduceOp.MAX)
        return read_V.nonzero().squeeze(1)


class _Lookup(torch.autograd.Function):
    """Rows of the table, (r, L, H), whose gradient goes to `WordGradients` and not to the table itself."""

    @staticmethod
    def forward(context: Any, weight: Tensor, ids_rL: Tensor, gradients: WordGradients) -> Tensor:
        context.save_for_backward(ids_rL)
        context.gradients = gradients
        return nn.functional.embedding(ids_rL, weight)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients_rLH: Tensor) -> tuple[None, None, None]:
        (ids_rL,) = context.saved_tensors
        context.gradients.add(ids_rL, gradients_rLH[0])
        return None, None, None
