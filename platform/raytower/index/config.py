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
Stemmer = Literal[
    "arabic",
    "armenian",
    "basque",
    "catalan",
    "danish",
    "dutch",
    "english",
    "esperanto",
    "estonian",
    "finnish",
    "french",
    "german",
    "greek",
    "hindi",
    "hungarian",
    "indonesian",
    "irish",
    "italian",
    "lithuanian",
    "nepali",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "serbian",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
    "yiddish",
]


class RebuildTargetConfig(Config):
    """What shards that are built anew should reach, as `TargetConfig`. Null is the newest version's own."""

    recall: float | None = Field(default=None, gt=0, le=1)
    """Recall@k against exact search."""
    k: int | None = Field(default=None, ge=1)
    """Hits at which recall is measured and aimed at; null is the newest version's own."""
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
    """Share of the exact nearest neighbours that a search has to find."""
    k: int = Field(default=10, ge=1)
    """Hits at which recall is measured and aimed at."""


class HnswConfig(Config):
    """Settings of graphs."""

    m: int | None = Field(default=None, ge=2, le=512)
    """Links of a node, twice as many on the lowest level; null is planned: 32."""
    ef_construction: int | None = Field(default=None, ge=1)
    """How widely neighbours are searched for while building; null is planned: 100."""


class IvfConfig(Config):
    """Settings of lists."""

    nlist: int | None = Field(default=None, ge=1)
    """Lists of a shard; null is planned."""
    pq_m: int | None = Field(default=None, ge=1)
    """Sub-vectors of a code of ivf_pq, which must divide the dimension; null is planned."""


class TokensConfig(Config):
    """How texts become the tokens of lexical search (`index/tokens.py`). A version keeps it, and queries follow it."""

    stemmer: Stemmer | None = None
    """Snowball stemmer of words between spaces: connections and connected become connect. Null leaves words as they
    are."""
    unspaced: Literal["icu", "grams"] = "icu"
    """How Thai, Lao, Khmer and Burmese are parted: icu by the words of ICU's dictionaries, grams into characters and
    pairs of them, as Chinese is."""


class IndexBuildConfig(Config):
    """`raytower index build`."""

    embeddings: str
    """Folder that encode wrote."""
    output: str
    """Folder or URI of the index."""
    kind: IndexKind = "auto"
    """Kind of the shards; auto takes what the target allows and answers most quickly."""
    shards: Literal["auto"] | int = "auto"
    """Number of shards; auto takes as many as build tasks need."""
    placement: Placing = "rows"
    """Which shard a document goes to: by rows, or by its nearest cluster, so that a query need not visit all
    shards."""
    rescore: Literal["auto"] | bool = "auto"
    """Keep whole vectors beside codes and score the best candidates with them; auto does. ivf_rabitq needs it."""
    hnsw: HnswConfig = HnswConfig()
    ivf: IvfConfig = IvfConfig()
    indexed: list[str] = Field(default_factory=list)
    """Columns that filters ask often; each gets a scalar index."""
    lexical: bool = True
    """Keep the tokens of each text and an inverted index over them, for lexical and hybrid search."""
    tokens: TokensConfig = TokensConfig()
    """How texts become those tokens."""
    replace: bool = False
    """Take the place of an index that was changed since it was built."""
    target: TargetConfig = TargetConfig()
    """What the index has to reach."""
    workers: WorkersConfig = WorkersConfig()
    """Each builds one shard at a time. Training and measuring recall run as one task, which uses the threads of all of
    them, up to the cores of one node. `num_gpus` is held by the tasks that train centroids and codebooks and fill
    lists, which run there with the gpu extra."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""


class IndexCompactConfig(Config):
    """`raytower index compact`. `kind` and `placement` null are the newest version's own."""

    renamed: ClassVar = {"recall": "target.recall", "recall_k": "target.k", "memory": "target.memory"}

    index: str
    """The index: a folder or a URI."""
    kind: IndexKind | None = None
    """Kind of the shards; null is the newest version's own."""
    shards: Literal["auto"] | int = "auto"
    """Number of shards; auto takes as many as build tasks need."""
    placement: Placing | None = None
    """Which shard a document goes to, as index build has it; null is the newest version's own."""
    lexical: bool | None = None
    """Make the lexical side, or take it away, without encoding anything; null leaves it as it is."""
    tokens: TokensConfig | None = None
    """How texts become the tokens of the lexical side; null is the newest version's own."""
    target: RebuildTargetConfig = RebuildTargetConfig()
    """What the index has to reach."""
    workers: WorkersConfig = WorkersConfig()
    """Tasks that build shards side by side."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""


class IndexConvertConfig(IndexCompactConfig):
    """`raytower index convert`. `remove_old` takes the files of format 2 away once the index is of format 3."""

    remove_old: bool = False
    """Remove the files of format 2 once the index is of format 3."""
