"""The engine's stages, over parts whose numbers are small enough to reckon by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from raytower.errors import InputError
from raytower.index.table import Document
from raytower.models.fusion import Fusion
from raytower.serving.calls import (
    ClassifyCall,
    EmbedCall,
    RerankCall,
    SearchAnswer,
    SearchCall,
    ServedModel,
    SimilarityCall,
    TokenCounts,
)
from raytower.serving.engine import EngineLimits, SearchEngine
from raytower.serving.errors import (
    NotConfiguredError,
    NotFiniteError,
    NotFoundError,
    NotReadyError,
    OutOfTimeError,
    OverloadedError,
    UnprocessableError,
)
from raytower.serving.forwards import Lane
from raytower.serving.generation import Generation, ModelEntry
from raytower.serving.parts import Encoded, Pairs, Parts, Recalled, Scored
from raytower.serving.work import Deadline

# The vectors that texts have, and with them their cosines.
VECTORS = {
    "east": (1.0, 0.0),
    "north": (0.0, 1.0),
    "north-east": (0.8, 0.6),
    "nowhere": (0.0, 0.0),
    "warm up": (0.6, 0.8),
}
TEXTS = ("east", "north-east", "north")  # rows 0, 1, 2
LATER = 60_000


class FakeEncoder:
    served = ServedModel(name="compass", max_length=8, dim=2)

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[str, ...], str, Lane]] = []
        self.seconds = 0.0
        self.held = asyncio.Event()
        self.held.set()

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        return self.seconds

    async def encode(
        self,
        texts: Sequence[str],
        prefix: str,
        lane: Lane,
        deadline: Deadline,
        max_length: int | None = None,
    ) -> Encoded:
        self.seen.append((tuple(texts), prefix, lane))
        await self.held.wait()
        vectors = np.array([VECTORS[text] for text in texts], np.float32)
        return Encoded(vectors, TokenCounts(tokens=len(texts), truncated=0))

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return [list(VECTORS)[ids[0]] for ids in token_ids]


class FakeScorer:
    """The logit of a pair is the document's place in the alphabet of TEXTS; `depth` is what time allows."""

    served = ServedModel(name="judge", max_length=16)
    LOGITS: ClassVar = {"east": -1.0, "north-east": 3.0, "north": 2.0}

    def __init__(self) -> None:
        self.depth = 100
        self.seen: list[tuple[tuple[str, ...], Lane]] = []
        self.error: Exception | None = None

    def predict(self, num_pairs: int, lane: Lane) -> float:
        return 0.0

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        if self.error is not None:
            raise self.error
        most = max(map(len, pairs.candidates))
        depth = min(self.depth, most) if pairs.may_shorten else most
        heads = [texts[:depth] for texts in pairs.candidates]
        self.seen.extend((tuple(head), pairs.lane) for head in heads)
        logits = [np.array([self.LOGITS[text] for text in head], np.float32) for head in heads]
        return Scored(logits, depth, TokenCounts(tokens=10, truncated=1))


class FakeClassifier:
    served = ServedModel(name="sorter", max_length=8, labels=("A##B", "C"))

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        return 0.0

    async def logits(
        self, texts: Sequence[str], lane: Lane, deadline: Deadline
    ) -> tuple[NDArray[np.float32], TokenCounts]:
        # Their probabilities are 1/4 and 3/4.
        return np.log(np.array([[1, 3]] * len(texts), np.float32)), TokenCounts(tokens=1)


