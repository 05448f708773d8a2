"""Configs of what changes an index or looks after it: `raytower index add | delete | set | sync | gc | list | …`.

Imports neither FAISS nor Lance.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from raytower.config import AutoscalingWorkersConfig, Config, OnError, WorkersConfig
from raytower.data.config import InputConfig, PathConfig


class IndexAddConfig(Config):
    """`raytower index add`: documents of an embeddings folder into `index`.

    `upsert` lets a document replace the one with its id; without it an id that is there already is refused. An addition
    that was made before is not made again, unless `again` is true.
    """

    index: str
    embeddings: str
    upsert: bool = False
    again: bool = False
    workers: WorkersConfig = WorkersConfig()


class IndexDeleteConfig(Config):
    """`raytower index delete`: by `ids`, by a file of ids at `input`, or by a `filter` on the documents' columns."""

    renamed: ClassVar = {"path": "input.path"}

    index: str
    ids: list[str] = Field(default_factory=list)
    input: PathConfig | None = None
    """A text with an id a line; or JSONL or Parquet with a key or column `id`, for ids of any characters."""
    filter: dict[str, Any] | str | None = None
    """JSON, or SQL text."""
    on_unknown: Literal["fail", "ignore"] = "fail"
    """Ignore lets ids pass that the index does not hold; they are counted."""
    workers: WorkersConfig = WorkersConfig()

    def model_post_init(self, context: Any) -> None:
        if not self.ids and self.input is None and self.filter is None:
            raise ValueError("there is nothing to delete: give ids, input (a file of ids), or filter")
        if self.filter is not None and (self.ids or self.input is not None):
            raise ValueError("filter stands beside ids or input; give one of them")


class IndexSetConfig(Config):
    """`raytower index set`: other values in columns of documents, without encoding anything.

    Either `values` is written wherever `filter` holds; or `input`, JSONL or Parquet, has an `id` and the columns to be
    changed in each row. The text and the id cannot be set: they belong to the vector.
    """

    renamed: ClassVar = {"path": "input.path"}

    index: str
    values: dict[str, Any] = Field(default_factory=dict)
    filter: dict[str, Any] | str | None = None
    input: PathConfig | None = None
    on_unknown: Literal["fail", "ignore"] = "fail"

    def model_post_init(self, context: Any) -> None:
        if (self.input is None) == (self.filter is None) or bool(self.values) != (self.filter is not None):
            raise ValueError(
                "give values and the filter that they are for, or input, a file of ids and values"
            )


class IndexSyncConfig(Config):
    """`raytower index sync`: what is new in `input` is added, what changed is replaced, what is gone is deleted.

    A text that changed is encoded again; where only other columns changed, they are set. `gone: keep` leaves documents
    that the input no longer has. More than the share `max_gone` of the index is deleted only if that is raised: a
    folder that was half delivered looks like one from which half was deleted. `encoder` null is the one that the
    index names.
    """

    index: str
    input: InputConfig
    encoder: str | None = None
    gone: Literal["delete", "keep"] = "delete"
    max_gone: float = Field(default=0.5, ge=0, le=1)
    tokens_per_batch: int | None = Field(default=None, ge=1)
    workers: AutoscalingWorkersConfig = AutoscalingWorkersConfig()
    on_error: OnError = "fail"


class IndexGcConfig(Config):
    """`raytower index gc`: the newest `keep` versions stay.

    What no version needs is taken away once it is a day old, since a build may be at work on it; `unfinished`
    takes it at once, and with it what a killed build could go on from.
    """

    index: str
    keep: int = Field(default=2, ge=1)
    unfinished: bool = False


class IndexListConfig(Config):
    """`raytower index list`; `curve` adds every measured point of each version."""

    index: str
    curve: bool = False


class IndexVerifyConfig(Config):
    """`raytower index verify`; `version` null verifies the newest.

    `encoder` null is the one that the index names, whose fingerprint is compared where it is on this machine.
    """

    index: str
    version: str | None = None
    encoder: str | None = None


class IndexRollbackConfig(Config):
    """`raytower index rollback`: a new version that equals version `to`."""

    index: str
    to: str
