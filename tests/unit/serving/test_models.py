"""Models shared by requests, and generations over real indexes: the same numbers as the engines give by themselves."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import FormatError, InputError
from raytower.models import engine_choice
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.serving.calls import EmbedCall, RerankCall, SearchAnswer, SearchCall
from raytower.serving.config import CollectionConfig
from raytower.serving.engine import SearchEngine
from raytower.serving.errors import UnprocessableError
from raytower.serving.forwards import Forwards, Lane
from raytower.serving.generation import ComputeEntry, ModelEntry
from raytower.serving.models import ModelPool, SharedClassifier, SharedEncoder, SharedScorer
from raytower.serving.opening import LocalParts
from raytower.serving.parts import Pairs, Scored
from raytower.serving.resolve import generation_of
from raytower.serving.work import Deadline
from tests.support.served_index import TEXTS, write_version
from tests.support.tiny_models import build_tiny_classifier

LATER = 60_000


@pytest.fixture
def forwards() -> Iterator[Forwards]:
    made = Forwards()
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> Path:
    """Two versions of one index."""
    folder = tmp_path_factory.mktemp("served") / "index"
    write_version(folder, "000001", dummy_encoder_dir)
    write_version(folder, "000002", dummy_encoder_dir)
    return folder


def encoder_of(folder: Path, forwards: Forwards, pool: ThreadPoolExecutor, **compute: Any) -> SharedEncoder:
    entry = ModelEntry(uri=str(folder), fingerprint=Encoder.load(folder).compute_fingerprint())
    return SharedEncoder(entry, ComputeEntry(**compute), forwards, pool)


def engine_over(forwards: Forwards) -> SearchEngine:
    return SearchEngine(["default"], LocalParts(ModelPool(forwards)))


async def serve(engine: SearchEngine, index: Path, version: str, /, **values: Any) -> str:
    generation = generation_of("default", CollectionConfig(index=str(index), **values), version)
    await engine.prepare(generation)
    engine.activate(generation.id)
    return generation.id


def test_vectors_are_those_of_the_engine_alone(
    dummy_encoder_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    texts = [*TEXTS[:20], "word " * 300, "月" * 40]
    shared = encoder_of(dummy_encoder_dir, forwards, pool, max_length=16)
    alone = ForwardEngine(Encoder.load(dummy_encoder_dir), max_length=16)

    async def ask() -> list[Any]:
        asks = [shared.encode([text], "p: ", Lane.QUERY, Deadline.after(LATER)) for text in texts]
        return list(
            await asyncio.gather(*asks, shared.encode(texts, "p: ", Lane.BULK, Deadline.after(LATER)))
        )

    *single, together = asyncio.run(ask())
    expected = alone.encode(texts, "p: ")
    np.testing.assert_allclose(together.vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([one.vectors for one in single]), expected, atol=1e-5)
    lengths = alone.tokenise(texts, "p: ").lengths
    assert together.counts.tokens == int(lengths.sum())


def test_a_text_is_called_cut_only_where_something_was_cut_off(
    dummy_encoder_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    tokens = len(ForwardEngine(Encoder.load(dummy_encoder_dir)).tokenise(["sun moon star"]).ids)
    counts = []
    for max_length in (tokens - 1, tokens, tokens + 1):
        shared = encoder_of(dummy_encoder_dir, forwards, pool, max_length=max_length)
        encoded = asyncio.run(shared.encode(["sun moon star", "sun"], "", Lane.BULK, Deadline.after(LATER)))
        counts.append(encoded.counts.truncated)
    assert counts == [1, 0, 0]


def test_token_ids_are_read_as_the_texts_they_stand_for(
    minilm_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    shared = encoder_of(minilm_dir, forwards, pool)
    tokenizer = Encoder.load(minilm_dir).tokenizer
    assert shared.decode([tokenizer("sun moon")["input_ids"]]) == ["sun moon"]
    with pytest.raises(UnprocessableError, match=r"input\.1: token id 999999999"):
        shared.decode([[5], [999999999]])


def test_logits_are_those_of_the_scorer_alone(
    dummy_reranker_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    entry = ModelEntry(uri=str(dummy_reranker_dir), fingerprint="f")
    shared = SharedScorer(entry, ComputeEntry(rerank_max_length=12), forwards, pool)
    alone = CrossScorer(CrossEncoder.load(dummy_reranker_dir), max_length=12)
    candidates = [TEXTS[:5], [], ["star " * 50, "moon"]]
    queries = ["sun", "nothing", "大地"]

    async def ask() -> Any:
        pairs = Pairs(queries, candidates, Lane.RERANK, may_shorten=True)
        return await shared.score(pairs, Deadline.after(LATER))

    scored = asyncio.run(ask())
    for query, texts, logits in zip(queries, candidates, scored.logits, strict=True):
        expected = alone.score([query] * len(texts), texts) if texts else np.empty(0)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert (scored.depth, scored.counts.truncated) == (5, 1)


def test_only_as_many_candidates_are_scored_as_there_is_time_for(
    dummy_reranker_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    shared = SharedScorer(
        ModelEntry(uri=str(dummy_reranker_dir), fingerprint="f"), ComputeEntry(), forwards, pool
    )
    for _ in range(50):  # a token takes 10 ms, says experience
        shared._passes.cost.observe(100, 1.0)
        shared._passes.cost.observe(10, 0.1)

    async def ask(timeout_ms: int) -> int:
        candidates = [["sun moon"] * 30, ["star"] * 30]
        pairs = Pairs(["a", "b"], candidates, Lane.RERANK, may_shorten=True)
        scored = await shared.score(pairs, Deadline.after(timeout_ms))
        assert [len(logits) for logits in scored.logits] == [scored.depth] * 2
        return scored.depth

    assert asyncio.run(ask(1)) == 0
    assert 0 < asyncio.run(ask(1000)) < 20
    assert asyncio.run(ask(LATER)) == 30


def test_what_was_scored_counts_where_passes_take_longer_than_was_expected(
    dummy_reranker_dir: Path, forwards: Forwards, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was thrown away once: a search took its whole time, and its answer was not reranked."""
    shared = SharedScorer(
        ModelEntry(uri=str(dummy_reranker_dir), fingerprint="f"), ComputeEntry(), forwards, pool
    )
    # The longest come last, so that no order by length alone scores the first ones.
    candidates = [["sun " * number for number in range(1, 41)]]

    async def score(timeout_ms: int, may_shorten: bool) -> Scored:
        pairs = Pairs(["a"], candidates, Lane.RERANK, may_shorten=may_shorten)
        return await shared.score(pairs, Deadline.after(timeout_ms))

    expected = asyncio.run(score(LATER, False)).logits[0]
    forward = shared._engine.forward_block
    monkeypatch.setattr(shared._engine, "tokens_per_batch", 200)

    def slow(block: Any) -> Any:
        time.sleep(0.2)
        return forward(block)

    monkeypatch.setattr(shared._engine, "forward_block", slow)
    monkeypatch.setattr(shared._passes.cost, "predict", lambda tokens: 0.0)
    scored = asyncio.run(score(700, True))
    assert scored.depth in (8, 16)
    np.testing.assert_allclose(scored.logits[0], expected[: scored.depth], atol=1e-5)


