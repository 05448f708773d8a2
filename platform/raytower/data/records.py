"""Records: their kinds, the columns that each kind always has, and the names a file may give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

RecordKind = Literal["corpus", "pairs", "triples", "scored", "candidates", "ranked", "labelled", "lines"]

FieldType = Literal["text", "id", "number", "category", "texts", "numbers"]
"""text: a string. id: a string or an integer. number: finite. category: a string or a number, kept as its text in
normal form (data/plain_labels.py). texts, numbers: a list of such."""
_TYPES: dict[FieldType, tuple[str, pa.DataType]] = {
    "text": ("string", pa.string()),
    "id": ("string or an integer", pa.string()),
    "number": ("number", pa.string()),
    "category": ("string or a number", pa.string()),
    "texts": ("list of strings", pa.list_(pa.string())),
    "numbers": ("list of numbers", pa.list_(pa.float64())),
}


@dataclass(frozen=True)
class RecordField:
    """One value of a record, and the column or key names it may come under, best first."""

    name: str
    names: tuple[str, ...]
    type: FieldType = "text"
    required: bool = True
    may_be_blank: bool = False

    @property
    def expected(self) -> str:
        """The type that a value must have, in words for messages."""
        return _TYPES[self.type][0]

    @property
    def read_type(self) -> pa.DataType:
        """The Arrow type in which values come to the checks; a single number comes as its text."""
        return _TYPES[self.type][1]

    @property
    def is_list(self) -> bool:
        return pa.types.is_list(self.read_type)

    @property
    def record_type(self) -> pa.DataType:
        """The Arrow type that the column of a finished record has."""
        return pa.float64() if self.type == "number" else self.read_type


_QUERY = RecordField("query", ("query", "sentence1"))
_DOCUMENT = RecordField("document", ("document", "title", "sentence2"))
_FIELDS: dict[RecordKind, tuple[RecordField, ...]] = {
    "pairs": (
        RecordField("query", ("query", "sentence1", "text")),
        RecordField("document", ("document", "title", "sentence2", "similar_text")),
        RecordField("query_id", ("query_id",), "id", required=False),
        RecordField("document_id", ("document_id",), "id", required=False),
    ),
    "triples": (_QUERY, _DOCUMENT, RecordField("negative", ("negative", "neg_title"))),
    "scored": (_QUERY, _DOCUMENT, RecordField("label", ("label", "score"), "number")),
    # The best-scored document first. JSON lines may give `positive` and `negatives` in place of the lists.
    "candidates": (
        RecordField("query", ("query",)),
        RecordField("documents", ("documents",), "texts"),
        RecordField("scores", ("scores",), "numbers"),
    ),
    # A document that was recalled for a query, in a row of its own, as `raytower search --input` writes them.
    "ranked": (
        RecordField("query", ("query", "sentence1", "text_a")),
        # A title alone is the document; beside another text it is that document's title.
        RecordField("document", ("document", "text", "candidate", "sentence2", "text_b", "title")),
        RecordField("score", ("recall_score", "score"), "number", required=False),
        RecordField("query_id", ("query_id",), "id", required=False),
        RecordField("document_id", ("document_id", "id"), "id", required=False),
        RecordField("title", ("title",), required=False, may_be_blank=True),
    ),
    "labelled": (RecordField("text", ("text",)), RecordField("label", ("label",), "category")),
}

INSTRUCTION = RecordField("instruction", ("instruction", "prompt"), required=False, may_be_blank=True)
"""What its query is asked for, which a training row may say; see `InputConfig.reads_instructions`."""

# The column names that the documentation gives for TSV files of each kind; None where files need no header. Scored
# pairs may go without where the third column is a number.
EXPECTED_HEADER: dict[RecordKind, tuple[str, ...]] = {
    "triples": ("query", "title", "neg_title"),
    "scored": ("query", "title", "label"),
}
# What the columns of a TSV without a header mean. The last ones may be missing where their fields are not required.
HEADERLESS: dict[RecordKind, tuple[str, ...]] = {
    "pairs": ("query", "document"),
    "ranked": ("query", "document", "score"),
    "scored": ("query", "title", "label"),
    "labelled": ("text", "label"),
}


def is_corpus_like(kind: RecordKind) -> bool:
    """Kinds whose records are single texts with an id."""
    return kind in ("corpus", "lines")


def fields_of(
    kind: RecordKind,
    text_fields: tuple[str, ...],
    id_field: str | None,
    text_may_be_blank: bool = False,
    instructions: bool = False,
) -> tuple[RecordField, ...]:
    """The fields to read for `kind`. For a corpus: its id, then one field for each of `text_fields`.

    The last text field is required, those before it (a title) are not. `text_may_be_blank` lets the required one be
    empty as long as the joined text is not, which BEIR's corpora need. `instructions` adds INSTRUCTION to kinds with
    queries.
    """
    if not is_corpus_like(kind):
        fields = _FIELDS[kind]
        return (*fields, INSTRUCTION) if instructions and fields[0].name == "query" else fields
    names = (id_field,) if id_field else ("id", "_id")
    identifier = RecordField("id", names, "id", required=id_field is not None)
    last = len(text_fields) - 1
    texts = [
        RecordField(f"text_{i}", (name,), required=i == last, may_be_blank=i < last or text_may_be_blank)
        for i, name in enumerate(text_fields)
    ]
    return (identifier, *texts)


def canonical_schema(kind: RecordKind) -> pa.Schema:
    """The columns that every table of this kind has, whatever its source."""
    if is_corpus_like(kind):
        return pa.schema([("id", pa.string()), ("text", pa.string())])
    return pa.schema([(field.name, field.record_type) for field in _FIELDS[kind]])
