"""Config of `raytower rerank`; that of `raytower search` is retrieval's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from raytower.config import FractionField, OnError
from raytower.data.config import InputConfig
from raytower.retrieval.config import BatchConfig, FileWorkersConfig, RankedFileType


class RerankFileConfig(BatchConfig):
    """`raytower rerank`: candidates of queries, scored and sorted by a reranker."""

    renamed: ClassVar = {"format": "file_type"}

    reranker: str
    """Cross-encoder directory or hub id that scores each query with its candidates."""
    input: InputConfig
    """Rows `query <tab> candidate [<tab> recall score]` without a header, or with those names as columns or keys; the
    rows of a query stand together. What `raytower search --input` writes is such a file."""
    output: str
    """File of the sorted candidates: `query <tab> text <tab> score` without a header, or as file_type says."""
    file_type: RankedFileType | None = None
    """Type of the file that is written; null goes by its ending: .tsv or .txt, .jsonl, .parquet, .trec."""
    k: int = Field(default=10, ge=1)
    """Candidates of a query that are written, the best ones; all are scored."""
    fusion_weight: FractionField | None = None
    """Weight of the rerank score beside the recall scores of the input; null is the weight stored with the reranker
    where the input has recall scores, and else the rerank score alone orders."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a (query, candidate) pair; null is the reranker's own limit."""
    rows_per_batch: int = Field(default=4096, ge=1)
    """Pairs in flight at once."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that score side by side."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""
