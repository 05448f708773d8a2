"""Faults of an index: killed and competing processes, full and read-only disks, bad input.

Whatever happens, readers answer from a version that is whole, and the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import raytower.index.build as build_module
import raytower.index.compact as compact_module
from raytower.cli import main
from raytower.errors import FormatError
from raytower.index.change import add_to_index, delete_from_index
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig, IndexGcConfig, IndexVerifyConfig
from raytower.index.collect import collect_garbage
from raytower.index.manage import index_verify
from raytower.index.reader import Index
from raytower.index.table import DocumentTable
from raytower.index.versions import version_names
from raytower.models.encoder import Encoder
from raytower.runtime import worker_environment
from raytower.storage import Location
from tests.support.index_cases import HERE, build, unit_vectors, write_embeddings
from tests.support.warm import Popen

PAGE = 4096
DIM = 32


def one_complaint(capfd: pytest.CaptureFixture[str]) -> str:
    """The single message of a command that failed."""
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("raytower: ")]
    assert ".rs:" not in message, "a place in a library's source is no help"
    return message


def embeddings_of(folder: Path, first: int, last: int, **manifest: Any) -> str:
    """Documents `id <first>` to `id <last>` (exclusive), each with the same vector wherever it is made."""
    ids = [f"id {number}" for number in range(first, last)]
    return write_embeddings(folder, ids, _vectors(first, last), rows_per_file=100, **manifest)


def _vectors(first: int, last: int) -> np.ndarray:
    return unit_vectors(last, DIM)[first:last]


def assert_holds(index: Path, numbers: set[int]) -> None:
    """The index equals the dictionary {id n: n-th vector}: documents, texts and exact answers."""
    opened = Index.open(index)
    found = {document.id: document.text for document in opened.documents(opened.table.row_map.rows())}
    assert found == {f"id {number}": f"text of id {number}" for number in numbers}
    known = sorted(numbers)
    queries = unit_vectors(4, DIM, seed=9)
    wanted = np.argsort(-(queries @ unit_vectors(known[-1] + 1, DIM)[known].T), axis=1)[:, :5]
    hits = opened.search(queries, 5)
    for rows, best in zip(hits.rows, wanted.tolist(), strict=True):
        assert [document.id for document in opened.documents(rows)] == [f"id {known[at]}" for at in best]


def tree(folder: Path, pattern: str = "*") -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every file below `folder`."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob(pattern)
        if path.is_file()
    }


class Process:
    """A command in a process of its own that has imported all it needs and waits to be told to start."""

    def __init__(
        self, *command: str, modules: str = "raytower.index.sync", run: str = "", **environment: str
    ):
        script = (
            f"import sys\nfrom raytower.cli import main\nimport {modules}\n{run}\n"
            "print('ready', flush=True)\nsys.stdin.readline()\nsys.exit(main(sys.argv[1:]))\n"
        )
        self._process = Popen(
            [sys.executable, "-c", script, *command],
            env={**os.environ, **worker_environment(), **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def start(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def result(self) -> dict[str, Any]:
        out, err = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, err
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def on_session_ray() -> dict[str, str]:
    """Environment of a process that joins the tests' Ray."""
    import ray

    return {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": worker_environment()}}),
    }


