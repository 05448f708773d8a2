"""Outputs that a job must not write to are refused by every command alike, in its plan too, before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

import raytower
from raytower.data.config import InputConfig
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.encoding.job import plan as plan_encode
from raytower.errors import InputError
from raytower.evaluation.reports import check_reports_output
from raytower.export import plan_export
from raytower.index.build import plan_build
from raytower.index.config import IndexBuildConfig
from raytower.models.config import ExportConfig
from raytower.storage import Location, output_folder
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import plan_train_retriever
from raytower.up.config import UpConfig
from raytower.up.job import plan_up
from tests.support.index_cases import build, unit_vectors, write_embeddings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> dict[str, Any]:
    """An encoder, a corpus, pairs, and embeddings."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "corpus.tsv").write_text("id\ttext\na\tone\nb\ttwo\n")
    (folder / "pairs.tsv").write_text("query\tdocument\none\tuno\ntwo\tdue\n")
    return {
        "encoder": str(dummy_encoder_dir),
        "corpus": InputConfig(path=str(folder / "corpus.tsv")),
        "pairs": str(folder / "pairs.tsv"),
        "embeddings": write_embeddings(folder / "embeddings", ["a", "b", "c"], unit_vectors(3)),
    }


def train_config(world: dict[str, Any], output: str) -> TrainRetrieverConfig:
    values = {
        "init_from": world["encoder"],
        "train": {"path": world["pairs"]},
        "output": output,
        "batch_size": 2,
    }
    return TrainRetrieverConfig.model_validate(values)


Job = Callable[[dict[str, Any], str], Any]
ENCODE: Job = lambda w, out: EncodeConfig(encoder=w["encoder"], input=w["corpus"], output=out)  # noqa: E731
JOBS: dict[str, Job] = {
    "encode": lambda w, out: encode(ENCODE(w, out)),
    "encode's plan": lambda w, out: plan_encode(ENCODE(w, out)),
    "index build": lambda w, out: build(out, w["embeddings"]),
    "index build's plan": lambda w, out: plan_build(IndexBuildConfig(embeddings=w["embeddings"], output=out)),
    "index_texts": lambda w, out: raytower.index_texts(["one", "two"], w["encoder"], out),
    "export's plan": lambda w, out: plan_export(ExportConfig(encoder=w["encoder"], output=out)),
    "train's plan": lambda w, out: plan_train_retriever(train_config(w, out)),
    "evaluate": lambda w, out: check_reports_output(out),
    "up's plan": lambda w, out: plan_up(UpConfig(input=w["corpus"], model=w["encoder"], output=out, port=0)),
}


@pytest.mark.parametrize("job", JOBS)
class TestEveryJob:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

    def test_no_name(self, world: dict[str, Any], job: str) -> None:
        for output in ("", " "):
            with pytest.raises(InputError, match="output is"):
                JOBS[job](world, output)
        assert not os.listdir(), "nothing was written to the folder that the shell is in"

    def test_a_file_and_what_is_below_one(self, world: dict[str, Any], job: str) -> None:
        Path("file").write_text("precious")
        with pytest.raises(InputError, match="is a file"):
            JOBS[job](world, "file")
        with pytest.raises(InputError, match="no folder that this user may write to"):
            JOBS[job](world, "file/out")
        assert Path("file").read_text() == "precious"

    def test_a_folder_of_something_else(self, world: dict[str, Any], job: str) -> None:
        Path("out").mkdir()
        Path("out/thesis.txt").write_text("precious")
        with pytest.raises(InputError, match=r"holds files of something else, as 'thesis\.txt'"):
            JOBS[job](world, "out")
        assert os.listdir("out") == ["thesis.txt"]


def test_empty_folders_and_beginnings_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert output_folder(str(folder), "job.json") == Location.of(folder)
    folder.mkdir()
    (folder / ".encode.lock").write_text("")
    assert output_folder(str(folder), "job.json") == Location.of(folder)
    (folder / "part.parquet").write_text("")
    with pytest.raises(InputError, match=r"'part\.parquet'"):
        output_folder(str(folder), "job.json")
    (folder / "job.json").write_text("{}")
    assert output_folder(str(folder), "job.json") == Location.of(folder)


def test_a_killed_build_goes_on_in_its_folder(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raytower.index.build as module

    write_fragments = module.write_fragments

    def dying(*arguments: Any) -> Any:
        write_fragments(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_fragments", dying)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", world["embeddings"])
    monkeypatch.setattr(module, "write_fragments", write_fragments)
    assert build(tmp_path / "index", world["embeddings"])["rows"] == 3


def test_remote_storage_is_looked_at_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this machine stands for a bucket."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(Location, "of", staticmethod(lambda name: Location(bucket, name)))
    with pytest.raises(InputError, match=r"'thesis\.txt'"):
        output_folder("out", "job.json")
    with pytest.raises(InputError, match="is a file"):
        output_folder("file", "job.json")
    assert not output_folder("new", "job.json").exists()
