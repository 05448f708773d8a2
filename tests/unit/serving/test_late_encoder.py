"""A server that searches by words: its encoder is loaded by the first request that asks for vectors, and not before."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.errors import FormatError
from raytower.models.encoder import Encoder
from raytower.serving.calls import EmbedCall, SearchCall, ServedModel, TokenCounts
from raytower.serving.config import CollectionConfig
from raytower.serving.engine import SearchEngine
from raytower.serving.errors import NotReadyError, OutOfTimeError
from raytower.serving.forwards import Forwards, Lane
from raytower.serving.generation import Generation
from raytower.serving.late_encoder import LateEncoder
from raytower.serving.models import ModelPool
from raytower.serving.opening import LocalParts
from raytower.serving.parts import Encoded
from raytower.serving.resolve import generation_of
from raytower.serving.work import Deadline
from tests.support.served_index import write_version

LATER = 60_000


class Loaded:
    """An encoder that was loaded."""

    served = ServedModel(name="tiny", max_length=32, dim=4)

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        return 1.5

    async def encode(
        self, texts: Sequence[str], prefix: str, lane: Lane, deadline: Deadline, max_length: int | None = None
    ) -> Encoded:
        return Encoded(np.ones((len(texts), 4), np.float32), TokenCounts(tokens=7))

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return ["decoded"] * len(token_ids)


UNLOADED = ServedModel(name="tiny", max_length=None, dim=4)


def encode(late: LateEncoder, timeout_ms: int = LATER) -> Any:
    return late.encode(["a"], "", Lane.QUERY, Deadline.after(timeout_ms))


def test_it_is_loaded_once_by_who_needs_it_first() -> None:
    loads: list[float] = []

    def load() -> Loaded:
        loads.append(time.monotonic())
        time.sleep(0.05)
        return Loaded()

    late = LateEncoder(load, UNLOADED)
    assert (late.served, late.predict(["a"], Lane.QUERY)) == (UNLOADED, 0.0)
    assert loads == []

    async def together() -> list[Any]:
        return await asyncio.gather(*(encode(late) for _ in range(4)))

    found = asyncio.run(together())
    assert [each.counts.tokens for each in found] == [7] * 4
    assert len(loads) == 1
    assert (late.served, late.predict(["a"], Lane.QUERY)) == (Loaded.served, 1.5)
    assert late.decode([[1], [2]]) == ["decoded"] * 2


def test_who_has_no_time_left_does_not_wait_and_the_next_one_finds_it() -> None:
    go = threading.Event()

    def load() -> Loaded:
        go.wait(10)
        return Loaded()

    late = LateEncoder(load, UNLOADED)

    async def ask() -> None:
        with pytest.raises(OutOfTimeError):
            await encode(late, timeout_ms=30)
        with pytest.raises(NotReadyError, match="is being loaded; try again, or send texts"):
            late.decode([[1]])
        go.set()
        assert (await encode(late)).counts.tokens == 7

    asyncio.run(ask())


def test_what_cannot_be_loaded_is_tried_again() -> None:
    failures = [FormatError("its files were changed")]

    def load() -> Loaded:
        if failures:
            raise failures.pop()
        return Loaded()

    late = LateEncoder(load, UNLOADED)

    async def ask() -> None:
        with pytest.raises(NotReadyError, match="cannot be loaded: its files were changed"):
            await encode(late)
        assert late.served == UNLOADED
        assert (await encode(late)).counts.tokens == 7

    asyncio.run(ask())


# --- a server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the encoders that were loaded."""
    found: list[str] = []
    real = Encoder.load

    def load(name: Any, *arguments: Any, **more: Any) -> Encoder:
        found.append(str(name))
        return real(name, *arguments, **more)

    monkeypatch.setattr(Encoder, "load", load)
    return found


def serve(generation: Generation, work: Callable[[SearchEngine], Any]) -> None:
    async def whole() -> None:
        forwards = Forwards()
        engine = SearchEngine(["default"], LocalParts(ModelPool(forwards)))
        await engine.prepare(generation)
        engine.activate(generation.id)
        await engine.check()
        await work(engine)

    asyncio.run(whole())


def config_of(index: Path, **more: Any) -> CollectionConfig:
    return CollectionConfig(index=str(index), **more)


@pytest.fixture
def index(tmp_path: Path, dummy_encoder_dir: Path, loads: list[str]) -> Path:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    loads.clear()
    return tmp_path / "index"


def test_a_server_that_searches_by_words_loads_no_encoder(index: Path, loads: list[str]) -> None:
    generation = generation_of("default", config_of(index, mode="lexical"))

    async def work(engine: SearchEngine) -> None:
        words = SearchCall(queries=("sun 3",), k=2, recall_k=2, rerank=False, mode="lexical")
        by_words = await engine.search("default", words, Deadline.after(LATER))
        assert by_words.hits[0][0].text == "sun 3"
        described = engine.served("default").encoder
        assert (described.max_length, described.dim) == (None, 32)
        assert loads == []
        dense = SearchCall(queries=("sun 3",), k=2, recall_k=2, rerank=False, mode="dense")
        found = await engine.search("default", dense, Deadline.after(LATER))
        assert found.hits[0][0].text == "sun 3"
        assert len(loads) == 1
        assert engine.served("default").encoder.max_length is not None
        call = EmbedCall(texts=("moon",), role="query")
        assert (await engine.embed("default", call, Deadline.after(LATER))).vectors.shape == (1, 32)
        assert len(loads) == 1

    serve(generation, work)


@pytest.mark.parametrize("more", [{}, {"mode": "hybrid"}, {"mode": "lexical", "classify_modes": ("votes",)}])
def test_where_something_else_needs_it_it_is_loaded_before(
    index: Path, loads: list[str], more: dict[str, Any]
) -> None:
    async def work(engine: SearchEngine) -> None:
        assert engine.served("default").encoder.max_length is not None

    serve(generation_of("default", config_of(index, **more)), work)
    assert loads


def test_an_encoder_of_somebody_is_not_loaded_for_its_fingerprint(
    index: Path, tmp_path: Path, dummy_encoder_dir: Path, loads: list[str]
) -> None:
    """raytower.json records it; without one the index's is taken, and checked when the encoder is loaded."""
    foreign = tmp_path / "foreign"
    shutil.copytree(dummy_encoder_dir, foreign)
    (foreign / "raytower.json").unlink(missing_ok=True)
    plain = generation_of("default", config_of(index, mode="lexical", encoder=str(foreign)))
    assert loads == []
    # Another one is refused by the request that needs it.
    pooling = next(foreign.glob("*Pooling*/config.json"))
    changed = json.loads(pooling.read_text())
    changed |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    pooling.write_text(json.dumps(changed))

    async def work(engine: SearchEngine) -> None:
        dense = SearchCall(queries=("sun",), k=2, recall_k=2, rerank=False, mode="dense")
        with pytest.raises(NotReadyError, match=r"cannot be loaded: model .* has fingerprint"):
            await engine.search("default", dense, Deadline.after(LATER))

    serve(plain, work)
