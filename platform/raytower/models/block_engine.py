"""What every forward engine does with a model: rows through it in blocks, whatever it gives for a row.

A block is tokenised in a thread while the block before it is computed; it is sorted by length and cut into batches by a
token budget, and its results come back in input order. A budget that does not fit into memory is halved. Imports no
Ray, so it also runs alone beside an accelerator.

Shape legend: N rows (texts or pairs), B rows of a batch, L tokens, W values that the model gives for a row.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytower.errors import InputError, RaytowerError
from raytower.models.ahead import Ahead
from raytower.models.batch_planner import plan_batches
from raytower.models.chunks import load_rows
from raytower.models.compute import check_tokens_per_batch
from raytower.models.device import (
    default_block_rows,
    default_tokens_per_batch,
    is_out_of_memory,
    load_tensor,
)
from raytower.models.token_block import Ids, Padding, TokenBlock

_logger = logging.getLogger(__name__)


@dataclass
class ForwardStats:
    """Running totals over blocks, for throughput reports."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    forward_seconds: float = 0.0


class BlockEngine(ABC):
    """Computes rows with one model on one device; what is computed of a batch is the subclass's.

    Tokenising may run beside `forward_block`; two forwards at once need a lock of the caller's.
    """

    row_name: ClassVar[str] = "text"

    def __init__(
        self, device: torch.device, padding: Padding, *, max_length: int, tokens_per_batch: int | None
    ) -> None:
        """`max_length` and `device` are checked by the subclass; `tokens_per_batch` None chooses by device.

        Raises:
            InputError: `tokens_per_batch` is no whole number of at least 1.
        """
        self.device = device
        self.max_length = max_length
        self.tokens_per_batch = (
            default_tokens_per_batch(device)
            if tokens_per_batch is None
            else check_tokens_per_batch(tokens_per_batch)
        )
        self.block_rows = default_block_rows(device)
        self._padding = padding

    @property
    @abstractmethod
    def width(self) -> int:
        """W, the values that the model gives for a row."""

    @property
    @abstractmethod
    def transformer(self) -> nn.Module:
        """The transformer inside the model, or the graph in its place."""

    @abstractmethod
    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the model makes (B, W) of padded rows, each of `inputs` (B, L), all on the device."""

    def call_between_layers(self, call: Callable[[], None]) -> int:
        """Have `call` called between the layers of every batch from now on, where others may compute meanwhile.

        Returns the number of parts that this cuts a batch into: 1 where there is nothing to call it from, such as in an
        ONNX graph.
        """
        layers = _layers_of(self.transformer)
        for layer in layers[1:]:
            layer.register_forward_pre_hook(lambda *_: call())
        return max(len(layers), 1)

    def forward_rows(self, num_rows: int, tokenise: Callable[[slice], TokenBlock]) -> NDArray[np.float32]:
        """Results float32 (num_rows, W), in input order; `tokenise` is asked for one block of rows after another."""
        if num_rows <= self.block_rows:  # a query should not wait for a thread to start
            return self.forward_block(tokenise(slice(0, num_rows)))
        output_NW = np.empty((num_rows, self.width), dtype=np.float32)
        starts = range(0, num_rows, self.block_rows)
        slices = [slice(start, min(start + self.block_rows, num_rows)) for start in starts]
        with Ahead(tokenise, slices) as blocks:
            for rows, block in zip(slices, blocks, strict=True):
                output_NW[rows] = self.forward_block(block)
        return output_NW

    @torch.inference_mode()
    def forward_block(self, block: TokenBlock, stats: ForwardStats | None = None) -> NDArray[np.float32]:
        """Results float32 (N, W) of one block, in its order; `stats` is added to.

        A batch that does not fit into memory is cut, and `tokens_per_batch` stays at what fitted.

        Raises:
            RaytowerError: one row alone does not fit into memory.
        """
        started = time.perf_counter()
        output_NW = np.empty((len(block), self.width), dtype=np.float32)
        done, results, padded = self._compute_batches(block)
        if done:
            output_NW[np.concatenate(done)] = torch.cat(results).float().cpu().numpy()
        if stats is not None:
            stats.rows += len(block)
            stats.tokens += len(block.ids)
            stats.padded_tokens += padded
            stats.forward_seconds += time.perf_counter() - started
        return output_NW

    # Not inference mode: what a model keeps from one call for the next, such as rotations, may serve training then.
    @torch.no_grad()
    def forward_on_device(self, block: TokenBlock) -> Tensor:
        """As `forward_block`, with the results left on the device."""
        done, results, _ = self._compute_batches(block)
        if not done:
            return torch.empty((0, self.width), device=self.device)
        # Where each row of the block lies among the results.
        place_N = np.argsort(np.concatenate(done))
        return torch.cat(results).float()[load_tensor(place_N, self.device)]

    def _compute_batches(self, block: TokenBlock) -> tuple[list[Ids], list[Tensor], int]:
        """Rows of each batch, what was computed of them (B, W), and the padded tokens of all."""
        waiting = self._plan(block, np.arange(len(block)))
        done: list[Ids] = []
        results: list[Tensor] = []
        padded = 0
        while waiting:
            try:
                inputs = load_rows(block, waiting[0], self._padding, self.device)
                result_BW = self.compute(inputs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                # Results stay on the device until the block is through: a copy would wait for each batch.
                results.append(result_BW)
                done.append(waiting.pop(0))
                padded += inputs["input_ids"].numel()
                continue
            # Behind the handler: the exception's frames hold tensors.
            self._back_off(block, waiting[0], reason)
            waiting = self._plan(block, np.concatenate(waiting))
        return done, results, padded

    def _plan(self, block: TokenBlock, rows: Ids) -> list[Ids]:
        plan = plan_batches(block.lengths[rows], self.tokens_per_batch)
        return [rows[batch] for batch in plan.batches]

    def _back_off(self, block: TokenBlock, rows: Ids, reason: str) -> None:
        """Halve the budget below what `rows` needed. Raises RaytowerError where that was one row."""
        longest = int(block.lengths[rows].max())
        if len(rows) == 1:
            raise RaytowerError(
                f"one {self.row_name} of {longest} tokens does not fit into the memory of {self.device} ({reason}); "
                f"lower max_length (now {self.max_length}), compute in bfloat16 or float16, or give the worker more "
                "memory"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before, self.tokens_per_batch = self.tokens_per_batch, longest * len(rows) // 2
        _logger.warning(
            "out of memory on %s at tokens_per_batch %d; going on with %d",
            self.device,
            before,
            self.tokens_per_batch,
        )


def refuse_no_numbers(values_NW: NDArray[np.float32], model: str, row_name: str) -> NDArray[np.float32]:
    """What a model gave for rows, (N, W), as it is.

    Raises:
        InputError: it holds NaN or infinity, of which no score can be made; the first such row is named.
    """
    broken = np.flatnonzero(~np.isfinite(values_NW).all(axis=1))
    if len(broken):
        raise InputError(
            f"the {model} gives {row_name} number {int(broken[0])} the values {values_NW[broken[0]][:5].tolist()}, "
            f"which are no numbers ({len(broken)} of {len(values_NW)} such rows); compute in float32, or check the "
            "model's weights"
        )
    return values_NW


def _layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The layers that a transformer runs one after another: the longest list of modules that lies outermost."""
    lists = [
        (name.count("."), -len(module), list(module))
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return min(lists, key=lambda item: item[:2], default=(0, 0, []))[2]