class FakeRecall:
    rows = 3

    def __init__(self, missing: tuple[int, ...] = ()) -> None:
        self.columns = {"id": "string", "text": "string", "side": "string", "label": "string"}
        self.missing = missing
        self.fetched: list[tuple[list[int], tuple[str, ...]]] = []

    def check_filter(self, filter: Mapping[str, Any]) -> None:
        if set(filter) != {"side"}:
            raise InputError("there is no such column")

    async def search(
        self, vectors: NDArray[np.float32], k: int, filter: Mapping[str, Any] | None, deadline: Deadline
    ) -> Recalled:
        rows = [0, 1] if filter else [0, 1, 2]
        scores = vectors @ np.array([VECTORS[TEXTS[row]] for row in rows], np.float32).T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = np.array(rows)[order]
        padding = max(min(k, 3) - found.shape[1], 0)
        return Recalled(
            np.pad(np.take_along_axis(scores, order, 1), ((0, 0), (0, padding)), constant_values=-np.inf),
            np.pad(found, ((0, 0), (0, padding)), constant_values=-1),
            self.missing,
        )

    async def documents(
        self, rows: NDArray[np.int64], columns: Sequence[str], deadline: Deadline
    ) -> list[Document]:
        self.fetched.append((rows.tolist(), tuple(columns)))
        values = {"side": "right", "label": "x##y"}
        return [
            Document(
                f"d{row}",
                TEXTS[row] if "text" in columns else "",
                {name: value for name, value in values.items() if name in columns},
            )
            for row in rows.tolist()
        ]

    async def find(self, id: str, deadline: Deadline) -> Document | None:
        return Document("d1", "north-east", {}) if id == "d1" else None


def generation(version: str = "000001", **values: Any) -> Generation:
    model = ModelEntry(uri="compass", fingerprint="f")
    return Generation(
        collection="default",
        index="/index",
        index_version=version,
        manifest_sha256=version,
        encoder=model,
        query_prefix="Q: ",
        document_prefix="D: ",
        **values,
    )


class Made:
    """An engine that serves a generation of fakes."""

    def __init__(self, *, fusion: Fusion | None = None, with_models: bool = True, **limits: int) -> None:
        self.encoder, self.scorer, self.recall = FakeEncoder(), FakeScorer(), FakeRecall()
        self.rendered: list[SearchAnswer] = []
        self.opened: list[str] = []

        def open_parts(wanted: Generation) -> Parts:
            self.opened.append(wanted.index_version)
            if wanted.index_version == "999999":
                raise InputError("there is no such version")
            return Parts(
                generation=wanted,
                recall=self.recall,
                encoder=self.encoder,
                scorer=self.scorer if with_models else None,
                classifier=FakeClassifier() if with_models else None,
                fusion=fusion,
                kind="flat",
                metric="cosine",
            )

        def render(collection: str, call: SearchCall, answer: SearchAnswer) -> bytes:
            self.rendered.append(answer)
            return b"{}"

        self.engine = SearchEngine(
            ["default", "other"], open_parts, limits=EngineLimits(**limits), render=render
        )

    async def serve(self, **values: Any) -> SearchEngine:
        modes = {"classify_modes": ("classifier", "labels", "votes")}
        wanted = generation(**{**modes, **values})
        await self.engine.prepare(wanted)
        self.engine.activate(wanted.id)
        self.encoder.seen.clear()
        self.scorer.seen.clear()
        self.recall.fetched.clear()
        return self.engine


def search(query: str = "east", **values: Any) -> SearchCall:
    given: dict[str, Any] = {"queries": [query], "k": 2, "recall_k": 3, "rerank": True} | values
    return SearchCall(**given)


def ask(made: Made, call: SearchCall, timeout_ms: int = LATER) -> SearchAnswer:
    async def run() -> SearchAnswer:
        engine = await made.serve()
        return await engine.search("default", call, Deadline.after(timeout_ms))

    return asyncio.run(run())


# --- search ---------------------------------------------------------------------------------------------------


def test_a_search_recalls_reranks_and_fetches_the_final_hits_alone() -> None:
    made = Made()
    answer = ask(made, search(fields=("side",)))
    (hits,) = answer.hits
    assert [(hit.id, hit.rank, hit.score, hit.rerank_score) for hit in hits] == [
        ("d1", 1, 3.0, 3.0),
        ("d2", 2, 2.0, 2.0),
    ]
    assert [hit.recall_score for hit in hits] == pytest.approx([0.8, 0.0])
    assert answer.recall_ranks == [[2, 3]]
    assert (answer.reranked, answer.reranked_k, answer.partial) == (True, 3, False)
    assert made.recall.fetched == [([0, 1, 2], ("text",)), ([1, 2], ("side",))]
    assert answer.counts == TokenCounts(tokens=11, truncated=1)
    assert set(answer.timings_ms) == {"encode", "recall", "fetch", "rerank"}


