"""The config of `raytower refresh`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raytower.config import Config
from raytower.data.config import InputConfig
from raytower.evaluation.config import DevQueriesConfig

# What each round sets itself, by the section whose other keys a config may set.
SET_BY_ROUNDS = {
    "training": ("model", "init_from", "train", "output"),
    "encoding": ("encoder", "input", "output"),
    "indexing": ("embeddings", "output"),
    "mining": ("encoder", "index", "input", "output", "format", "file_type"),
}


class RefreshConfig(Config):
    """`raytower refresh`. Round 0 measures the encoder as it is and mines with it; each round after it trains one."""

    model: str
    """The encoder to begin with: a directory, a hub id or a URI."""
    train: InputConfig
    """Training pairs; each round mines negatives for them anew."""
    corpus: InputConfig
    """Documents to encode and index, among which negatives are found."""
    queries: DevQueriesConfig
    """Judged queries by which rounds are compared. The best round is chosen by them: measure it on others."""
    output: str
    """Folder of the rounds."""
    rounds: int = Field(default=3, ge=1)
    """Most rounds of training."""
    metric: str = "ndcg@10"
    """By which metric rounds are compared: recall@k, hit@k, mrr@k, ndcg@k, or one of ir-measures."""
    patience: int = Field(default=1, ge=1)
    """Stops after this many rounds in a row that are not better than the best by more than chance."""
    continued: bool = False
    """Whether a round goes on with the weights of the round before; false begins each with those of model."""
    training: dict[str, Any] = Field(default={})
    """Other keys of train-retriever, such as {batch_size: 64, epochs: 1}."""
    encoding: dict[str, Any] = Field(default={})
    """Other keys of encode."""
    indexing: dict[str, Any] = Field(default={})
    """Other keys of index build."""
    mining: dict[str, Any] = Field(default={"num_negatives": 4, "max_score_ratio": 0.95})
    """Other keys of mine."""

    def model_post_init(self, context: Any) -> None:
        for section, names in SET_BY_ROUNDS.items():
            for name in names:
                if name in getattr(self, section):
                    raise ValueError(f"{section} has {name!r}, which each round sets itself; leave it out")
