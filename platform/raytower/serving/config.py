"""The config of `raytower serve`."""

from __future__ import annotations

import hashlib
import os
from typing import Any, ClassVar, Literal

from pydantic import Field

from raytower.config import Config, FractionField
from raytower.errors import InputError
from raytower.serving.schemas import Limits


class ServeConfig(Config):
    """What is served, where, and with how much of the machine.

    `layout: together` holds encoder, all shards and reranker in each replica: the fewest hops. `apart` gives each index
    shard its own process, for an index that one machine's memory cannot hold.
    """

    renamed: ClassVar = {"placement": "layout"}

    index: str
    """The index: a folder or a URI."""
    encoder: str | None = Field(
        default=None,
        description="Encoder: a directory, a hub id or a URI; null is the one that the index names.",
    )
    reranker: str | None = None
    """Cross-encoder directory, hub id or URI; null serves without one."""
    fusion_weight: FractionField | None = Field(
        default=None,
        description="Weight of the rerank score beside the recall score; null is the one stored with the reranker.",
    )
    query_prefix: str | None = Field(
        default=None,
        description="Put before each query when it is encoded; null is the encoder's own prompt.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models' forward passes."""
    max_length: int | None = Field(
        default=None, ge=1, description="tokens of a text; null: the encoder's own limit"
    )
    rerank_max_length: int | None = Field(
        default=None, ge=1, description="tokens of a (query, document) pair; null: the reranker's own limit"
    )
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback opens the server to others."""
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    replicas: int = Field(default=1, ge=1)
    """Copies of the server, which share its requests."""
    layout: Literal["together", "apart"] = "together"
    """together holds encoder, shards and reranker in each replica; apart gives each shard a process of its
    own."""
    num_cpus: float = Field(default=1, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(default=0, ge=0, description="GPUs of a replica.")
    shard_num_cpus: float = Field(default=1, ge=0, description="CPUs of a shard's process; layout apart.")
    shard_timeout_ms: int = Field(
        default=500, ge=1, description="Milliseconds to wait for a shard; layout apart."
    )
    max_ongoing_requests: int = Field(
        default=16, ge=1, description="Requests of a replica that are worked on at once."
    )
    max_queued_requests: int = Field(
        default=64, ge=0, description="Requests of a replica that wait beyond those; more are answered 429."
    )
    timeout_ms: int = Field(
        default=2000, ge=1, description="Milliseconds that a request may take where it names none."
    )
    start_timeout_s: float = Field(
        default=180, gt=0, description="Seconds for loading index and models on all replicas."
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key to ask for; null asks for none."
    )
    limits: Limits = Limits()
    """Bounds of a request."""
    page_title: str = Field(default="Search", min_length=1)
    """Title of the search page."""

    def model_post_init(self, context: Any) -> None:
        if self.timeout_ms > self.limits.max_timeout_ms:
            raise ValueError(
                f"timeout_ms is {self.timeout_ms}, more than limits.max_timeout_ms {self.limits.max_timeout_ms}; "
                "lower it or raise the limit"
            )

    def api_key_sha256(self) -> bytes | None:
        """The digest of the key to ask for, or None. Replicas get this; the key stays in the driver's environment.

        Raises:
            InputError: the named variable is unset or empty.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise InputError(
                f"api_key_env names {self.api_key_env!r}, which is unset or empty; export the key in it or set "
                "api_key_env to null"
            )
        return hashlib.sha256(key.encode()).digest()
