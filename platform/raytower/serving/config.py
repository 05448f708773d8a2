"""The config of `raytower serve` and of the commands that speak to a running server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from raytower.config import Config, FractionField
from raytower.errors import InputError
from raytower.index.search_config import HybridConfig
from raytower.models.compute import EngineChoice, EngineDtype, check_compute
from raytower.models.search_mode import SearchMode
from raytower.requirements import refuse_requirements
from raytower.serving.access_log import AccessLogConfig
from raytower.serving.generation import DEFAULT_COLLECTION
from raytower.serving.http_config import HttpConfig
from raytower.serving.observe import ObserveConfig

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
# Words of the interface's paths, /v1/WORD, which no collection can be called by.
_PATH_WORDS = frozenset(
    {
        "admin",
        "classify",
        "collections",
        "documents",
        "embeddings",
        "models",
        "rerank",
        "search",
        "similarity",
    }
)


class CollectionConfig(Config):
    """What one collection serves: an index and the models beside it."""

    index: str
    """The index: a folder or a URI."""
    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    reranker: str | None = None
    """Cross-encoder directory, hub id or URI; null serves without one."""
    mode: SearchMode = "dense"
    """How documents are recalled for requests that do not say: dense by vectors, lexical by words (BM25), hybrid by
    both. All three are served where the index has a lexical side. With lexical the encoder is loaded by the first
    request that asks for vectors."""
    hybrid: HybridConfig = HybridConfig()
    """How mode hybrid makes one score of two."""
    classifier: str | None = None
    """Directory, hub id or URI of a text classifier; null serves without one."""
    classify_modes: tuple[Literal["labels", "votes"], ...] = ()
    """Ways to classify by the documents' labels: labels takes each document for the description of its label, votes
    counts the labels of the nearest."""
    label_field: str = Field(default="label", min_length=1)
    """Column of the documents that holds their labels."""
    classify_tuned: tuple[str, ...] = ()
    """Files that tune-classify wrote, one for each way at most: labels are as those of `classify` with `tuned`."""
    fusion_weight: FractionField | None = None
    """Weight of the rerank score beside the recall score; null is the one stored with the reranker."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    engine: EngineChoice = "torch"
    """What runs the models' forward passes; auto times those that compute in dtype, and takes the faster."""
    dtype: EngineDtype = "float32"
    """Precision of the models' forward passes."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a text; null is the encoder's own limit."""
    rerank_max_length: int | None = Field(default=None, ge=1)
    """Tokens of a (query, document) pair; null is the reranker's own limit."""

    @field_validator("engine", mode="before")
    @classmethod
    def _not_a_server(cls, value: Any) -> Any:
        if value in ("uvicorn", "ray"):
            raise ValueError(
                f"engine is what the models compute with; what the server runs on is `server: {value}`"
            )
        return value

    @model_validator(mode="after")
    def _check_compute(self) -> Self:
        try:
            check_compute(self.engine, self.dtype)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def settings(self) -> dict[str, Any]:
        """The collection's keys alone, as JSON."""
        return self.model_dump(mode="json", include=set(CollectionConfig.model_fields))


class AutoscalingConfig(Config):
    """Replicas that come and go with the load."""

    min: int = Field(default=1, ge=1)
    """Fewest replicas."""
    max: int = Field(default=2, ge=1)
    """Most replicas."""
    target_requests: float = Field(default=8, gt=0)
    """Requests under way in each replica that are aimed at."""

    def model_post_init(self, context: Any) -> None:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max {self.max}; lower min or raise max")