def test_a_model_is_loaded_once_for_all_generations_and_goes_with_the_last(
    index: Path, dummy_encoder_dir: Path, dummy_reranker_dir: Path, forwards: Forwards
) -> None:
    models = ModelPool(forwards)
    config = CollectionConfig(index=str(index), reranker=str(dummy_reranker_dir))
    first, second = (generation_of("default", config, version) for version in ("000001", "000002"))
    encoder, scorer = models.encoder(first), models.scorer(first)
    assert models.encoder(second) is encoder
    assert models.scorer(second) is scorer
    gone = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert gone() is None


def test_weights_that_changed_under_a_generation_are_refused(index: Path, forwards: Forwards) -> None:
    generation = generation_of("default", CollectionConfig(index=str(index)), "000001")
    changed = generation.model_copy(
        update={"encoder": ModelEntry(uri=generation.encoder.uri, fingerprint="other")}
    )
    with pytest.raises(InputError, match="files were changed"):
        ModelPool(forwards).encoder(changed)


def test_an_index_version_built_anew_under_its_name_is_refused(index: Path, forwards: Forwards) -> None:
    generation = generation_of("default", CollectionConfig(index=str(index)), "000001")
    with pytest.raises(FormatError, match="built anew"):
        LocalParts(ModelPool(forwards))(generation.model_copy(update={"manifest_sha256": "0" * 64}))


