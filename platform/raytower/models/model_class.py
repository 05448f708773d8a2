"""Whether a model directory holds an encoder, a reranker or a text classifier, as its JSON files say.

As the wrong one a model loads without a word: a reranker as an encoder loses its head, a classifier of two labels as a
reranker scores pairs that it never saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from raytower.errors import FormatError
from raytower.models.directory import (
    is_cross_encoder,
    is_sequence_classifier,
    read_info,
    read_json_object,
    transformer_folder,
)

ModelClass = Literal["encoder", "reranker", "classifier"]
INFO_KEY = "model_class"
"""Under it raytower.json states the class of what has a head."""
_CLASSES: tuple[ModelClass, ...] = ("encoder", "reranker", "classifier")
_TRAINED_BY = {"encoder": "train-retriever", "reranker": "train-reranker", "classifier": "train-classifier"}
_AS_ENCODER = ", and as one it would lose its head and give vectors that it was never trained for"


def possible_classes(path: Path) -> tuple[ModelClass, ...]:
    """What a resolved directory may be: one class, or those between which its files do not decide.

    A head of one label is a reranker's, of three and more a classifier's. Two labels may be either's, unless
    raytower.json or the files of sentence-transformers tell. A causal language model may be an encoder or a reranker,
    and what names no architecture anything.
    """
    stated = read_info(path).get(INFO_KEY)
    if stated in _CLASSES:
        return (stated,)
    if is_cross_encoder(path):
        return ("reranker",)
    config = read_json_object(transformer_folder(path) / "config.json")
    names = _architectures(config)
    if any(name.endswith("ForCausalLM") for name in names) and not (path / "modules.json").is_file():
        return ("encoder", "reranker")
    if not names and not (path / "modules.json").is_file():
        return _CLASSES
    if (path / "modules.json").is_file() or not any(map(is_sequence_classifier, names)):
        return ("encoder",)
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if num_labels == 2:
        return ("reranker", "classifier")
    return ("reranker",) if num_labels == 1 else ("classifier",)


def refuse_other_class(path: Path, wanted: ModelClass) -> None:
    """Raises FormatError where a resolved directory cannot be what is wanted, with its class and the key for it."""
    found = possible_classes(path)
    if wanted in found:
        return
    names = _architectures(read_json_object(transformer_folder(path) / "config.json"))
    what = " or ".join(f"{'an' if name == 'encoder' else 'a'} {name}" for name in found)
    keys = " or ".join(f"`{name}`" for name in found)
    article = "an" if wanted == "encoder" else "a"
    raise FormatError(
        f"{str(path)!r} is {what}{f' ({names[0]})' if names else ''}: it is no {wanted}"
        f"{_AS_ENCODER if wanted == 'encoder' else ''}; commands take it by the key {keys}. Name {article} {wanted} "
        f"here, or train one of it with `raytower {_TRAINED_BY[wanted]}`"
    )


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []
