"""Recall on a dev set during training: every worker encodes a share, all get the same metrics.

Shape legend: Q queries, C corpus texts of this worker, D embedding dimension, K depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
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
    """Queries, the corpus to search, and for each query the positions of its relevant documents in that corpus.

    The corpus holds each text once; where documents are judged by id, each document, copies of a text too. `own` is
    each query's own position there, -1 where the corpus does not hold it or it is relevant to itself: what asks is no
    answer.
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


@dataclass
class _Asked:
    """Queries and their relevant documents under keys: their ids where documents are judged by id, else their texts."""

    queries: dict[str, str]
    documents: dict[str, str]
    grades: dict[str, dict[str, float]]
    """Query → document → judgement."""
    instructions: dict[str, str | None]

    def by_text(self) -> _Asked:
        """The same under their texts; of several judgements the highest."""
        grades: dict[str, dict[str, float]] = {}
        instructions: dict[str, str | None] = {}
        for query, judged in self.grades.items():
            known = grades.setdefault(self.queries[query], {})
            for document, grade in judged.items():
                text = self.documents[document]
                known[text] = max(known.get(text, 0.0), grade)
            if query in self.instructions:
                instructions.setdefault(self.queries[query], self.instructions[query])
        texts = {text: text for text in self.documents.values()}
        return _Asked({query: query for query in grades}, texts, grades, instructions)


def load_dev_set(config: RetrieverDevConfig, set_aside: Sequence[Piece] = ()) -> DevSet:
    """Read dev pairs and a sample of the corpus that holds every relevant text; memory holds the sample only.

    The documents of all rows of a query are relevant to it. Equal texts of the corpus count once. The documents of a
    BEIR folder are judged by id, as `evaluate` judges those of an index of its corpus: a copy under another id is
    another document. Of another corpus, which lacks those ids, its texts are relevant. Of training rows that were set
    aside, the document that the query is trained to find is relevant.

    Raises:
        InputError: a split of what is no BEIR folder, bad rows, or training rows that name no relevant document.
    """
    read = dev_tables(config, "pairs", set_aside, config.split, instructions=True)
    judged = _judgements(config)
    asked = _read_asked(config, read, judged)
    corpus = config.path if config.corpus is None and judged is not None else config.corpus
    sampled = [] if corpus is None else _sample(corpus, config.corpus_rows, asked.documents)
    by_id = judged is not None and any(
        asked.documents.get(identifier) == text for identifier, text in sampled
    )
    if not by_id:
        asked = asked.by_text()
    rows: dict[str, str] = {}
    for identifier, text in [*sampled, *asked.documents.items()]:
        key = identifier if by_id else text
        rows.setdefault(key, asked.documents.get(key, text))
    places = {key: place for place, key in enumerate(rows)}
    return DevSet(
        queries=[asked.queries[query] for query in asked.grades],
        corpus=list(rows.values()),
        relevant=[[places[document] for document in documents] for documents in asked.grades.values()],
        own=[
            -1 if query in documents or rows.get(query) != asked.queries[query] else places[query]
            for query, documents in asked.grades.items()
        ],
        grades=[list(documents.values()) for documents in asked.grades.values()],
        instructions=[asked.instructions.get(query) for query in asked.grades]
        if asked.instructions
        else None,
    )


def _read_asked(
    config: RetrieverDevConfig, read: Iterable[pa.Table], judged: dict[str, dict[str, float]] | None
) -> _Asked:
    """The dev rows, under ids where there are judgements by id."""
    asked = _Asked({}, {}, {}, {})
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
        texts = best_documents(rows)
        keys = texts if judged is None else (rows["query_id"], rows["document_id"])
        said = rows.get(INSTRUCTION.name, [None] * table.num_rows)
        for query_key, document_key, query, document, instruction in zip(*keys, *texts, said, strict=True):
            grade = 1.0 if judged is None else judged[query_key][document_key]
            asked.grades.setdefault(query_key, {})[document_key] = grade
            asked.queries[query_key], asked.documents[document_key] = query, document
            if INSTRUCTION.name in rows:
                asked.instructions.setdefault(query_key, instruction)
    return asked


