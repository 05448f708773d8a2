"""The Ray Data actor that encodes: one piece of the corpus in, one Parquet file out, a row of figures back.

A file appears only when it is whole, so whatever files a killed run left are finished ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from raytower.data.pieces import Piece, read_piece
from raytower.encoding.config import ComputeConfig
from raytower.errors import FormatError, RaytowerError
from raytower.models.directory import set_num_threads
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.storage import Location

TOKENS_KEY = b"raytower.tokens"
PADDED_KEY = b"raytower.padded_tokens"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every encoding worker needs besides the pieces."""

    encoder: str
    fingerprint: str
    output: str
    prefix: str
    max_length: int
    embedding_dtype: str
    compute: ComputeConfig
    num_threads: int
    use_gpu: bool


def part_name(piece: Piece) -> str:
    """The output file of a piece; its number is the piece's place in the corpus."""
    return f"part-{piece.index:08d}.parquet"


class PieceEncoder:
    """Callable class for `map_batches`; each batch is one row holding a piece's number."""

    def __init__(self, settings: WorkerSettings, pieces: ray.ObjectRef[Sequence[Piece]]) -> None:
        set_num_threads(settings.num_threads)
        self.settings = settings
        self.output = Location.of(settings.output)
        self.pieces = ray.get(pieces)
        encoder = Encoder.load(settings.encoder)
        if encoder.fingerprint != settings.fingerprint:
            raise FormatError(
                f"encoder {settings.encoder!r} has fingerprint {encoder.fingerprint[:12]} on this worker and "
                f"{settings.fingerprint[:12]} where the job started; every node must see the same model"
            )
        self.engine = ForwardEngine(
            encoder,
            dtype=settings.compute.dtype,
            device="cuda" if settings.use_gpu else "cpu",
            tokens_per_batch=settings.compute.tokens_per_batch,
            max_length=settings.max_length,
        )

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        figures = [self._encode_piece(self.pieces[int(number)]) for number in batch["piece"]]
        return {name: [row[name] for row in figures] for name in figures[0]}

    def _encode_piece(self, piece: Piece) -> dict[str, Any]:
        started_at, started = time.time(), time.perf_counter()
        table = read_piece(piece)
        stats = self.engine.stats
        tokens_before, padded_before = stats.tokens, stats.padded_tokens
        vectors = self.engine.encode(table["text"].to_pylist(), self.settings.prefix)
        _refuse_broken_vectors(vectors, table)
        tokens, padded = stats.tokens - tokens_before, stats.padded_tokens - padded_before
        write_part(
            self.output / part_name(piece),
            table,
            vectors.astype(self.settings.embedding_dtype, copy=False),
            {TOKENS_KEY: str(tokens).encode(), PADDED_KEY: str(padded).encode()},
        )
        seconds = time.perf_counter() - started
        return {"rows": table.num_rows, "tokens": tokens, "seconds": seconds, "started_at": started_at}


def write_part(place: Location, table: pa.Table, vectors: NDArray[Any], metadata: dict[bytes, bytes]) -> None:
    """Write id, text, embedding (rows, dim) and the other columns of `table` as one Parquet file, atomically."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    position = table.schema.get_field_index("text") + 1
    whole = table.add_column(position, "embedding", embedding).replace_schema_metadata(metadata)
    with place.open_write() as sink:
        # Vectors do not compress; dictionary and statistics on them only cost time.
        columns = [name for name in whole.column_names if name != "embedding"]
        pq.write_table(whole, sink, compression="zstd", use_dictionary=False, write_statistics=columns)


def _refuse_broken_vectors(vectors: NDArray[np.float32], table: pa.Table) -> None:
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        name = table["id"][int(np.flatnonzero(broken)[0])].as_py()
        raise RaytowerError(
            f"the encoder gave {int(broken.sum())} vectors that are not finite, the first for id {name!r}; "
            "try compute.dtype float32, or check the model's weights"
        )
