"""Which documents of an index are relevant to which query, and how many relevant ones the index does not hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raytower.data.queries import QuerySet
from raytower.index.reader import Index
from raytower.retrieval.lookup import find_documents

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
    num_missing: int
    """Judgements whose document is not in the index."""
    num_without_relevant: int
    """Queries of the input that nothing is relevant to; they are no part of the lists above."""
    relevant_texts: list[list[str]] | None = None
    """The texts that are relevant to each query where relevance goes by text, else None."""

    def by_text(self, part: slice) -> TextJudgements | None:
        """Those of the queries in `part` where relevance goes by text, else None."""
        if self.relevant_texts is None:
            return None
        return TextJudgements(self.texts[part], self.relevant_texts[part])


def judge(queries: QuerySet, index: Index) -> Judgements:
    """Turn a query set into judgements over the documents of an index.

    Relevance by id is taken as it is. Relevance by text (pairs) means every document whose text is equal.
    """
    if queries.relevant is not None:
        known = {doc_id for judged in queries.relevant for doc_id in judged}
        present = set(find_documents(index, "id", known, "id"))
        relevant = queries.relevant
        num_missing = sum(doc_id not in present for judged in relevant for doc_id in judged)
    else:
        assert queries.relevant_texts is not None
        wanted = {text for texts in queries.relevant_texts for text in texts}
        ids = find_documents(index, "text", wanted, "id")
        relevant = [
            {doc_id: 1.0 for text in texts for doc_id in ids.get(text, (_ABSENT + text,))}
            for texts in queries.relevant_texts
        ]
        num_missing = sum(text not in ids for texts in queries.relevant_texts for text in texts)
    return Judgements(
        queries.ids,
        queries.texts,
        relevant,
        num_missing,
        queries.num_without_relevant,
        queries.relevant_texts,
    )


@dataclass(frozen=True)
class TextJudgements:
    """Relevance by text, as training counts it on dev pairs: documents of one text are one answer, at the best place of
    any of them, and a query's own text is none unless it is relevant to itself."""

    queries: list[str]
    relevant: list[list[str]]

    def answers(self, row: int, texts: Iterable[str]) -> list[str]:
        """The answers among the texts of ranked documents, best first, to query number `row`."""
        query = self.queries[row]
        is_answer = query in self.relevant[row]
        return [text for text in dict.fromkeys(texts) if is_answer or text != query]


def absent_text(identifier: str) -> str | None:
    """The text that stands for a relevant document which the index lacks, or None for an ordinary id."""
    return identifier[len(_ABSENT) :] if identifier.startswith(_ABSENT) else None
