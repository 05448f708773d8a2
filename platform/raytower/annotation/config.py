"""Configs of `raytower mine`, `classify`, `tune-classify` and `similarity`."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, field_validator

from raytower.annotation.classify_settings import VoteKind
from raytower.config import Config, OnError
from raytower.data.config import InputConfig
from raytower.data.plain_labels import plain_label
from raytower.retrieval.config import BatchConfig, FileWorkersConfig, ModeConfig, RerankConfig

FileType = Literal["tsv", "jsonl"]
Label = Annotated[str, AfterValidator(plain_label)]  # in the form that rows bring theirs in
Sampling = Literal["random", "top", "score"]
_OF_RETRIEVAL = ("encoder", "index", "label_field", "votes", "temperature", "query_prefix")


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


class MineConfig(RerankConfig, ModeConfig, BatchConfig):
    """`raytower mine`. Ranks count from 1 in the order of recall, known positives included."""

    renamed: ClassVar = {"depth": "recall_k", "kind": "format"}

    encoder: str | None = None
    """Encoder: a directory, a hub id or a URI; null is the one that the index names."""
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
    """Sampling by score: a candidate's chance grows with exp(score / sampling_temperature); 0.05 fits cosines,
    and scores of the modes lexical and hybrid are larger."""
    max_score_ratio: float | None = Field(default=None, gt=0)
    """Drop candidates that score above this share of the pair's own document: likely positives. 0.95 is usual. By the
    scores of vectors, in mode hybrid too; mode lexical has none."""
    max_score_margin: float | None = None
    """Drop candidates that score less than this below the pair's own document; 0.05 is usual of cosines.
    By the scores of vectors too."""
    screen: ScreenConfig | None = None
    """A cross-encoder that drops what it takes for positives, of those that are drawn; null screens none."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that mine side by side."""
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
        self.refuse_unread_fusion()
        for name in ("max_score_ratio", "max_score_margin"):
            if self.mode == "lexical" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which compares scores of vectors, and mode lexical has none; "
                    f"set mode to hybrid, or {name} to null"
                )
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
    votes: VoteKind = "similarity"
    """Mode votes: what a neighbour's vote weighs. similarity: exp(score / temperature); uniform: 1; rank: 1 / rank."""
    temperature: float = Field(default=0.05, gt=0)
    """Mode votes by similarity: small trusts the nearest, large counts heads."""
    tuned: str | None = None
    """File that tune-classify wrote: votes, k and temperature, chances in place of scores, cut and threshold are as it
    found them; null takes those of this config."""
    positive: Label | None = None
    """Of two classes the one that is looked for: its average precision, and precision, recall and F1; null has none."""
    cut: float | None = None
    """With `positive`: the score from which on a text gets that label; null gives it where it is the first one."""
    abstain_below: float | None = None
    """A text whose first label scores less gets none (an empty cell, null in JSON lines); null labels all."""
    explain: bool = False
    """Whether each text gets the words that decide its label: those without which it scores lower. A text is labelled
    once for each of its words, of a long one for each of 64 parts."""
    suspects: str | None = None
    """Mode votes, over an index of the very rows of the input: file of rows whose label their neighbours contradict.
    Documents with the text of a row do not vote on it; null writes none."""
    suspect_share: float = Field(default=0.02, ge=0, lt=0.5)
    """A label with at most this share of the votes is suspected."""
    report: str | None = None
    """File of an HTML page of the figures, of labelled input: confusion and figures of each label, reliability,
    coverage; null writes none."""
    plots: str | None = None
    """Folder that gets each plot of the page as an SVG file; null writes none."""
    file_type: FileType = "tsv"
    """Type of the file that is written."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap that intervals come from."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that label side by side."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        _check_mode(self, _OF_RETRIEVAL)
        self._check_tuned()
        self._check_suspects()
        for key in ("report", "plots"):
            if getattr(self, key) is not None and not self.labelled:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r} and labelled is false: figures come from labels to compare with; "
                    "leave it out, or give labelled input"
                )

    def _check_tuned(self) -> None:
        if self.cut is not None and self.positive is None:
            raise ValueError(
                f"cut is {self.cut}, and no class is named that it is for; set positive, or leave cut out"
            )
        for key in ("votes", "temperature", "cut") if self.tuned is not None else ():
            if getattr(self, key) != _default(self, key):
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, and tuned is {self.tuned!r}, which holds it too; leave one of "
                    "the two out"
                )

    def _check_suspects(self) -> None:
        if self.suspects is None:
            return
        if self.mode != "votes" or not self.labelled:
            raise ValueError(
                f"suspects is {self.suspects!r}, mode {self.mode} and labelled {str(self.labelled).lower()}: labels "
                "are suspected by the votes of other texts; set mode to votes and labelled to true, or suspects to null"
            )
        if self.suspects == self.output:
            raise ValueError(f"suspects and output are both {self.output!r}; name two files")


class TuneClassifyConfig(BatchConfig):
    """`raytower tune-classify`: what classify needs to know of scores, found on dev rows. Keys as those of classify."""

    encoder: str | None = None
    """Modes labels and votes: a directory, a hub id or a URI."""
    index: str | None = None
    """Modes labels and votes: an index of label texts, or of labelled texts."""
    classifier: str | None = None
    """Mode classifier: a directory that train-classifier wrote, or any Hugging Face text classifier."""
    input: InputConfig
    """Labelled rows to tune on (`text <tab> label`); never those that are measured later."""
    output: str
    """JSON file of what was found, for `tuned` of classify and `classify_tuned` of serve."""
    mode: Literal["labels", "votes", "classifier"] = "labels"
    """By the nearest label text, by votes of labelled texts, or by a trained classifier."""
    label_field: str = "label"
    """Column of a document that holds its label; in mode labels its text is the label where it has none."""
    metric: Literal["accuracy", "f1_macro"] = "accuracy"
    """Mode votes: what the kind of votes, k and temperature are chosen by; f1_macro counts rare labels as much as
    common ones."""
    max_k: int = Field(default=50, ge=1)
    """Mode votes: most neighbours that may vote. Else: labels that are ranked, among which chances are shared out."""
    calibration: Literal["auto", "temperature", "isotonic", "none"] = "auto"
    """How scores become chances that the first label is right: by one number, or by a rising function, which wants some
    thousand rows; auto takes the better one on rows that it was not fitted on, none leaves scores as they are."""
    positive: Label | None = None
    """Of two classes the one that is looked for; the cut with its best F1 is found. Null has none."""
    min_accuracy: float | None = Field(default=None, gt=0, le=1)
    """Find the threshold below which texts get no label, so that of the others this share is right; null labels all."""
    folds: int = Field(default=5, ge=2)
    """Parts of the rows; calibration is measured on each by what was fitted on the others."""
    query_prefix: str | None = None
    """Put before each query when it is encoded; null is the encoder's own prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        _check_mode(self, ("encoder", "index", "label_field", "query_prefix"))


