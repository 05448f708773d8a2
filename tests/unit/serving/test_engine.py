"""The engine on tiny real models and an index in memory; the batcher and the gate by themselves. No Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from sentence_transformers import CrossEncoder, SentenceTransformer

from raytower.errors import FormatError, InputError
from raytower.index.filters import to_sql
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.retrieval.retriever import Candidate, Vectors
from raytower.serving.app import SearchCall, create_app
from raytower.serving.config import ServeConfig
from raytower.serving.engine import SearchEngine
from raytower.serving.schemas import NotConfiguredError, NotReadyError, OutOfTimeError, UnprocessableError
from raytower.serving.work import Deadline, MicroBatcher
from tests.support.tiny_models import build_tiny_encoder

TEXTS = ["the sun is hot", "月亮大", "a star, far away", "rain in the city", "time is up", "他在上"]
SOON = 20_000


@dataclass
class MemoryIndex:
    """Exact search over a few vectors; document ids carry the version, so that a mix would show."""

    version: str
    fingerprint: str
    vectors: np.ndarray
    encoder: str | None = None
    partial: bool = False
    pause: threading.Event | None = field(default=None)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def check_fingerprint(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise FormatError(f"made by {self.fingerprint}, given {fingerprint}")

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        to_sql(filter, pa.schema([("place", pa.int64())]))

    def recall(
        self, vectors: Vectors, k: int, deadline: Deadline, filter: Mapping[str, Any] | None = None
    ) -> tuple[list[list[Candidate]], bool]:
        if self.pause is not None:
            self.pause.wait(10)
        scores = vectors @ self.vectors.T
        found = []
        for row in scores:
            best = np.argsort(-row, kind="stable")[:k]
            found.append([Candidate(f"{self.version}/{at}", TEXTS[at], {}, float(row[at])) for at in best])
        return found, self.partial


def call_for(
    queries: list[str], k: int, recall_k: int, rerank: bool, filter: Mapping[str, Any] | None = None
) -> SearchCall:
    return SearchCall(queries=queries, k=k, recall_k=recall_k, rerank=rerank, filter=filter)


def memory_index(encoder_dir: Path, version: str = "v1") -> MemoryIndex:
    encoder = Encoder.load(str(encoder_dir))
    vectors = ForwardEngine(encoder).encode(TEXTS, encoder.prefix_for("document"))
    return MemoryIndex(version, encoder.fingerprint, vectors, str(encoder_dir))


@pytest.fixture
def index(dummy_encoder_dir: Path) -> MemoryIndex:
    return memory_index(dummy_encoder_dir)


def make_engine(index: MemoryIndex, **values: object) -> SearchEngine:
    return SearchEngine(ServeConfig(index="memory", **values), lambda version: index)  # type: ignore[arg-type]


def test_search_finds_each_text_by_itself(index: MemoryIndex) -> None:
    engine = make_engine(index)
    assert engine.index_version is None
    assert engine.load() == "v1"
    answer = engine.search(call_for(TEXTS, 2, 100, True), Deadline.after(SOON))
    assert [hits[0].text for hits in answer.hits] == TEXTS
    assert [hits[0].recall_score for hits in answer.hits] == pytest.approx([1.0] * len(TEXTS), abs=1e-5)
    assert (answer.index_version, answer.partial, answer.reranked) == ("v1", False, False)
    assert {"encode", "recall", "rerank"} <= set(answer.timings_ms)


def test_rerank_scores_are_the_cross_encoder_s(index: MemoryIndex, dummy_reranker_dir: Path) -> None:
    engine = make_engine(index, reranker=str(dummy_reranker_dir))
    engine.load()
    answer = engine.search(call_for(["time is up"], 6, 6, True), Deadline.after(SOON))
    assert answer.reranked
    peer = CrossEncoder(str(dummy_reranker_dir), device="cpu")
    logits = peer.predict([("time is up", hit.text) for hit in answer.hits[0]], activation_fn=_identity)
    assert [hit.rerank_score for hit in answer.hits[0]] == pytest.approx(logits.tolist(), abs=1e-5)
    assert [hit.score for hit in answer.hits[0]] == [hit.rerank_score for hit in answer.hits[0]]
    assert logits.tolist() == sorted(logits.tolist(), reverse=True)
    scored = engine.score("time is up", TEXTS, Deadline.after(SOON))
    expected = peer.predict([("time is up", text) for text in TEXTS], activation_fn=_identity)
    assert scored.logits == pytest.approx(expected, abs=1e-5)
    assert scored.model == "reranker"


def test_texts_and_pairs_are_cut_to_the_lengths_of_the_config(
    index: MemoryIndex, dummy_encoder_dir: Path, dummy_reranker_dir: Path
) -> None:
    engine = make_engine(index, reranker=str(dummy_reranker_dir), max_length=8, rerank_max_length=12)
    engine.load()
    peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu")
    peer.max_seq_length = 8
    answer = engine.embed(TEXTS, None, Deadline.after(SOON))
    assert np.abs(answer.vectors - peer.encode(TEXTS)).max() < 1e-5
    # A token a character and two special ones; all texts but the two Chinese ones (3 and 3) are longer.
    assert answer.num_tokens == 4 * 8 + 2 * 5
    pairs = [("time is up", text) for text in TEXTS]
    cut, whole = (CrossEncoder(str(dummy_reranker_dir), device="cpu", max_length=size) for size in (12, None))
    expected = cut.predict(pairs, activation_fn=_identity)
    assert np.abs(expected - whole.predict(pairs, activation_fn=_identity)).max() > 1e-3
    assert engine.score("time is up", TEXTS, Deadline.after(SOON)).logits == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="max_length is 9999"):
        make_engine(index, max_length=9999).load()


def test_the_fusion_weight_of_the_config_wins(index: MemoryIndex, dummy_reranker_dir: Path) -> None:
    engine = make_engine(index, reranker=str(dummy_reranker_dir), fusion_weight=0.25)
    engine.load()
    (hits,) = engine.search(call_for(["rain"], 6, 6, True), Deadline.after(SOON)).hits
    for hit in hits:
        assert hit.score == pytest.approx(0.75 * hit.recall_score + 0.25 * hit.rerank_score, abs=1e-6)
    assert Fusion(weight=0.25).fuse(1.0, 1.0) == 1.0


def test_embeddings_are_the_encoder_s_with_the_prefix_of_the_role(tmp_path: Path) -> None:
    folder = build_tiny_encoder(tmp_path / "e", prompts={"query": "query: ", "document": "passage: "})
    engine = make_engine(memory_index(folder))
    engine.load()
    peer = SentenceTransformer(str(folder), device="cpu")
    for role, prefix in ((None, ""), ("query", "query: "), ("document", "passage: ")):
        answer = engine.embed(["moon", "a star"], role, Deadline.after(SOON))
        expected = peer.encode([prefix + "moon", prefix + "a star"], prompt="")
        assert np.abs(answer.vectors - expected).max() < 1e-5
        # a token a character, spaces included, and two special ones
        assert answer.num_tokens == 4 + 6 + 4 + 2 * len(prefix)
    assert answer.model == "e"


def test_queries_get_the_query_prefix_and_the_config_s_wins(tmp_path: Path) -> None:
    folder = build_tiny_encoder(tmp_path / "e", prompts={"query": "query: ", "document": ""})
    peer = SentenceTransformer(str(folder), device="cpu")
    index = memory_index(folder)
    for prefix, used in ((None, "query: "), ("", ""), ("other ", "other ")):
        engine = make_engine(index, query_prefix=prefix)
        engine.load()
        (hits,) = engine.search(call_for(["moon"], 1, 1, False), Deadline.after(SOON)).hits
        best = float((peer.encode([used + "moon"], prompt="") @ index.vectors.T).max())
        assert hits[0].recall_score == pytest.approx(best, abs=1e-5)


def test_nothing_loaded_is_not_ready(index: MemoryIndex) -> None:
    engine = make_engine(index)
    with pytest.raises(NotReadyError):
        engine.search(call_for(["a"], 1, 1, False), Deadline.after(SOON))


def test_no_reranker_is_said_so(index: MemoryIndex) -> None:
    engine = make_engine(index)
    engine.load()
    with pytest.raises(NotConfiguredError, match="reranker"):
        engine.score("a", ["b"], Deadline.after(SOON))


def test_an_index_of_another_encoder_is_refused_naming_both(index: MemoryIndex, tmp_path: Path) -> None:
    other = build_tiny_encoder(tmp_path / "other", seed=1)
    engine = make_engine(index, encoder=str(other))
    with pytest.raises(FormatError) as refused:
        engine.load()
    assert index.fingerprint in str(refused.value)
    assert Encoder.load(str(other)).fingerprint in str(refused.value)
    assert engine.index_version is None


def test_an_index_that_records_no_encoder_needs_one_in_the_config(index: MemoryIndex) -> None:
    index.encoder = None
    with pytest.raises(InputError, match="encoder"):
        make_engine(index).load()


def test_a_failed_reload_keeps_the_version_before(index: MemoryIndex, dummy_encoder_dir: Path) -> None:
    damaged = MemoryIndex("v2", "0000", index.vectors, str(dummy_encoder_dir))
    engine = SearchEngine(ServeConfig(index="memory"), lambda version: damaged if version == "v2" else index)
    engine.load("v1")
    with pytest.raises(FormatError, match="0000"):
        engine.load("v2")
    assert engine.index_version == "v1"
    assert engine.search(call_for(["a"], 1, 1, False), Deadline.after(SOON)).index_version == "v1"


def test_a_request_under_way_ends_on_the_version_it_began_with(dummy_encoder_dir: Path) -> None:
    old, new = memory_index(dummy_encoder_dir, "v1"), memory_index(dummy_encoder_dir, "v2")
    engine = SearchEngine(ServeConfig(index="memory"), lambda version: new if version == "v2" else old)
    engine.load("v1")
    old.pause = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(engine.search, call_for(["moon"], 6, 6, True), Deadline.after(SOON))
        time.sleep(0.05)
        engine.load("v2")
        after = engine.search(call_for(["moon"], 6, 6, True), Deadline.after(SOON))
        old.pause.set()
        before = under_way.result()
    for answer, version in ((before, "v1"), (after, "v2")):
        assert answer.index_version == version
        assert {hit.id.split("/")[0] for hit in answer.hits[0]} == {version}


def test_versions_never_mix_while_they_are_swapped_under_load(dummy_encoder_dir: Path) -> None:
    versions = [memory_index(dummy_encoder_dir, f"v{number}") for number in range(4)]
    engine = SearchEngine(ServeConfig(index="memory"), lambda version: versions[int((version or "v0")[1:])])
    engine.load()
    stop = threading.Event()

    def ask() -> set[str]:
        seen = set()
        while not stop.is_set():
            answer = engine.search(call_for(["moon", "star"], 6, 6, True), Deadline.after(SOON))
            found = {hit.id.split("/")[0] for hits in answer.hits for hit in hits}
            assert found == {answer.index_version}
            seen |= found
        return seen

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        for number in (1, 2, 3):
            time.sleep(0.1)
            engine.load(f"v{number}")
        time.sleep(0.1)
        stop.set()
        seen = set().union(*(asker.result() for asker in askers))
    assert {"v0", "v3"} <= seen


def test_a_filter_that_does_not_fit_is_the_callers_mistake(index: MemoryIndex) -> None:
    engine = make_engine(index)
    engine.load()
    engine.search(call_for(["a"], 1, 1, False, {"place": {"$lt": 3}}), Deadline.after(SOON))
    with pytest.raises(UnprocessableError, match="there is no column 'palce'; the nearest is 'place'"):
        engine.search(call_for(["a"], 1, 1, False, {"palce": 3}), Deadline.after(SOON))


def test_a_missing_shard_is_passed_on_and_time_is_kept(index: MemoryIndex) -> None:
    engine = make_engine(index)
    engine.load()
    index.partial = True
    assert engine.search(call_for(["a"], 1, 1, False), Deadline.after(SOON)).partial
    past = Deadline(time.monotonic() - 1, 10)
    with pytest.raises(OutOfTimeError):
        engine.search(call_for(["a"], 1, 1, False), past)


def test_the_app_over_the_real_engine(index: MemoryIndex, dummy_reranker_dir: Path) -> None:
    config = ServeConfig(index="memory", reranker=str(dummy_reranker_dir), timeout_ms=SOON)
    engine = SearchEngine(config, lambda version: index)
    engine.load()
    with TestClient(create_app(engine, config)) as client:
        body = client.post("/v1/search", json={"queries": ["月亮大", "time"], "k": 100}).json()
        assert body["reranked"] is True
        assert [len(hits) for hits in body["results"]] == [6, 6]
        assert body["timings_ms"]["rerank"] > 0
        assert client.post("/v1/embeddings", json={"input": "a"}).json()["model"] == "encoder"
        assert client.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).status_code == 200


# --- batching -------------------------------------------------------------------------------------------------


def test_what_waits_while_a_forward_runs_shares_the_next_one() -> None:
    calls: list[list[int]] = []
    begun, release = threading.Event(), threading.Event()

    def run(items: list[int]) -> list[int]:
        calls.append(items)
        begun.set()
        release.wait(10)
        return [item * 10 for item in items]

    batcher = MicroBatcher(run, max_items=8)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(batcher.submit, [0], Deadline.after(SOON))
        assert begun.wait(5)
        others = [
            pool.submit(batcher.submit, [number, -number], Deadline.after(SOON)) for number in range(1, 5)
        ]
        _wait_for(lambda: len(batcher._waiting) == 4)
        release.set()
        assert first.result() == [0]
        assert [other.result() for other in others] == [[number * 10, -number * 10] for number in range(1, 5)]
    assert calls[0] == [0], "an idle batcher must not wait for company"
    assert len(calls) == 2
    assert sorted(calls[1]) == [-4, -3, -2, -1, 1, 2, 3, 4]


def test_long_submissions_are_cut_and_keep_their_order() -> None:
    calls: list[int] = []

    def run(items: list[int]) -> list[int]:
        calls.append(len(items))
        return [item + 1 for item in items]

    batcher = MicroBatcher(run, max_items=4)
    assert batcher.submit(list(range(10)), Deadline.after(SOON)) == list(range(1, 11))
    assert calls == [4, 4, 2]
    assert batcher.submit([], Deadline.after(SOON)) == []


def test_a_failed_forward_reaches_all_its_requests_and_the_next_one_works() -> None:
    begun, release = threading.Event(), threading.Event()

    def run(items: list[str]) -> list[str]:
        begun.set()
        release.wait(10)
        if "bad" in items:
            raise ValueError("broken")
        return items

    batcher = MicroBatcher(run, max_items=8)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.submit, ["ok"], Deadline.after(SOON))
        assert begun.wait(5)
        others = [pool.submit(batcher.submit, [item], Deadline.after(SOON)) for item in ("bad", "fine")]
        _wait_for(lambda: len(batcher._waiting) == 2)
        release.set()
        assert first.result() == ["ok"]
        for other in others:
            with pytest.raises(ValueError, match="broken"):
                other.result()
    assert batcher.submit(["again"], Deadline.after(SOON)) == ["again"]


def test_a_submission_that_waited_too_long_is_never_run() -> None:
    calls: list[list[str]] = []
    begun, release = threading.Event(), threading.Event()

    def run(items: list[str]) -> Sequence[str]:
        calls.append(items)
        begun.set()
        release.wait(10)
        return items

    batcher = MicroBatcher(run, max_items=8)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(batcher.submit, ["first"], Deadline.after(SOON))
        assert begun.wait(5)
        with pytest.raises(OutOfTimeError, match="30 ms"):
            batcher.submit(["late"], Deadline.after(30))
        release.set()
        first.result()
    assert batcher.submit(["next"], Deadline.after(SOON)) == ["next"]
    assert calls == [["first"], ["next"]]


def _identity(value: object) -> object:
    return value


def _wait_for(condition: object) -> None:
    deadline = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)
