"""Recall on a dev set during training: every worker encodes a share, all get the same metrics.

Shape legend: Q queries, C corpus texts of this worker, D embedding dimension, K depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytower.collectives import gather_constants
from raytower.data.beir import is_beir, read_qrels
from raytower.data.config import NamedInput
from raytower.data.pieces import Piece, Survey, read_piece
from raytower.data.pieces import survey as survey_input
from raytower.data.records import INSTRUCTION
from raytower.data.survey_notes import remembered
from raytower.errors import InputError
from raytower.metrics import ranking_metrics
from raytower.training.columns import best_documents, query_prefixes
from raytower.training.config import RetrieverDevConfig
from raytower.training.dev_scored import ScoredPairs
from raytower.training.inputs import dev_tables
from raytower.training.shares import gather_rows_in_order, own_rows


@dataclass(frozen=True)
class DevSet:
    """Queries, the corpus to search, and for each query the positions of its relevant texts in that corpus.

    `own` is each query's own position there, -1 where the corpus does not hold it or it is relevant to itself: a text
    that asks is no answer.
    """

    queries: list[str]
    corpus: list[str]
    relevant: list[list[int]]
    own: list[int]
    grades: list[list[float]] | None = None
    """The judgement of each of `relevant`, above 0; None judges all alike."""
    instructions: list[str | None] | None = None
    """What each query is asked for, where rows say it."""

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """Queries and relevant documents, one pair for each document of each query."""
        pairs = [
            (query, self.corpus[place])
            for query, places in zip(self.queries, self.relevant, strict=True)
            for place in places
        ]
        return [query for query, _ in pairs], [document for _, document in pairs]


def load_dev_set(config: RetrieverDevConfig, set_aside: Sequence[Piece] = ()) -> DevSet:
    """Read dev pairs and a sample of the corpus that holds every relevant text; memory holds the sample only.

    The documents of all rows of a query are relevant to it, with their judgements where a BEIR folder has them. Equal
    texts of the corpus count once. Of training rows that were set aside, the document that the query is trained to find
    is relevant.

    Raises:
        InputError: a split of what is no BEIR folder, bad rows, or training rows that name no relevant document.
    """
    positives: dict[str, dict[str, float]] = {}
    instructions: dict[str, str | None] = {}
    read = dev_tables(config, "pairs", set_aside, config.split, instructions=True)
    judged = _judgements(config)
    for table in read:
        names = table.column_names
        if "query" in names and "label" in names:
            raise InputError(
                f"{config.origin}: the training rows are scored pairs, of which dev.metric {config.metric} cannot tell "
                "the relevant ones; measure auc or spearman, or name pairs by dev.path"
            )
        if "query" not in names and "label" not in names:
            raise InputError(
                f"{config.origin}: the training rows are single texts, to which no document is relevant; name dev "
                "pairs by dev.path"
            )
        rows = table.to_pydict()
        grades = [1.0] * table.num_rows
        if judged is not None:
            ids = zip(rows["query_id"], rows["document_id"], strict=True)
            grades = [judged[query_id][document_id] for query_id, document_id in ids]
        for query, document, grade in zip(*best_documents(rows), grades, strict=True):
            known = positives.setdefault(query, {})
            known[document] = max(known.get(document, 0.0), grade)
        if INSTRUCTION.name in rows:
            for query, instruction in zip(rows["query"], rows[INSTRUCTION.name], strict=True):
                instructions.setdefault(query, instruction)
    places: dict[str, int] = {}
    for documents in positives.values():
        for document in documents:
            places.setdefault(document, len(places))
    corpus = config.path if config.corpus is None and judged is not None else config.corpus
    if corpus is not None:
        surveyed = survey_input(NamedInput(path=corpus), "corpus", remember=remembered)
        wanted = max(config.corpus_rows - len(places), 0) / surveyed.num_rows
        for (text,) in _survey_rows(surveyed, ("text",)):
            if text not in places and _position(text) < wanted:
                places[text] = len(places)
    relevant = [[places[document] for document in documents] for documents in positives.values()]
    own = [-1 if query in documents else places.get(query, -1) for query, documents in positives.items()]
    return DevSet(
        queries=list(positives),
        corpus=list(places),
        relevant=relevant,
        own=own,
        grades=[list(documents.values()) for documents in positives.values()],
        instructions=[instructions.get(query) for query in positives] if instructions else None,
    )


def _judgements(config: RetrieverDevConfig) -> dict[str, dict[str, float]] | None:
    """Judgements by the ids of query and document where the dev rows are a BEIR folder, else None."""
    if config.path is None or not is_beir(NamedInput(path=config.path)):
        return None
    return read_qrels(config.path, config.split or "dev")


class TextEngine(Protocol):
    """Gives the vectors (N, D) of texts behind a prefix, or each behind its own, on a device or in the CPU's memory."""

    def encode(
        self, texts: Sequence[str], prefix: str | Sequence[str] = ""
    ) -> Tensor | NDArray[np.float32]: ...


