"""Which documents of an index are relevant to which query, and how many relevant ones the index does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raytower.data.queries import QuerySet
from raytower.evaluation.runs import RankedList
from raytower.index.reader import Index
from raytower.index.table import DocumentTable
from raytower.progress import log
from raytower.retrieval.lookup import find_in_table

# No document id can begin with this: ids come from text files, whose readers refuse the character.
_ABSENT = "\x00"


@dataclass(frozen=True)
class Judgements:
    """Judged queries. `relevant` holds document id → judgement for each, and is never empty.

    A relevant document that the index lacks keeps its place there, so that recall counts it as missed.
    """

    ids: list[str]
    texts: list[str]
    relevant: list[dict[str, float]]
    num_missing: int | None
    """Judgements whose document is not in the index; None where there is no index to look into."""
    num_without_relevant: int
    """Queries of the input that nothing is relevant to; they are no part of the lists above."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Where relevance goes by text: document id → id of the first document with its text, of texts that stand in the
    index more than once."""
    unwanted: Sequence[Mapping[str, float]] = ()
    """Documents judged 0 or less, for each query; empty where relevance goes by text."""
    own: Sequence[Sequence[str]] = ()
    """Documents whose text is the query itself, for each query to which it is not judged relevant: what asks is no
    answer. Empty where relevance goes by id."""

    @property
    def num_own(self) -> int:
        """Queries that stand in the corpus themselves."""
        return sum(map(bool, self.own))

    def counted_once(
        self, ids: Sequence[str], relevant: Mapping[str, float]
    ) -> tuple[list[str], dict[str, float]]:
        """Ranked ids and judgements of one query with the first id of a text for each of its copies.

        So one judged text, found at rank 1, is a recall of 1, as on the dev pairs of training: recall and nDCG count a
        text at its first place alone.
        """
        first = self.copies
        return [first.get(item, item) for item in ids], {first.get(i, i): j for i, j in relevant.items()}


def judge(queries: QuerySet, index: Index) -> Judgements:
    """As `judge_by_table`, of an index's documents."""
    return judge_by_table(queries, index.table)


def judge_by_table(queries: QuerySet, table: DocumentTable) -> Judgements:
    """Turn a query set into judgements over the documents of an index, of which no shard has to be opened.

    Relevance by id is taken as it is. Relevance by text (pairs) means every document whose text is equal. How many
    relevant documents the index lacks is logged, and how many queries it holds as documents.
    """
    copies: dict[str, str] = {}
    own: list[list[str]] = []
    if queries.relevant is not None:
        known = {doc_id for judged in queries.relevant for doc_id in judged}
        present = set(find_in_table(table, "id", known, "id"))
        relevant = queries.relevant
        num_missing = sum(doc_id not in present for judged in relevant for doc_id in judged)
    else:
        assert queries.relevant_texts is not None
        wanted = {text for texts in queries.relevant_texts for text in texts}
        ids = find_in_table(table, "text", wanted | set(queries.texts), "id")
        relevant = [
            {doc_id: 1.0 for text in texts for doc_id in ids.get(text, (_ABSENT + text,))}
            for texts in queries.relevant_texts
        ]
        same_texts = [ids[text] for text in wanted if len(ids.get(text, ())) > 1]
        copies = {doc_id: same[0] for same in same_texts for doc_id in same}
        own = [
            [] if query in texts else ids.get(query, [])
            for query, texts in zip(queries.texts, queries.relevant_texts, strict=True)
        ]
        num_missing = sum(text not in ids for texts in queries.relevant_texts for text in texts)
    if num_missing:
        log(f"{num_missing:,} relevant documents are not in the index; they count as missed")
    return _said(
        Judgements(
            queries.ids,
            queries.texts,
            relevant,
            num_missing,
            queries.num_without_relevant,
            copies,
            queries.unwanted or (),
            own,
        )
    )


def judge_run(queries: QuerySet, lists: Mapping[str, RankedList]) -> Judgements:
    """Turn a query set into judgements over what a run file holds: ids, or texts where relevance goes by text."""
    own: list[list[str]] = []
    if queries.relevant is not None:
        relevant = queries.relevant
    else:
        assert queries.relevant_texts is not None
        relevant = [dict.fromkeys(texts, 1.0) for texts in queries.relevant_texts]
        own = [
            [query] if query not in judged and query in lists and query in lists[query].documents else []
            for query, judged in zip(queries.texts, relevant, strict=True)
        ]
    return _said(
        Judgements(
            queries.ids,
            queries.texts,
            relevant,
            None,
            queries.num_without_relevant,
            unwanted=queries.unwanted or (),
            own=own,
        )
    )


def _said(judgements: Judgements) -> Judgements:
    if judgements.num_own:
        log(f"{judgements.num_own:,} queries stand in the corpus themselves: left out of their own answers")
    return judgements


def absent_text(identifier: str) -> str | None:
    """The text that stands for a relevant document which the index lacks, or None for an ordinary id."""
    return identifier[len(_ABSENT) :] if identifier.startswith(_ABSENT) else None
