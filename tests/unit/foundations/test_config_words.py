"""What is said of a config's values: in our words, whatever pydantic calls the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from raytower.commands import COMMANDS, find_reference
from raytower.config import ByteSize, Config, load_config, make_config
from raytower.errors import InputError


class Section(Config):
    shorthand = "path"

    path: str
    depth: int = Field(default=1, ge=1, lt=9)


class Inner(Config):
    rate: float = 1.0


class Squared(Config):
    name: Literal["squared"] = "squared"


class Weighted(Config):
    name: Literal["weighted"] = "weighted"
    weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None


class Example(Config):
    section: Section = Section(path="x")
    inner: Inner = Inner()
    loss: Annotated[Squared | Weighted, Field(discriminator="name")] = Squared()
    text: str = "a"
    names: list[str] = Field(default=["a"], min_length=1)
    counts: list[Annotated[int, Field(gt=0)]] | None = None
    kind: Literal["flat", "hnsw"] = "flat"
    shards: Literal["auto"] | int = "auto"
    switch: bool = False
    memory: ByteSize = Field(default=ByteSize(4096), ge=1024)
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    where: dict[str, Any] | str | None = None
    steps: list[Inner] = Field(default_factory=list)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"section": None}, "section is null; it must be a single text for 'path', or a mapping of its keys ('path', "
     "'depth'); leave it out for its default"),
    ({"inner": 3}, "inner is 3; it must be a mapping of its keys ('rate')"),
    ({"inner": {"rate": "x"}}, "inner.rate is 'x'; it must be a number"),
    ({"inner": {"rate": float("inf")}}, "inner.rate is inf; it must be a number"),
    ({"section": {"path": 3}}, "section.path is 3; it must be a text; write it in quotes"),
    ({"section": {"path": "x", "depth": 9}}, "section.depth is 9; it must be a whole number ≥ 1, < 9"),
    ({"section": {}}, "section.path is required and not given; set it in the config file or with --section.path VALUE"),
    ({"loss": None}, "loss is null; it must be 'squared' or 'weighted', or a mapping with this name and its settings; "
     "leave it out for its default"),
    ({"loss": {"name": "weigthed"}},
     "loss.name is 'weigthed'; it must be 'squared' or 'weighted'; the nearest is 'weighted'"),
    ({"loss": {"name": "weighted", "weights": "x"}},
     "loss.weights is 'x'; it must be 'balanced', or a mapping, or null"),
    ({"loss": {"name": "weighted", "weights": {"a": 0}}}, "loss.weights.a is 0; it must be a number > 0"),
    ({"text": True}, "text is true; it must be a text; write it in quotes"),
    ({"names": []}, "names is []; it must be a list of texts, not empty"),
    ({"names": ["a", 3]}, "names.1 is 3; it must be a text; write it in quotes"),
    ({"counts": 0}, "counts is 0; it must be a list of whole numbers > 0, or null"),
    ({"counts": [1, 0.5]}, "counts.1 is 0.5; it must be a whole number > 0"),
    ({"kind": "hsnw"}, "kind is 'hsnw'; it must be 'flat' or 'hnsw'; the nearest is 'hnsw'"),
    ({"shards": "many"}, "shards is 'many'; it must be 'auto', or a whole number"),
    ({"switch": "x"}, "switch is 'x'; it must be true or false"),
    ({"memory": "3 bananas"}, "memory is '3 bananas'; it must be a size ≥ 1024, such as 8GiB"),
    ({"memory": 3}, "memory is 3; it must be a size ≥ 1024, such as 8GiB"),
    ({"share": 1.5}, "share is 1.5; it must be a number ≥ 0, ≤ 1, or null"),
    ({"where": []}, "where is []; it must be a mapping, or a text, or null"),
    ({"where": {1: 2}}, "where has the key 1; keys are texts: write it in quotes"),
    ({"steps": [{}, 3]}, "steps.1 is 3; it must be a mapping of its keys ('rate')"),
    ({"steps": [{"rat": 3}]}, "unknown key 'steps.0.rat'; known are rate"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CASES, ids=str)
def test_each_refusal_says_key_value_rule_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        make_config(Example, values, source="here")
    assert str(raised.value) == f"here: {message}"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_of_pydantic_is_left(name: str) -> None:
    """Whatever is put into any key of any command."""
    config_class = find_reference(COMMANDS[name].config)
    for key in config_class.model_fields:
        for value in (None, "x", "", -1, {}, [], [None], {1: 2}, 1.25, True, float("nan"), b"x", 10**30):
            try:
                make_config(config_class, {key: value})
            except InputError as error:
                said = str(error)
                for word in ("Input should", "instance of", "literal[", "valid dictionary", "tag", "[key]"):
                    assert word not in said.replace("stage", ""), said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text: a\nshards: 1\ntext: b\n", "key 'text' stands twice, in lines 1 and 3; keep one of them"),
        ("section:\n  path: a\n  path: b\n", "key 'path' stands twice, in lines 2 and 3"),
        ('{"text": "a",\n"text": "b"}', "key 'text' stands twice, in lines 1 and 2"),
        ('{"text": "a", "text": "b"}', "key 'text' stands twice, in lines 1 and 1"),
        ("section.path: a\n", "unknown key 'section.path': in a file sections are nested; write section: {path: …}"),
        ("text: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
        ("[" * 5000, "not valid YAML"),
        ("- text\n", "it holds a list and must hold a mapping"),
        ("shards: x\n", "shards is 'x'; it must be"),
        ("text: \udcff\n", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as raised:
        load_config(Example, file)
    assert str(raised.value).startswith(f"config file {str(file)!r}: {message}")


def test_anchors_and_merges_are_no_doubles(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "section: &s {path: a}\ntext: &t b\nnames: [*t, *t]\nwhere: {<<: *s, path: c}\n"
    )
    config = load_config(Example, tmp_path / "c.yaml")
    assert (config.names, config.where) == (["b", "b"], {"path": "c"})
