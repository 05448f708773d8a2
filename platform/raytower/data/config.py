"""Configs of what jobs read: rows, judged queries, a file. Imports no library of data."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raytower.config import Config

InputFormat = Literal["auto", "lines", "tsv", "csv", "jsonl", "beir", "parquet", "arrow"]
QueryFormat = Literal["auto", "pairs", "beir", "trec"]


class PathConfig(Config):
    """Where something is read from, local or by URI; a string alone is a path."""

    shorthand = "path"

    path: str = Field(min_length=1)
    """A file, a folder or a glob, local or by URI."""

    @property
    def path_alone(self) -> str | None:
        """The path if no other key is set, else None."""
        return self.path if self == type(self)(path=self.path) else None


class InputConfig(PathConfig):
    """Where records come from. `path` is a file, a folder or a glob."""

    format: InputFormat = "auto"
    """Format of the files; auto detects it from extension and first bytes."""
    text_fields: list[str] = Field(default=["title", "text"], min_length=1)
    """Columns or keys that make up a corpus text, joined by one space; the last is required, the others are not."""
    id_field: str | None = None
    """The column or key that holds a corpus row's id; null takes `id` or `_id` where there is one."""
    split: str | None = None
    """Split of a BEIR folder: its pairs are those that qrels/<split>.tsv judges relevant. Null reads train."""

    split_key: ClassVar[str] = "input.split"
    """How the command calls the key of the split, for messages; empty where it has none."""

    @property
    def reads_instructions(self) -> bool:
        """Whether rows with queries may bring an `instruction`, which then is a column of their records."""
        return False

    def remedy(self, text: str) -> str:
        """The end of a message: `text`, which advises to set keys of this section."""
        return f"; {text}"


class NamedInput(InputConfig):
    """An input of which the command's config holds the path alone, so no message may advise to set another key."""

    instructions: bool = False
    """Whether rows with queries may bring an instruction."""

    split_key: ClassVar[str] = ""

    @property
    def reads_instructions(self) -> bool:
        return self.instructions

    def remedy(self, text: str) -> str:
        return ""


class TrainRows(NamedInput):
    """Training rows: path and split."""

    split_key: ClassVar[str] = "train.split"


class DevRows(NamedInput):
    """Dev rows: path and split."""

    split_key: ClassVar[str] = "dev.split"


class QueriesConfig(PathConfig):
    """Judged queries: pairs (relevance by text), a BEIR folder (relevance by id), or TREC qrels (ids alone)."""

    format: QueryFormat = "auto"
    """Kind of the rows; auto takes a BEIR folder for one, a file of TREC qrels too, and everything else for pairs. TREC
    qrels hold no texts, so they judge run files alone."""
    split: str = "test"
    """Split of a BEIR folder: queries are those that qrels/<split>.tsv judges. Pairs have no splits."""
