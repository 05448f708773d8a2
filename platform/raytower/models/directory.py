"""Model directories: found by path, hub id or storage URI; only whole safetensors weights inside of them are read.

Weights that are pickles, and configs that were made for code of a repository's own, are read from a copy in the cache.

Directories come from anywhere, so everything in them is checked before it is used, and what transformers raises about
them becomes one message.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.models.fetching import fetch_model
from raytower.models.hub_forms import native_config
from raytower.models.native_copy import CopyPlan, PickleError, native_copy
from raytower.storage import Location, StorageError
from raytower.storage.errors import one_line

INFO_NAME = "raytower.json"
_HUB_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.safetensors",
    "*/adapter_config.json",
    "*/config.json",
    "*/model.safetensors",
]
_PICKLE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_OTHER_PICKLES = ("model.pt", "model.pth")
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# What a model may be loaded from; weights of other forms are left alone.
_SUFFIXES = (".jinja", ".json", ".txt", ".model", ".safetensors")
# Modules of the peer library are computed here; others are code of a repository.
_KNOWN_MODULES = "sentence_transformers."
_LFS_POINTER = b"version https://git-lfs"
# No known backbone is as deep; a config that asks for more builds layers for minutes before weights are looked at.
_MAX_LAYERS = 1000
# Keys of config.json that do not change what a string is mapped to: names, versions, how weights are stored or
# trained, and what labels are called.
_OUTSIDE_MAP = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "problem_type",
        "sentence_transformers",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Loading prints a progress bar and a report of new parameters; we check those ourselves and raise.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def resolve_model(name: str) -> Path:
    """Return the local directory of `name`: a path, a storage URI, or a hub id with an optional `@revision`.

    Weights that are there as pickles alone (`pytorch_model.bin`), and a config that was made for code of the
    repository's own, are changed in a copy in the cache, which is then the directory.

    Raises:
        InputError: no such directory and no such hub repository, or the hub cannot be reached.
        FormatError: the directory has no config.json, no weights, damaged ones, pickles of more than tensors, or code
            of its own that no class of transformers stands for.
        StorageError: the storage cannot be reached, or the cache cannot be written.
    """
    path = _find(name)
    _refuse_pointers(path)
    _refuse_adapter(path, name)
    _refuse_own_modules(path)
    path = _in_native_form(path, name)
    body = transformer_folder(path)
    static = is_static(path)
    if not static and not (body / "config.json").is_file():
        raise FormatError(
            f"model directory {str(body)!r} has no config.json; it must be a Hugging Face directory"
        )
    tensors = [_count_tensors(file) for file in _weight_files(body, name)]
    layers = 0 if static else read_json_object(body / "config.json").get("num_hidden_layers", 0)
    if isinstance(layers, int) and layers > max(_MAX_LAYERS, sum(tensors)):
        raise FormatError(
            f"{str(body / 'config.json')!r} has num_hidden_layers {layers}, its weights are {sum(tensors)} tensors; "
            "they do not belong together"
        )
    return path


def transformer_folder(path: Path) -> Path:
    """Where a model directory keeps config.json, weights and tokenizer: at its top, or in a folder of their own.

    Older versions of the peer library wrote them into `0_Transformer`, as the first of modules.json says.
    """
    kind, place = _first_module(path)
    if kind == "StaticEmbedding":
        return place
    return place if kind == "Transformer" and not (path / "config.json").is_file() else path


def is_static(path: Path) -> bool:
    """Whether a model directory's first module is a StaticEmbedding, which has no transformer."""
    return _first_module(path)[0] == "StaticEmbedding"


def _first_module(path: Path) -> tuple[str, Path]:
    """Class name and folder of what modules.json lists first; an empty name where there is no such file."""
    file = path / "modules.json"
    modules = read_json(file) if file.is_file() else None
    first = modules[0] if isinstance(modules, list) and modules else None
    if not isinstance(first, dict):
        return "", path
    kind = str(first.get("type")).rsplit(".", 1)[-1]
    return kind, inside(path, first.get("path"), file) if kind in ("Transformer", "StaticEmbedding") else path


def _refuse_pointers(path: Path) -> None:
    """Refuse a clone without Git LFS, whose tokenizer and configs may be pointers as its weights are (`_damage`)."""
    for file in sorted({*path.glob("*"), *path.glob("*/*")}):
        if (
            file.suffix not in (".json", ".txt", ".model")
            or not file.is_file()
            or not os.access(file, os.R_OK)
        ):
            continue
        with open(file, "rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise FormatError(
                    f"{str(file)!r} is a Git LFS pointer, not the file itself; run git lfs pull in the model's "
                    "repository"
                )


def _find(name: str) -> Path:
    if "://" in name:
        place = Location.of(name)
        return place.local_path if place.is_local else fetch_model(place)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    return _missing(name) if looks_local or path.exists() else _download(name)


def _refuse_adapter(path: Path, name: str) -> None:
    """Refuse an adapter beside the weights: they alone would load, without what was trained on top of them."""
    for folder in (path, transformer_folder(path)):
        file = folder / _ADAPTER
        if file.is_file():
            raise FormatError(
                f"model {name!r} holds a LoRA adapter ({file.relative_to(path).as_posix()}); merge it into its base "
                "model (merge_and_unload() of peft) and save that"
            )


def _refuse_own_modules(path: Path) -> None:
    """Refuse a modules.json that names code of the repository's own, as jina-embeddings-v3 does (`custom_st`)."""
    file = path / "modules.json"
    for module in _listed_modules(path):
        kind = module.get("type")
        if isinstance(kind, str) and not kind.startswith(_KNOWN_MODULES):
            raise FormatError(
                f"{str(file)!r} names the module {kind!r}, which is code of the model's own and never run; "
                "known are modules of sentence-transformers"
            )


def _listed_modules(path: Path) -> list[dict[str, Any]]:
    """The entries of modules.json; none where it is missing, or no list of objects."""
    file = path / "modules.json"
    modules = read_json(file) if file.is_file() else []
    return [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []


def _in_native_form(path: Path, name: str) -> Path:
    """`path`, or its copy in the cache where weights are pickles, or its config is for code of a repository's own."""
    file = transformer_folder(path) / "config.json"
    if not file.is_file():
        return path
    config = native_config(read_json_object(file), file)
    pickled = {folder: _pickles(folder) for folder in _weight_folders(path) if not _has_safetensors(folder)}
    if config is None and not any(pickled.values()):
        return path
    plan = _plan_copy(path, pickled, {} if config is None else {file: config})
    try:
        return native_copy(plan, name)
    except PickleError as error:
        raise _as_refusal(error) from error


def _plan_copy(
    path: Path, pickled: Mapping[Path, list[Path]], written: Mapping[Path, Mapping[str, Any]]
) -> CopyPlan:
    """The copy of the directory `path` with the pickles of its folders as safetensors, and JSON files as `written`."""

    def place(file: Path) -> str:
        return file.relative_to(path).as_posix()

    pickles: dict[str, Path] = {}
    indexes: dict[str, list[str]] = {}
    for folder, files in pickled.items():
        is_whole = files == [folder / _PICKLE]
        targets = [
            place(folder / _WEIGHTS if is_whole else file.with_suffix(".safetensors")) for file in files
        ]
        pickles |= dict(zip(targets, files, strict=True))
        if files and not is_whole:
            indexes[place(folder / _WEIGHTS_INDEX)] = targets
    kept = [file for file in model_files(path) if file.name != _PICKLE_INDEX and file not in written]
    return CopyPlan(
        files={place(file): file for file in sorted(kept)},
        pickles=pickles,
        indexes=indexes,
        objects={place(file): value for file, value in written.items()},
    )


def _weight_folders(path: Path) -> list[Path]:
    """Where a directory has weights: beside config.json, and in the folders of its Dense modules."""
    file = path / "modules.json"
    dense = [module for module in _listed_modules(path) if str(module.get("type")).endswith(".Dense")]
    return [transformer_folder(path), *(inside(path, module.get("path"), file) for module in dense)]


def _has_safetensors(folder: Path) -> bool:
    return (folder / _WEIGHTS).is_file() or (folder / _WEIGHTS_INDEX).is_file()


def _pickles(folder: Path) -> list[Path]:
    """The pickled weights of a folder, in one piece or as their index names them; none where there are none."""
    files = [folder / _PICKLE] if (folder / _PICKLE).is_file() else []
    if not files and (folder / _PICKLE_INDEX).is_file():
        files = _indexed_files(folder / _PICKLE_INDEX)
    for file in files:
        if not file.is_file() or not os.access(file, os.R_OK):
            raise FormatError(f"weights {str(file)!r} {_damage(file, FileNotFoundError())}")
    return files


def _as_refusal(error: PickleError) -> RaytowerError:
    file = str(error.file)
    if error.kind == "unwritten":
        return StorageError(
            f"weights {file!r} cannot be written into the cache as safetensors: {error.reason}; make room there, or "
            "name another place with RAYTOWER_CACHE"
        )
    if error.kind == "damaged":
        return FormatError(f"weights {file!r} {_damage(error.file, Exception(error.reason))}")
    if error.kind == "memory":
        return FormatError(
            f"weights {file!r} ask for far more memory than tensors of their size take ({error.reason}); no weights "
            "are like that: download the model again, from somebody you trust"
        )
    return FormatError(
        f"weights {file!r} are a pickle of more than tensors ({error.reason}), which may run code when it is read, and "
        "is refused; convert it with save_pretrained() if you trust it, or for a hub model name a revision that holds "
        "safetensors as id@revision"
    )


def model_files(path: Path) -> Iterator[Path]:
    """What a model may be loaded from: at the top, in the folders of its modules, and where its weights are parted."""
    for folder in {path, *_module_folders(path)}:
        for file in folder.iterdir():
            if file.suffix in _SUFFIXES and not file.name.startswith(".") and file.is_file():
                yield file


def _module_folders(path: Path) -> Iterator[Path]:
    modules = path / "modules.json"
    for module in _listed_modules(path):
        if module.get("path") and inside(path, module["path"], modules).is_dir():
            yield inside(path, module["path"], modules)
    if (path / "additional_chat_templates").is_dir():
        yield path / "additional_chat_templates"
    index = path / _WEIGHTS_INDEX
    parts = read_json_object(index).get("weight_map")
    for part in set(parts.values()) if isinstance(parts, dict) else ():
        yield inside(path, part, index).parent


def _weight_files(path: Path, name: str) -> list[Path]:
    """The safetensors files of a directory, in one piece or as its index names them."""
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    index = path / _WEIGHTS_INDEX
    if not index.is_file():
        pickled = [file for file in _OTHER_PICKLES if (path / file).is_file()]
        found = (
            f" and no {_PICKLE} (it has {pickled[0]}, which is not read)" if pickled else f" and no {_PICKLE}"
        )
        raise FormatError(
            f"model {name!r} has no {_WEIGHTS}{found}; convert it with save_pretrained(), or for a hub model "
            f"name a revision that holds safetensors as id@revision"
        )
    return _indexed_files(index)


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights in parts names, sorted."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise FormatError(f"{str(index)!r} has no weight_map; download the model again")
    return [inside(index.parent, file, index) for file in sorted({str(value) for value in files.values()})]


def inside(folder: Path, name: object, named_by: Path) -> Path:
    """The file or folder `name` below `folder`. Raises FormatError where it is none, or leads outside."""
    place = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("..")
    if place.is_absolute() or ".." in place.parts:
        raise FormatError(f"{str(named_by)!r} names the path {name!r}; it must lie below the model directory")
    return folder / place


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes by the header of a safetensors file, which must be whole; no weights are read.

    Raises:
        FormatError: the file is missing, cannot be read, is cut short or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"weights {str(file)!r} {_damage(file, error)}") from error


