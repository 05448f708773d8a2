"""Configs, storage and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileInfo, FileSelector, LocalFileSystem

from raytower.config import (
    AutoscalingWorkersConfig,
    ByteSize,
    Config,
    load_config,
    make_config,
    to_json,
)
from raytower.errors import FormatError, InputError, RaytowerError, find_cause
from raytower.storage import Location, publish_directory


class Nested(Config):
    rate: float = 1.0
    memory: ByteSize = ByteSize(1)


class Source(Config):
    shorthand = "path"

    path: str
    split: str = "test"


class Example(Config):
    name: str
    source: Source | None = None
    nested: Nested = Nested()
    workers: AutoscalingWorkersConfig = AutoscalingWorkersConfig()
    maybe: Nested | None = None


class TestConfig:
    def test_file_and_overrides(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("name: 中文\nnested: {rate: 2, memory: 8GiB}\n", encoding="utf-8")
        config = load_config(Example, tmp_path / "c.yaml", {"nested.rate": 1e-5, "workers.num": 9})
        assert (config.name, config.nested.rate, config.workers.num) == ("中文", 1e-5, 9)
        assert int(config.nested.memory) == 8 * 2**30

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"name": "x", "nested": {"rat": 1}},
                "unknown key 'nested.rat'; the nearest known key is 'nested.rate'",
            ),
            ({"nmae": "x"}, "unknown key 'nmae'; the nearest known key is 'name'"),
            (
                {"name": "x", "maybe": {"rte": 1}},
                "unknown key 'maybe.rte'; the nearest known key is 'maybe.rate'",
            ),
            ({}, "name is required and not given"),
            ({"name": "x", "nested": {"rate": "fast"}}, "nested.rate is 'fast'"),
            ({"name": "x", "workers": {"min": 3, "num": 2}}, "more than workers.num 2"),
        ],
    )
    def test_refusals_name_key_value_and_rule(self, values: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_config(Example, values)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            load_config(Example, tmp_path / "none.yaml")
        (tmp_path / "bad.yaml").write_text("a: [")
        with pytest.raises(InputError, match="not valid YAML"):
            load_config(Example, tmp_path / "bad.yaml")
        (tmp_path / "list.yaml").write_text("- a")
        with pytest.raises(InputError, match="holds a list"):
            load_config(Example, tmp_path / "list.yaml")

    def test_a_single_value_stands_for_a_section(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("name: x\nsource: corpus.tsv\n", encoding="utf-8")
        assert load_config(Example, tmp_path / "c.yaml").source == Source(path="corpus.tsv")
        laid_over = load_config(Example, tmp_path / "c.yaml", {"source.split": "dev"})
        assert laid_over.source == Source(path="corpus.tsv", split="dev")

    def test_json_has_no_nan(self) -> None:
        assert to_json({"a": float("nan"), "b": [1, "中"]}) == '{"a": null, "b": [1, "中"]}'


class AppearingFolder:
    """A filesystem on which another process makes the folder while it is being listed, as pyarrow then reports it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed = 0

    def get_file_info(self, selector: FileSelector) -> list[FileInfo]:
        self.listed += 1
        if self.listed == 1:
            self.folder.mkdir()
            (self.folder / "x").touch()
            raise FileNotFoundError(2, f"Cannot list directory '{self.folder}'")
        return list(LocalFileSystem().get_file_info(selector))


class TestStorage:
    def test_a_folder_that_appears_while_it_is_listed(self, tmp_path: Path) -> None:
        filesystem = AppearingFolder(tmp_path / "new")
        place = Location(filesystem, str(tmp_path / "new"))  # type: ignore[arg-type]
        assert [child.name for child in place.children()] == ["x"]
        assert filesystem.listed == 2

    def test_an_interrupted_write_leaves_nothing(self, tmp_path: Path) -> None:
        place = Location.of(tmp_path) / "deep" / "file.bin"
        place.write_bytes(b"old")
        with pytest.raises(RuntimeError, match="interrupted"), place.open_write() as stream:  # noqa: PT012
            stream.write(b"new")
            raise RuntimeError("interrupted")
        assert place.read_bytes() == b"old"
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.bin"]

    def test_an_interrupted_directory_leaves_the_old_one(self, tmp_path: Path) -> None:
        target = Location.of(tmp_path / "model")
        with publish_directory(target) as folder:
            (folder / "a").write_text("first")
        with pytest.raises(RuntimeError, match="interrupted"), publish_directory(target) as folder:  # noqa: PT012
            (folder / "b").write_text("second")
            raise RuntimeError("interrupted")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in (tmp_path / "model").iterdir()] == ["a"]

    def test_uris_and_missing_files(self, tmp_path: Path) -> None:
        place = Location.of(f"file://{tmp_path}/x.txt")
        place.write_bytes(b"1")
        assert (tmp_path / "x.txt").read_bytes() == b"1"
        with pytest.raises(InputError, match="no file at"):
            Location.of(tmp_path / "none").read_bytes()
        with pytest.raises(InputError, match="cannot be opened"):
            Location.of("nosuch://bucket/key")
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(FormatError, match="not valid JSON"):
            Location.of(tmp_path / "bad.json").read_json()

    @settings(deadline=None)  # it waits for the disk
    @given(content=st.binary(max_size=1000))
    def test_sha256_is_the_standard_one(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        import hashlib

        place = Location.of(tmp_path_factory.mktemp("sha") / "f")
        place.write_bytes(content)
        assert place.sha256() == hashlib.sha256(content).hexdigest()


def test_the_users_mistake_is_found_under_what_wraps_it() -> None:
    inner = InputError("the rule")
    try:
        try:
            raise inner
        except InputError as error:
            raise ValueError("middle") from error
    except ValueError as error:
        outer = RuntimeError("outer")
        outer.cause = error  # type: ignore[attr-defined] # as RayTaskError does
    assert find_cause(outer) is inner
    wrapper = InputError("a remote traceback of forty lines")
    wrapper.cause = inner  # type: ignore[attr-defined]
    assert find_cause(wrapper) is inner
    plain = RuntimeError("nothing inside")
    assert find_cause(plain) is plain
    assert isinstance(inner, RaytowerError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "WorkerCrashedError",
            "a worker process was killed, perhaps for want of memory; run the command again",
        ),
        ("OutOfMemoryError", "memory of its node was nearly used up"),
        ("NodeDiedError", "the node of a worker was lost"),
        ("LocalRayletDiedError", "Ray's own process on this machine was killed"),
    ],
)
def test_a_lost_worker_is_said_to_be_one(name: str, said: str) -> None:
    """Ray's own message sends the reader to log files of Ray's."""
    lost = type(name, (Exception,), {"__module__": "ray.exceptions"})("Check python-core-worker-*.log files")
    outer = RuntimeError("outer")
    outer.cause = lost  # type: ignore[attr-defined]
    for error in (lost, outer):
        cause = find_cause(error)
        assert isinstance(cause, RaytowerError)
        assert said in str(cause)
        assert "core-worker" not in str(cause)
    # What was raised on purpose says more.
    lost.__cause__ = InputError("the rule")
    assert find_cause(outer) is lost.__cause__
    other = type(name, (Exception,), {"__module__": "torch.cuda"})("of another library")
    assert find_cause(other) is other
