"""What the HTTP interface is told: bounds of a request, who may ask, and where it listens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raytower.config import ByteSize, Config

TokenIds = Literal["cl100k_base", "o200k_base", "model"]


class Limits(Config):
    """The limits of one request. Longer texts and bodies are answered 413, larger counts 422."""

    max_body_bytes: ByteSize = Field(default=ByteSize(4 * 1024 * 1024), ge=1024)
    """Bytes of a request's body, after it is decompressed."""
    body_timeout_ms: int = Field(default=10_000, ge=1)
    """Milliseconds that a body may take to arrive; a slower one is answered 408."""
    max_query_characters: int = Field(default=8192, ge=1)
    """Characters of a query."""
    max_queries: int = Field(default=64, ge=1)
    """Queries of a request."""
    max_k: int = Field(default=1000, ge=1)
    """Hits that may be asked for."""
    max_recall_k: int = Field(default=1000, ge=1)
    """Documents that the first stage may be asked to recall for the reranker."""
    max_pairs: int = Field(default=16_000, ge=1)
    """Pairs of query and document that a search may rerank, over all its queries."""
    max_inputs: int = Field(default=2048, ge=1)
    """Texts of a request for embeddings, similarity or labels."""
    max_documents: int = Field(default=1000, ge=1)
    """Documents of a rerank request."""
    max_document_characters: int = Field(default=65536, ge=1)
    """Characters of a document."""
    max_characters: int = Field(default=8_000_000, ge=1)
    """Characters that a model is given for one request; a reranker is given the query again with each document. A token
    id counts as four."""
    max_filter_conditions: int = Field(default=256, ge=1)
    """Conditions of a filter."""
    max_filter_members: int = Field(default=10_000, ge=1)
    """Members of all lists of a filter."""
    max_answer_bytes: ByteSize = Field(default=ByteSize(64 * 1024 * 1024), ge=1024)
    """Bytes of an answer."""
    max_timeout_ms: int = Field(default=60_000, ge=1)
    """Milliseconds that a request may ask for."""


class SecurityConfig(Config):
    """Who may ask. A server without keys listens on loopback alone, unless `open` is set."""

    keys_file: str | None = Field(
        default=None,
        description="YAML file of keys, each with name, sha256 (hex), and if wanted admin, requests_per_second and "
        "max_in_flight; null has none.",
    )
    key_env: str | None = Field(
        default=None, description="Environment variable that holds a key in clear; null has none."
    )
    admin_key_env: str | None = Field(
        default=None,
        description="Environment variable that holds a key in clear which may use the admin routes too; null has "
        "none.",
    )
    open: bool = False
    """Serve everybody who reaches the address, without a key, on other addresses than loopback too."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that a keyless server on loopback answers to, beside loopback's own and names without a
    dot. A web page of another name could otherwise reach it (DNS rebinding)."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers, such as https://search.example.com; "*" is every origin."""

    @property
    def has_keys(self) -> bool:
        """Whether requests must bring a key."""
        return any((self.keys_file, self.key_env, self.admin_key_env))


class HttpConfig(Config):
    """Where the server listens, and what it takes."""

    host: str = "127.0.0.1"
    """Address to listen on; another than loopback asks for keys (`security`)."""
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    timeout_ms: int = Field(
        default=2000, ge=1, description="Milliseconds that a request may take where it names none."
    )
    limits: Limits = Limits()
    """Bounds of a request."""
    security: SecurityConfig = SecurityConfig()
    """Who may ask."""
    token_ids: TokenIds = "cl100k_base"
    """What lists of token ids in embeddings requests are read as: OpenAI's clients send those of cl100k_base, which
    need tiktoken; model takes them as ids of the encoder's own tokenizer."""
    page_title: str = Field(default="Search", min_length=1)
    """Title of the search page."""

    def model_post_init(self, context: Any) -> None:
        if self.timeout_ms > self.limits.max_timeout_ms:
            raise ValueError(
                f"timeout_ms is {self.timeout_ms}, more than limits.max_timeout_ms {self.limits.max_timeout_ms}; "
                "lower it or raise the limit"
            )