def _count_tensors(file: Path) -> int:
    return len(tensor_shapes(file))


def _damage(file: Path, error: Exception) -> str:
    if not file.is_file():
        return "do not exist, though their index names them; download the model again"
    if not os.access(file, os.R_OK):
        return "cannot be read: permission denied; give this account the right to read them"
    with open(file, "rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "are a Git LFS pointer, not the weights; run git lfs pull in the model's repository"
    size = file.stat().st_size
    return f"are cut short or damaged ({size:,} bytes: {one_line(error)}); download the model again"


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads `what` from the directory `path` into one FormatError."""
    try:
        yield
    except (RaytowerError, MemoryError):
        raise
    except Exception as error:  # a wrong value in a file of the directory can surface as any class
        raise FormatError(
            f"model directory {str(path)!r} cannot be loaded: {what}: {type(error).__name__}: {one_line(error)}"
        ) from error


def is_sequence_classifier(architecture: str) -> bool:
    """Whether a name in `architectures` of a config.json is that of a model with a classification head."""
    return architecture.endswith("ForSequenceClassification")


def is_cross_encoder(path: Path) -> bool:
    """Whether the peer library wrote a directory as a cross-encoder, whose modules and prompts are for pairs."""
    return read_json_object(path / "config_sentence_transformers.json").get("model_type") == "CrossEncoder"


def load_weights(kind: Any, path: Path, what: str, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model in fp32 from the safetensors of a directory, and the names of the weights that it lacks, sorted.

    Args:
        kind: an Auto class of transformers.
        path: the directory.
        what: what is loaded, for messages.
        changes: what to change in the model's config.

    Raises:
        FormatError: whatever transformers raises.
    """
    with loading(path, what):
        model, report = kind.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **changes,
        )
        # A cache serves generation only; a decoder would hold keys and values of all layers during each forward pass.
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "use_cache", False):
                part.use_cache = False
    # Position ids are computed where a directory does not hold them.
    missing = [key for key in report.get("missing_keys", []) if "position_ids" not in key]
    return cast(PreTrainedModel, model), sorted(missing)


