"""A server's searches by words and by both, with all shards here and with shards in groups: as one process finds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import InputError
from raytower.index.hybrid import HybridFusion, search_hybrid
from raytower.index.reader import Index
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.serving.calls import SearchAnswer, SearchCall, ServedModel, TokenCounts
from raytower.serving.engine import SearchEngine
from raytower.serving.errors import UnprocessableError
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation
from raytower.serving.parts import Encoded, Pairs, Scored
from raytower.serving.placements import GroupCalls, PlacedParts
from raytower.serving.resolve import resolve_settings
from raytower.serving.shards import ShardGroup
from raytower.serving.work import Deadline
from tests.support.index_cases import build, embeddings_of, unit_vectors
from tests.support.served_index import TEXTS, write_version

QUERIES = ("sun 3", "月亮", "…")
LATER = 60_000


class Encoding:
    """An encoder that counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._engine = ForwardEngine(Encoder.load(folder))
        self.served = ServedModel(name="tiny", max_length=32, dim=self._engine.dim)
        self.asked = 0

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        return 0.0

    async def encode(
        self, texts: Sequence[str], prefix: str, lane: Lane, deadline: Deadline, max_length: int | None = None
    ) -> Encoded:
        self.asked += len(texts)
        return Encoded(self._engine.encode(list(texts), prefix), TokenCounts(tokens=5))


class Equal:
    """A reranker to which all documents are the same, so that recall scores alone tell where they are mixed in."""

    served = ServedModel(name="equal", max_length=32)

    def predict(self, num_pairs: int, lane: Lane) -> float:
        return 0.0

    async def score(self, pairs: Pairs, deadline: Any) -> Scored:
        return Scored([np.zeros(len(texts), np.float32) for texts in pairs.candidates], 100, TokenCounts())


class Models:
    def __init__(self, folder: Path, scorer: Any = None) -> None:
        self.encoding = Encoding(folder)
        self._scorer = scorer

    def encoder(self, generation: Generation) -> Any:
        return self.encoding

    def scorer(self, generation: Generation) -> Any:
        return self._scorer

    def classifier(self, generation: Generation) -> None:
        return None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> str:
    folder = tmp_path_factory.mktemp("served") / "index"
    write_version(folder, "000001", dummy_encoder_dir, num_shards=3)
    return str(folder)


def ask(models: Models, generation: Generation, num_groups: int, *calls: SearchCall) -> list[SearchAnswer]:
    async def work() -> list[SearchAnswer]:
        groups = [ShardGroup(number, num_groups) for number in range(num_groups)]
        for group in groups:
            await group.prepare(generation)
        placed = PlacedParts(
            models,  # type: ignore[arg-type]
            groups=[GroupCalls(counts=group.counts, search=group.search) for group in groups],
            shard_timeout_ms=LATER,
        )
        engine = SearchEngine(["default"], placed)
        await engine.prepare(generation)
        engine.activate(generation.id)
        models.encoding.asked = 0
        assert engine.served("default").modes == generation.modes
        await engine.check()
        return [await engine.search("default", call, Deadline.after(LATER)) for call in calls]

    return asyncio.run(work())


def call(mode: Any, **more: Any) -> SearchCall:
    return SearchCall(queries=QUERIES, k=6, recall_k=6, rerank=False, mode=mode, **more)


@pytest.mark.parametrize("num_groups", [0, 2])
def test_it_finds_what_one_process_finds(served: str, dummy_encoder_dir: Path, num_groups: int) -> None:
    settings = {"index": served, "mode": "lexical", "hybrid": {"weight": 0.4}}
    generation = resolve_settings("default", settings).generation
    assert generation.modes == ("lexical", "dense", "hybrid")
    models, index = Models(dummy_encoder_dir), Index.open(served)
    some = {"number": {"$lt": 20}}
    dense, words, both, filtered = ask(
        models,
        generation,
        num_groups,
        call("dense"),
        call("lexical"),
        call("hybrid"),
        call("hybrid", filter=some),
    )
    assert models.encoding.asked == 3 * len(QUERIES), (
        "a search by words encodes nothing, and is the health check here"
    )
    vectors = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(list(QUERIES))
    by_words = index.search_lexical(QUERIES, 6)
    fusion = HybridFusion(weight=0.4)
    expected = {
        "dense": (dense, index.search(vectors, 6)),
        "lexical": (words, by_words),
        "hybrid": (both, search_hybrid(index, QUERIES, vectors, 6, fusion)),
        "filtered": (filtered, search_hybrid(index, QUERIES, vectors, 6, fusion, filter=some)),
    }
    for name, (answer, hits) in expected.items():
        for number in range(len(QUERIES)):
            rows = [row for row in hits.rows[number].tolist() if row >= 0]
            assert [hit.text for hit in answer.hits[number]] == [TEXTS[row] for row in rows], name
            scores = hits.scores[number][: len(rows)].tolist()
            assert [hit.score for hit in answer.hits[number]] == pytest.approx(scores, abs=1e-5), name
    assert [answer.mode for answer in (dense, words, both)] == ["dense", "lexical", "hybrid"]
    assert [answer.wordless for answer in (dense, words, both)] == [0, 1, 1]
    assert words.hits[2] == []
    assert [hit.id for hit in both.hits[2]] == [hit.id for hit in dense.hits[2]]
    assert (words.counts.tokens, dense.counts.tokens) == (0, 5)


def test_an_index_without_a_lexical_side_has_one_mode(tmp_path: Path, dummy_encoder_dir: Path) -> None:
    encoder = Encoder.load(dummy_encoder_dir)
    made_by = {"fingerprint": encoder.fingerprint, "encoder": str(dummy_encoder_dir)}
    build(tmp_path / "index", embeddings_of(tmp_path / "in", unit_vectors(9, 32), **made_by), lexical=False)
    settings = {"index": str(tmp_path / "index")}
    generation = resolve_settings("default", settings).generation
    assert generation.modes == ("dense",)
    with pytest.raises(UnprocessableError, match=r"mode: is 'hybrid'.*no lexical side"):
        ask(Models(dummy_encoder_dir), generation, 0, call("hybrid"))
    with pytest.raises(InputError, match=r"mode is hybrid.*`raytower index compact --lexical true`"):
        resolve_settings("default", {**settings, "mode": "hybrid"})


def test_a_fusion_serves_the_mode_that_it_was_tuned_in(served: str, dummy_encoder_dir: Path) -> None:
    generation = resolve_settings("default", {"index": served}).generation
    fusion = Fusion(weight=0.5, recall_mean=0.0, recall_std=1.0, mode="hybrid")
    models = Models(dummy_encoder_dir, Equal())

    async def work() -> list[SearchAnswer]:
        engine = SearchEngine(
            ["default"],
            lambda wanted: replace(PlacedParts(models)(wanted), fusion=fusion),  # type: ignore[arg-type]
        )
        await engine.prepare(generation)
        engine.activate(generation.id)
        calls = [replace(call(mode), rerank=True) for mode in ("dense", "hybrid")]
        return [await engine.search("default", each, Deadline.after(LATER)) for each in calls]

    dense, both = asyncio.run(work())
    assert {hit.score for hit in dense.hits[0]} == {0.0}, "the logit alone"
    assert [hit.score for hit in both.hits[0]] == pytest.approx(
        [hit.recall_score / 2 for hit in both.hits[0]]
    )
