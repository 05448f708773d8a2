"""Finding model directories: local paths, hub ids, and the rule that only safetensors weights are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from raytower.errors import FormatError, InputError

INFO_NAME = "raytower.json"
_HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "*/model.safetensors"]
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")

# Loading prints a progress bar and a report of new parameters; we check those ourselves and raise.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def resolve_model(name: str) -> Path:
    """Return the local directory of `name`: a path, or a hub id with an optional `@revision`.

    Raises:
        InputError: no such directory and no such hub repository, or the hub cannot be reached.
        FormatError: the directory has no config.json or no safetensors weights.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
        path = _missing(name) if looks_local or path.exists() else _download(name)
    if not (path / "config.json").is_file():
        raise FormatError(
            f"model directory {str(path)!r} has no config.json; it must be a Hugging Face directory"
        )
    if not any((path / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        pickled = [file for file in _PICKLED_WEIGHTS if (path / file).is_file()]
        found = f" (it has {pickled[0]}, and pickle is never read)" if pickled else ""
        raise FormatError(
            f"model {name!r} has no model.safetensors{found}; convert it with save_pretrained(), or for a hub model "
            f"name a revision that holds safetensors as id@revision"
        )
    return path


def _missing(name: str) -> Path:
    raise InputError(
        f"model directory {name!r} does not exist; give a directory, or a hub id like 'org/model'"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the connection, or give a local directory"
        ) from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory. Raises FormatError where it cannot be loaded as one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"model directory {str(path)!r} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise FormatError(f"the tokenizer in {str(path)!r} must be a fast one with a padding token")
    return tokenizer


def max_positions(config: Any) -> int:
    """Most tokens that a text may have for a backbone with this config; RoBERTa's kind loses two to its offset."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if not positions:
        return 1 << 20
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer") else 0
    return positions - offset


def read_info(path: Path) -> dict[str, Any]:
    """raytower.json of a directory, empty where there is none."""
    file = path / INFO_NAME
    if not file.is_file():
        return {}
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(info, dict):
        raise FormatError(f"{str(file)!r} must hold a JSON object")
    return info


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def hash_tensors(digest: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Feed names, shapes and fp32 bytes in name order, so that a re-save in another dtype keeps the hash."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)


def hash_tokenizer(digest: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Feed what the tokenizer does to a string; truncation and padding are set per call and do not count."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    digest.update(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode())


def new_digest() -> Any:
    return hashlib.sha256()


def set_num_threads(count: int) -> None:
    """Threads of torch and the tokenizers in this process; a worker holds only the cores it was given."""
    torch.set_num_threads(max(count, 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
