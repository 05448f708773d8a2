"""Configs of `raytower mine`, `classify` and `similarity`."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from raytower.config import Config, OnError
from raytower.data.config import InputConfig
from raytower.retrieval.config import BatchConfig, RerankConfig

FileType = Literal["tsv", "jsonl"]
Sampling = Literal["random", "top", "score"]
_OF_RETRIEVAL = ("encoder", "index", "label_field", "temperature", "query_prefix")


class ScreenConfig(Config):
    """A cross-encoder that tells likely positives among the candidates, as RocketQA's denoising (Qu et al. 2021)."""

    shorthand: ClassVar = "reranker"

    reranker: str
    """Cross-encoder: a directory, a hub id or a URI."""
    margin: float = 0.0
    """Drop candidates whose logit is not this far below that of the pair's own document."""
    max_probability: float | None = Field(default=None, gt=0, lt=1)
    """Drop candidates whose logit gives this probability or more, by the logistic function; RocketQA took 0.1."""

    def limit(self, own_logit: float) -> float:
        """A candidate passes with a logit below this, given the logit of the pair's own document."""
        limit = own_logit - self.margin
        if self.max_probability is None:
            return limit
        return min(limit, math.log(self.max_probability / (1 - self.max_probability)))


class MineConfig(RerankConfig, BatchConfig):
    """`raytower mine`. Ranks count from 1 in the order of recall, known positives included."""

    renamed: ClassVar = {"depth": "recall_k", "kind": "format"}

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    index: str
    """The index: a folder or a URI."""
    input: InputConfig
    """Training pairs."""
    output: str
    """File of rows with negatives."""
    format: Literal["triples", "scored", "candidates"] = "triples"
    """Kind of the rows that are written, as train.format reads them."""
    file_type: FileType = "tsv"
    """Candidates are written as jsonl alone: their lists do not fit a TSV."""
    teacher: str | None = None
    """Cross-encoder directory or hub id whose logits are the labels or scores; null: 1 for the pair's own, else 0."""
    recall_k: int = Field(default=50, ge=1)
    """Documents that the first stage recalls for each query; negatives are sampled among them."""
    skip_top: int = Field(default=0, ge=0)
    """Best ranks that are never taken: where positives are sparsely labelled, these are often unlabelled ones."""
    num_negatives: int = Field(default=1, ge=1)
    """Sampled for each pair, without replacement; fewer where fewer remain."""
    sampling: Sampling = "random"
    """Which of the candidates that are left: any by chance, the nearest, or by chance the nearer the likelier."""
    sampling_temperature: float = Field(default=0.05, gt=0)
    """Sampling by score: a candidate's chance grows with exp(score / sampling_temperature)."""
    max_score_ratio: float | None = Field(default=None, gt=0)
    """Drop candidates that score above this share of the pair's own document: likely positives. 0.95 is usual."""
    max_score_margin: float | None = None
    """Drop candidates that score less than this below the pair's own document; 0.05 is usual of cosines."""
    screen: ScreenConfig | None = None
    """A cross-encoder that drops what it takes for positives, of those that are drawn; null screens none."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    @field_validator("format", mode="before")
    @classmethod
    def _refuse_file_type(cls, value: Any) -> Any:
        if value in get_args(FileType):
            raise ValueError(
                "it is the kind of rows now (triples, scored or candidates); the type of the file is called 'file_type'"
            )
        return value

    def model_post_init(self, context: Any) -> None:
        if self.sampling != "score" and self.sampling_temperature != _default(self, "sampling_temperature"):
            raise ValueError(
                f"sampling_temperature is {self.sampling_temperature}, which sampling {self.sampling} does not read; "
                "leave it out, or set sampling to score"
            )
        if self.skip_top + self.num_negatives > self.recall_k:
            raise ValueError(
                f"skip_top {self.skip_top} and num_negatives {self.num_negatives} need more than recall_k "
                f"{self.recall_k}; raise recall_k"
            )
        if self.format == "candidates" and self.file_type != "jsonl":
            raise ValueError(
                f"format is candidates, whose lists of documents do not fit file_type {self.file_type}; set file_type "
                "to jsonl"
            )
        if self.teacher is not None and self.format == "triples":
            raise ValueError(
                f"teacher is {self.teacher!r}, but triples hold no scores; set format to candidates or scored, or "
                "teacher to null"
            )


class ClassifyConfig(BatchConfig):
    """`raytower classify`. Modes labels and votes need `encoder` and `index`, mode classifier needs `classifier`.

    A document's label is its `label_field` where it has one; in mode labels else its text.
    """

    renamed: ClassVar = {"format": "file_type"}

    encoder: str | None = None
    """Modes labels and votes: a directory, a hub id or a URI."""
    index: str | None = None
    """Modes labels and votes: an index of label texts, or of labelled texts."""
    classifier: str | None = None
    """Mode classifier: a directory that train-classifier wrote, or any Hugging Face text classifier."""
    input: InputConfig
    """Texts to label."""
    output: str
    """File of texts with labels."""
    mode: Literal["labels", "votes", "classifier"] = "labels"
    """By the nearest label text, by votes of labelled texts, or by a trained classifier."""
    labelled: bool = True
    """Whether the input holds labels to compare with (`text <tab> label`); false reads texts alone."""
    label_field: str = "label"
    """Column of a document that holds its label; in mode labels its text is the label where it has none."""
    k: int = Field(default=10, ge=1)
    """Modes labels and classifier: labels listed in JSON lines. Mode votes: neighbours that vote."""
    temperature: float = Field(default=0.05, gt=0)
    """Mode votes: a neighbour's vote weighs exp(score / temperature); small trusts the nearest, large counts heads."""
    file_type: FileType = "tsv"
    """Type of the file that is written."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap that intervals come from."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        by_classifier = self.mode == "classifier"
        needed, unread = (
            (("classifier",), _OF_RETRIEVAL) if by_classifier else (("encoder", "index"), ("classifier",))
        )
        for key in needed:
            if getattr(self, key) is None:
                other = "labels or votes" if by_classifier else "classifier"
                raise ValueError(
                    f"mode {self.mode} needs {key}, which is not given; set it, or set mode to {other}"
                )
        for key in unread:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, which mode {self.mode} does not read; leave it out, or set "
                    "another mode"
                )


class SimilarityConfig(BatchConfig):
    """`raytower similarity`. Prefixes null are the encoder's own: the first text a query, the second a document.

    Where both texts are of one kind (two questions) and the encoder has prefixes, set both to the same one.
    """

    renamed: ClassVar = {"format": "file_type"}

    encoder: str
    """Encoder: a directory, a hub id or a URI."""
    input: InputConfig
    """Pairs of texts."""
    output: str
    """File of pairs with their cosines."""
    labelled: bool = True
    """Whether the input holds labels (`query title label`); false reads pairs alone."""
    threshold: float = Field(default=0.8, ge=-1, le=1)
    """A pair counts as similar from this cosine on."""
    file_type: FileType = "tsv"
    """Type of the file that is written."""
    query_prefix: str | None = None
    """Put before the first text; null is the encoder's own prompt for queries."""
    document_prefix: str | None = None
    """Put before the second text; null is the encoder's own prompt for documents."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""


def _default(config: Config, name: str) -> Any:
    return type(config).model_fields[name].default


AnnotationConfig = MineConfig | ClassifyConfig | SimilarityConfig
