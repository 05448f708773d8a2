"""What a cluster gives and what it costs: encoding on two nodes beside one, and jobs on Ray beside a bare loop.

    python benchmarks/bench_ray.py nodes [--texts 3000] [--repeats 3]
    python benchmarks/bench_ray.py loop  [--texts 2000] [--queries 2000] [--rows 20000] [--repeats 3]

nodes: the encode job on one node of one CPU and on two (`ray.cluster_utils.Cluster`, a head without CPUs), MiniLM in
    fp32, seconds after the start-up of the first worker.
loop: encode, index build and search of a file, by one worker of one thread on Ray and by a plain loop over the same
    work in one process of one thread. Of encode it is the time from the first text on. The others run over a quarter
    and over all of the work, where everything has started; the difference is what three quarters cost.

Every run is in a process of its own, the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROWS_PER_FILE = 64
DIM = 128
DOCUMENTS = 2_000
ONE_WORKER = {"num": 1, "num_cpus": 1, "num_gpus": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    nodes_parser = commands.add_parser("nodes")
    nodes_parser.add_argument("--texts", type=int, default=3000)
    nodes_parser.add_argument("--repeats", type=int, default=3)
    nodes_parser.set_defaults(command=nodes)
    loop_parser = commands.add_parser("loop")
    loop_parser.add_argument("--texts", type=int, default=2000)
    loop_parser.add_argument("--queries", type=int, default=2000)
    loop_parser.add_argument("--rows", type=int, default=20_000)
    loop_parser.add_argument("--repeats", type=int, default=3)
    loop_parser.set_defaults(command=loop)
    one = commands.add_parser("one")  # what the others start
    one.add_argument("name", choices=RUNS)
    one.add_argument("folder", type=Path)
    one.add_argument("size", type=int)
    one.set_defaults(command=lambda arguments: print(RUNS[arguments.name](arguments.folder, arguments.size)))
    arguments = parser.parse_args()
    arguments.command(arguments)


def in_process(name: str, folder: Path, size: int) -> float:
    """Seconds that a run of `RUNS` has measured, in a process of one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, "one", name, str(folder), str(size)],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


# --- nodes ---------------------------------------------------------------------------------------------------------


def nodes(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "corpus.tsv", arguments.texts)
        seconds: dict[str, list[float]] = {"1 node": [], "2 nodes": []}
        for _ in range(arguments.repeats):
            for way, found in seconds.items():
                found.append(in_process(f"encode on {way}", folder, arguments.texts))
                say_load(way, found[-1])
    ratio = statistics.median(seconds["1 node"]) / statistics.median(seconds["2 nodes"])
    print(f"\n{arguments.texts:,} texts, fp32, median of {arguments.repeats}, seconds after start-up")
    print("| way | times as fast | texts/s | lowest and highest seconds |\n|---|---|---|---|")
    for way, factor in (("1 node", 1.0), ("2 nodes", ratio)):
        rate = arguments.texts / statistics.median(seconds[way])
        print(f"| {way} | {factor:.2f} | {rate:,.0f} | {min(seconds[way]):.1f}, {max(seconds[way]):.1f} |")


def encode_on_nodes(folder: Path, size: int, num_nodes: int) -> float:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    seconds = encode_on_ray(folder, size, {**ONE_WORKER, "num": num_nodes, "min": num_nodes})
    ray.shutdown()
    cluster.shutdown()
    return seconds


# --- loop ----------------------------------------------------------------------------------------------------------