def test_without_reranking_the_order_and_the_score_are_those_of_recall() -> None:
    made = Made()
    answer = ask(made, search(rerank=False))
    (hits,) = answer.hits
    assert [(hit.id, hit.rerank_score) for hit in hits] == [("d0", None), ("d1", None)]
    assert [hit.score for hit in hits] == pytest.approx([1.0, 0.8])
    assert (answer.reranked, made.scorer.seen) == (False, [])
    assert made.recall.fetched == [([0, 1], ("text", "side", "label"))]


def test_scores_are_fused_as_the_generation_says() -> None:
    fusion = Fusion(weight=0.5, recall_mean=0.5, recall_std=0.5, rerank_mean=1.0, rerank_std=2.0)
    answer = ask(Made(fusion=fusion), search(k=3))
    # d1: (0.8 - 0.5) / 0.5 / 2 + (3 - 1) / 2 / 2; d0: 1 / 2 - 1 / 2; d2: -1 / 2 + 1 / 4.
    assert [(hit.id, round(hit.score, 6)) for hit in answer.hits[0]] == [
        ("d1", 0.8),
        ("d0", 0.0),
        ("d2", -0.25),
    ]


def test_what_is_past_the_depth_follows_in_recall_order() -> None:
    answer = ask(Made(), search(k=3, recall_k=1))
    hits = answer.hits[0]
    assert [hit.id for hit in hits] == ["d0", "d1", "d2"]
    assert [hit.score for hit in hits] == pytest.approx([-1.0, -1.2, -2.0])
    assert [hit.rerank_score for hit in hits] == [-1.0, None, None]


def test_a_search_that_is_short_of_time_reranks_what_fits_and_says_how_many() -> None:
    made = Made()
    made.scorer.depth = 2
    answer = ask(made, search(k=3))
    assert ([hit.id for hit in answer.hits[0]], answer.reranked_k) == (["d1", "d0", "d2"], 2)


class SlowRecall(FakeRecall):
    """Fetches documents as a busy machine does."""

    async def documents(
        self, rows: NDArray[np.int64], columns: Sequence[str], deadline: Deadline
    ) -> list[Document]:
        await asyncio.sleep(0.1)
        deadline.check()
        return await super().documents(rows, columns, deadline)


class SlowScorer(FakeScorer):
    """Takes all the time that it is given."""

    async def score(self, pairs: Pairs, deadline: Deadline) -> Scored:
        await asyncio.sleep(deadline.remaining_s())
        raise deadline.exceeded()


def test_reranking_leaves_the_time_that_fetching_takes() -> None:
    """It left 15 ms, so a search on a busy machine was answered 504 in place of the order of recall."""
    made = Made()

    async def run() -> SearchAnswer:
        engine = await made.serve()
        parts = engine._active["default"]
        engine._active["default"] = replace(parts, recall=SlowRecall(), scorer=SlowScorer())
        return await engine.search("default", search(), Deadline.after(1000))

    assert asyncio.run(run()).reranked_k == 0


def test_a_reranker_whose_logits_are_no_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the damaged logit is none of the answer's: it has sunk below the first k."""

    async def run() -> None:
        engine = await Made().serve()
        monkeypatch.setitem(FakeScorer.LOGITS, "east", math.nan)
        deadline = Deadline.after(LATER)
        with pytest.raises(NotFiniteError, match="reranker 'judge' gave a logit that is not a number"):
            await engine.search("default", search(k=1), deadline)
        with pytest.raises(NotFiniteError, match="reranker 'judge' gave a logit that is not a number"):
            await engine.rerank("default", RerankCall(query="north", documents=("east", "north")), deadline)

    asyncio.run(run())


@pytest.mark.parametrize("late", [True, False])
def test_without_any_time_to_rerank_the_recall_order_is_the_answer(late: bool) -> None:
    made = Made()

    async def run() -> SearchAnswer:
        engine = await made.serve()
        made.scorer.depth = 0
        made.scorer.error = OutOfTimeError("late") if late else None
        return await engine.search("default", search(), Deadline.after(LATER))

    answer = asyncio.run(run())
    assert ([hit.id for hit in answer.hits[0]], answer.reranked, answer.reranked_k) == (
        ["d0", "d1"],
        False,
        0,
    )


