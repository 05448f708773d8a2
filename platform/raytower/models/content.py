"""What a model directory holds, as one hash: of the files as they lie there, whoever wrote them.

The fingerprint names what a loaded model maps a text to, and raytower.json only says what it was when the directory
was written. This hash reads the files themselves and loads no model, so it tells weights that were edited since.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytower.models.directory import (
    INFO_NAME,
    model_files,
    new_digest,
    read_info,
    read_json_object,
    resolve_model,
)
from raytower.storage import Location, known_sha256

# The texts that transformers' tokenizers are read from.
_VOCABULARIES = frozenset({"vocab.txt", "merges.txt", "dict.txt"})
# Keys of config.json that say where the model came from and how it was written, at any depth.
_OUTSIDE_CONTENT = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


def hash_model(name: str) -> str:
    """Hash over weights, config.json, tokenizer and modules of a directory, hub id or URI; a copy has the same one.

    Of config.json paths, dtype and versions are left out, of raytower.json all but the length of its texts. Weights
    are read in pieces, and large local files once (`known_sha256`).

    Raises:
        InputError, FormatError: as `resolve_model`.
    """
    path = resolve_model(name)
    digest = new_digest()
    for file in sorted(filter(_is_read, model_files(path))):
        content = (
            _described(read_json_object(file))
            if file.name == "config.json"
            else known_sha256(Location.of(file))
        )
        digest.update(json.dumps([file.relative_to(path).as_posix(), content], sort_keys=True).encode())
    digest.update(json.dumps(read_info(path).get("max_length")).encode())
    return str(digest.hexdigest())


def _is_read(file: Path) -> bool:
    """Whether a model is loaded from this one of `model_files`: of texts, only vocabularies are no words about it."""
    return file.name != INFO_NAME and (file.suffix != ".txt" or file.name in _VOCABULARIES)


def _described(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _described(value) for key, value in values.items() if key not in _OUTSIDE_CONTENT}
    return [_described(value) for value in values] if isinstance(values, list) else values