def test_an_index_of_another_encoder_is_refused_naming_both(index: Path, minilm_dir: Path) -> None:
    with pytest.raises(FormatError, match="fingerprint"):
        generation_of("default", CollectionConfig(index=str(index), encoder=str(minilm_dir)))


def test_a_search_finds_each_text_by_itself(index: Path, forwards: Forwards) -> None:
    async def ask() -> SearchAnswer:
        engine = engine_over(forwards)
        await serve(engine, index, "000001")
        call = SearchCall(queries=TEXTS, k=2, recall_k=10, rerank=True, filter={"number": {"$gte": 0}})
        return await engine.search("default", call, Deadline.after(LATER))

    answer = asyncio.run(ask())
    assert [hits[0].text for hits in answer.hits] == TEXTS
    assert all(hits[0].recall_score == pytest.approx(1, abs=1e-5) for hits in answer.hits)
    assert answer.hits[3][0].metadata == {"number": 3}


def test_what_is_embedded_as_a_document_is_cut_as_the_documents_of_the_index_were(
    index: Path, dummy_encoder_dir: Path, forwards: Forwards
) -> None:
    text = "sun moon star " * 30

    async def ask(role: Any) -> Any:
        engine = engine_over(forwards)
        config = CollectionConfig(index=str(index))
        generation = generation_of("default", config, "000001")
        assert generation.document_max_length == 64  # as the manifest says
        shorter = generation.model_copy(update={"document_max_length": 9, "document_prefix": "p: "})
        await engine.prepare(shorter)
        engine.activate(shorter.id)
        return await engine.embed("default", EmbedCall(texts=[text], role=role), Deadline.after(LATER))

    as_document, as_text = asyncio.run(ask("document")), asyncio.run(ask(None))
    encoder = Encoder.load(dummy_encoder_dir)
    cut = ForwardEngine(encoder, max_length=9).encode([text], "p: ")
    np.testing.assert_allclose(as_document.vectors, cut, atol=1e-5)
    np.testing.assert_allclose(as_text.vectors, ForwardEngine(encoder).encode([text]), atol=1e-5)
    assert (as_document.counts.tokens, as_document.counts.truncated) == (9, 1)


def test_rerank_scores_are_the_cross_encoders(
    index: Path, dummy_reranker_dir: Path, forwards: Forwards
) -> None:
    async def ask() -> tuple[SearchAnswer, Any]:
        engine = engine_over(forwards)
        await serve(engine, index, "000001", reranker=str(dummy_reranker_dir))
        call = SearchCall(queries=["sun 3"], k=5, recall_k=5, rerank=True)
        found = await engine.search("default", call, Deadline.after(LATER))
        texts = [hit.text for hit in found.hits[0]]
        return found, await engine.rerank(
            "default", RerankCall(query="sun 3", documents=texts), Deadline.after(LATER)
        )

    found, reranked = asyncio.run(ask())
    alone = CrossScorer(CrossEncoder.load(dummy_reranker_dir))
    texts = [hit.text for hit in found.hits[0]]
    expected = alone.score(["sun 3"] * 5, texts)
    np.testing.assert_allclose([hit.rerank_score for hit in found.hits[0]], expected, atol=1e-5)
    np.testing.assert_allclose(reranked.logits, expected, atol=1e-5)
    assert expected.tolist() == sorted(expected.tolist(), reverse=True)


def test_versions_never_mix_while_they_are_swapped_under_load(index: Path, forwards: Forwards) -> None:
    """Ids carry the version, so that an answer of two versions would show."""

    async def ask() -> set[str]:
        engine = engine_over(forwards)
        generations = {version: await serve(engine, index, version) for version in ("000001", "000002")}
        seen: set[str] = set()
        stopped = False

        async def searches() -> None:
            while not stopped:
                call = SearchCall(queries=["sun 1", "moon 2"], k=5, recall_k=5, rerank=False)
                answer = await engine.search("default", call, Deadline.after(LATER))
                versions = {hit.id.split("/")[0] for hits in answer.hits for hit in hits}
                assert versions == {answer.index_version}
                assert generations[answer.index_version] == answer.generation
                seen.add(answer.index_version)

        tasks = [asyncio.ensure_future(searches()) for _ in range(4)]
        for version in ("000001", "000002") * 3:
            await serve(engine, index, version)
            await asyncio.sleep(0.02)
        stopped = True
        await asyncio.gather(*tasks)
        return seen

    assert asyncio.run(ask()) == {"000001", "000002"}