@pytest.mark.processes
class TestKilledChanges:
    """Each is killed as soon as the table holds its change and no version does, and at a random moment."""

    @pytest.fixture
    def case(self, tmp_path: Path, dummy_encoder_dir: Path) -> dict[str, Any]:
        made = {
            "encoder": str(dummy_encoder_dir),
            "fingerprint": Encoder.load(str(dummy_encoder_dir)).fingerprint,
        }
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "base", 0, 300, **made), kind="flat")
        corpus = tmp_path / "corpus.jsonl"
        lines = [{"id": f"id {number}", "text": f"text of id {number}"} for number in range(40, 300)]
        corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = embeddings_of(tmp_path / "more", 300, 420, **made)
        gone = tmp_path / "gone.txt"
        gone.write_text("".join(f"id {number}\n" for number in range(50)))
        named = ["--index", str(index)]
        return {
            "index": index,
            "add": (["index", "add", *named, "--embeddings", more], set(range(420))),
            "delete": (["index", "delete", *named, "--input.path", str(gone)], set(range(50, 300))),
            "sync": (["index", "sync", *named, "--input.path", str(corpus)], set(range(40, 300))),
        }

    @pytest.mark.parametrize("operation", ["add", "delete", "sync"])
    def test_a_killed_change_is_whole_or_nothing_and_runs_again(
        self, case: dict[str, Any], operation: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        index: Path = case["index"]
        command, after = case[operation]
        before = set(range(300))
        processes = [Process(*command) for _ in range(2)]
        processes[0].start()
        while len(list((index / "table.lance" / "_versions").iterdir())) < 3 and processes[0].is_running:
            time.sleep(0.0005)
        processes[0].kill()
        assert_holds(index, after if version_names(Location.of(index))[-1] == "000002" else before)
        processes[1].start()
        time.sleep(random.Random(operation).uniform(0, 0.4))
        processes[1].kill()
        assert_holds(index, after if version_names(Location.of(index))[-1] == "000002" else before)
        assert main(command) == 0
        assert_holds(index, after)
        # A change that was made is not made twice.
        assert main(command) == 0
        assert version_names(Location.of(index)) == ["000001", "000002"]
        assert index_verify(IndexVerifyConfig(index=str(index), version="000002"))["rows"] == len(after)
        assert Index.open(index, "000001").num_rows == 300


@pytest.mark.processes
class TestWritersAtOnce:
    def test_both_changes_are_there(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "base", 0, 200))
        more = [embeddings_of(tmp_path / f"more-{at}", at, at + 30) for at in (200, 230)]
        named = ["--index", str(index)]
        writers = [Process("index", "add", *named, "--embeddings", folder) for folder in more]
        writers.append(Process("index", "delete", *named, "--ids", '["id 3", "id 4"]'))
        for writer in writers:
            writer.start()
        versions = sorted(writer.result()["version"] for writer in writers)
        assert versions == ["000002", "000003", "000004"]
        assert_holds(index, set(range(260)) - {3, 4})

    def test_changes_beside_a_compaction_are_carried_over(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        numbers = set(range(3000))
        build(index, embeddings_of(tmp_path / "base", 0, 3000), shards=3)
        here = "import raytower.index.tasks as t, raytower.index.compact as c\nc.on_ray = lambda *_: t.Run()"
        compaction = Process(
            "index", "compact", "--index", str(index), "--kind", "hnsw", "--shards", "1",
            modules="raytower.index.compact", run=here,
        )  # fmt: skip
        compaction.start()
        beside = 0
        while compaction.is_running or beside == 0:
            first = 3000 + 5 * beside
            add_to_index(
                IndexAddConfig(
                    index=str(index), embeddings=embeddings_of(tmp_path / f"e{beside}", first, first + 5)
                )
            )
            delete_from_index(IndexDeleteConfig(index=str(index), ids=[f"id {beside}", f"id {first}"]))
            numbers |= set(range(first, first + 5))
            numbers -= {beside, first}
            beside += 1
        assert compaction.result()["compacted"] is True
        opened = Index.open(index)
        found = {document.id for document in opened.documents(opened.table.row_map.rows())}
        assert found == {f"id {number}" for number in numbers}
        operations = [
            Index.open(index, name).manifest.operation for name in version_names(Location.of(index))
        ]
        assert operations.count("compact") == 1
        assert operations.count("add") == operations.count("delete") == beside
        assert {entry.kind for entry in opened.manifest.shards} <= {"hnsw", "flat"}
        assert index_verify(IndexVerifyConfig(index=str(index)))["rows"] == len(numbers)


@pytest.mark.usefixtures("ray_cluster")
class TestKilledBuilds:
    def _build(self, embeddings: str, index: Path, *settings: str) -> Process:
        command = ["index", "build", "--embeddings", embeddings, "--output", str(index), *settings]
        return Process(
            *command, "--workers.num_cpus", "0.5", modules="raytower.index.build, ray", **on_session_ray()
        )

    def test_a_build_killed_half_way_keeps_what_is_finished(self, tmp_path: Path) -> None:
        index = tmp_path / "index"
        embeddings = embeddings_of(tmp_path / "e", 0, 1200)
        builder = self._build(embeddings, index, "--kind", "flat", "--shards", "40", "--workers.num", "1")
        builder.start()
        while len(list((index / "shards").glob("[0-9a-f]*/shard.json"))) < 2:
            assert builder.is_running, builder.result()
            time.sleep(0.001)
        builder.kill()
        # Its workers are ended with it; a shard that one of them is moving into place would still appear.
        before = -1
        while before != (before := len(list((index / "shards").glob("[0-9a-f]*/shard.json")))):
            time.sleep(0.5)
        assert 2 <= before < 40
        assert version_names(Location.of(index)) == []
        finished = {
            place.parent.name: tree(place.parent) for place in (index / "shards").glob("[0-9a-f]*/shard.json")
        }
        fragments = tree(index / "table.lance" / "data")
        figures = build(index, embeddings, shards=40)
        assert (figures["version"], figures["shards"]) == ("000001", 40)
        assert {name: tree(index / "shards" / name) for name in finished} == finished
        assert tree(index / "table.lance" / "data") == fragments
        assert_holds(index, set(range(1200)))
        # The same build in one go has the same shards.
        build(tmp_path / "whole", embeddings, shards=40)
        digests = [
            {
                (entry.digest, entry.files["vectors.faiss"].sha256)
                for entry in Index.open(place).manifest.shards
            }
            for place in (index, tmp_path / "whole")
        ]
        assert digests[0] == digests[1]

    def test_a_killed_worker_s_shard_is_built_again(self, tmp_path: Path) -> None:
        """The task to kill is found by the file that it is writing. Ray starts it again."""
        index = tmp_path / "index"
        embeddings = embeddings_of(tmp_path / "e", 0, 8000)
        builder = self._build(embeddings, index, "--kind", "hnsw", "--shards", "2", "--workers.num", "1")
        builder.start()
        while not _kill_writer_below(index / "shards"):
            assert builder.is_running, builder.result()
        assert builder.result()["rows"] == 8000
        assert index_verify(IndexVerifyConfig(index=str(index)))["rows"] == 8000


def _kill_writer_below(folder: Path) -> bool:
    """Kill -9 a process that has a file below `folder` open for writing; False where there is none yet."""
    for links in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [os.readlink(link) for link in links.iterdir()]
        except OSError:
            continue  # ended meanwhile
        if any(target.startswith(f"{folder}/") and ".tmp/" in target for target in targets):
            os.kill(int(links.parent.name), signal.SIGKILL)
            return True
    return False


class TestWhatAKilledBuildLeft:
    """Its notes name files of the table; where those are gone, they are written again."""

    @pytest.fixture
    def killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
        index = tmp_path / "index"
        build(index, embeddings_of(tmp_path / "old", 0, 50))
        embeddings = embeddings_of(tmp_path / "new", 0, 250)

        def killed(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(build_module, "measured_against", killed)
            with pytest.raises(KeyboardInterrupt):
                build(index, embeddings)
        return index, embeddings

    def test_a_collection_took_its_version_of_the_table(self, killed: tuple[Path, str]) -> None:
        index, embeddings = killed
        delete_from_index(IndexDeleteConfig(index=str(index), ids=["id 3"]))
        collect_garbage(IndexGcConfig(index=str(index), keep=1))
        assert_holds(index, set(range(50)) - {3})
        assert build(index, embeddings, replace=True)["rows"] == 250
        assert_holds(index, set(range(250)))

    def test_its_fragments_are_gone(self, killed: tuple[Path, str]) -> None:
        index, embeddings = killed
        for note in (index / "work").rglob("table.json"):
            note.unlink()
        published = DocumentTable.open(Location.of(index), 2)
        needed = {
            Path(file.path).name for part in published._dataset.get_fragments() for file in part.data_files()
        }
        for path in (index / "table.lance" / "data").iterdir():
            if path.name not in needed:
                path.unlink()
        assert build(index, embeddings)["rows"] == 250
        assert_holds(index, set(range(250)))


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


class TestDisks:
    @pytest.fixture(autouse=True)
    def without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (build_module, compact_module):
            monkeypatch.setattr(module, "on_ray", lambda *_: HERE)

    @pytest.fixture
    def index(self, disk: SmallDisk, tmp_path: Path) -> Path:
        """A small published index on the small disk, with a change, so that there is something to compact."""
        index = disk.path / "index"
        build(index, embeddings_of(tmp_path / "first", 0, 60), shards=2)
        delete_from_index(IndexDeleteConfig(index=str(index), ids=["id 0"]))
        return index

    @pytest.fixture
    def commands(self, index: Path, tmp_path: Path) -> dict[str, tuple[list[str], set[int]]]:
        named = ["--index", str(index)]
        more, new = embeddings_of(tmp_path / "more", 60, 260), embeddings_of(tmp_path / "new", 0, 300)
        built = ["--embeddings", new, "--output", str(index), "--kind", "flat", "--replace", "true"]
        return {
            "build": (["index", "build", *built], set(range(300))),
            "add": (["index", "add", *named, "--embeddings", more], set(range(1, 260))),
            "delete": (["index", "delete", *named, "--ids", '["id 7"]'], set(range(1, 60)) - {7}),
            "set": (["index", "set", *named, "--filter", "id = 'id 7'", "--values", '{"year": 7}'], set()),
            "compact": (["index", "compact", *named], set(range(1, 60))),
            "rollback": (["index", "rollback", *named, "--to", "000001"], set(range(60))),
            "gc": (["index", "gc", *named, "--keep", "1"], set(range(1, 60))),
        }

    @pytest.mark.parametrize("name", ["build", "add", "delete", "compact", "rollback"])
    def test_wherever_the_space_ends_the_old_version_stays(
        self,
        disk: SmallDisk,
        index: Path,
        commands: dict[str, tuple[list[str], set[int]]],
        name: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        command, after = commands[name]
        codes = []
        # Each run goes on from what the one before left, a few pages further.
        for _ in range(60):
            disk.resize(disk.used_bytes + 3 * PAGE * (len(codes) // 2))
            capfd.readouterr()
            codes.append(main(command))
            disk.resize(64 * 2**20)
            if codes[-1] == 0:
                break
            message = one_complaint(capfd)
            assert f"no space is left for {disk.path}" in message
            assert version_names(Location.of(index)) == ["000001", "000002"]
            assert_holds(index, set(range(1, 60)))
        assert codes == [1] * (len(codes) - 1) + [0]
        assert len(codes) > 2
        assert_holds(index, after)
        assert index_verify(IndexVerifyConfig(index=str(index)))["rows"] == len(after)

    @pytest.mark.parametrize("name", ["build", "add", "delete", "compact", "rollback", "gc"])
    def test_a_disk_that_may_only_be_read(
        self,
        disk: SmallDisk,
        index: Path,
        commands: dict[str, tuple[list[str], set[int]]],
        name: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        command, after = commands[name]
        capfd.readouterr()
        disk.set_writable(False)
        try:
            assert main(command) == 2
            assert str(index) in one_complaint(capfd)
            assert_holds(index, set(range(1, 60)))
        finally:
            disk.set_writable(True)
        assert main(command) == 0
        assert_holds(index, after)


class TestDamagedTable:
    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        build(tmp_path / "index", embeddings_of(tmp_path / "e", 0, 250), indexed=["id"])
        return tmp_path / "index"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.unlink(),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-50]),
            lambda path: path.write_bytes(b"\xff" * (path.stat().st_size - 100) + path.read_bytes()[-100:]),
        ],
        ids=["gone", "empty", "cut", "overwritten"],
    )
    @pytest.mark.parametrize("part", ["data", "_versions", "_indices"])
    def test_it_is_said_in_one_line(
        self, index: Path, damage: Callable[[Path], Any], part: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for path in sorted((index / "table.lance" / part).rglob("*")):
            if path.is_file():
                damage(path)
        capfd.readouterr()
        code = main(["index", "delete", "--index", str(index), "--ids", '["id 7"]'])
        if part == "_indices" and code == 0:
            return  # what was left of the index was not asked
        assert code in (1, 2)
        assert str(index / "table.lance") in one_complaint(capfd)
        assert version_names(Location.of(index)) == ["000001"]

    def test_reading_a_damaged_table_is_a_format_error(self, index: Path) -> None:
        table = DocumentTable.open(Location.of(index))
        rows = table.row_map.rows()
        for path in (index / "table.lance" / "data").iterdir():
            path.unlink()
        fresh = DocumentTable.open(Location.of(index))
        for read in (
            lambda: fresh.row_map,
            lambda: list(fresh.scan(["text"])),
            lambda: fresh.documents(rows),
        ):
            with pytest.raises(
                FormatError, match=r"table.lance version \d is damaged: Not found: [^,]*; roll back"
            ):
                read()


class TestDamagedShard:
    """A change leaves most shards as they are; it must not publish a version that nobody can open all the same."""

    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        build(tmp_path / "index", embeddings_of(tmp_path / "e", 0, 250), kind="ivf_sq8", shards=2)
        return tmp_path / "index"

    @pytest.mark.parametrize("name", ["vectors.faiss", "rows.npy", "exact.npy"])
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda path: path.unlink(), "is missing; the index is damaged"),
            (lambda path: path.write_bytes(path.read_bytes()[:-5]), "it was truncated or changed"),
            (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read"),
        ],
        ids=["gone", "cut", "emptied"],
    )
    def test_no_change_publishes_it(
        self,
        index: Path,
        damage: Callable[[Path], Any],
        said: str,
        name: str,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        path = index / "shards" / Index.open(index).manifest.shards[1].digest / name
        damage(path)
        capfd.readouterr()
        assert main(["index", "delete", "--index", str(index), "--ids", '["id 7"]']) == 2
        message = one_complaint(capfd)
        assert said in message
        assert path.parent.name in message
        assert version_names(Location.of(index)) == ["000001"]

    def test_a_shard_that_stays_is_not_read_again(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half of a deletion would be spent on it."""
        read = []
        monkeypatch.setattr(
            faiss,
            "read_index",
            lambda *args, read_index=faiss.read_index: read.append(args) or read_index(*args),
        )
        delete_from_index(IndexDeleteConfig(index=str(index), ids=["id 3"]))
        assert read == []
        assert Index.open(index).num_rows == 249
        assert len(read) == 2


class TestBadInput:
    """Through the command line: exit code 2, one message, nothing written."""

    @pytest.fixture(autouse=True)
    def without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_module, "on_ray", lambda *_: HERE)

    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        build(tmp_path / "index", embeddings_of(tmp_path / "e", 0, 50))
        return tmp_path / "index"

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            (["search", "--query", "text", "--k", "0"], "k"),
            (["index", "verify", "--version", "000009"], "no version '000009'; it has: 000001"),
            (["index", "rollback", "--to", "v000001"], "no version 'v000001'; it has: 000001"),
            (["index", "delete", "--filter", "nope = 1"], "No field named nope"),
            (["index", "delete", "--filter", '{"nope": 1}'], "nope"),
            (["index", "delete", "--filter", "id = "], "filter cannot be evaluated"),
            (["index", "set", "--filter", "nope = 1", "--values", '{"text": "x"}'], "text cannot be set"),
            (["index", "delete", "--ids", '["nobody"]'], "1 of 1 ids are not in index"),
            (["index", "compact", "--shards", "51"], "shards is 51, more than the 50 rows"),
        ],
    )  # fmt: skip
    def test_what_is_asked_of_an_index(
        self, index: Path, command: list[str], message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = {name: known for name, known in tree(index).items() if name != "writer.lock"}
        capfd.readouterr()
        assert main([*command, "--index", str(index)]) == 2
        assert message in one_complaint(capfd)
        assert {name: known for name, known in tree(index).items() if name != "writer.lock"} == before

    def _refused(self, output: Path, embeddings: str, *more: str) -> None:
        command = ["index", "build", "--embeddings", embeddings, "--output", str(output), "--kind", "flat"]
        assert main([*command, *more]) == 2

    def test_an_output_that_is_a_file(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "index").write_text("precious")
        self._refused(tmp_path / "index", embeddings_of(tmp_path / "e", 0, 50))
        assert str(tmp_path / "index") in one_complaint(capfd)
        assert (tmp_path / "index").read_text() == "precious"

    def test_more_shards_than_rows(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._refused(tmp_path / "index", embeddings_of(tmp_path / "e", 0, 50), "--shards", "51")
        assert "shards is 51, more than the 50 rows" in one_complaint(capfd)
        assert not (tmp_path / "index").exists()

    def test_no_rows(self, index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        none = embeddings_of(tmp_path / "none", 0, 0)
        capfd.readouterr()
        self._refused(tmp_path / "other", none)
        assert "rows" in one_complaint(capfd)
        assert not (tmp_path / "other").exists()
        assert main(["index", "add", "--index", str(index), "--embeddings", none]) == 2
        assert "holds no rows" in one_complaint(capfd)

    def test_unfinished_embeddings(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        embeddings = embeddings_of(tmp_path / "e", 0, 50)
        next(Path(embeddings).glob("*.json")).unlink()
        self._refused(tmp_path / "index", embeddings)
        assert embeddings in one_complaint(capfd)
        assert not (tmp_path / "index").exists()
        shutil.rmtree(embeddings)
        self._refused(tmp_path / "index", embeddings)
        assert embeddings in one_complaint(capfd)