def _missing(name: str) -> Path:
    raise InputError(
        f"model directory {name!r} does not exist; give a directory, or a hub id like 'org/model'"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_PATTERNS))
        pickles = _pickle_patterns(path)
        if pickles:
            # The folder is named after the commit; a branch may have moved on since.
            snapshot_download(repository, revision=path.name, allow_patterns=pickles)
        return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the connection, or give a local directory"
        ) from error


def _pickle_patterns(path: Path) -> list[str]:
    """Pickled weights to fetch for a snapshot of the hub, for those folders alone that have no safetensors there."""
    folders = [folder for folder in _weight_folders(path) if not _has_safetensors(folder)]
    return [str(folder.relative_to(path) / "pytorch_model*.bin") for folder in folders]


def load_tokenizer(path: Path, config: Any) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory whose backbone has `config`.

    A decoder's may have no padding token; its end of text then fills batches up, which the attention mask hides.

    Raises:
        FormatError: it cannot be loaded as a fast one, or gives ids that the embedding table does not have.
    """
    with loading(path, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise FormatError(f"the tokenizer in {str(path)!r} must be a fast one with a padding token")
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = config.get_text_config().vocab_size
    if last >= rows:
        raise FormatError(
            f"the tokenizer in {str(path)!r} has {last + 1} tokens, {token!r} the last, and the embedding table "
            f"{rows} rows; resize it with resize_token_embeddings(), or give the tokenizer it was "
            "trained with"
        )
    return tokenizer


def max_positions(config: Any) -> int:
    """Most tokens that a text may have for a backbone with this config; RoBERTa's kind loses two to its offset."""
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
    if positions < 1:  # XLNet, whose positions are relative, says -1
        return 1 << 20
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer") else 0
    return positions - offset


def read_info(path: Path) -> dict[str, Any]:
    """raytower.json of a directory, empty where there is none."""
    return read_json_object(path / INFO_NAME)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file. Raises FormatError where it holds anything else."""
    value = read_json(file) if file.is_file() else {}
    if not isinstance(value, dict):
        raise FormatError(f"{str(file)!r} must hold a JSON object, not {type(value).__name__}")
    return value


def read_json(file: Path) -> Any:
    """Raises FormatError where the file cannot be read, or holds no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{str(file)!r} is not valid JSON: {error}") from error
    except OSError as error:
        raise FormatError(f"{str(file)!r} cannot be read: {one_line(error)}") from error


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file that others may read as the umask allows; the library itself writes 0600."""
    file.unlink(missing_ok=True)
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file)
    file.chmod(mode)


def save_pretrained(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a backbone with its tokenizer, weights as safetensors with the permissions of the other files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def digest_of(tensors: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A running hash over weights and tokenizer. Numbers of positions are none of the weights."""
    digest = new_digest()
    _hash_tensors(
        digest, {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    )
    _hash_tokenizer(digest, tokenizer)
    return digest


def _hash_tensors(digest: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Feed names, shapes and fp32 bytes in name order, so that a re-save in another dtype keeps the hash."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)


def _hash_tokenizer(digest: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Feed what the tokenizer does to a string; truncation and padding are set per call and do not count."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    digest.update(json.dumps(rules, sort_keys=True, ensure_ascii=False).encode())


def hash_config(digest: Any, config: Any) -> None:
    """Feed what config.json does to a string: the kind of backbone, and what differs from that kind's defaults.

    Defaults are left out, so that a newer transformers, which writes down more of them, keeps the hash.
    """
    values = json.loads(config.to_json_string(use_diff=False))
    try:
        defaults = json.loads(type(config)().to_json_string(use_diff=False))
    except Exception:  # a kind whose parts have no defaults
        defaults = {}
    chosen = {
        key: value
        for key, value in values.items()
        if key not in _OUTSIDE_MAP and (key not in defaults or defaults[key] != value)
    }
    digest.update(json.dumps([config.model_type, chosen], sort_keys=True).encode())


def new_digest() -> Any:
    return hashlib.sha256()


def set_num_threads(count: int) -> None:
    """Threads of torch and the tokenizers in this process; a worker holds only the cores it was given."""
    torch.set_num_threads(max(count, 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