def test_queries_keep_their_order_and_short_answers_stay_short() -> None:
    answer = ask(Made(), search(queries=["north", "east"], k=3, rerank=False, filter={"side": "right"}))
    assert [[hit.id for hit in hits] for hits in answer.hits] == [["d1", "d0"], ["d0", "d1"]]


def test_missing_shards_are_named() -> None:
    made = Made()

    async def run() -> SearchAnswer:
        engine = await made.serve()
        made.recall.missing = (3,)
        return await engine.search("default", search(), Deadline.after(LATER))

    answer = asyncio.run(run())
    assert (answer.partial, answer.missing_shards) == (True, (3,))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"filter": {"weight": 1}}, "no such column"),
        ({"fields": ("id", "price")}, "'price'; this collection has id, text"),
        ({"mode": "hybrid"}, "must be 'dense'"),
    ],
)
def test_what_the_collection_has_not_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnprocessableError, match=words):
        ask(Made(), search(**values))


def test_a_search_puts_the_prefix_of_queries_and_goes_first() -> None:
    made = Made()
    ask(made, search())
    assert made.encoder.seen == [(("east",), "Q: ", Lane.QUERY)]
    assert [lane for _, lane in made.scorer.seen] == [Lane.RERANK]


def test_a_search_that_costs_much_goes_with_the_bulk() -> None:
    made = Made()
    made.encoder.seconds = 30.0
    ask(made, search())
    assert made.encoder.seen[0][2] == Lane.BULK


# --- the other calls ------------------------------------------------------------------------------------------


def test_embeddings_take_the_prefix_of_their_role_and_go_with_the_bulk() -> None:
    async def run() -> None:
        made = Made()
        engine = await made.serve()
        calls = [
            EmbedCall(texts=["east", "north"]),
            EmbedCall(texts=["east", "north"], role="document"),
            EmbedCall(texts=["east"], role="query"),
            EmbedCall(token_ids=[[1], [0]]),
        ]
        for call in calls:
            answer = await engine.embed("default", call, Deadline.after(LATER))
        assert made.encoder.seen == [
            (("east", "north"), "", Lane.BULK),
            (("east", "north"), "D: ", Lane.BULK),
            (("east",), "Q: ", Lane.QUERY),
            (("north", "east"), "", Lane.BULK),
        ]
        assert answer.vectors.tolist() == [[0.0, 1.0], [1.0, 0.0]]
        assert (answer.model, answer.counts.tokens) == ("compass", 2)

    asyncio.run(run())


def test_similarity_is_the_cosine_and_a_zero_vector_has_none() -> None:
    async def run() -> None:
        engine = await Made().serve()
        call = SimilarityCall(pairs=[("east", "north-east"), ("north", "north-east")])
        answer = await engine.similarity("default", call, Deadline.after(LATER))
        assert answer.scores.tolist() == pytest.approx([0.8, 0.6])
        call = SimilarityCall(pairs=[("east", "north"), ("nowhere", "north")])
        with pytest.raises(UnprocessableError, match=r"pairs\[1\]"):
            await engine.similarity("default", call, Deadline.after(LATER))

    asyncio.run(run())


def test_classification_by_classifier_by_labels_and_by_votes() -> None:
    async def run() -> None:
        engine = await Made().serve()
        found = {}
        for mode in (None, "classifier", "labels", "votes"):
            call = ClassifyCall(texts=["east"], top_k=1, mode=mode)  # type: ignore[arg-type]
            answer = await engine.classify("default", call, Deadline.after(LATER))
            found[mode] = (answer.mode, answer.model, answer.labels)
        assert found[None] == found["classifier"]
        assert found["classifier"] == ("classifier", "sorter", [[("C", 0.75)]])
        assert found["labels"][:2] == ("labels", "compass")
        assert found["labels"][2] == [[(answer_label, 1.0) for answer_label in ("x##y",)]]
        assert found["votes"][2] == [[("x##y", pytest.approx(1.0))]]

    asyncio.run(run())


