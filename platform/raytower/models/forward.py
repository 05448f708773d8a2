"""The forward engine: texts to vectors in one process. Imports no Ray, so it also runs alone beside an accelerator.

Texts go through in blocks. A block is tokenised in a thread while the block before it is computed; it is sorted by
length and cut into batches by a token budget, and its vectors come back in input order. A budget that does not fit
into memory is halved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from raytower.errors import InputError, RaytowerError
from raytower.models.batch_planner import plan_batches
from raytower.models.compute import Engine, EngineDtype, check_compute
from raytower.models.encoder import Encoder
from raytower.models.onnx_export import use_onnx
from raytower.models.token_block import TokenBlock

ComputeDtype = Literal["float32", "bfloat16", "float16"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHARACTERS_PER_TOKEN = 64
"""More than a token of any text in words stands for. Of longer texts the beginning alone is tokenised at first."""
_CPU_TOKENS_PER_BATCH = 2048
_GPU_TOKENS_PER_BATCH = 65536
# Enough texts that batches of like length fill up, few enough that memory does not depend on the input.
_CPU_BLOCK_ROWS = 4096
_GPU_BLOCK_ROWS = 8192
# What torch's CPU allocator, cuBLAS, ONNX Runtime and C++ say; only CUDA's allocator has an exception of its own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "failed to allocate memory",
    "bad allocation",
    "bad_alloc",
)
_Input = TypeVar("_Input")
_Output = TypeVar("_Output")
_logger = logging.getLogger(__name__)


@dataclass
class ForwardStats:
    """Running totals over blocks, for throughput reports."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    forward_seconds: float = 0.0


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> ComputeDtype:
    """bfloat16 where the hardware multiplies it, else float32.

    A CPU without AVX-512 BF16 or AMX emulates bfloat16, which takes several times as long as float32.
    """
    # torch 2.8 answers these questions in private functions alone.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cuda" or native else "float32"


def default_tokens_per_batch(device: torch.device) -> int:
    """Small batches stay in a CPU's cache; an accelerator wants big ones."""
    return _CPU_TOKENS_PER_BATCH if device.type == "cpu" else _GPU_TOKENS_PER_BATCH


def default_block_rows(device: torch.device) -> int:
    """Texts that are tokenised, sorted by length and computed together."""
    return _CPU_BLOCK_ROWS if device.type == "cpu" else _GPU_BLOCK_ROWS


