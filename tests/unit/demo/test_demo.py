"""The demo's sample, and the tables that it ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from raytower.data.queries import read_queries
from raytower.demo.orders import orders_table, rank_answers
from raytower.demo.sample import SampleSizes, write_sample
from raytower.models.fusion import Fusion
from raytower.retrieval.retriever import Candidate, Retriever


def test_the_sample_judges_every_question_by_an_answer_of_its_corpus(tmp_path: Path) -> None:
    files = write_sample(tmp_path / "data", SampleSizes(train=20, dev=10, test=10, corpus=100), seed=1)
    corpus = [json.loads(line) for line in files.corpus.read_text(encoding="utf-8").splitlines()]
    assert len(corpus) == files.num_corpus == 100
    ids = {row["_id"] for row in corpus}
    for split in ("dev", "test"):
        queries = read_queries(str(files.beir), "beir", split)
        assert len(queries) == 10
        assert queries.relevant is not None
        assert all(set(judged) <= ids and judged for judged in queries.relevant)
    assert len(files.train_pairs.read_text(encoding="utf-8").splitlines()) == files.num_train >= 20


class _Fake:
    """An encoder and a scorer that give what they were told to."""

    def encode(self, texts: Sequence[str], prefix: str = "") -> NDArray[np.float32]:
        return np.zeros((len(texts), 2), dtype=np.float32)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return np.array([LOGITS[document] for document in documents], dtype=np.float32)


RECALLED = [("a", 0.9), ("b", 0.8), ("c", 0.6), ("d", 0.5), ("e", 0.1)]
LOGITS = {"text a": -1.0, "text b": 2.0, "text c": 0.0, "text d": 0.5, "text e": -3.0}


def answers(weight: float) -> Any:
    fake = cast(Any, _Fake())
    items = [Candidate(name, f"text {name}", {}, score) for name, score in RECALLED]
    retriever = Retriever(fake, scorer=fake, recall=lambda queries, k: [items[:k] for _ in queries.texts])
    [ranked] = rank_answers(retriever, Fusion(weight=weight), ["why?"], 5)
    return ranked


def test_an_answer_has_its_rank_by_recall_by_the_reranker_and_by_both() -> None:
    # Half of each: a -0.05, b 1.4, c 0.3, d 0.5, e -1.45.
    ranked = answers(0.5)
    assert [(a.id, a.recall_rank, a.rerank_rank, a.fused_rank) for a in ranked] == [
        ("a", 1, 4, 4),
        ("b", 2, 1, 1),
        ("c", 3, 3, 3),
        ("d", 4, 2, 2),
        ("e", 5, 5, 5),
    ]
    assert [a.fused_rank for a in answers(0.0)] == [1, 2, 3, 4, 5]


def test_a_table_shows_who_is_among_the_first_three_and_which_order_is_served() -> None:
    assert orders_table("why?", answers(0.5), 0.5, fused=True).splitlines() == [
        "",
        "why?",
        "| rank by recall | by the reranker | by both (weight 0.50), served | recall score | rerank score | answer |",
        "|---|---|---|---|---|---|",
        "| 1 | 4 | 4 | 0.900 | -1.000 | [a] text a |",
        "| 2 | 1 | 1 | 0.800 | 2.000 | [b] text b |",
        "| 3 | 3 | 3 | 0.600 | 0.000 | [c] text c |",
        "| 4 | 2 | 2 | 0.500 | 0.500 | [d] text d |",
    ]
    header = orders_table("why?", answers(0.0), 0.0, fused=False).splitlines()[2]
    assert header.startswith("| rank by recall, served | by the reranker | by both (weight 0.00) |")