def _sample(corpus: str, num_rows: int, documents: Mapping[str, str]) -> list[tuple[str, str]]:
    """Ids and texts of a corpus, in its order: every relevant one, and of the others as many as `num_rows` leaves."""
    surveyed = survey_input(NamedInput(path=corpus), "corpus", remember=remembered)
    wanted = max(num_rows - len(documents), 0) / surveyed.num_rows
    texts = set(documents.values())
    return [
        (identifier, text)
        for identifier, text in _survey_rows(surveyed, ("id", "text"))
        if identifier in documents or text in texts or _position(text) < wanted
    ]


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
    # Copies of a text are computed once, so that they tie, and are put in the order of their rows.
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(dev.corpus):
        rows_of.setdefault(text, []).append(row)
    texts = list(rows_of)
    own_corpus = own_rows(len(texts))
    own_queries = encode_queries(engine, dev, instruction_format, prefixes[0])
    query_QD = gather_rows_in_order(own_queries, len(dev.queries))
    corpus_CD = torch.as_tensor(engine.encode([texts[place] for place in own_corpus], prefixes[1]))
    name, _, k = metric.partition("@")
    own_k = {int(k)}
    cutoffs = sorted({1, 10} | own_k)
    mrr_ks, ndcg_ks = ({10} | (own_k if name == wanted else set()) for wanted in ("mrr", "ndcg"))
    # One more than is looked at, as a query's own text may be among them.
    ranked = _rank_documents(query_QD, corpus_CD, own_corpus, depth=max(cutoffs) + 1)
    rows = list(rows_of.values())
    ids = [
        [
            str(row)
            for _, row in sorted((-score, row) for score, place in found for row in rows[place])
            if row != own
        ]
        for found, own in zip(ranked, dev.own, strict=True)
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
) -> list[list[tuple[float, int]]]:
    """Score and place of the best texts of each query over all workers, best first, equal ones by place."""
    device = corpus_CD.device
    places_C = torch.from_numpy(own_corpus).to(device)
    kept = min(depth, len(corpus_CD))
    scores, places = [], []
    for block_qD in query_QD.split(256):
        values_qK, columns_qK = _best(block_qD @ corpus_CD.T, kept)
        scores.append(values_qK)
        places.append(places_C[columns_qK])
    # Workers' shares may differ by one text, so short lists are filled with scores that never win.
    score_QK = torch.full((len(query_QD), depth), -torch.inf, device=device)
    place_QK = torch.zeros((len(query_QD), depth), dtype=torch.int64, device=device)
    score_QK[:, :kept], place_QK[:, :kept] = torch.cat(scores), torch.cat(places)
    score_QA, place_QA = (
        torch.cat(gather_constants(each).split(len(query_QD)), dim=1).cpu().numpy()
        for each in (score_QK, place_QK)
    )
    order_QK = np.lexsort((place_QA, -score_QA), axis=1)[:, :depth]
    ordered = (np.take_along_axis(each, order_QK, 1).tolist() for each in (score_QA, place_QA))
    return [
        [(score, place) for score, place in zip(*found, strict=True) if score > -np.inf]
        for found in zip(*ordered, strict=True)
    ]


def _best(scores_qC: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their columns, (q, kept); of equal scores the first columns."""
    values_qK, columns_qK = scores_qC.topk(kept, dim=1)
    # topk takes any of those that tie with the last; only such rows need the slower sort.
    tied = ((scores_qC >= values_qK[:, -1:]).sum(1) > kept).nonzero()[:, 0]
    if len(tied):
        ordered = scores_qC[tied].sort(dim=1, descending=True, stable=True)
        values_qK[tied], columns_qK[tied] = ordered.values[:, :kept], ordered.indices[:, :kept]
    return values_qK, columns_qK


def _survey_rows(surveyed: Survey, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for piece in surveyed.pieces:
        table = read_piece(piece)
        yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _position(text: str) -> float:
    """A fixed pseudo-random number in 0..1 for a text; texts below a limit are the sample."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
