"""Configs of `raytower evaluate` and `raytower tune-fusion`."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from raytower.data.config import PathConfig, QueriesConfig
from raytower.retrieval.config import (
    BatchConfig,
    FileWorkersConfig,
    ModeConfig,
    RerankConfig,
    RetrieverConfig,
)

RunFormat = Literal["auto", "trec", "tsv", "jsonl"]
# A comma outside parentheses: none closes behind it before one opens.
_COMMA = re.compile(r",(?![^(]*\))")


class RunFileConfig(PathConfig):
    """A run file: the ranked lists of some retrieval, ours or anybody's."""

    format: RunFormat = "auto"
    """Form of its lines: trec (`query Q0 document rank score tag`), tsv (`query <tab> text <tab> score`, no header) or
    jsonl (query_id or query, id or text, score); auto goes by the first line."""


class EvaluateConfig(RetrieverConfig, BatchConfig):
    """`raytower evaluate`: of an index (`index`), of a run file (`run`), or of earlier evaluations (`compare`)."""

    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    index: str | None = None
    """The index to measure: a folder or a URI."""
    queries: QueriesConfig | None = None
    """Judged queries. With compare, null takes the values that the evaluations have kept of each query."""
    run: RunFileConfig | None = None
    """Measures this run file; no index and no model is opened."""
    compare: list[str] | None = None
    """Outputs of earlier evaluations, or run files, two or more: each is tested against the first, query by query."""
    metrics: list[str] | None = None
    """Names of metrics: recall@k, hit@k, mrr@k and ndcg@k, and all of the library ir-measures, such as nDCG@10, MRR@10,
    R@100, P@5, AP, Judged@10. Null is recall and hit at each k, mrr@10 and ndcg@10."""
    k: list[int] = Field(default=[1, 5, 10, 20, 50], min_length=1)
    """Cut-offs of recall and hit, and of the count of unjudged documents."""
    ignore_identical_ids: bool = False
    """Leaves out of each list the document whose id is the query's, as BEIR does for sets whose queries stand in the
    corpus (ArguAna, Quora)."""
    stages: bool = False
    """Measures where a loss comes from: exact search over the stored vectors, the index, the reranker, each against the
    one before, and how recall and time go with the index's search parameter. It costs one read of all vectors and
    queries × documents inner products: half a minute of CPU for 4,000 × 400,000 of 384 dimensions."""
    output: str | None = None
    """Folder of run.trec, qrels.trec, per_query.jsonl, report.json and report.html, with compare of comparison.json and
    comparison.html; null writes none."""
    plots: str | None = None
    """Folder that gets each plot of the report as an SVG file; null writes none."""
    figures: Literal["png"] | None = None
    """Type of files that each plot of the report is drawn to, beside the page in `output`: png, light, for what shows
    no SVG (extra `png`); null draws none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap that intervals come from, and of the permutations of compare."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that search side by side, where an index has many queries and there is an output."""

    @field_validator("metrics", "compare", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        """`--metrics nDCG@10,AP` is a list, as `--k 1,5` is; commas inside parentheses part no names."""
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], str):
            return [part.strip() for part in _COMMA.split(texts[0])]
        return value

    def model_post_init(self, context: Any) -> None:
        if min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise ValueError(f"k is {self.k}; cut-offs must be 1 or more, each given once")
        if self.metrics is not None and (not self.metrics or len(set(self.metrics)) != len(self.metrics)):
            raise ValueError(f"metrics is {self.metrics}; name at least one, each once, or leave it out")
        self.refuse_unread_fusion()
        measured = [key for key in ("index", "run", "compare") if getattr(self, key) is not None]
        if len(measured) != 1:
            given = f"{' and '.join(measured)} are given" if measured else "nothing is given to measure"
            raise ValueError(f"{given}; give one of index, run and compare")
        if self.queries is None and self.compare is None:
            raise ValueError(f"{measured[0]} needs queries, by which it is judged; give them")
        if self.figures is not None and self.output is None:
            raise ValueError(
                f"figures is {self.figures}, and there is no page to draw them beside; name an output, or leave it out"
            )
        if self.workers != FileWorkersConfig() and (self.index is None or self.output is None or self.stages):
            raise ValueError(
                "workers are given, which only an evaluation of an index with an output and without stages has: there "
                "their parts lie; leave them out, or name index and output"
            )
        if self.stages and self.index is None:
            raise ValueError(
                f"stages is true, and only an index has stages; leave it out, or give index in place of {measured[0]}"
            )
        if self.compare is not None and (len(self.compare) < 2 or len(set(self.compare)) < len(self.compare)):
            raise ValueError(f"compare is {self.compare}; give two or more evaluations, each once")
        if self.index is None:
            for key in ("encoder", "reranker", "mode"):
                if getattr(self, key) not in (None, "dense"):
                    raise ValueError(
                        f"{key} is {getattr(self, key)!r}, which only an index needs; leave it out, or give index in "
                        f"place of {measured[0]}"
                    )


class DevQueriesConfig(QueriesConfig):
    """Judged queries to tune on, which are never the ones that are evaluated."""

    split: str = "dev"
    """Split of a BEIR folder: queries are those that qrels/<split>.tsv judges. Pairs have no splits."""


class TuneFusionConfig(RerankConfig, ModeConfig, BatchConfig):
    """`raytower tune-fusion`: the weight of a reranker, or without one that of words beside vectors."""

    reranker: str | None = None
    """Cross-encoder directory, in whose raytower.json the fusion of its scores with those of `mode` is stored; null
    tunes the weight of lexical beside dense scores, which a new version of the index holds."""
    index: str
    """The index: a folder or a URI."""
    queries: DevQueriesConfig
    """Judged queries to tune on; never those that are evaluated later."""
    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
    recall_k: int = Field(default=100, ge=1)
    """Documents that the first stage recalls for each query; all of them are reranked. Without a reranker, as many are
    candidates by vectors and as many by words."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own."""
    store: bool = True
    """Whether the fusion is stored, with the reranker or in the index; false only shows it."""

    def model_post_init(self, context: Any) -> None:
        if self.reranker is None and self.mode == "lexical":
            raise ValueError(
                "mode is lexical, and without a reranker the weight of words beside vectors is tuned; name a reranker, "
                "or leave mode out"
            )
        if self.reranker is None and self.hybrid.weight is not None:
            raise ValueError(
                f"hybrid.weight is {self.hybrid.weight}, which is what is tuned without a reranker; leave it out, or "
                "name a reranker"
            )