def encode_queries(
    engine: TextEngine, dev: DevSet | ScoredPairs, instruction_format: str | None, prefix: str
) -> Tensor | NDArray[np.float32]:
    """(own rows, D) the vectors of this worker's queries, behind `prefix` or each behind its instruction."""
    rows = own_rows(len(dev.queries)).tolist()
    said = None if dev.instructions is None else [dev.instructions[row] for row in rows]
    before = query_prefixes(said, instruction_format, prefix)
    return engine.encode([dev.queries[row] for row in rows], before)


def evaluate_recall(
    engine: TextEngine,
    dev: DevSet,
    metric: str,
    prefixes: tuple[str, str],
    instruction_format: str | None = None,
) -> dict[str, float]:
    """Recall@1, @10, MRR@10, nDCG@10 and `metric`; all workers call it together and get the same values.

    Vectors are compared where the engine leaves them.

    Raises:
        InputError: `metric` is unknown.
    """
    own_corpus = own_rows(len(dev.corpus))
    own_queries = encode_queries(engine, dev, instruction_format, prefixes[0])
    query_QD = gather_rows_in_order(own_queries, len(dev.queries))
    corpus_CD = torch.as_tensor(engine.encode([dev.corpus[row] for row in own_corpus], prefixes[1]))
    name, _, k = metric.partition("@")
    own_k = {int(k)}
    cutoffs = sorted({1, 10} | own_k)
    mrr_ks, ndcg_ks = ({10} | (own_k if name == wanted else set()) for wanted in ("mrr", "ndcg"))
    # One more than is looked at, as a query's own text may be among them.
    ranked = _rank_documents(query_QD, corpus_CD, own_corpus, depth=max(cutoffs) + 1)
    ids = [
        [str(row) for row in rows if row != own or row < 0]
        for rows, own in zip(ranked.tolist(), dev.own, strict=True)
    ]
    grades = dev.grades or [[1.0] * len(rows) for rows in dev.relevant]
    judged = [
        {str(row): grade for row, grade in zip(rows, own, strict=True)}
        for rows, own in zip(dev.relevant, grades, strict=True)
    ]
    measured = ranking_metrics(ids, judged, cutoffs, sorted(mrr_ks), sorted(ndcg_ks))
    values = {key: float(value.mean()) for key, value in measured.items()}
    if metric not in values:
        raise InputError(f"dev.metric {metric!r} is unknown; known are {sorted(values)}")
    return values


def _rank_documents(
    query_QD: Tensor, corpus_CD: Tensor, own_corpus: NDArray[np.int64], depth: int
) -> NDArray[np.int64]:
    """Corpus positions of the best documents over all workers, (Q, K), best first; -1 where there are no more."""
    device = corpus_CD.device
    places_C = torch.from_numpy(own_corpus).to(device)
    kept = min(depth, len(corpus_CD))
    scores, places = [], []
    for block_qD in query_QD.split(256):
        top = (block_qD @ corpus_CD.T).topk(kept, dim=1)
        scores.append(top.values)
        places.append(places_C[top.indices])
    # Workers' shares may differ by one text, so short lists are filled with scores that never win.
    score_QK = torch.full((len(query_QD), depth), -torch.inf, device=device)
    place_QK = torch.zeros((len(query_QD), depth), dtype=torch.int64, device=device)
    score_QK[:, :kept], place_QK[:, :kept] = torch.cat(scores), torch.cat(places)
    all_score = torch.cat(gather_constants(score_QK).split(len(query_QD)), dim=1)
    all_place = torch.cat(gather_constants(place_QK).split(len(query_QD)), dim=1)
    best = all_score.topk(depth, dim=1)
    ranked = torch.gather(all_place, 1, best.indices)
    # Where the corpus is smaller than the depth, fillers remain at the end; -1 makes them name no document.
    ranked[torch.isinf(best.values)] = -1
    return ranked.cpu().numpy()


def _survey_rows(surveyed: Survey, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for piece in surveyed.pieces:
        table = read_piece(piece)
        yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _position(text: str) -> float:
    """A fixed pseudo-random number in 0..1 for a text; texts below a limit are the sample."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