def loop(arguments: argparse.Namespace) -> None:
    sizes = {"encode": arguments.texts, "index build": arguments.rows, "search": arguments.queries}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "corpus.tsv", arguments.texts)
        write_vectors(folder / "all", arguments.rows)
        write_vectors(folder / "part", arguments.rows // 4)
        write_index(folder)
        print(f"\none worker of one thread on Ray beside a plain loop, medians of {arguments.repeats}")
        print("| job | size | cost of Ray | loop, s | on Ray, s | differences, least and most |")
        print("|---|---|---|---|---|---|")
        for job, size in sizes.items():
            found: dict[str, list[float]] = {"loop": [], "ray": []}
            for _ in range(arguments.repeats):
                for way, seconds in found.items():
                    seconds.append(in_process(f"{job}, {way}", folder, size))
                    say_load(f"{job}, {way}", seconds[-1])
            bare, on_ray = (statistics.median(seconds) for seconds in found.values())
            each = [there - here for here, there in zip(*found.values(), strict=True)]
            counted = size if job == "encode" else size - size // 4
            print(
                f"| {job} | {counted:,} | {on_ray / bare - 1:+.1%} | {bare:.2f} | {on_ray:.2f} | "
                f"{min(each):+.2f}, {max(each):+.2f} s |"
            )


def encode_on_ray(folder: Path, size: int, workers: dict[str, Any]) -> float:
    """Seconds of the job from its first text on."""
    from raytower.encoding.job import encode

    with tempfile.TemporaryDirectory(dir=folder) as output:
        figures = encode(encode_config(part_of(folder, size), Path(output) / "out", workers))
    return float(figures["seconds"] - figures["startup_seconds"])


def encode_in_loop(folder: Path, size: int) -> float:
    """Read, encode and write piece by piece, as the job's worker does."""
    import torch

    from raytower.data.pieces import read_piece, survey
    from raytower.encoding.parts import write_part
    from raytower.models.encoder import Encoder
    from raytower.models.forward import ForwardEngine
    from raytower.storage import Location

    torch.set_num_threads(1)
    config = encode_config(part_of(folder, size), folder / "none", ONE_WORKER)
    engine = ForwardEngine(Encoder.load(config.encoder))
    pieces = survey(config.input, "corpus", ROWS_PER_FILE).pieces
    with tempfile.TemporaryDirectory(dir=folder) as output:
        started = time.perf_counter()
        for piece in pieces:
            table = read_piece(piece)
            vectors = engine.encode(table["text"].to_pylist())
            write_part(Location.of(output) / f"{piece.index}.parquet", table, vectors, {})
        return time.perf_counter() - started


def encode_config(corpus: Path, output: Path, workers: dict[str, Any]) -> Any:
    from bench_encoding import find_minilm

    from raytower.config import make_config
    from raytower.encoding.config import EncodeConfig

    values = {"encoder": str(find_minilm()), "input": str(corpus), "output": str(output), "workers": workers}
    return make_config(EncodeConfig, {**values, "rows_per_file": ROWS_PER_FILE})


def less_a_quarter(run: Callable[[int], float], size: int) -> float:
    """Seconds of `run` over `size`, less those over a quarter of it; the first run is to start all that there is."""
    run(size // 4)
    quarter = run(size // 4)
    return run(size) - quarter


def build(folder: Path, size: int, *, on_ray: bool) -> float:
    """The build of one shard; its steps run as Ray tasks, or as calls."""
    from raytower.config import make_config
    from raytower.index.build import build_index
    from raytower.index.config import IndexBuildConfig
    from raytower.index.tasks import Run

    part = "all" if size == rows_of(folder / "all") else "part"
    with tempfile.TemporaryDirectory(dir=folder) as output:
        values = {"embeddings": str(folder / part), "output": f"{output}/index", "kind": "hnsw", "shards": 1}
        config = make_config(IndexBuildConfig, {**values, "workers": ONE_WORKER, "lexical": False})
        started = time.perf_counter()
        build_index(config, None if on_ray else Run())
        return time.perf_counter() - started


def search(folder: Path, size: int, *, on_ray: bool) -> float:
    """The hits of a file of queries, as Ray tasks, or share by share in this process."""
    import torch

    from raytower.config import make_config
    from raytower.ranked import search as search_job
    from raytower.retrieval.config import SearchConfig

    torch.set_num_threads(1)
    search_job._MAX_QUERIES_PER_SHARE = 256  # several shares, as of a large file
    with tempfile.TemporaryDirectory(dir=folder) as output:
        queries = Path(output) / "queries.txt"
        lines = (folder / "corpus.tsv").read_text(encoding="utf-8").splitlines()
        queries.write_text("".join(lines[row % len(lines)] + "\n" for row in range(size)), encoding="utf-8")
        values = {"index": str(folder / "index"), "input": str(queries), "output": f"{output}/hits.tsv"}
        workers = ONE_WORKER if on_ray else {}
        config = make_config(SearchConfig, {**values, "workers": workers})
        started = time.perf_counter()
        search_job.search_one_or_many(config)
        return time.perf_counter() - started


RUNS: dict[str, Callable[[Path, int], float]] = {
    "encode on 1 node": lambda folder, size: encode_on_nodes(folder, size, 1),
    "encode on 2 nodes": lambda folder, size: encode_on_nodes(folder, size, 2),
    "encode, loop": encode_in_loop,
    "encode, ray": lambda folder, size: encode_on_ray(folder, size, ONE_WORKER),
    "index build, loop": lambda folder, size: less_a_quarter(partial(build, folder, on_ray=False), size),
    "index build, ray": lambda folder, size: less_a_quarter(partial(build, folder, on_ray=True), size),
    "search, loop": lambda folder, size: less_a_quarter(partial(search, folder, on_ray=False), size),
    "search, ray": lambda folder, size: less_a_quarter(partial(search, folder, on_ray=True), size),
}


# --- inputs --------------------------------------------------------------------------------------------------------


def write_texts(corpus: Path, count: int) -> None:
    from bench_encoding import short_texts

    corpus.write_text("".join(f"{text}\n" for text in short_texts(count)), encoding="utf-8")


def part_of(folder: Path, size: int) -> Path:
    """A file of the first texts."""
    part = folder / f"corpus-{size}.txt"
    lines = (folder / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    part.write_text("".join(f"{line}\n" for line in lines[:size]), encoding="utf-8")
    return part


def write_vectors(folder: Path, rows: int) -> None:
    from synthetic import blocks_of, clustered, write_embeddings

    write_embeddings(folder, blocks_of(clustered(rows, DIM)), DIM)


def rows_of(folder: Path) -> int:
    rows: int = json.loads((folder / "manifest.json").read_text())["rows"]
    return rows


def write_index(folder: Path) -> None:
    from bench_encoding import find_minilm, short_texts

    import raytower

    raytower.index_texts(short_texts(DOCUMENTS), str(find_minilm()), str(folder / "index"), kind="flat")


def say_load(what: str, seconds: float) -> None:
    print(f"{what}: {seconds:.1f} s, {os.getloadavg()[0]:.1f} tasks wait or run", file=sys.stderr)


if __name__ == "__main__":
    main()