class SimilarityConfig(RerankConfig, BatchConfig):
    """`raytower similarity`, by an encoder or by a reranker.

    Prefixes are an encoder's alone; null are its own: the first text a query, the second a document.

    Where both texts are of one kind (two questions) and the encoder has prefixes, set both to the same one.
    """

    renamed: ClassVar = {"format": "file_type"}

    encoder: str | None = None
    """Encoder whose cosines are the scores: a directory, a hub id or a URI; null where a reranker scores."""
    reranker: str | None = None
    """Cross-encoder directory or hub id that scores the pairs; null where an encoder does."""
    input: InputConfig
    """Pairs of texts."""
    output: str
    """File of pairs with their scores."""
    labelled: bool = True
    """Whether the input holds labels (`query title label`); false reads pairs alone."""
    threshold: float | None = None
    """A pair counts as similar from this score on; null is a cosine of 0.8, a reranker's probability of 0.5, or a logit
    of 0 of one that puts no sigmoid on it."""
    file_type: FileType = "tsv"
    """Type of the file that is written."""
    query_prefix: str | None = None
    """Put before the first text; null is the encoder's own prompt for queries."""
    document_prefix: str | None = None
    """Put before the second text; null is the encoder's own prompt for documents."""
    workers: FileWorkersConfig = FileWorkersConfig()
    """Processes that score side by side."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        if (self.encoder is None) == (self.reranker is None):
            given = "neither is" if self.encoder is None else "both are"
            raise ValueError(
                f"encoder and reranker are two ways to score a pair, and {given} given; name one of them"
            )
        if self.encoder is not None and self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(
                f"threshold is {self.threshold:g}; a cosine lies between -1 and 1, and so must it"
            )
        prefixes = {"query_prefix": self.query_prefix, "document_prefix": self.document_prefix}
        given_prefix = next((name for name, value in prefixes.items() if value is not None), None)
        if self.reranker is not None and given_prefix is not None:
            raise ValueError(
                f"{given_prefix} is given, which only an encoder reads; leave it out (a reranker's prompts stand in "
                "its directory)"
            )


def _default(config: Config, name: str) -> Any:
    return type(config).model_fields[name].default


AnnotationConfig = MineConfig | ClassifyConfig | SimilarityConfig


def _check_mode(config: ClassifyConfig | TuneClassifyConfig, of_retrieval: tuple[str, ...]) -> None:
    """Raises ValueError where a mode lacks a key, or is given one, of `of_retrieval` say, that it does not read."""
    by_classifier = config.mode == "classifier"
    needed, unread = (
        (("classifier",), of_retrieval) if by_classifier else (("encoder", "index"), ("classifier",))
    )
    for key in needed:
        if getattr(config, key) is None:
            other = "labels or votes" if by_classifier else "classifier"
            raise ValueError(
                f"mode {config.mode} needs {key}, which is not given; set it, or set mode to {other}"
            )
    for key in unread:
        if getattr(config, key) != _default(config, key):
            raise ValueError(
                f"{key} is {getattr(config, key)!r}, which mode {config.mode} does not read; leave it out, or set "
                "another mode"
            )
