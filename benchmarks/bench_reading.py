"""What reading costs a training: rates of one process, and from them a run of many workers over many pairs.

    python benchmarks/bench_reading.py [--rows 400000] [--workers 64] [--pairs 1e9]

rates: rows for a second of CPU. Surveying and hashing are done once for a content, on the driver; reading is done by
all workers together, once an epoch: in the order of training, as one worker, and as two processes that exchange rows.
`read` is what the processes asked the file system for. The same rows gzipped, and in one row group, are read where they
lie and from the copy that training makes of them.
Then what follows of these rates for many workers and pairs.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import distributed as dist
from torch import multiprocessing

from raytower.data.config import InputConfig
from raytower.data.pieces import DEFAULT_ROWS_PER_PIECE, Piece, Survey, survey
from raytower.data.survey_notes import remembered
from raytower.storage import Location, known_sha256
from raytower.training.copies import copy_where_needed
from raytower.training.exchange import Alone, Exchange, GroupExchange
from raytower.training.row_stream import StreamPlan, stream_batches

T = TypeVar("T")
BATCH_SIZE = 1024
WINDOW_ROWS = 100_000
# A note is read by the piece: with so few rows in each there are enough to measure.
_FEWEST_ROWS = 150_000
_FEW_ROWS = 64


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as name:
        os.environ["RAYTOWER_CACHE"] = str(Path(name) / "cache")
        measure(Path(name), arguments.rows, arguments.workers, arguments.pairs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--pairs", type=float, default=1e9)
    arguments = parser.parse_args()
    if arguments.rows < _FEWEST_ROWS:
        parser.error(
            f"--rows is {arguments.rows}; give {_FEWEST_ROWS} or more: smaller files are neither copied nor noted"
        )
    return arguments


def measure(folder: Path, num_rows: int, workers: int, pairs: float) -> None:
    texts = write_pairs(folder / "pairs.tsv", num_rows)
    row_bytes = texts.stat().st_size / num_rows
    parquet = write_parquet(texts, folder / "pairs.parquet", 65_536)
    hash_seconds, _ = cpu_seconds(lambda: Location.of(texts).sha256())
    survey_seconds, found = cpu_seconds(lambda: surveyed(texts))
    time.sleep(2.5)  # what was written moments ago is not noted
    known_sha256(Location.of(texts))
    surveyed(texts)
    surveyed(texts, _FEW_ROWS)
    again_seconds, many = cpu_seconds(lambda: surveyed(texts, _FEW_ROWS))
    again_seconds *= len(found.pieces) / len(many.pieces)
    print(f"{num_rows:,} pairs of {row_bytes:.0f} bytes, windows of {WINDOW_ROWS:,} rows\n")
    print("| rates, one core | rows/s of CPU | read, times the file |\n|---|---|---|")
    print(f"| sha256 | {num_rows / hash_seconds:,.0f} | 1.0 |")
    print(f"| survey | {num_rows / survey_seconds:,.0f} | 1.0 |")
    print(f"| the survey from its note | {num_rows / again_seconds:,.0f} | |")
    alone_seconds, read = read_alone(found.pieces)
    show("tsv, one worker", num_rows, alone_seconds, read / texts.stat().st_size)
    exchanging, read_by_two = read_by_processes(found.pieces, 2)
    show("tsv, two workers that exchange", num_rows, exchanging, read_by_two / texts.stat().st_size)
    by_groups = surveyed(parquet).pieces
    parquet_seconds, parquet_read = read_alone(by_groups)
    show("parquet, row groups of 65,536", num_rows, parquet_seconds, parquet_read / parquet.stat().st_size)
    zipped = texts.with_suffix(".tsv.gz")
    with open(texts, "rb") as source, gzip.open(zipped, "wb", 6) as sink:
        shutil.copyfileobj(source, sink)
    large = write_parquet(texts, folder / "large.parquet", num_rows)
    for path, what in ((zipped, "gzipped"), (large, f"parquet, one row group of {num_rows:,}")):
        pieces = surveyed(path).pieces
        seconds, read = read_alone(pieces)
        show(f"{what}, where it lies", num_rows, seconds, read / path.stat().st_size)
        place = Location.of(folder / f"{path.name}.rows")
        copy_seconds, copied = cpu_seconds(
            lambda pieces=pieces, place=place: copy_where_needed(pieces, place)
        )
        size = sum(file.stat().st_size for file in Path(place.path).iterdir())
        print(f"| {what}, copying once | {num_rows / copy_seconds:,.0f} | |")
        seconds, read = read_alone(copied)
        show(f"{what}, from its copy", num_rows, seconds, read / size)
    costs = Costs(
        rows=num_rows,
        row_bytes=row_bytes,
        pieces=len(found.pieces),
        first_seconds=hash_seconds + survey_seconds,
        again_seconds=again_seconds,
        alone_seconds=alone_seconds,
        exchanging_seconds=exchanging,
    )
    show_costs(costs, workers, pairs)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured of `rows` rows, in seconds of CPU: starting, and reading them once alone and by exchange."""

    rows: int
    row_bytes: float
    pieces: int
    first_seconds: float
    again_seconds: float
    alone_seconds: float
    exchanging_seconds: float


def show_costs(costs: Costs, workers: int, pairs: float) -> None:
    """What so many workers pay for so many pairs at these rates."""
    row_bytes = costs.row_bytes
    scale = pairs / costs.rows
    epoch_bytes = row_bytes * pairs
    windows = pairs / WINDOW_ROWS
    pieces_per_window = costs.pieces / costs.rows * WINDOW_ROWS
    print(
        f"\n| {workers} workers, {pairs:,.0f} pairs of {row_bytes:.0f} bytes | now | each worker reads all |"
    )
    print("|---|---|---|")
    print(f"| read an epoch | {in_tb(epoch_bytes)} | {in_tb(epoch_bytes * workers)} |")
    print(f"| sent between workers an epoch | {in_tb(epoch_bytes * (workers - 1) / workers)} | 0 |")
    alone_hours = hours(costs.alone_seconds, scale)
    exchanging_hours = hours(costs.exchanging_seconds, scale)
    print(f"| CPU hours an epoch, all workers | {exchanging_hours:.2f} | {alone_hours * workers:.1f} |")
    print(f"| of them reading alone | {alone_hours:.2f} | {alone_hours * workers:.1f} |")
    print(f"| windows, each an exchange | {windows:,.0f} | |")
    most = -(-pieces_per_window // workers)
    print(f"| pieces of a window that one worker reads, at most | {most:.0f} | {pieces_per_window:.0f} |")
    first = costs.first_seconds * scale
    print(f"| start-up on the driver, the first time, s | {first:,.0f} | {first:,.0f} |")
    print(f"| start-up on the driver, again, s | {costs.again_seconds * scale:,.1f} | {first:,.0f} |")


def hours(seconds: float, scale: float) -> float:
    return seconds * scale / 3600


def in_tb(size: float) -> str:
    return f"{size / 1e12:.2f} TB"


def show(what: str, num_rows: int, seconds: float, times: float) -> None:
    print(f"| {what} | {num_rows / seconds:,.0f} | {times:.1f} |", flush=True)


def write_pairs(path: Path, num_rows: int) -> Path:
    """Queries of about 40 bytes and documents of about 110, words drawn from 5,000."""
    random = np.random.default_rng(0)
    words = np.array([f"w{number:04d}" for number in range(5_000)])
    with open(path, "w", encoding="utf-8") as sink:
        for start in range(0, num_rows, 10_000):
            count = min(10_000, num_rows - start)
            drawn = words[random.integers(0, len(words), (count, 24))].tolist()
            sink.writelines(f"{' '.join(row[:6])}\t{' '.join(row[6:])}\n" for row in drawn)
    return path


def write_parquet(texts: Path, path: Path, row_group_size: int) -> Path:
    rows = [line.split("\t") for line in texts.read_text().splitlines()]
    table = pa.table({"query": [row[0] for row in rows], "document": [row[1] for row in rows]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def surveyed(path: Path, rows_per_piece: int = DEFAULT_ROWS_PER_PIECE) -> Survey:
    return survey(InputConfig(path=str(path)), "pairs", rows_per_piece, remember=remembered)


def cpu_seconds(run: Callable[[], T]) -> tuple[float, T]:
    """Seconds of CPU of this process, all its threads, and what `run` gives."""
    before = time.process_time()
    result = run()
    return time.process_time() - before, result


def read_epoch(pieces: Sequence[Piece], exchange: Exchange) -> tuple[float, int]:
    """Seconds of CPU and bytes read by this process for its batches of one epoch."""
    num_rows = sum(piece.num_rows for piece in pieces)
    plan = StreamPlan(
        pieces=pieces,
        batch_size=BATCH_SIZE,
        num_batches=num_rows // BATCH_SIZE,
        seed=0,
        window_rows=WINDOW_ROWS,
    )
    before = bytes_read()
    seconds, _ = cpu_seconds(lambda: [None for _ in stream_batches(plan, exchange=exchange)])
    return seconds, bytes_read() - before


def bytes_read() -> int:
    """What this process has asked the file system for, cached or not; 0 where the system does not count it."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        return 0
    return int(counters.read_text().split("rchar:")[1].split()[0])


def read_alone(pieces: Sequence[Piece]) -> tuple[float, int]:
    return read_epoch(pieces, Alone())


def read_by_processes(pieces: Sequence[Piece], num_workers: int) -> tuple[float, int]:
    """Seconds of CPU and bytes read of all workers together."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (num_workers, folder, pieces), nprocs=num_workers)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(num_workers)]
    return sum(seconds for seconds, _ in results), sum(read for _, read in results)


def _work(rank: int, num_workers: int, folder: str, pieces: Sequence[Piece]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers
    )
    torch.save(read_epoch(pieces, GroupExchange()), Path(folder) / f"{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # destroying the group may wait for ever, see tests/support/worker_group.py


if __name__ == "__main__":
    main()
