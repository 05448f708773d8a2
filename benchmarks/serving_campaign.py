"""Swaps and kills under load: does a client ever see a failure, or an answer that belongs to no generation?

    python benchmarks/serving_campaign.py [--seconds 300] [--swaps 20] [--kills 5]

`raytower serve` under Ray with two replicas. Four clients ask without a pause, and ask once more where the answer is
none or a refusal. Meanwhile generations are swapped (index version, encoder with its index, reranker) and replicas
killed by SIGKILL, at even distances. Every answer is compared with the known one of the generation that it names:
without a reranker that of a brute-force search by sentence-transformers and numpy, with one that of the quiet server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from bench_serving import SEED, insurance, model_folder, ours, questions, running

ROWS, QUERIES, K, RECALL_K = 300, 12, 5, 20
TIE = 1e-4
# Long enough that no reranking is shortened: this asks for right answers, not for quick ones.
TIMEOUT_MS = 20_000
OTHERS = [
    {"index_version": "000001"},
    {"index_version": "newest", "reranker": "a"},
    {"index": "b", "encoder": "second"},
    {"reranker": "b"},
    {"index": "a", "encoder": "first", "reranker": "none"},
]


def prepare(folder: Path) -> None:
    """Two encoders, an index of each (the first with two versions, of other texts), two rerankers."""
    import torch

    import raytower
    from raytower.models.cross_encoder import CrossEncoder
    from raytower.models.encoder import Encoder

    texts = [item["en"][:300] for item in list(insurance("answers").values())[: 2 * ROWS]]
    first, second = Encoder.load(str(model_folder())), Encoder.load(str(model_folder()))
    first.save(folder / "first")
    torch.manual_seed(SEED)
    with torch.no_grad():
        for weight in second.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight) if weight.ndim == 2 else 0
    second.save(folder / "second")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        CrossEncoder.start_from(str(model_folder())).save(folder / f"reranker-{name}")
    (folder / "texts.json").write_text(json.dumps(texts))
    raytower.index_texts(texts[:ROWS], str(folder / "first"), str(folder / "a"), kind="flat")
    raytower.index_texts(
        texts[ROWS // 2 : ROWS // 2 + ROWS], str(folder / "first"), str(folder / "a"), kind="flat"
    )
    raytower.index_texts(texts[ROWS:], str(folder / "second"), str(folder / "b"), kind="flat")


Hits = list[tuple[str, float]]


def hits(answer: dict[str, Any]) -> Hits:
    return [(hit["text"], hit["score"]) for hit in answer["results"][0]]


def same(found: Hits, known: Hits) -> bool:
    """The same texts in the same order, but for those whose scores are equal to what a batch changes."""
    if [text for text, _ in found] == [text for text, _ in known]:
        return True
    scores = dict(known)
    least = known[-1][1]
    return all(
        abs(score - place[1]) < TIE and abs(scores.get(text, least) - score) < TIE
        for (text, score), place in zip(found, known, strict=True)
    )


def brute_force(folder: Path, encoder: str, rows: list[str], asked: list[str]) -> dict[str, Hits]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / encoder))
    vectors = model.encode([*rows, *asked], normalize_embeddings=True, show_progress_bar=False)
    scores = vectors[len(rows) :] @ vectors[: len(rows)].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return {
        query: [(rows[row], float(scores[number, row])) for row in order[number]]
        for number, query in enumerate(asked)
    }


class Campaign:
    def __init__(self, url: str, pid: int, folder: Path, asked: list[str]) -> None:
        self.url, self.pid, self.folder, self.asked = url, pid, folder, asked
        self.known: dict[str, dict[str, Hits]] = {}
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.answered = Counter[str]()
        self.retried = self.shortened = 0
        self.took: list[float] = []
        self.why: list[tuple[float, float, int, str]] = []
        self.events: list[tuple[float, str]] = []
        self.start = time.monotonic()
        self.recovered: list[float] = []
        self.over = False

    async def ask(self, session: aiohttp.ClientSession, query: str) -> tuple[int, Any]:
        body = {"query": query, "k": K, "recall_k": RECALL_K, "timeout_ms": TIMEOUT_MS}
        try:
            async with session.post(f"{self.url}/v1/search", json=body) as reply:
                return reply.status, await reply.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, repr(error)

    async def ask_until_answered(self, session: aiohttp.ClientSession, query: str) -> Any:
        for _ in range(20):
            status, answer = await self.ask(session, query)
            if status == 200 and (not answer["reranked"] or answer["reranked_k"] == RECALL_K):
                return answer
        raise RuntimeError(f"the quiet server does not answer: {status} {answer}")

    async def client(self, session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(number)
        while not self.over:
            query = draw.choice(self.asked)
            began = time.monotonic()
            status, answer = await self.ask(session, query)
            if status != 200:
                self.retried += 1
                self.why.append(
                    (round(began - self.start, 1), round(time.monotonic() - began, 1), status, str(answer))
                )
                await asyncio.sleep(1.0)  # what Retry-After says at least
                status, answer = await self.ask(session, query)
            self.took.append(time.monotonic() - began)
            if status != 200:
                self.failed.append(f"{status} {answer}")
                continue
            self.answered[answer["generation"]] += 1
            known = self.known.get(answer["generation"], {}).get(query)
            if answer["reranked"] and answer["reranked_k"] < RECALL_K:
                self.shortened += 1
            elif known is None or not same(hits(answer), known):
                self.wrong.append(f"{answer['generation']} {query!r}: {hits(answer)}, known {known}")

    async def admin(self, session: aiohttp.ClientSession, what: str, body: dict[str, str] | None) -> Any:
        timeout = aiohttp.ClientTimeout(600)
        method = session.get if body is None else session.post
        async with method(f"{self.url}/v1/admin/{what}", json=body, timeout=timeout) as reply:
            return await reply.json()

    async def reload(self, session: aiohttp.ClientSession, wanted: dict[str, str]) -> str:
        body = {
            name: str(self.folder / (f"reranker-{value}" if name == "reranker" else value))
            if name != "index_version" and value != "none"
            else value
            for name, value in wanted.items()
        }
        answer = await self.admin(session, "reload", body)
        if "generation" not in answer:
            raise RuntimeError(f"{wanted}: {answer}")
        return str(answer["generation"])

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """The known answers of every generation that the campaign will come by."""
        texts = json.loads((self.folder / "texts.json").read_text())
        for wanted in [*OTHERS, *OTHERS]:
            generation = await self.reload(session, wanted)
            said = {query: await self.ask_until_answered(session, query) for query in self.asked}
            assert {answer["generation"] for answer in said.values()} == {generation}
            found = {query: hits(answer) for query, answer in said.items()}
            if not next(iter(said.values()))["reranked"]:
                version = next(iter(said.values()))["index_version"]
                rows = texts[:ROWS] if version == "000001" else texts[ROWS // 2 : ROWS // 2 + ROWS]
                right = brute_force(self.folder, "first", rows, self.asked)
                assert all(same(found[query], right[query]) for query in self.asked), wanted
            before = self.known.setdefault(generation, found)
            assert all(same(found[query], before[query]) for query in self.asked), wanted

    async def swap(self, session: aiohttp.ClientSession, times: int, seconds: float) -> list[float]:
        took = []
        start = time.monotonic()
        for number in range(times):
            await asyncio.sleep(max(start + seconds * (number + 0.5) / times - time.monotonic(), 0))
            began = time.monotonic()
            await self.reload(session, OTHERS[number % len(OTHERS)])
            took.append(time.monotonic() - began)
            self.events.append((round(began - self.start, 1), f"swap {number} {took[-1]:.1f} s"))
        return took

    def replicas(self) -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process(self.pid).children(recursive=True)
            if "ServeReplica" in " ".join(child.cmdline()) and ":search" in " ".join(child.cmdline())
        ]

    async def kill(self, session: aiohttp.ClientSession, times: int, seconds: float) -> None:
        start = time.monotonic()
        draw = random.Random(SEED)
        for number in range(times):
            await asyncio.sleep(max(start + seconds * (number + 0.8) / times - time.monotonic(), 0))
            victims = await asyncio.to_thread(self.replicas)
            victim = draw.choice(victims)
            os.kill(victim.pid, signal.SIGKILL)
            began = time.monotonic()
            self.events.append((round(began - self.start, 1), "kill"))
            while True:
                await asyncio.sleep(0.5)
                now = await asyncio.to_thread(self.replicas)
                if len(now) >= 2 and victim.pid not in {process.pid for process in now}:
                    break
            self.recovered.append(time.monotonic() - began)

    async def run(self, seconds: float, swaps: int, kills: int) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
            await self.learn(session)
            self.start = time.monotonic()
            print(f"{len(self.known)} generations known")
            clients = [asyncio.create_task(self.client(session, number)) for number in range(4)]
            took, _ = await asyncio.gather(
                self.swap(session, swaps, seconds), self.kill(session, kills, seconds)
            )
            self.over = True
            await asyncio.gather(*clients)
        print(
            f"{sum(self.answered.values())} answers of {len(self.answered)} generations; {self.retried} asked again"
        )
        for second, took_s, status, answer in self.why:
            print(f"  at {second} s, after {took_s} s: {status} {answer[:150]}")
        print(f"events: {sorted(self.events)}")
        print(f"failed after one retry: {len(self.failed)} {self.failed[:3]}")
        print(f"reranked fewer than asked for, and said so: {self.shortened}")
        print(f"wrong or mixed: {len(self.wrong)} {self.wrong[:3]}")
        print(f"{len(took)} swaps, each {min(took):.1f} to {max(took):.1f} s")
        print(
            f"{len(self.recovered)} kills, a new process after {[round(value, 1) for value in self.recovered]} s"
        )
        print(f"longest wait of a client {max(self.took):.1f} s, p99 {np.quantile(self.took, 0.99):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        (folder / "index").symlink_to(folder / "a")

        def command(port: int) -> list[str]:
            return [*ours(folder, port, "ray", False), "--replicas", "2", "--timeout-ms", str(TIMEOUT_MS)]

        with running(command) as (url, pid):
            campaign = Campaign(url, pid, folder, questions()[:QUERIES])
            asyncio.run(campaign.run(arguments.seconds, arguments.swaps, arguments.kills))


if __name__ == "__main__":
    main()
