"""The Ray Data actor that encodes: one piece of the corpus in, one Parquet file out, a row of figures back.

A file appears only when it is whole, and its record after it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from raytower.data.pieces import Piece, read_piece
from raytower.encoding.config import EncodeConfig
from raytower.encoding.parts import PartFigures, open_part, part_name
from raytower.encoding.records import write_record
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.models.block_engine import ForwardStats
from raytower.models.directory import resolve_model, set_num_threads
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.storage import Location


@dataclass(frozen=True, kw_only=True)
class EncodedPiece:
    """What a worker answers for one piece. `started_at` is in epoch seconds.

    `seconds` say where its time went, in total, reading, tokenising, forward and writing, without waiting for another
    piece's forward. Tokenising and writing run beside the forward, so that the parts may exceed the whole.
    """

    part: PartFigures
    seconds: dict[str, float]
    started_at: float
    tokens_per_batch: int


class PieceEncoder:
    """Callable class for `map_batches`; each batch is one row holding a piece's number.

    Several pieces may be in flight in threads of one worker: one computes while others are read, tokenised or written.
    """

    def __init__(
        self,
        config: EncodeConfig,
        fingerprint: str,
        prefix: str,
        pieces: ray.ObjectRef[Sequence[Piece]],
        board: Any = None,
    ) -> None:
        num_threads = config.workers.num_threads
        set_num_threads(num_threads)
        # The tokenizer's threads are counted once, when it first runs, and would else be all of the node's cores.
        os.environ["RAYON_NUM_THREADS"] = str(num_threads)
        self._config = config
        self._prefix = prefix
        self._pieces = ray.get(pieces)
        self._board = board
        self._device = threading.Lock()
        self._failure: RaytowerError | None = None
        try:
            self._output = Location.of(config.output)
            self._engine = load_engine(config, fingerprint)
        except RaytowerError as error:
            self._failure = error

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[str]]:
        """Encode the pieces whose numbers are batch["piece"], (pieces,); one row an answer (see `read_answer`)."""
        return {"answer": [self._answer(self._pieces[int(number)]) for number in batch["piece"]]}

    def _answer(self, piece: Piece) -> str:
        # An error is returned as data: raised here, it would reach the driver as the text of a traceback, without its
        # class.
        try:
            if self._failure is not None:
                raise self._failure
            return json.dumps(asdict(self.encode_piece(piece)))
        except RaytowerError as error:
            return json.dumps({"error": str(error), "is_input_error": isinstance(error, InputError)})

    def encode_piece(self, piece: Piece) -> EncodedPiece:
        """Write the file of `piece`.

        Raises:
            InputError: the corpus has changed since it was surveyed.
            RaytowerError: vectors that are not finite, or a text that does not fit into memory.
            StorageError: the output cannot be written.
        """
        started_at, started = time.time(), time.perf_counter()
        self._report(piece, ForwardStats())
        table = read_piece(piece)
        reading = time.perf_counter() - started
        stats = ForwardStats()
        blocks = _split(table, self._engine.block_rows)
        texts = (block["text"].to_pylist() for block in _split(table, self._engine.block_rows))
        with (
            self._engine.tokenise_ahead(texts, self._prefix) as tokenised,
            open_part(self._output / part_name(piece), self._config.embedding_dtype) as part,
        ):
            ready = time.perf_counter()
            with self._device:
                waiting = time.perf_counter() - ready
                for rows, tokens in zip(blocks, tokenised, strict=True):
                    vectors = self._engine.forward_block(tokens, stats)
                    _refuse_broken_vectors(vectors, rows)
                    part.write(rows, vectors)
                    self._report(piece, stats)
            figures = part.finish(stats.tokens, stats.padded_tokens)
            finished = time.perf_counter()
        write_record(self._output, figures)
        ended = time.perf_counter()  # flushed to disk and named
        seconds = {
            "total": ended - started - waiting,
            "reading": reading,
            "tokenising": tokenised.seconds,
            "forward": stats.forward_seconds,
            "writing": part.seconds + ended - finished,
        }
        return EncodedPiece(
            part=figures,
            seconds=seconds,
            started_at=started_at,
            tokens_per_batch=self._engine.tokens_per_batch,
        )

    def _report(self, piece: Piece, stats: ForwardStats) -> None:
        if self._board is not None:
            self._board.report.remote(piece.index, stats.rows, stats.tokens)


def read_answer(answer: str) -> EncodedPiece:
    """What a worker answered. Raises the InputError or RaytowerError that it met instead."""
    values: dict[str, Any] = json.loads(answer)
    if "error" in values:
        raise (InputError if values["is_input_error"] else RaytowerError)(values["error"])
    return EncodedPiece(**{**values, "part": PartFigures.of(values["part"])})


def load_engine(config: EncodeConfig, fingerprint: str) -> ForwardEngine:
    """The encoder on this worker's device. Raises FormatError where it is another than the job started with."""
    encoder = Encoder.load(config.encoder)
    if encoder.fingerprint != fingerprint:
        raise FormatError(
            f"encoder {config.encoder!r} has fingerprint {encoder.fingerprint[:12]} on this worker and "
            f"{fingerprint[:12]} where the job started; every node must see the same model"
        )
    return ForwardEngine(
        encoder,
        engine=config.engine,
        dtype=config.dtype,
        device="cuda" if config.workers.num_gpus else "cpu",
        tokens_per_batch=config.tokens_per_batch,
        max_length=config.max_length,
        directory=resolve_model(config.encoder),
    )


def _split(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, len(table), rows):
        yield table.slice(start, rows)


def _refuse_broken_vectors(vectors: NDArray[np.float32], table: pa.Table) -> None:
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        name = table["id"][int(np.flatnonzero(broken)[0])].as_py()
        raise RaytowerError(
            f"the encoder gave {int(broken.sum())} vectors that are not finite, the first for id {name!r}; "
            "try dtype float32, or check the model's weights"
        )