def test_what_is_not_configured_is_said() -> None:
    async def run() -> None:
        engine = await Made(with_models=False).serve(classify_modes=("votes",))
        with pytest.raises(NotConfiguredError, match="has no reranker"):
            await engine.rerank("default", RerankCall(query="q", documents=["d"]), Deadline.after(LATER))
        with pytest.raises(NotConfiguredError, match="it has votes"):
            await engine.classify(
                "default", ClassifyCall(texts=["east"], mode="labels"), Deadline.after(LATER)
            )
        with pytest.raises(NotFoundError, match="there are default, other"):
            engine.served("third")
        with pytest.raises(NotReadyError, match="'other' is still being loaded"):
            engine.served("other")

    asyncio.run(run())


def test_a_document_is_found_by_its_id() -> None:
    async def run() -> None:
        engine = await Made().serve()
        found = [await engine.document("default", id, Deadline.after(LATER)) for id in ("d1", "d9")]
        assert [answer.text for answer in found] == ["north-east", None]

    asyncio.run(run())


# --- generations ----------------------------------------------------------------------------------------------


def test_a_request_ends_on_the_generation_that_it_began_on() -> None:
    async def run() -> None:
        made = Made()
        engine = await made.serve()
        following = generation("000002")
        await engine.prepare(following)
        made.encoder.held.clear()
        before = asyncio.ensure_future(engine.search("default", search(), Deadline.after(LATER)))
        await asyncio.sleep(0.01)
        engine.activate(following.id)
        after = asyncio.ensure_future(engine.search("default", search(), Deadline.after(LATER)))
        made.encoder.held.set()
        assert [(await task).index_version for task in (before, after)] == ["000001", "000002"]
        assert engine.served("default").generation == following.id

    asyncio.run(run())


def test_a_generation_that_cannot_be_loaded_leaves_the_one_before_in_place() -> None:
    async def run() -> None:
        made = Made()
        engine = await made.serve()
        with pytest.raises(InputError, match="no such version"):
            await engine.prepare(generation("999999"))
        assert [found.index_version for found in engine.active().values()] == ["000001"]
        with pytest.raises(NotReadyError, match="not prepared"):
            engine.activate(generation("999999").id)

    asyncio.run(run())


def test_preparing_sends_a_query_through_to_its_json_and_happens_once() -> None:
    async def run() -> None:
        made = Made()
        wanted = generation("000002")
        await asyncio.gather(made.engine.prepare(wanted), made.engine.prepare(wanted))
        assert (made.opened, len(made.rendered), made.engine.active()) == (["000002"], 1, {})
        made.engine.drop(wanted.id)
        assert made.engine.prepared() == {}

    asyncio.run(run())


def test_the_check_fails_where_a_part_does() -> None:
    async def run() -> None:
        made = Made()
        engine = await made.serve()
        made.scorer.error = RuntimeError("the reranker is broken")
        engine.collections = ("default",)
        with pytest.raises(RuntimeError, match="reranker is broken"):
            await engine.check()

    asyncio.run(run())


def test_a_late_check_is_well_while_requests_are_answered() -> None:
    """Health checks that were late thrice had a replica replaced, for nothing but the work that it had."""

    async def run() -> None:
        made = Made()
        engine = await made.serve()
        engine.collections = ("default",)
        await engine.check()

        async def late(*arguments: Any) -> Encoded:
            if is_busy:
                engine.admission.admit(0.0, Deadline.after(LATER), urgent=True).__exit__(None, None, None)
            raise OutOfTimeError("late")

        made.encoder.encode = late  # type: ignore[method-assign]
        is_busy = True
        await engine.check()
        is_busy = False
        with pytest.raises(OutOfTimeError):
            await engine.check()

    asyncio.run(run())


# --- admission ------------------------------------------------------------------------------------------------


def test_what_cannot_end_in_time_is_refused_at_once_and_leaves_no_trace() -> None:
    async def run() -> None:
        made = Made(max_wait_ms=LATER)
        engine = await made.serve()
        made.encoder.seconds = 1.5
        made.encoder.held.clear()
        first = asyncio.ensure_future(engine.search("default", search(), Deadline.after(LATER)))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="try again in 2 s"):
            await engine.search("default", search(), Deadline.after(2000))
        first.cancel()
        await asyncio.sleep(0.01)
        made.encoder.held.set()
        assert engine.admission.requests == 0
        await engine.search("default", search(), Deadline.after(2000))

    asyncio.run(run())
