"""Planning an encoding job: numbers in, plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from raytower.data.pieces import Piece
from raytower.data.slices import MAX_SLICE_BYTES
from raytower.models.compute import PARAMETER_BYTES

_FILES_PER_WORKER = 8
_MIN_ROWS_PER_FILE = 256
_MAX_ROWS_PER_FILE = 65_536
# Resident memory of a Ray worker that has imported torch and transformers and runs a model of no size.
_PROCESS_BYTES = 560 * 2**20
# A token on its way through the tokenizer: its place in a list, the integer, and its place in an array.
_TOKEN_BYTES = 48
# A text of a block: the Python string and its place in lists, beside its characters.
_STRING_BYTES = 128
# Blocks in memory at once: the one computed and the one tokenised ahead of it.
_BLOCKS_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """What is to be encoded. `text_bytes` counts the rows as read, decompressed."""

    rows: int
    text_bytes: int
    files: int
    rows_per_file: int
    tokens_per_text: float


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The encoder. `embedding_parameters` are those of lookup tables, which ONNX leaves in float32."""

    parameters: int
    embedding_parameters: int
    dim: int
    width: int
    intermediate: int


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    """How a worker computes."""

    workers: int
    engine: str
    dtype: str
    tokens_per_batch: int
    block_rows: int
    vector_bytes: int
    on_gpu: bool
    pieces_in_flight: int


def choose_rows_per_file(num_rows: int, num_workers: int) -> int:
    """Rows of one output file: enough files that workers finish together, few enough that a folder stays listable.

    A power of two between 256 and 65,536, about eight files a worker.
    """
    wanted = max(num_rows // (num_workers * _FILES_PER_WORKER), 1)
    rows = 1 << (wanted.bit_length() - 1)
    return min(max(rows, _MIN_ROWS_PER_FILE), _MAX_ROWS_PER_FILE)


def join_pieces(pieces: Sequence[Piece], rows_per_file: int) -> tuple[Piece, ...]:
    """Pieces joined, up to `rows_per_file` good rows each: those that lie end to end in one file, and small files.

    So one survey with small pieces serves any size of output files, and a file of few rows costs no output file.
    """
    runs: list[Piece] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if last is not None and _fits(last, piece, rows_per_file):
            runs[-1] = dataclasses.replace(
                last,
                extent=dataclasses.replace(last.extent, end=piece.extent.end),
                num_rows=last.num_rows + piece.num_rows,
                left_out=last.left_out + piece.left_out,
            )
        else:
            runs.append(piece)
    groups: list[list[Piece]] = []
    rows = num_bytes = 0
    for run in runs:
        rows, num_bytes = rows + run.num_rows, num_bytes + _held_bytes(run)
        if not groups or rows > rows_per_file or num_bytes > MAX_SLICE_BYTES:
            groups.append([])
            rows, num_bytes = run.num_rows, _held_bytes(run)
        groups[-1].append(run)
    return tuple(_as_one(number, group) for number, group in enumerate(groups))


def _as_one(index: int, runs: Sequence[Piece]) -> Piece:
    if len(runs) == 1:
        return dataclasses.replace(runs[0], index=index)
    num_rows = sum(run.num_rows for run in runs)
    return dataclasses.replace(runs[0], index=index, num_rows=num_rows, left_out=(), parts=tuple(runs))


def plan_encode(corpus: CorpusSize, model: ModelSize, shape: WorkerShape) -> dict[str, int]:
    """What --dry-run prints: batches, disk, and the memory of one worker, weights and blocks counted."""
    tokens = round(corpus.rows * corpus.tokens_per_text)
    vector_bytes = model.dim * shape.vector_bytes
    weights = _weight_bytes(model, shape)
    activations = _activation_bytes(model, shape)
    on_device = weights + activations if shape.on_gpu else 0
    # A GPU's weights pass through host memory on their way.
    on_host = model.parameters * PARAMETER_BYTES["float32"] if shape.on_gpu else weights + activations
    return {
        "rows": corpus.rows,
        "files": corpus.files,
        "rows_per_file": corpus.rows_per_file,
        "workers": min(shape.workers, corpus.files),
        "block_rows": shape.block_rows,
        "tokens_per_batch": shape.tokens_per_batch,
        "estimated_tokens": tokens,
        "estimated_batches": -(-tokens // shape.tokens_per_batch),
        "predicted_disk_bytes": corpus.rows * vector_bytes + corpus.text_bytes,
        "predicted_memory_bytes_per_worker": _PROCESS_BYTES + on_host + _text_bytes(corpus, model, shape),
        "predicted_device_bytes_per_worker": on_device,
    }


def _fits(last: Piece, piece: Piece, rows: int) -> bool:
    first, second = last.extent, piece.extent
    if last.source != piece.source or first.row_group != second.row_group or first.end != second.start:
        return False
    # Of text an extent counts bytes, and is held whole while it is parsed.
    is_short = first.row_group is not None or second.end - first.start <= MAX_SLICE_BYTES
    return is_short and last.num_rows + piece.num_rows <= rows


def _held_bytes(run: Piece) -> int:
    """Bytes of text; of Parquet, whose extents count rows, none are known."""
    return 0 if run.extent.row_group is not None else run.extent.end - run.extent.start


def _weight_bytes(model: ModelSize, shape: WorkerShape) -> int:
    """At the peak, which is while the model is loaded: float32 weights beside what they become."""
    loaded = model.parameters * PARAMETER_BYTES["float32"]
    if shape.engine == "torch":
        return loaded + (model.parameters * PARAMETER_BYTES[shape.dtype] if shape.dtype != "float32" else 0)
    tables = model.embedding_parameters * PARAMETER_BYTES["float32"]
    matrices = (model.parameters - model.embedding_parameters) * PARAMETER_BYTES[shape.dtype]
    # ONNX Runtime holds the graph as read and its own copy, matrices packed.
    return loaded + 2 * (tables + matrices)


def _activation_bytes(model: ModelSize, shape: WorkerShape) -> int:
    """Of one layer: states, queries, keys, values, context and residual, and both sides of the activation function."""
    item_bytes = {"bfloat16": 2, "float16": 2}.get(shape.dtype, 4)
    per_token = (6 * model.width + 2 * model.intermediate) * item_bytes + model.width * 4
    return shape.tokens_per_batch * per_token


def _text_bytes(corpus: CorpusSize, model: ModelSize, shape: WorkerShape) -> int:
    """The rows of a file, as bytes while they are parsed and as a table; and what its blocks need besides."""
    row_bytes = corpus.text_bytes / max(corpus.rows, 1)
    rows = min(corpus.rows_per_file, corpus.rows)
    block_rows = min(shape.block_rows, rows)
    per_row = row_bytes + _STRING_BYTES + corpus.tokens_per_text * _TOKEN_BYTES
    vectors = block_rows * model.dim * (4 + shape.vector_bytes)
    piece = rows * row_bytes * 3 * shape.pieces_in_flight
    return round(piece + _BLOCKS_IN_FLIGHT * (block_rows * per_row + vectors))