class ServeConfig(HttpConfig, CollectionConfig):
    """What is served, where, and with how much of the machine.

    Either `index` names the one index, or `collections` names several; the keys of a collection that stand beside
    `collections` are then those of each collection that does not set them itself.
    """

    renamed: ClassVar = {"placement": "layout"}

    index: str | None = None  # type: ignore[assignment]
    """The index: a folder or a URI."""
    collections: dict[str, CollectionConfig] = Field(
        default={},
        description="Several indexes, each with keys of its own; the first is the default collection.",
    )
    server: Literal["ray", "uvicorn"] = "ray"
    """ray runs replicas that are restarted, scaled and swapped together; uvicorn runs one process without Ray, with
    layout together."""
    layout: Literal["together", "split", "sharded"] = "together"
    """together holds models and all shards in each replica; split gives the reranker replicas of its own; sharded gives
    the shards of the index processes of their own."""
    name: str = Field(default="raytower", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The application's name in the cluster."""
    route_prefix: str = Field(default="/", pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")
    """The path that the application answers below."""
    replace: bool = False
    """Take the place of an application of this name that is served already, such as one whose command was killed."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the server, which share its requests."""
    autoscaling: AutoscalingConfig | None = None
    """Lets replicas come and go, in place of `replicas`; null keeps their number."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of a replica."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of a replica; null is 1 where there is one for each replica and copy of the reranker, a part of one where
    there are fewer, and else 0."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """What each replica, copy of the reranker and group of shards holds of other things that nodes have, by the names
    that `ray start --resources` gave them."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that their nodes must have, such as {"ray.io/market-type": "!spot"}; values as those of a job's
    workers.label_selector."""
    rerank_replicas: int = Field(default=1, ge=1)
    """Copies of the reranker; layout split."""
    rerank_num_cpus: float = Field(default=1, ge=0)
    """CPUs of a copy of the reranker; layout split."""
    rerank_num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of a copy of the reranker, as num_gpus of a replica; layout split."""
    shard_groups: int | None = Field(default=None, ge=1)
    """Groups that the shards are dealt out to; layout sharded; null is one for each shard that the largest index has
    at the start."""
    shard_replicas: int = Field(default=1, ge=1)
    """Copies of each group of shards; layout sharded."""
    shard_num_cpus: float = Field(default=1, ge=0)
    """CPUs of a copy of a group of shards; layout sharded."""
    shard_timeout_ms: int = Field(default=500, ge=1)
    """Milliseconds to wait for a group of shards; layout sharded."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests that a replica holds at once; how many of them it can answer in time, it reckons itself."""
    max_wait_ms: int = Field(default=250, ge=1)
    """Milliseconds that a search may be expected to wait for those before it; beyond it is answered 429."""
    max_queued_requests: int = Field(default=512, ge=0)
    """Requests that wait for a replica; more are answered 429."""
    api_key_env: str | None = None
    """Environment variable that holds the one key to ask for; more keys, and keys in a file, are in `security`."""
    watch_s: float | None = Field(default=None, gt=0)
    """Seconds between looks for a newer index version, which is then served; null waits for `serve reload`."""
    access_log: AccessLogConfig = AccessLogConfig()
    """A line of JSON for each request."""
    observe: ObserveConfig = ObserveConfig()
    """Where errors and spans are sent; nowhere by default."""
    start_timeout_s: float = Field(default=180, gt=0)
    """Seconds for loading index and models on all replicas."""
    end_s: float = Field(default=25, ge=0)
    """Seconds that requests under way have to end once a server is told to stop; those that take longer are cut off."""
    drain_s: float = Field(default=1.0, ge=0)
    """Seconds for which a server that stops says so, by 503 to readyz and new requests, before it closes its door."""

    @field_validator("layout", mode="before")
    @classmethod
    def _former_layout(cls, value: Any) -> Any:
        if value == "apart":
            raise ValueError("the layout apart is called sharded now")
        return value

    @model_validator(mode="after")
    def _check_collections(self) -> Self:
        if (self.index is None) == (not self.collections):
            given = "neither" if self.index is None else "both"
            raise ValueError(f"index, collections: {given} given; name one index, or several collections")
        for name in self.collections:
            if not _NAME.fullmatch(name) or name in _PATH_WORDS:
                raise ValueError(
                    f"collections: {name!r} cannot be a collection's name; use lower-case letters, digits, - and _, "
                    f"and none of {', '.join(sorted(_PATH_WORDS))}"
                )
        if self.server == "ray" and self.access_log.path == "-":
            raise ValueError(
                "access_log.path is '-', and Ray keeps what replicas print to itself; name a file, or set server to "
                "uvicorn"
            )
        if self.server == "uvicorn" and self.layout != "together":
            raise ValueError(f"server uvicorn has one process, and cannot have layout {self.layout}")
        if self.server == "uvicorn" and (self.replicas > 1 or self.autoscaling):
            raise ValueError("server uvicorn has one process; set replicas to 1 and autoscaling to null")
        if self.server == "uvicorn" and (self.resources or self.label_selector):
            raise ValueError(
                "server uvicorn runs here; leave out resources and label_selector, which choose nodes"
            )
        refuse_requirements(self.resources, self.label_selector)
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_key(cls, values: Any) -> Any:
        """`api_key_env` is the short way to say `security.key_env`."""
        if not isinstance(values, Mapping) or values.get("api_key_env") is None:
            return values
        security = values.get("security") or {}
        given = security if isinstance(security, Mapping) else security.model_dump(exclude_unset=True)
        if given.get("key_env") not in (None, values["api_key_env"]):
            raise ValueError(
                f"api_key_env is {values['api_key_env']!r} and security.key_env is {given['key_env']!r}; set one"
            )
        return {**values, "api_key_env": None, "security": {**given, "key_env": values["api_key_env"]}}

    def served_collections(self) -> dict[str, CollectionConfig]:
        """Every collection's own config, the default one first."""
        names = set(CollectionConfig.model_fields) & self.model_fields_set
        shared = {name: getattr(self, name) for name in names - {"index"}}
        if self.index is not None:
            return {DEFAULT_COLLECTION: CollectionConfig(**{**shared, "index": self.index})}
        return {
            name: CollectionConfig(**{**shared, **{key: getattr(own, key) for key in own.model_fields_set}})
            for name, own in self.collections.items()
        }


# Keys of a server come in this order: what is served, where, how much of the machine.
def _in_order(cls: type[ServeConfig]) -> None:
    fields = cls.__pydantic_fields__
    own = [name for name in get_annotations(cls) if name in fields]
    served = [name for name in CollectionConfig.model_fields if name not in ("index",)]
    names = dict.fromkeys(("index", "collections", *served, *HttpConfig.model_fields, *own))
    cls.__pydantic_fields__ = {name: fields[name] for name in names}
    cls.model_rebuild(force=True)


_in_order(ServeConfig)


# --- commands to a running server -----------------------------------------------------------------------------


class ServerConfig(Config):
    """Which server a command speaks to."""

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://")
    """Where the server answers."""
    key_env: str | None = None
    """Environment variable that holds the key to send; null sends none."""
    timeout_s: float = Field(default=600, gt=0)
    """Seconds to wait for the answer; loading a large index takes its time."""


class ServeStatusConfig(ServerConfig):
    """`raytower serve status`."""


class ServeReloadConfig(ServerConfig):
    """`raytower serve reload`: keys that are not given stay as they are served. Without any key the index moves to its
    newest version."""

    collection: str | None = None
    """The collection; null is the default one."""
    index: str | None = None
    """Another index; null keeps the one that is served."""
    index_version: str | None = None
    """Version of the index, or `newest`; null is the newest where no key is given, or `index` is."""
    encoder: str | None = None
    """Another encoder; null keeps the one that is served."""
    reranker: str | None = None
    """Another reranker, `none` serves without one; null keeps the one that is served."""
    classifier: str | None = None
    """Another classifier, `none` serves without one; null keeps the one that is served."""
    mode: SearchMode | None = None
    """Another way to recall documents for requests that do not say: dense, lexical or hybrid; null keeps the one that
    is served."""
    hybrid: HybridConfig = HybridConfig()
    """How mode hybrid makes one score of two; what is null in it stays as it is served."""
    fusion_weight: FractionField | None = None
    """Another weight of the rerank score; null keeps the one that is served."""


class ServeRollbackConfig(ServerConfig):
    """`raytower serve rollback`."""

    collection: str | None = None
    """The collection; null is the default one."""
