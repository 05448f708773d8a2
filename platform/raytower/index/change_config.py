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
    """The index: a folder or a URI."""
    embeddings: str
    """Folder that encode wrote."""
    upsert: bool = False
    """Let a document replace the one with its id; without it such an id is refused."""
    again: bool = False
    """Add what was added before once more."""
    workers: WorkersConfig = WorkersConfig()
    """Tasks that fold shards side by side."""


class IndexDeleteConfig(Config):
    """`raytower index delete`: by `ids`, by a file of ids at `input`, or by a `filter` on the documents' columns."""

    renamed: ClassVar = {"path": "input.path"}

    index: str
    """The index: a folder or a URI."""
    ids: list[str] = Field(default_factory=list)
    """Ids to delete."""
    input: PathConfig | None = None
    """A text with an id a line; or JSONL or Parquet with a key or column `id`, for ids of any characters."""
    filter: dict[str, Any] | str | None = None
    """A condition on the documents' columns: JSON, such as {"year": {"$gte": 2020}}, or SQL text."""
    on_unknown: Literal["fail", "ignore"] = "fail"
    """Ignore lets ids pass that the index does not hold; they are counted."""
    workers: WorkersConfig = WorkersConfig()
    """Tasks that fold shards side by side."""

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
    """The index: a folder or a URI."""
    values: dict[str, Any] = Field(default_factory=dict)
    """Columns and the values to write wherever the filter holds."""
    filter: dict[str, Any] | str | None = None
    """A condition on the documents' columns: JSON, such as {"year": {"$gte": 2020}}, or SQL text."""
    input: PathConfig | None = None
    """JSONL or Parquet with an `id` and the columns to change in each row."""
    on_unknown: Literal["fail", "ignore"] = "fail"
    """ignore lets ids pass that the index does not hold; they are counted."""

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
    """The index: a folder or a URI."""
    input: InputConfig
    """Where the texts are; the index is made equal to them."""
    encoder: str | None = None
    """Null is the one that the index names."""
    gone: Literal["delete", "keep"] = "delete"
    """What happens with documents that the input no longer has."""
    max_gone: float = Field(default=0.5, ge=0, le=1)
    """Largest share of the index that may be deleted at once."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Padded tokens of a forward pass; null chooses by device."""
    workers: AutoscalingWorkersConfig = AutoscalingWorkersConfig()
    """Processes that encode side by side."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""


class IndexGcConfig(Config):
    """`raytower index gc`: the newest `keep` versions stay.

    What no version needs is taken away once it is a day old, since a build may be at work on it; `unfinished`
    takes it at once, and with it what a killed build could go on from.
    """

    index: str
    """The index: a folder or a URI."""
    keep: int = Field(default=2, ge=1)
    """Newest versions that stay."""
    unfinished: bool = False
    """Remove what no version needs at once, and with it what a killed build could go on from."""


class IndexListConfig(Config):
    """`raytower index list`; `curve` adds every measured point of each version."""

    index: str
    """The index: a folder or a URI."""
    curve: bool = False
    """Add every measured point of each version."""


class IndexVerifyConfig(Config):
    """`raytower index verify`; `version` null verifies the newest.

    `encoder` null is the one that the index names, whose fingerprint is compared where it is on this machine.
    """

    index: str
    """The index: a folder or a URI."""
    version: str | None = None
    """Null verifies the newest."""
    encoder: str | None = None
    """Encoder whose fingerprint is compared; null is the one that the index names, where it is on this
    machine."""


class IndexRollbackConfig(Config):
    """`raytower index rollback`: a new version that equals version `to`."""

    index: str
    """The index: a folder or a URI."""
    to: str
    """The version that the new one equals, such as 000003."""
