"""A generation: the one immutable document of what a collection serves, and the only thing that changes at run time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from raytower.annotation.classify_settings import ClassifySettings
from raytower.index.search_config import HybridWay
from raytower.models.compute import EngineChoice, EngineDtype
from raytower.models.search_mode import SearchMode

# The collection of a server that was given one index.
DEFAULT_COLLECTION = "default"
# Labels that are ranked for a text at most.
MOST_LABELS = 1_000


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelEntry(_Document):
    """A model: where it lies, and the fingerprint of its weights."""

    uri: str
    fingerprint: str


class FusionEntry(_Document):
    """The constants of `raytower.models.fusion.Fusion`."""

    weight: float
    recall_mean: float
    recall_std: float
    rerank_mean: float
    rerank_std: float
    mode: SearchMode = "dense"


class HybridEntry(_Document):
    """The constants of `raytower.index.hybrid.HybridFusion`."""

    way: HybridWay = "standardised"
    weight: float = 0.3


class ComputeEntry(_Document):
    """How the models compute. None of a length is the model's own limit."""

    engine: EngineChoice = "torch"
    dtype: EngineDtype = "float32"
    max_length: int | None = None
    rerank_max_length: int | None = None


class Generation(_Document):
    """Index version, encoder, reranker, classifier, fusion, modes and prefixes of one collection.

    Two generations with one `id` give the same answers. Models are shared between generations by their entries and
    `compute`.
    """

    collection: str
    index: str
    """The index: an absolute path or a URI."""
    index_version: str
    manifest_sha256: str
    encoder: ModelEntry
    reranker: ModelEntry | None = None
    classifier: ModelEntry | None = None
    fusion: FusionEntry | None = None
    modes: tuple[SearchMode, ...] = ("dense",)
    """How the index can be searched; the first is what a search takes that asks for none."""
    hybrid: HybridEntry = HybridEntry()
    query_prefix: str = ""
    document_prefix: str = ""
    document_max_length: int | None = None
    """Tokens that documents were cut to when the index was made; None is the encoder's limit."""
    label_field: str = "label"
    """Column of a document that holds its label, for classification by votes or by label texts."""
    classify_modes: tuple[Literal["labels", "votes", "classifier"], ...] = ()
    classify_settings: tuple[ClassifySettings, ...] = ()
    """As tune-classify found them, of one way each."""
    num_labels: int = 0
    """With label texts: how many labels the index has, counted up to MOST_LABELS."""
    compute: ComputeEntry = ComputeEntry()

    def settings_of(self, mode: str) -> ClassifySettings | None:
        """The tuned settings of a way to classify."""
        return next((each for each in self.classify_settings if each.mode == mode), None)

    @property
    def id(self) -> str:
        """12 hexadecimal digits over everything that the generation says."""
        return _id_of(self)


def needs_no_encoder(mode: SearchMode, classify_modes: Iterable[str]) -> bool:
    """Whether a collection that searches so by default, and labels texts so, encodes nothing unless it is asked to."""
    return mode == "lexical" and not {"labels", "votes"} & set(classify_modes)


# Every request asks; a cached property would go along into copies with other values.
@lru_cache(maxsize=256)
def _id_of(generation: Generation) -> str:
    return hashlib.sha256(generation.model_dump_json().encode()).hexdigest()[:12]
