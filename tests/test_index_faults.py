"""Faults of an index: damaged files, full disks, killed and competing builders. Nothing half-written is ever served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytower.cli import main
from raytower.errors import FormatError, InputError
from raytower.index.manage import IndexVerifyConfig, index_verify
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index
from raytower.runtime import worker_environment
from raytower.storage import Location, StorageError
from tests.test_index import brute_force, build, clustered_vectors, found_ids, write_embeddings

PAGE = 4096


def one_complaint(capfd: pytest.CaptureFixture[str]) -> str:
    """The single message of a command that failed."""
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("raytower: ")]
    return message


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every file below `folder`."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two shards of a kind that keeps all the files that a shard may have."""
    folder = tmp_path_factory.mktemp("index")
    write_embeddings(folder / "embeddings", clustered_vectors(800))
    build(folder / "embeddings", folder / "index", kind="ivf_sq8")
    return folder / "index"


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Path:
    """A copy of the built index to damage."""
    shutil.copytree(built, tmp_path / "index")
    return tmp_path / "index"


DAMAGES = {
    "flipped": lambda content: content[:-20] + bytes([content[-20] ^ 1]) + content[-19:],
    "truncated": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "grown": lambda content: content + b"\0",
    "swapped": lambda content: content[::-1],
}


class TestDamagedFiles:
    @pytest.mark.parametrize("how", [*DAMAGES, "removed"])
    def test_every_file_of_a_shard_is_vouched_for(
        self, damaged: Path, how: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        version = damaged / "versions" / "v000001"
        files = IndexManifest.read(Location.of(version)).shards[1].files
        assert {"vectors.faiss", "documents.arrow"} <= files.keys()
        for name in files:
            place = version / "shard-00001" / name
            content = place.read_bytes()
            if how == "removed":
                place.unlink()
            else:
                place.write_bytes(DAMAGES[how](content))
            with pytest.raises(FormatError, match=name):
                Index.open(damaged)
            if how not in ("flipped", "swapped"):
                with pytest.raises(FormatError, match=name):
                    Index.open(damaged, verify="none")
            assert main(["index", "verify", "--index", str(damaged)]) == 2
            assert name in one_complaint(capfd)
            place.write_bytes(content)
        assert index_verify(IndexVerifyConfig(index=str(damaged)))["verified"] is True

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not valid JSON"),
            (b'{"format": "raytower.index", "format_ver', "not valid JSON"),
            (b"[]", "not an index manifest"),
            (b"{}", "not an index manifest"),
            (
                b'{"format": "raytower.index", "format_version": 999}',
                "format version 999; this raytower reads",
            ),
            (b"\xff\xfe\x00", "not valid JSON"),
        ],
    )
    def test_a_manifest_that_cannot_be_trusted(
        self, damaged: Path, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (damaged / "versions" / "v000001" / "manifest.json").write_bytes(content)
        assert main(["index", "verify", "--index", str(damaged)]) == 2
        assert message in one_complaint(capfd)

    def test_a_manifest_that_lost_any_of_its_fields(self, damaged: Path) -> None:
        place = damaged / "versions" / "v000001" / "manifest.json"
        values = json.loads(place.read_text())
        for name in values:
            place.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
            try:
                # What has a default may be missing; the index is the same one then.
                assert Index.open(damaged).num_rows == 800
            except FormatError:
                continue

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"v000007\n", "no version 'v000007'; it has: v000001"),
            (b"", "no version name"),
            (b"../../elsewhere\n", "no version name"),
            (b"v000001\nv000002\n", "no version name"),
            (b"\xff\xfe", "no version name"),
        ],
    )
    def test_a_current_that_names_nothing(
        self, damaged: Path, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (damaged / "CURRENT").write_bytes(content)
        with pytest.raises(InputError, match=message):
            Index.open(damaged)
        assert main(["index", "verify", "--index", str(damaged)]) == 2
        assert message in one_complaint(capfd)
        # The remedy needs no rebuild.
        assert main(["index", "rollback", "--index", str(damaged), "--to", "v000001"]) == 0
        assert Index.open(damaged).version == "v000001"

    def test_a_damaged_version_is_never_rolled_back_to(
        self, damaged: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        place = damaged / "versions" / "v000001" / "shard-00000" / "documents.arrow"
        place.write_bytes(place.read_bytes()[:-1])
        (damaged / "CURRENT").unlink()
        assert main(["index", "rollback", "--index", str(damaged), "--to", "v000001"]) == 2
        assert "documents.arrow" in one_complaint(capfd)
        assert not (damaged / "CURRENT").exists()


@pytest.mark.usefixtures("ray_cluster")
class TestBadInput:
    """Through the command line: exit code 2, one message, nothing written."""

    def _build(self, embeddings: Path, output: Path, *more: str) -> int:
        command = ["index", "build", "--embeddings", str(embeddings), "--output", str(output)]
        return main([*command, "--kind", "flat", "--workers.num_cpus", "0.5", *more])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("nan", "id 'id 33' has a vector that holds NaN or infinity"),
            ("zero", "id 'id 33' has a vector that is zero"),
            ("dim", "manifest says fixed_size_list of 32 dimensions"),
            ("duplicate", "id 'id 1' stands twice"),
            ("shards", "shards is 51, more than the 50 rows"),
        ],
    )
    def test_what_cannot_be_indexed(
        self, tmp_path: Path, change: str, message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        vectors = clustered_vectors(50)
        ids = [f"id {row}" for row in range(50)]
        if change in ("nan", "zero"):
            vectors[33] = np.nan if change == "nan" else 0
        if change == "duplicate":
            ids[49] = "id 1"
        embeddings = write_embeddings(
            tmp_path / "embeddings", vectors, ids=ids, **({"dim": 32} if change == "dim" else {})
        )
        shards = "51" if change == "shards" else "2"
        assert self._build(embeddings, tmp_path / "index", "--shards", shards) == 2
        assert message in one_complaint(capfd)
        assert not (tmp_path / "index").exists()

    def test_as_many_shards_as_rows(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(5)
        build(write_embeddings(tmp_path / "embeddings", vectors), tmp_path / "index", shards=5)
        queries = clustered_vectors(3, seed=1)
        assert found_ids(Index.open(tmp_path / "index"), queries, 5) == brute_force(vectors, queries, 5)

    def test_an_output_that_is_a_file(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(50))
        (tmp_path / "index").write_text("precious")
        assert self._build(embeddings, tmp_path / "index") == 2
        assert "cannot be used" in one_complaint(capfd)
        assert (tmp_path / "index").read_text() == "precious"

    def test_no_hits_wanted(self, built: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["search", "--index", str(built), "--query", "text", "--k", "0"]) == 2
        assert "k" in one_complaint(capfd)


@dataclass(frozen=True)
class SmallDisk:
    """A file system in memory, of a size that can be changed."""

    path: Path

    def resize(self, num_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(self.path)], check=True)

    def set_writable(self, writable: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'rw' if writable else 'ro'}", str(self.path)], check=True)

    @property
    def used_bytes(self) -> int:
        figures = os.statvfs(self.path)
        return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here to make a small disk with")
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield SmallDisk(path)
    # Lazily: what a test mapped into memory would keep it busy.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.usefixtures("ray_cluster")
class TestFullDisk:
    @pytest.fixture
    def first(self, disk: SmallDisk, tmp_path: Path) -> Path:
        """A small published index on the small disk."""
        build(write_embeddings(tmp_path / "first", clustered_vectors(40)), disk.path / "index", shards=1)
        return disk.path / "index"

    @pytest.mark.parametrize("kind", ["flat", "ivf_sq8"])
    def test_a_build_stops_and_goes_on_when_there_is_room(
        self, disk: SmallDisk, first: Path, tmp_path: Path, kind: str
    ) -> None:
        vectors = clustered_vectors(6000)
        embeddings = write_embeddings(tmp_path / "second", vectors)
        settings: dict[str, Any] = {"kind": kind, "shards": 4, "workers": {"max": 1, "num_cpus": 0.5}}
        # How much a shard takes is seen on a large disk.
        build(embeddings, tmp_path / "large", **settings)
        shard = tmp_path / "large" / "versions" / "v000001" / "shard-00000"
        shard_bytes = sum(-(-file.stat().st_size // PAGE) * PAGE for file in shard.iterdir())
        disk.resize(disk.used_bytes + PAGE + 2 * shard_bytes + shard_bytes // 2)
        with pytest.raises(
            StorageError, match=r"no space is left for \S*/index/versions/v000002/shard-00002"
        ):
            build(embeddings, first, **settings)
        assert (first / "CURRENT").read_text() == "v000001\n"
        assert found_ids(Index.open(first), clustered_vectors(2), 3) == brute_force(
            clustered_vectors(40), clustered_vectors(2), 3
        )
        version = first / "versions" / "v000002"
        names = sorted(path.name for path in version.iterdir() if path.name != ".lock")
        assert names == ["build.json", "shard-00000", "shard-00001"]
        finished = {name: tree(version / name) for name in ("shard-00000", "shard-00001")}
        disk.resize(64 * 2**20)
        assert build(embeddings, first, **settings)["version"] == "v000002"
        assert {name: tree(version / name) for name in finished} == finished
        assert index_verify(IndexVerifyConfig(index=str(first)))["rows"] == 6000
        for written in ("shard-00000", "shard-00003"):
            for file in (version / written).iterdir():
                if file.name != "shard.json":
                    whole = tmp_path / "large" / "versions" / "v000001" / written / file.name
                    assert file.read_bytes() == whole.read_bytes()

    def test_wherever_the_space_ends_the_old_version_stays(
        self, disk: SmallDisk, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Page by page: the build, its manifest or the swap of CURRENT runs out of space, until it all fits."""
        embeddings = write_embeddings(tmp_path / "second", clustered_vectors(300))
        command = [
            "index",
            "build",
            "--embeddings",
            str(embeddings),
            "--output",
            str(first),
            "--kind",
            "flat",
        ]
        command += ["--shards", "1", "--workers.num_cpus", "0.5"]
        codes = []
        for pages in range(0, 40):
            disk.resize(disk.used_bytes + pages * PAGE)
            capfd.readouterr()
            codes.append(main(command))
            disk.resize(64 * 2**20)
            if codes[-1] == 0:
                break
            assert f"no space is left for {first}" in one_complaint(capfd)
            assert (first / "CURRENT").read_text() == "v000001\n"
            assert Index.open(first).num_rows == 40
            for version in (first / "versions").iterdir():
                if version.name != "v000001":
                    shutil.rmtree(version)
        assert codes == [1] * (len(codes) - 1) + [0]
        assert len(codes) > 4
        assert Index.open(first).num_rows == 300
        assert index_verify(IndexVerifyConfig(index=str(first)))["rows"] == 300

    def test_a_disk_that_may_only_be_read(
        self, disk: SmallDisk, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        embeddings = write_embeddings(tmp_path / "second", clustered_vectors(50))
        disk.set_writable(False)
        try:
            command = ["index", "build", "--embeddings", str(embeddings), "--output", str(first)]
            assert main([*command, "--workers.num_cpus", "0.5"]) == 2
            assert str(first) in one_complaint(capfd)
            assert Index.open(first).num_rows == 40
        finally:
            disk.set_writable(True)


def start_build(
    embeddings: Path, output: Path, *settings: str, wait_for: Path | None = None
) -> subprocess.Popen[str]:
    """`raytower index build` in a process of its own that joins the session's Ray, once `wait_for` is there."""
    command = ["index", "build", "--embeddings", str(embeddings), "--output", str(output)]
    command += ["--workers.num_cpus", "0.5", *settings]
    script = (
        "import os, sys, time\nfrom raytower.cli import main\nimport raytower.index.build, ray\n"
        "print('ready', flush=True)\n"
        f"while {str(wait_for or '/')!r} and not os.path.exists({str(wait_for or '/')!r}):\n    time.sleep(0.005)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {
        **os.environ,
        **worker_environment(),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": worker_environment()}}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.usefixtures("ray_cluster")
class TestProcesses:
    def test_two_builders_at_once_and_a_reader_between_them(self, tmp_path: Path) -> None:
        old, new = clustered_vectors(100), clustered_vectors(900)
        index = tmp_path / "index"
        build(write_embeddings(tmp_path / "old", old), index)
        embeddings = write_embeddings(tmp_path / "new", new)
        queries = clustered_vectors(3, seed=4)
        answers = {100: brute_force(old, queries, 5), 900: brute_force(new, queries, 5)}
        # One build, twice at once: the same rows in the same shards, so nothing but the claim keeps them apart.
        start = tmp_path / "start"
        settings = ("--kind", "flat", "--shards", "3")
        builders = [start_build(embeddings, index, *settings, wait_for=start) for _ in range(2)]
        for builder in builders:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "ready\n"
        start.touch()
        seen = []
        while any(builder.poll() is None for builder in builders):
            opened = Index.open(index)
            assert found_ids(opened, queries, 5) == answers[opened.num_rows]
            seen.append(opened.version)
        ended = [builder.communicate() for builder in builders]
        assert [builder.returncode for builder in builders] == [0, 0], ended
        versions = {json.loads(out.splitlines()[-1])["version"] for out, _ in ended}
        assert len(seen) > 3
        assert seen[0] == "v000001"
        assert (index / "CURRENT").read_text().strip() in versions
        assert Index.open(index).num_rows == 900
        for name in versions:
            assert index_verify(IndexVerifyConfig(index=str(index), version=name))["rows"] == 900
        # One of them may have found the other's finished work, but only if that was finished before it looked.
        assert versions <= {"v000002", "v000003"}

    def test_a_build_killed_half_way_keeps_its_finished_shards(self, tmp_path: Path) -> None:
        vectors = clustered_vectors(1200)
        embeddings = write_embeddings(tmp_path / "embeddings", vectors)
        index = tmp_path / "index"
        version = index / "versions" / "v000001"
        settings = ("--kind", "flat", "--shards", "40", "--workers.max", "1")
        with start_build(embeddings, index, *settings) as builder:
            while not (version / "shard-00001" / "shard.json").exists():
                assert builder.poll() is None, builder.communicate()
                time.sleep(0.001)
            builder.send_signal(signal.SIGKILL)
            builder.wait()
        # Its workers are ended with it; a shard that one of them is moving into place would still appear.
        before = -1
        while before != (before := len(list(version.glob("shard-*/shard.json")))):
            time.sleep(1)
        assert 2 <= before < 40
        assert not (index / "CURRENT").exists()
        with pytest.raises(InputError, match="no published index"):
            Index.open(index)
        finished = {place.parent.name: tree(place.parent) for place in version.glob("shard-*/shard.json")}
        figures = build(embeddings, index, shards=40, workers={"max": 2, "num_cpus": 0.5})
        assert figures["version"] == "v000001"
        assert {name: tree(version / name) for name in finished} == finished
        assert not [path for path in version.iterdir() if path.name.endswith(".tmp")]
        queries = clustered_vectors(10, seed=8)
        assert found_ids(Index.open(index), queries, 10) == brute_force(vectors, queries, 10)
        assert index_verify(IndexVerifyConfig(index=str(index)))["rows"] == 1200

    def test_a_killed_worker_s_shard_is_built_again(self, tmp_path: Path) -> None:
        """The task to kill is found by the file that it is writing; a graph takes it seconds. Ray starts it again."""
        rows = 16_000
        embeddings = write_embeddings(tmp_path / "embeddings", clustered_vectors(rows))
        index = tmp_path / "index"
        settings = ("--kind", "hnsw", "--shards", "2", "--workers.max", "1")
        with start_build(embeddings, index, *settings) as builder:
            killed = None
            while killed is None:
                assert builder.poll() is None, builder.communicate()
                killed = _kill_writer_below(index / "versions" / "v000001")
            out, err = builder.communicate()
        assert builder.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["rows"] == rows
        assert index_verify(IndexVerifyConfig(index=str(index)))["rows"] == rows


def _kill_writer_below(folder: Path) -> int | None:
    """Kill -9 a process that has a file below `folder` open for writing; None where there is none yet."""
    for links in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [os.readlink(link) for link in links.iterdir()]
        except OSError:
            continue  # ended meanwhile
        if any(target.startswith(f"{folder}/") and ".tmp/" in target for target in targets):
            process = int(links.parent.name)
            os.kill(process, signal.SIGKILL)
            return process
    return None
