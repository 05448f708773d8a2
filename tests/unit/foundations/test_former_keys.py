"""Keys that were renamed: an old one is refused with its name of now, in every command that had it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, load_config, make_config
from raytower.errors import InputError
from raytower.index.build import _identity
from raytower.index.config import IndexBuildConfig
from raytower.index.manifest import Origin

# Old key → new key, and the commands that had it.
_ANNOTATING = ("evaluate", "mine", "classify", "similarity")
RENAMED = [
    ("compute.engine", "engine", ("encode",)),
    ("compute.dtype", "dtype", ("encode", "search", *_ANNOTATING)),
    ("compute.tokens_per_batch", "tokens_per_batch", ("encode", "search", *_ANNOTATING)),
    ("compute.max_length", "max_length", ("search", *_ANNOTATING)),
    ("compute.rerank_max_length", "rerank_max_length", ("search", "evaluate", "mine")),
    ("compute.rows_per_batch", "rows_per_batch", _ANNOTATING),
    ("dtype", "graph_dtype", ("export",)),
    ("rerank_k", "recall_k", ("search", "evaluate", "demo")),
    ("full", "sample", ("demo",)),
    ("depth", "recall_k", ("mine",)),
    ("kind", "format", ("mine",)),
    ("format", "file_type", ("classify", "similarity", "search", "rerank")),
    ("placement", "layout", ("serve",)),
    ("path", "input.path", ("index delete", "index set")),
    ("recall", "target.recall", ("index compact", "index convert")),
    ("recall_k", "target.k", ("index compact", "index convert")),
    ("memory", "target.memory", ("index compact", "index convert")),
]
CASES = [(command, old, new) for old, new, commands in RENAMED for command in commands]


def config_of(command: str) -> type[Config]:
    found: type[Config] = find_reference(COMMANDS[command].config)
    return found


def nested(key: str, value: object) -> dict[str, object]:
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize(("command", "old", "new"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_former_key_is_refused_with_its_name_of_now(
    command: str, old: str, new: str, tmp_path: Path
) -> None:
    message = f"unknown key '{old}': it is called '{new}' now"
    with pytest.raises(InputError) as raised:
        load_config(config_of(command), None, {old: "8"})
    assert str(raised.value) == f"the command line: {message}"
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(nested(old, 8)))
    with pytest.raises(InputError) as raised:
        load_config(config_of(command), file)
    assert str(raised.value) == f"config file '{file}': {message}"
    # The name of now is known: what is missing besides is another message.
    with pytest.raises(InputError) as raised:
        load_config(config_of(command), None, {new: "null"})
    assert "unknown key" not in str(raised.value)


@pytest.mark.parametrize("file_type", ["tsv", "jsonl"])
def test_a_key_with_another_meaning_names_what_it_was(file_type: str) -> None:
    """mine had `kind` for what train.format means and `format` for the type of the file."""
    given = {"encoder": "e", "index": "i", "input.path": "p", "output": "o", "format": file_type}
    with pytest.raises(InputError) as raised:
        load_config(config_of("mine"), None, given)
    assert f"format is '{file_type}': it is the kind of rows now" in str(raised.value)
    assert "the type of the file is called 'file_type'" in str(raised.value)


def test_all_former_keys_of_a_section_are_named_at_once() -> None:
    with pytest.raises(InputError) as raised:
        load_config(config_of("search"), None, {"compute.dtype": "bfloat16", "compute.max_length": "64"})
    assert str(raised.value).splitlines() == [
        "the command line: unknown key 'compute.dtype': it is called 'dtype' now",
        "the command line: unknown key 'compute.max_length': it is called 'max_length' now",
    ]


@pytest.mark.parametrize("command", ["search", *_ANNOTATING])
def test_a_command_has_its_own_keys_before_those_that_it_shares(command: str) -> None:
    """Required ones stand in front in help and in a dumped config, which go by the order of the fields."""
    fields = list(config_of(command).model_fields.items())
    # `evaluate` needs one of three, and the others not.
    first = [name for name, field in fields if field.is_required()] or ["index", "run", "compare"]
    names = [name for name, _ in fields]
    assert max(map(names.index, first)) < names.index("dtype") < names.index("tokens_per_batch")


@pytest.mark.parametrize(
    ("target", "identity"),
    [
        ({}, "2e010b36aa005946d0d6f99b5ba212cb3c4e1d8c05293e4f52fd1b47269d6d66"),
        ({"queries": "dev.tsv"}, "d2371c147c4ec8983d4b32c652eb081b11eee17973c9ee41ccd06e6af66424e2"),
        (
            {"queries": {"path": "dev.tsv"}},
            "d2371c147c4ec8983d4b32c652eb081b11eee17973c9ee41ccd06e6af66424e2",
        ),
    ],
    ids=["documents", "a path", "a section"],
)
def test_an_index_knows_the_builds_that_it_holds_from_before(target: dict[str, Any], identity: str) -> None:
    """The hashes were written down by the raytower of before, whose target.queries was a path."""
    origin = Origin(
        fingerprint="f",
        encoder="e",
        metric="cosine",
        dim=8,
        prefix="",
        query_prefix="",
        max_length=64,
        engine="torch",
        compute_dtype="float32",
    )
    config = make_config(IndexBuildConfig, {"embeddings": "e", "output": "o", "target": target})
    rows: Any = SimpleNamespace(identity=lambda: [["part", 3, "sha"]], origin=origin)
    plan: Any = SimpleNamespace(kind="flat", parameters={})
    assert _identity(config, rows, plan) == identity


@pytest.mark.parametrize("command", ["encode", "index build", "index compact"])
def test_how_many_workers_there_are_may_be_called_max_as_before(command: str, tmp_path: Path) -> None:
    needed = {"encode": "encoder: e\ninput: i\noutput: o", "index build": "embeddings: e\noutput: o"}
    file = tmp_path / "job.yaml"
    file.write_text(needed.get(command, "index: i") + "\nworkers: {max: 3, num_cpus: 2}\n")
    config: Any = load_config(config_of(command), file)
    assert (config.workers.num, config.workers.num_cpus) == (3, 2)
    config = load_config(config_of(command), file, {"workers.num": 5})
    assert config.workers.num == 5
