"""Configs of what builds shards: `raytower index build | compact | convert`. Imports neither FAISS nor Lance."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raytower.config import ByteSize, Config, WorkersConfig
from raytower.data.config import QueriesConfig

BuiltKind = Literal["flat", "hnsw", "ivf_flat", "ivf_rabitq", "ivf_sq8", "ivf_pq"]
Placing = Literal["rows", "cluster"]
Metric = Literal["cosine", "inner_product"]
ExactDtype = Literal["float16", "float32"]
IndexKind = Literal["auto", "flat", "hnsw", "ivf_flat", "ivf_rabitq", "ivf_sq8", "ivf_pq"]


class RebuildTargetConfig(Config):
    """What shards that are built anew should reach, as `TargetConfig`. Null is the newest version's own."""

    recall: float | None = Field(default=None, gt=0, le=1)
    """Recall@k against exact search."""
    k: int | None = Field(default=None, ge=1)
    memory: ByteSize = ByteSize(8 * 2**30)
    """Bounds both one process that searches all shards and the build tasks that run at once."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Milliseconds of a query on one core, as the planner predicts them; kind auto chooses by it among the kinds that
    fit the memory. Null asks for none."""
    on_target_missed: Literal["publish", "keep"] = "publish"
    """Publish an index that misses the recall, with a warning, or keep it back."""
    queries: QueriesConfig | None = None
    """Real queries to measure recall with."""


class TargetConfig(RebuildTargetConfig):
    """Recall to reach, memory to keep, the time that a query may take. `queries` null takes documents as queries."""

    recall: float = Field(default=0.95, gt=0, le=1)
    k: int = Field(default=10, ge=1)


class HnswConfig(Config):
    """Links of a node (twice as many on the lowest level), and how widely neighbours are searched for while building.

    Null is planned: 32 and 100.
    """

    m: int | None = Field(default=None, ge=2, le=512)
    ef_construction: int | None = Field(default=None, ge=1)


class IvfConfig(Config):
    """Lists of a shard, and sub-vectors of a code of ivf_pq, which must divide the dimension. Null is planned."""

    nlist: int | None = Field(default=None, ge=1)
    pq_m: int | None = Field(default=None, ge=1)


class IndexBuildConfig(Config):
    """`raytower index build`.

    `placement` decides which shard a document goes to: by rows, or by its nearest cluster, so that a query need not
    visit all shards. `indexed` names columns that filters ask often; each gets a scalar index. `replace` lets the
    build take the place of an index that was changed since it was built. `rescore` keeps whole vectors beside the
    codes of ivf_rabitq, ivf_sq8 and ivf_pq and scores the best candidates with them; auto does, and ivf_rabitq
    needs it.
    """

    embeddings: str
    output: str
    kind: IndexKind = "auto"
    shards: Literal["auto"] | int = "auto"
    placement: Placing = "rows"
    rescore: Literal["auto"] | bool = "auto"
    hnsw: HnswConfig = HnswConfig()
    ivf: IvfConfig = IvfConfig()
    indexed: list[str] = Field(default_factory=list)
    replace: bool = False
    target: TargetConfig = TargetConfig()
    workers: WorkersConfig = WorkersConfig()
    """Each builds one shard at a time. What runs alone, training and measuring recall, uses the threads of all of them,
    as far as one node has cores. `num_gpus` is held by the tasks that train centroids and codebooks and fill lists,
    which run there with the gpu extra."""
    seed: int = Field(default=0, ge=0)


class IndexCompactConfig(Config):
    """`raytower index compact`. `kind` and `placement` null are the newest version's own."""

    renamed: ClassVar = {"recall": "target.recall", "recall_k": "target.k", "memory": "target.memory"}

    index: str
    kind: IndexKind | None = None
    shards: Literal["auto"] | int = "auto"
    placement: Placing | None = None
    target: RebuildTargetConfig = RebuildTargetConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: int = Field(default=0, ge=0)


class IndexConvertConfig(IndexCompactConfig):
    """`raytower index convert`. `remove_old` takes the files of format 2 away once the index is of format 3."""

    remove_old: bool = False
