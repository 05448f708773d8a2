"""Pairs from the structure of a corpus: what rows say of themselves. Pure functions.

Title and text, question and answer, heading and section are the pairs that general encoders are trained on (E5, Wang et
al. 2022); here they are those of one's own domain.
A first sentence and what follows it is the inverse cloze task (Lee et al. 2019), cut at the beginning.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from raytower.adapt.config import Rule

_HAN = "\u3400-\u9fff\uf900-\ufaff"
_NUMBER = "[0-9〇零一二三四五六七八九十百千两]+"
# A heading stands in a line of its own.
_HEADING = re.compile(
    rf"^[ \t　]*(?:#{{1,6}}[ \t]+(?P<markdown>[^\n]+?)[ \t#]*"
    rf"|(?P<chapter>第{_NUMBER}[编章节篇][ \t　]*[^\n。；]{{0,40}})"
    rf"|(?P<listed>(?:[一二三四五六七八九十]+、|（[一二三四五六七八九十]+）)[^\n。；]{{1,40}}))[ \t　]*$",
    re.MULTILINE,
)
# An article begins a line, and its text goes on behind its number.
_ARTICLE = re.compile(rf"^[ \t　]*(?P<number>第{_NUMBER}条(?:之{_NUMBER})?)[ \t　:：]*", re.MULTILINE)
_BARE_NUMBER = re.compile(
    rf"^(?:第{_NUMBER}[编章节篇条](?:之{_NUMBER})?|[一二三四五六七八九十]+、|（[一二三四五六七八九十]+）|[0-9.]+)[ 　]*"
)
# A question is a sentence that ends with a question mark, before any other sentence's end.
_QUESTION = re.compile(
    r"^(?P<question>(?:[^?？。！!.\n]|[.](?!\s)){2,200}[?？])\s*(?P<answer>.+)$", re.DOTALL
)
_SENTENCE = re.compile(r"^(?P<first>.+?(?:[。！？!?]|[.](?=\s)))\s*(?P<rest>.+)$", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A row of a corpus. What it does not have is empty."""

    id: str
    text: str
    document: str
    """Of which it is a passage; the rows of one document stand one after another."""
    title: str = ""
    question: str = ""
    category: str = ""


@dataclass(frozen=True)
class StructurePair:
    """A text that may stand for a query, a passage that belongs to it, and the rule that says so."""

    query: str
    document: str
    rule: str


@dataclass(frozen=True)
class RowPairs:
    """What a row gives: its pairs, and its passages, of which pairs are made."""

    row: Row
    pairs: tuple[StructurePair, ...]
    passages: tuple[str, ...]


def pairs_of_rows(rows: Iterable[Row], rules: Collection[Rule]) -> Iterator[RowPairs]:
    """What each row gives, in order. What is held of the row before is its last passage."""
    document, passage = None, ""
    for row in rows:
        pairs = list(_sections(row, rules)) or list(_own_pairs(row, rules))
        # A text without pairs is a passage as it is. Two pairs of one passage, by question and title, name it once.
        passages = tuple(dict.fromkeys(pair.document for pair in pairs)) or (clean(row.text),)
        if "neighbour" in rules and document == row.document:
            pairs.append(StructurePair(passage, passages[0], "neighbour"))
        if "category" in rules and row.category:
            query = clean(row.category.replace("##", " "))  # a path of labels
            pairs += [StructurePair(query, passage, "category") for passage in passages]
        yield RowPairs(row, tuple(pairs), passages)
        document, passage = row.document, passages[-1]


def _sections(row: Row, rules: Collection[Rule]) -> Iterator[StructurePair]:
    """Headings or articles with what stands below them; none where a text has no structure.

    A number alone asks for nothing, so the title stands before it: 公司法 第十条. Articles go before headings, since
    a law's chapters hold articles.
    """
    cuts: list[tuple[int, int, str]] = []
    rule = "law"
    if "law" in rules:
        cuts = [(found.start(), found.end(), found["number"]) for found in _ARTICLE.finditer(row.text)]
        # A text that mentions one article is no law, one that is called by it is.
        if not (row.title or any(_HEADING.finditer(row.text))):
            cuts = []
    if not cuts and "heading" in rules:
        rule = "heading"
        for found in _HEADING.finditer(row.text):
            name = found["markdown"] or found["chapter"] or found["listed"]
            cuts.append((found.start(), found.end(), name))
    if not cuts:
        return
    if "title" in rules and row.title and clean(before := _HEADING.sub("", row.text[: cuts[0][0]])):
        yield StructurePair(clean(row.title), clean(before), "title")
    ends = [start for start, _, _ in cuts[1:]] + [len(row.text)]
    for (_, start, name), end in zip(cuts, ends, strict=True):
        section = row.text[start:end]
        if rule == "law":  # a chapter's heading belongs to the articles after it
            section = _HEADING.sub("", section)
        words = clean(name) if rule == "law" else _BARE_NUMBER.sub("", clean(name)) or clean(name)
        query = clean(f"{row.title} {words}")
        if clean(section) and query:
            yield StructurePair(query, clean(section), rule)


def _own_pairs(row: Row, rules: Collection[Rule]) -> Iterator[StructurePair]:
    """Pairs of a text as a whole: its question, its title, else a question or sentence that it begins with."""
    text, title = clean(row.text), clean(row.title)
    titled = "title" in rules and bool(title)
    asked = "question" in rules and bool(row.question.strip())
    if titled and text.startswith(title):
        text = text[len(title) :].lstrip(" 。.:：-—|") or text
    if asked:
        yield StructurePair(clean(row.question), text, "question")
    if titled:
        yield StructurePair(title, text, "title")
    if asked or titled:
        return
    if "question" in rules and (found := _QUESTION.match(text)):
        yield StructurePair(clean(found["question"]), clean(found["answer"]), "question")
    elif "lead" in rules and (found := _SENTENCE.match(text)):
        yield StructurePair(clean(found["first"]), clean(found["rest"]), "lead")


def clean(text: str) -> str:
    """The text with single spaces, as it stands in a line of a file."""
    return " ".join(text.split())


def num_letters(text: str) -> int:
    """Letters of a text; of a number of an article or heading there are none: 第十条 says nothing by itself."""
    return sum(char.isalpha() for char in _BARE_NUMBER.sub("", text))


def is_mostly_han(text: str) -> bool:
    """Whether at least half of the letters are Han."""
    letters = [char for char in text if char.isalpha()]
    return 2 * len(re.findall(f"[{_HAN}]", text)) >= max(len(letters), 1)


def similarity(left: str, right: str) -> float:
    """Jaccard's: pairs of neighbouring letters or digits that both texts have, of those that any has; 0 for none."""
    first, second = _bigrams(left), _bigrams(right)
    return len(first & second) / len(first | second) if first | second else 0.0


def _bigrams(text: str) -> set[str]:
    chars = [char for char in text.lower() if char.isalnum()]
    return {"".join(two) for two in itertools.pairwise(chars)}


def document_of(identifier: str, named: str, separator: str | None) -> str:
    """The document of a row: the one that it names, else what stands before the last separator of its id."""
    if named:
        return named
    return identifier.rpartition(separator)[0] or identifier if separator else identifier


def first_present(asked: str | None, usual: Sequence[str], there: Collection[str]) -> str | None:
    """The column that is asked for, else the first of the usual names that is there."""
    return asked if asked is not None else next((name for name in usual if name in there), None)