class ForwardEngine:
    """Encodes texts with one encoder at one precision on one device.

    Tokenising may run beside `forward_block`; two forwards at once need a lock of the caller's.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        engine: Engine = "torch",
        dtype: EngineDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
        directory: Path | None = None,
    ) -> None:
        """Take the encoder over: its weights are cast to `dtype` and moved to `device`, or replaced by an ONNX graph.

        `directory` is where the encoder was loaded from, in case `raytower export` put a graph there; engine onnx
        only. Without one the graph is exported once into this machine's cache.

        Raises:
            InputError: `max_length` is beyond the backbone's positions, or the engine does not compute in `dtype`
                or on `device`.
            MissingExtraError: engine onnx without ONNX Runtime.
        """
        check_compute(engine, dtype)
        self.max_length = check_max_length(max_length or encoder.max_length, encoder.max_positions)
        self.fingerprint = encoder.fingerprint  # before the cast: it names the model, not the precision
        self.encoder = encoder.eval()
        self.device = _choose_device(engine, device)
        if engine == "onnx":
            use_onnx(self.encoder, dtype, directory)
        else:
            self.encoder.to(self.device)
            torch.nn.Module.to(self.encoder.backbone, dtype=TORCH_DTYPES[dtype])
        self.tokens_per_batch = tokens_per_batch or default_tokens_per_batch(self.device)
        self.block_rows = default_block_rows(self.device)

    @property
    def dim(self) -> int:
        return self.encoder.dim

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        """Vectors of `texts`, float32 (len(texts), dim), in input order; `prefix` is put before each text."""
        output_ND = np.zeros((len(texts), self.dim), dtype=np.float32)
        starts = range(0, len(texts), self.block_rows)
        if len(starts) == 1:  # a query should not wait for a thread to start
            return self.forward(self.tokenise(texts, prefix))
        blocks = (texts[start : start + self.block_rows] for start in starts)
        with self.tokenise_ahead(blocks, prefix) as tokenised:
            for start, block in zip(starts, tokenised, strict=True):
                output_ND[start : start + len(block)] = self.forward_block(block)
        return output_ND

    def tokenise(self, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_length`."""
        prepared = self.encoder.prepared(texts, prefix)
        tokenizer = self.encoder.tokenizer
        # What a call of the tokenizer does, without building offsets, masks and a dict for each text.
        tokenizer.set_truncation_and_padding(
            padding_strategy=PaddingStrategy.DO_NOT_PAD,
            truncation_strategy=TruncationStrategy.LONGEST_FIRST,
            max_length=self.max_length,
            stride=0,
            pad_to_multiple_of=None,
            padding_side=None,
        )
        return [
            encoding.ids
            for encoding in _encode_beginnings(tokenizer.backend_tokenizer, prepared, self.max_length)
        ]

    def tokenise_ahead(self, blocks: Iterable[Sequence[str]], prefix: str = "") -> Ahead[Any, TokenBlock]:
        """The blocks tokenised, each while the one before it is worked on; the first is begun at once."""
        return Ahead(lambda texts: TokenBlock.of(self.tokenise(texts, prefix)), blocks)

    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors float32 (rows, dim) of tokenised texts, in input order."""
        return self.forward_block(TokenBlock.of(token_ids))

    @torch.inference_mode()
    def forward_block(self, block: TokenBlock, stats: ForwardStats | None = None) -> NDArray[np.float32]:
        """Vectors float32 (rows, dim) of one block, in its order; `stats` is added to.

        A batch that does not fit into memory is cut, and `tokens_per_batch` stays at what fitted.

        Raises:
            RaytowerError: one text alone does not fit into memory.
        """
        started = time.perf_counter()
        output_ND = np.empty((len(block), self.dim), dtype=np.float32)
        waiting = self._plan(block, np.arange(len(block)))
        done: list[NDArray[np.int64]] = []
        vectors: list[Tensor] = []
        padded = 0
        while waiting:
            try:
                vector_BD, num_padded = self._run(block, waiting[0])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                # Vectors stay on the device until the block is through: a copy would wait for each batch.
                vectors.append(vector_BD)
                done.append(waiting.pop(0))
                padded += num_padded
                continue
            # Behind the handler: the exception's frames hold tensors.
            self._back_off(block, waiting[0], reason)
            waiting = self._plan(block, np.concatenate(waiting))
        if done:
            output_ND[np.concatenate(done)] = torch.cat(vectors).float().cpu().numpy()
        if stats is not None:
            stats.rows += len(block)
            stats.tokens += len(block.ids)
            stats.padded_tokens += padded
            stats.forward_seconds += time.perf_counter() - started
        return output_ND

    def _plan(self, block: TokenBlock, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        plan = plan_batches(block.lengths[rows], self.tokens_per_batch)
        return [rows[batch] for batch in plan.batches]

    def _run(self, block: TokenBlock, rows_B: NDArray[np.int64]) -> tuple[Tensor, int]:
        """Vectors (B, D) on the device, and how many tokens were computed, padding counted."""
        ids_BL, mask_BL = block.pad(rows_B, int(self.encoder.tokenizer.pad_token_id))
        mask = None if mask_BL is None else self._to_device(mask_BL)
        return self.encoder(self._to_device(ids_BL), mask), ids_BL.size

    def _to_device(self, values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            # From pinned memory the copy runs beside the kernels of the batch before.
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _back_off(self, block: TokenBlock, rows: NDArray[np.int64], reason: str) -> None:
        """Halve the budget below what `rows` needed. Raises RaytowerError where that was one text."""
        longest = int(block.lengths[rows].max())
        if len(rows) == 1:
            raise RaytowerError(
                f"one text of {longest} tokens does not fit into the memory of {self.device} ({reason}); lower "
                f"max_length (now {self.max_length}), compute in bfloat16 or float16, or give the worker more memory"
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


class Ahead(Generic[_Input, _Output]):
    """Goes through `inputs` and gives `function` of each; the next is computed in a thread while the last is used.

    Iterate over it inside `with`; `seconds` is the time spent in `function` so far.
    """

    def __init__(self, function: Callable[[_Input], _Output], inputs: Iterable[_Input]) -> None:
        self.seconds = 0.0
        self._function = function
        self._inputs = iter(inputs)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next = self._begin()

    def __enter__(self) -> Ahead[_Input, _Output]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[_Output]:
        while self._next is not None:
            output = self._next.result()
            self._next = self._begin()
            yield output

    def _begin(self) -> Future[_Output] | None:
        for value in self._inputs:
            return self._thread.submit(self._timed, value)
        return None

    def _timed(self, value: _Input) -> _Output:
        started = time.perf_counter()
        output = self._function(value)
        self.seconds += time.perf_counter() - started
        return output


def _encode_beginnings(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Any]:
    """The tokens of each text cut to `max_length`, as of the whole text, at a cost that `max_length` bounds.

    A text is tokenised up to a white space behind `max_length` tokens of the usual size. Where what stands there (a run
    of spaces, a word without end) gave fewer, eight times as much is taken, and in the end the whole.
    """
    limit = max_length * CHARACTERS_PER_TOKEN
    encodings: list[Any] = tokenizer.encode_batch_fast([_beginning(text, limit) for text in texts])
    while True:
        short = [
            row
            for row, text in enumerate(texts)
            if len(text) > limit and len(encodings[row].ids) < max_length
        ]
        if not short:
            return encodings
        limit *= 8
        again = tokenizer.encode_batch_fast([_beginning(texts[row], limit) for row in short])
        for row, encoding in zip(short, again, strict=True):
            encodings[row] = encoding


def _beginning(text: str, limit: int) -> str:
    """The first `limit` characters or less, ending with a word where words end at all."""
    if len(text) <= limit:
        return text
    space = max(text.rfind(mark, limit // 2, limit) for mark in (" ", "\n"))
    return text[: space if space > 0 else limit]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, the device's or the process's, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Ids padded to the longest row (B, L) and their mask (B, L), or None where nothing had to be padded."""
    ids_BL, mask_BL = TokenBlock.of(rows).pad(np.arange(len(rows)), pad_id)
    return torch.from_numpy(ids_BL), None if mask_BL is None else torch.from_numpy(mask_BL)


def check_max_length(max_length: int, positions: int) -> int:
    """Return `max_length` if the backbone has positions for it. Raises InputError otherwise."""
    if not 1 <= max_length <= positions:
        raise InputError(
            f"max_length is {max_length}; this model has positions for 1 to {positions} tokens; lower it"
        )
    return max_length


def _choose_device(engine: Engine, device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device) if device is not None else default_device()
    if engine == "torch" or chosen.type == "cpu":
        return chosen
    if device is not None:
        raise InputError(
            f"engine onnx computes on CPUs, not on {chosen}; use engine torch there, or give it no GPU"
        )
    return torch.device("cpu")
