"""The config of `raytower demo`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raytower.config import Config


class DemoConfig(Config):
    """`work_dir` null uses a temporary folder, removed at the end; `port` is where the demo serves."""

    renamed: ClassVar = {"rerank_k": "recall_k", "full": "sample"}

    work_dir: str | None = None
    """Folder for data, models and indexes, which stays; null uses a temporary one."""
    sample: Literal["small", "normal", "everything"] = "normal"
    """How much of the data set is taken. small shows that every stage runs; its figures say nothing."""
    model: str | None = None
    """Encoder to start from: a directory or a hub id; null is the one that comes with the extra [demo]."""
    keep_serving: bool = False
    """Leave the server up until Ctrl-C."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port that the demo serves on; 0 picks a free one."""
    recall_k: int = Field(default=10, ge=1)
    """Documents that the first stage recalls for each question; all of them are reranked."""
