"""Prefixes that families of encoders were trained with, where their directories do not hold them as prompts.

Sources: the model cards of intfloat's e5 and multilingual-e5 ("Text Embeddings by Weakly-Supervised Contrastive
Pre-training", 2022; "Multilingual E5 Text Embeddings", 2024) and of BAAI's bge ("C-Pack: Packed Resources For General
Chinese Embeddings", 2023).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from raytower.models.directory import INFO_NAME, read_json_object
from raytower.models.encoder import Encoder
from raytower.progress import log

Role = Literal["query", "document"]


@dataclass(frozen=True, kw_only=True)
class TrainedPrefixes:
    """What stood before each text of a role in training; empty where nothing did."""

    family: str
    query: str
    document: str = ""


_E5 = TrainedPrefixes(family="e5", query="query: ", document="passage: ")
_E5_INSTRUCT = TrainedPrefixes(family="e5 instruct", query="Instruct: <the task in one sentence>\nQuery: ")
_BGE_ZH = TrainedPrefixes(family="bge zh", query="为这个句子生成表示以用于检索相关文章：")
_BGE_EN = TrainedPrefixes(family="bge en", query="Represent this sentence for searching relevant passages: ")
# By the whole name of a model: `my-e5-base` may have been trained otherwise.
_FAMILIES: tuple[tuple[str, TrainedPrefixes], ...] = (
    (r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?", _E5),
    (r"multilingual-e5-large-instruct|e5-mistral-7b-instruct", _E5_INSTRUCT),
    (r"bge-(small|base|large)-zh(-v1\.5)?", _BGE_ZH),
    (r"bge-(small|base|large)-en(-v1\.5)?", _BGE_EN),
)
# Between the parts of a path and of a hub id, and of the folder that a cache of the hub makes of one.
_BETWEEN = re.compile(r"[/\\@]|--")
_ORGANISATION = re.compile("^(intfloat|baai)_")


def trained_prefixes(names: Iterable[str]) -> TrainedPrefixes | None:
    """The prefixes of the family that one of `names` (a hub id, a path, a URI) belongs to; None of any other."""
    parts = {_ORGANISATION.sub("", part.lower()) for name in names for part in _BETWEEN.split(name)}
    return next(
        (
            found
            for pattern, found in _FAMILIES
            if any(re.fullmatch(pattern, part) is not None for part in parts)
        ),
        None,
    )


def own_prefix(encoder: Encoder, role: Role, name: str) -> str:
    """The prompt that the encoder `name` puts before texts of `role`; warns where its family had one it lacks."""
    folder = str(getattr(encoder.backbone.config, "_name_or_path", ""))
    say_untold_prefix(role, name, folder, encoder.prompts)
    return encoder.prefix_for(role)


def say_untold_prefix(role: Role, name: str, folder: str | Path, prompts: Mapping[str, str]) -> None:
    """Warn, once in a process, where texts of `role` go without the prefix that their encoder was trained with.

    Args:
        role: of the texts, for which no prefix is configured.
        name: the encoder, as it was named.
        folder: where its config.json lies, which may hold the name that it had where it was trained.
        prompts: what its directory holds; whoever wrote some there has decided.
    """
    # raytower.json: it was trained or exported here, with the prefixes that were configured.
    if prompts or (Path(folder) / INFO_NAME).is_file():
        return
    origin = read_json_object(Path(folder) / "config.json").get("_name_or_path")
    found = trained_prefixes([name, str(folder), str(origin)])
    if found is not None and getattr(found, role):
        _say_once(name, found)


@cache
def _say_once(name: str, found: TrainedPrefixes) -> None:
    behind = f"queries behind {found.query!r}"
    if found.document:
        behind += f" and documents behind {found.document!r}"
    keys = "query_prefix and document_prefix (encode: prefix)" if found.document else "query_prefix"
    log(
        f"warning: encoder {name!r} holds no prompts, and its family ({found.family}) was trained with {behind}; texts "
        f"go without it until prompts of its config_sentence_transformers.json say it, or, for the encoder that a job "
        f"is about, {keys}"
    )