def test_loading_does_not_hold_up_the_requests_meanwhile(index: Path, forwards: Forwards) -> None:
    async def ask() -> float:
        opened = threading.Event()
        parts = LocalParts(ModelPool(forwards))

        def slowly(generation: Any) -> Any:
            if generation.index_version == "000002":
                opened.wait(20)
            return parts(generation)

        engine = SearchEngine(["default"], slowly)
        await serve(engine, index, "000001")
        loading = asyncio.ensure_future(serve(engine, index, "000002"))
        await asyncio.sleep(0.05)
        started = time.perf_counter()
        await engine.embed("default", EmbedCall(texts=["sun"]), Deadline.after(LATER))
        took = time.perf_counter() - started
        opened.set()
        await loading
        return took

    assert asyncio.run(ask()) < 5


def test_what_was_served_before_is_let_go_of(
    index: Path, dummy_encoder_dir: Path, dummy_reranker_dir: Path, forwards: Forwards
) -> None:
    """After three swaps: indexes with their mapped files and tables, and the model that nothing names, are gone."""
    held: dict[str, list[weakref.ref[Any]]] = {}
    parts = LocalParts(ModelPool(forwards))

    def opened(generation: Any) -> Any:
        made = parts(generation)
        index = made.recall.index
        shard, table = index.shards[0], index.table
        named: list[Any] = [made, made.recall, index, shard, shard._index, table, table._dataset]
        named += [made.scorer] if made.scorer else []
        held.setdefault(generation.id, []).extend(weakref.ref(item) for item in named)
        return made

    async def swap_and_ask() -> list[str]:
        engine = SearchEngine(["default"], opened)
        served = []
        for version, values in (
            ("000001", {"reranker": str(dummy_reranker_dir)}),
            ("000002", {}),
            ("000001", {}),
        ):
            served.append(await serve(engine, index, version, **values))
            call = SearchCall(queries=["sun 1"], k=5, recall_k=5, rerank=True, filter={"number": {"$gte": 0}})
            await engine.search("default", call, Deadline.after(LATER))
            await engine.document("default", f"{version}/3", Deadline.after(LATER))
        gc.collect()
        alive = {id: [type(item()).__name__ for item in items if item()] for id, items in held.items()}
        assert [bool(alive[id]) for id in served] == [False, False, True], alive
        return served

    assert len(set(asyncio.run(swap_and_ask()))) == 3
    assert [len(items) for items in held.values()] == [8, 7, 7]


@pytest.mark.parametrize("faster", ["torch", "onnx"])
def test_engine_auto_serves_by_the_faster_and_says_which(
    faster: str,
    index: Path,
    forwards: Forwards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        engine_choice, "race", lambda ways: {name: 0.001 if name == faster else 0.002 for name in ways}
    )

    async def ask() -> SearchAnswer:
        engine = engine_over(forwards)
        await serve(engine, index, "000001", engine="auto")
        call = SearchCall(queries=["sun 1"], k=1, recall_k=1, rerank=False)
        return await engine.search("default", call, Deadline.after(LATER))

    answer = asyncio.run(ask())
    assert answer.hits[0][0].text == "sun 1"
    assert answer.hits[0][0].recall_score == pytest.approx(1, abs=1e-4)
    assert f"engine auto takes {faster}: the faster on a few texts" in capsys.readouterr().err


def test_a_served_classifier_has_the_labels_of_the_command(
    tmp_path: Path, forwards: Forwards, pool: ThreadPoolExecutor
) -> None:
    """`raytower classify` calls a class that somebody named 1.0 "1", and so do settings: a cut for it never held."""
    folder = build_tiny_classifier(tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "0.0", "1": "1.0"}, "label2id": {"0.0": 0, "1.0": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    entry = ModelEntry(uri=str(folder), fingerprint=TextClassifier.load(folder).fingerprint)
    shared = SharedClassifier(entry, ComputeEntry(), forwards, pool)
    assert tuple(shared.served.labels) == ("0", "1")
