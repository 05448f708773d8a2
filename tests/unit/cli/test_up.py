"""`raytower up`: what is found before any work, and what is done when."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError
from raytower.up import job
from raytower.up.config import UpConfig


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.tsv"
    path.write_text("a\tfirst text\nb\tsecond text\n")
    return path


def config_of(texts: Path, **more: Any) -> UpConfig:
    return make_config(UpConfig, {"input": str(texts), "port": 0, **more})


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were done, in their order, none of them for real."""
    steps: list[str] = []
    figures = {"added": 0, "changed": 0, "set": 0, "deleted": 0}

    def note(name: str, result: dict[str, Any]) -> Any:
        return lambda config: steps.append(name) or result

    monkeypatch.setattr(job.encoding, "encode", note("encode", {}))
    monkeypatch.setattr(job, "build_index", note("build", {}))
    monkeypatch.setattr(job, "sync_index", note("sync", figures))
    monkeypatch.setattr(job, "serve", note("serve", {"url": "http://127.0.0.1:1"}))
    return steps


def test_the_first_call_encodes_and_builds_and_a_later_one_syncs(texts: Path, done: list[str]) -> None:
    result = job.up(config_of(texts))
    assert done == ["encode", "build", "serve"]
    assert result == {"index": f"{texts}.raytower/index", "url": "http://127.0.0.1:1"}
    done.clear()
    versions = Path(f"{texts}.raytower/index/versions")
    versions.mkdir(parents=True)
    (versions / "000001.json").write_text("{}")
    job.up(config_of(texts))
    assert done == ["sync", "serve"]


def test_a_taken_port_is_found_before_any_work(texts: Path, done: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for work in (job.up, job.plan_up):
            with pytest.raises(InputError, match="cannot listen on"):
                work(config_of(texts, port=taken.getsockname()[1]))
    assert done == []


def test_a_missing_reranker_is_found_before_any_work(texts: Path, done: list[str]) -> None:
    with pytest.raises(InputError, match="/no/such"):
        job.up(config_of(texts, reranker="/no/such"))
    assert done == []


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("data/corpus/", "data/corpus.raytower"),
        ("s3://bucket/a.tsv?endpoint_override=127.0.0.1:9&scheme=http", "bucket/a.tsv.raytower"),
    ],
)
def test_the_folder_lies_beside_the_input(given: str, folder: str) -> None:
    config = make_config(UpConfig, {"input": given})
    assert job._folder(config).path.endswith(folder)


def test_what_may_be_deleted_is_said_to_the_sync(texts: Path) -> None:
    config = config_of(texts, gone="keep", max_gone=0.9)
    sync = job._sync_config(config, job._index_of(config))
    assert (sync.gone, sync.max_gone) == ("keep", 0.9)


def test_a_pattern_names_no_folder(texts: Path) -> None:
    given = str(texts.parent / "*.tsv")
    with pytest.raises(InputError, match=r"a pattern, which gives the index no name; give --output FOLDER"):
        job._folder(make_config(UpConfig, {"input": given}))
    assert job._folder(make_config(UpConfig, {"input": given, "output": "/x"})).path == "/x"


@pytest.mark.parametrize("given", [".", "./", "sub/.."])
def test_a_folder_under_another_name_gets_its_own(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "corpus")
    assert job._folder(make_config(UpConfig, {"input": given})).path == str(tmp_path / "corpus.raytower")
