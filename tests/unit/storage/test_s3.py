"""Storage on S3, against a real server process: places, whole files only, the cache, failures, and the index's way."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pytest

from raytower.cli import main
from raytower.config import WorkersConfig, make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.change import add_to_index, delete_from_index, set_in_index
from raytower.index.change_config import (
    IndexAddConfig,
    IndexDeleteConfig,
    IndexGcConfig,
    IndexRollbackConfig,
    IndexSetConfig,
    IndexVerifyConfig,
)
from raytower.index.collect import collect_garbage
from raytower.index.compact import compact_index
from raytower.index.config import IndexCompactConfig
from raytower.index.manage import index_rollback, index_verify
from raytower.index.reader import Index
from raytower.index.tasks import on_ray
from raytower.index.versions import open_manifest, version_names
from raytower.models.encoder import Encoder
from raytower.runtime import worker_environment
from raytower.storage import Lease, Location, absolute_if_local, objects, publish_directory, writer_lease
from raytower.storage import lease as lease_module
from raytower.storage import location as storage_module
from raytower.storage import s3 as s3_module
from raytower.storage.errors import StorageError, StorageRefusedError
from tests.support.encoding_here import encode_here, read_folder, write_corpus
from tests.support.index_cases import HERE, brute_force, build, clustered_vectors, embeddings_of, found_ids
from tests.support.s3_server import REGION, S3Server, s3_server
from tests.support.storage_races import HOLD, line_of, race, start

MIB = 2**20
ODD_KEYS = [
    "plain",
    "with space",
    "中文/文本.jsonl",
    "a%20b",
    "why?",
    "hash#tag",
    "x[1]*",
    "plus+and&is=@:;,",
]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket that no other test uses."""
    return f"{request.node.nodeid.encode().hex()[-40:]}"


@pytest.fixture
def place(s3: S3Server, prefix: str) -> Location:
    return Location.of(s3.uri(f"bucket/{prefix}"))


@contextmanager
def python_process(script: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs `script`; it does not outlive the block."""
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, **worker_environment()}
    with subprocess.Popen(command, env=environment, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, "the process ended before it got so far"
        time.sleep(0.01)


class TestPlaces:
    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_a_place_survives_its_own_name(
        self, s3: S3Server, prefix: str, place: Location, key: str
    ) -> None:
        written = place / key
        written.write_bytes(key.encode())
        assert s3.read("bucket", f"{prefix}/{key}") == key.encode()
        again = Location.of(str(written))
        assert again == written
        assert again.read_bytes() == key.encode()
        assert pickle.loads(pickle.dumps(written)) == written

    def test_endpoint_and_region_of_the_environment_travel_in_the_name(
        self, s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.address}")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        written = Location.of(f"s3://bucket/{prefix}/x")
        written.write_bytes(b"1")
        assert str(written) == s3.uri(f"bucket/{prefix}/x", region="eu-central-1").replace(
            "scheme=http&region=eu-central-1", "region=eu-central-1&scheme=http"
        )
        assert absolute_if_local(f"s3://bucket/{prefix}/x") == str(written)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://elsewhere.invalid")
        assert "endpoint_override=elsewhere.invalid" in str(Location.of("s3://bucket/x"))
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.delenv("AWS_REGION")
        assert Location.of(str(written)).read_bytes() == b"1"

    def test_options_of_a_uri(self, s3: S3Server, prefix: str) -> None:
        as_url = Location.of(f"s3://bucket/{prefix}/x?endpoint_override=http://{s3.address}&region={REGION}")
        assert as_url == Location.of(s3.uri(f"bucket/{prefix}/x"))
        created = Location.of(s3.uri(f"made-{prefix[:20]}", allow_bucket_creation="true"))
        created.make_dir()
        assert f"made-{prefix[:20]}" in [item["Name"] for item in s3.client.list_buckets()["Buckets"]]
        assert str(created).endswith("&allow_bucket_creation=true")

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("s3://key:secret@bucket/x", r"s3://…@bucket/x holds credentials.*AWS_ACCESS_KEY_ID"),
            ("s3:///x", "names no bucket"),
            ("s3://bucket/x?regoin=here", "option 'regoin'; the options .* are: endpoint_override, region"),
            ("s3://bucket/x?endpoint_override=h&scheme=ftp", "scheme 'ftp'; it is http or https"),
            ("s3://bucket/x?endpoint_override=h&anonymous=maybe", "anonymous=maybe; it is true or false"),
        ],
    )
    def test_uris_that_are_refused(self, uri: str, message: str) -> None:
        with pytest.raises(InputError, match=message) as refused:
            Location.of(uri)
        assert "secret" not in str(refused.value)

    def test_local_uris_may_hold_any_letter(self, tmp_path: Path) -> None:
        (tmp_path / "中 文").mkdir()
        Location.of(f"file://{tmp_path}/中 文/x").write_bytes(b"1")
        assert (tmp_path / "中 文" / "x").read_bytes() == b"1"

    def test_listing_sizes_and_removal(self, s3: S3Server, prefix: str, place: Location) -> None:
        for name in ("b", "a", "deep/er/c"):
            s3.put("bucket", f"{prefix}/{name}", name.encode())
        assert [child.name for child in place.children()] == ["a", "b", "deep"]
        recursive = [info.path for info in place.infos(recursive=True) if info.is_file]
        assert recursive == [f"bucket/{prefix}/{name}" for name in ("a", "b", "deep/er/c")]
        assert ((place / "deep").is_dir(), (place / "a").is_dir()) == (True, False)
        assert (place / "deep" / "er" / "c").size_bytes() == 9
        assert (place / "deep").parent == place
        assert (place / "none").children() == []
        (place / "none").delete()
        (place / "a").delete()
        (place / "deep").delete()
        assert s3.keys("bucket", prefix) == [f"{prefix}/b"]
        place.delete()
        assert not place.exists()
        place.make_dir()
        assert place.is_dir()

    def test_a_checksum_over_several_requests(self, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage_module, "_DOWNLOAD_BYTES", 1000)
        content = np.random.default_rng(0).bytes(4321)
        (place / "x").write_bytes(content)
        assert (place / "x").sha256() == hashlib.sha256(content).hexdigest()


class TestWholeOrNothing:
    def test_large_files_arrive_whole(self, s3: S3Server, prefix: str, place: Location) -> None:
        content = np.random.default_rng(0).bytes(23 * MIB)  # three parts of an upload
        (place / "x").write_bytes(content)
        assert hashlib.sha256(s3.read("bucket", f"{prefix}/x")).digest() == hashlib.sha256(content).digest()

    @pytest.mark.parametrize("old", [None, b"old"])
    def test_an_exception_leaves_what_was_there(
        self, s3: S3Server, prefix: str, place: Location, old: bytes | None
    ) -> None:
        if old is not None:
            s3.put("bucket", f"{prefix}/x", old)
        with pytest.raises(ValueError, match="interrupted"), (place / "x").open_write() as stream:  # noqa: PT012
            stream.write(b"new" * 5 * MIB)
            raise ValueError("interrupted")
        assert s3.keys("bucket", prefix) == ([f"{prefix}/x"] if old else [])
        if old is not None:
            assert s3.read("bucket", f"{prefix}/x") == old

    @pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
    def test_a_process_ended_in_an_upload_leaves_what_was_there(
        self, s3: S3Server, prefix: str, place: Location, tmp_path: Path, kind: signal.Signals
    ) -> None:
        """The uploader reads from a pipe that the test feeds, so it is ended when two parts have been sent."""
        s3.put("bucket", f"{prefix}/x", b"old")
        script = (
            "import sys\nfrom pathlib import Path\nfrom raytower.storage import location as storage\n"
            f"storage._UPLOAD_BYTES = {11 * MIB}\n"
            "storage.Location.of(sys.argv[1]).move_from_local(Path(sys.argv[2]))\n"
        )
        os.mkfifo(tmp_path / "pipe")
        with python_process(
            script, str(place / "x"), str(tmp_path / "pipe"), stderr=subprocess.PIPE
        ) as process:
            with open(tmp_path / "pipe", "wb") as pipe:
                pipe.write(b"n" * 22 * MIB)
                pipe.flush()
                parts = f"PUT /bucket/{prefix}/x?partNumber=2"
                wait_until(lambda: any(line.startswith(parts) for line in s3.requests()), process)
                process.send_signal(kind)
            # The pipe is closed after the signal: an interrupt that came just before a read began does not wake that
            # read, only its end does, and then Python sees the interrupt first.
            process.wait(timeout=120)
            assert process.returncode == -kind
        assert s3.read("bucket", f"{prefix}/x") == b"old"

    def test_a_failed_upload_is_not_silent(self, s3: S3Server, tmp_path: Path) -> None:
        for size in (1, 12 * MIB):
            with pytest.raises(StorageRefusedError, match="bucket that does not exist"):
                Location.of(s3.uri("no-such-bucket/x")).write_bytes(b"x" * size)


class TestConditionalWrites:
    def test_one_of_many_processes_creates_an_object(
        self, s3: S3Server, prefix: str, place: Location
    ) -> None:
        answers = race(str(place / "中 %20" / "x"))
        assert sorted(answers) == ["False"] * 7 + ["True"]
        assert s3.read("bucket", f"{prefix}/中 %20/x") == str(answers.index("True")).encode() * 100_000

    def test_replace_if_takes_only_what_was_read(self, s3: S3Server, prefix: str, place: Location) -> None:
        where = (place.filesystem, (place / "x").path)
        assert objects.read(*where) is None
        assert not objects.replace(*where, b"2", '"anything"')
        s3.put("bucket", f"{prefix}/x", b"1")
        content, etag = objects.read(*where) or (b"", "")
        assert content == b"1"
        assert [objects.replace(*where, new, etag) for new in (b"2", b"3")] == [True, False]
        assert s3.read("bucket", f"{prefix}/x") == b"2"

    def test_creating_in_a_bucket_that_does_not_exist(self, s3: S3Server) -> None:
        with pytest.raises(StorageRefusedError, match="bucket that does not exist"):
            Location.of(s3.uri("no-such-bucket/x")).put_if_absent(b"1")

    def test_a_listing_is_one_request(self, s3: S3Server, prefix: str, place: Location) -> None:
        for name in ("a", "b", "c"):
            s3.put("bucket", f"{prefix}/{name}", name.encode() * 5)
        before = len(s3.requests())
        assert [(info.base_name, info.size) for info in place.infos()] == [("a", 5), ("b", 5), ("c", 5)]
        assert len(s3.requests()) - before == 1

    def test_a_dead_holder_s_lease_is_taken_over_when_it_expires(self, place: Location) -> None:
        process = start(HOLD, str(place / "lease"), "3")
        try:
            assert line_of(process) == "held"
            time.sleep(5)  # longer than a lease that nobody renews would last
            refused = pytest.raises(RaytowerError, match="held by first since 20")
            with refused, writer_lease(place / "lease", owner="second", seconds=3):
                pass
            process.kill()
            with writer_lease(place / "lease", owner="second", seconds=3, wait_seconds=60) as lease:
                lease.check()
            with writer_lease(place / "lease", owner="third", seconds=3) as lease:
                (place / "lease").write_bytes(b"{}")
                wait_for_loss(lease)
        finally:
            process.kill()
            process.communicate()

    @pytest.mark.parametrize("ahead_s", [7200.0, -7200.0])
    def test_a_clock_that_is_hours_off_takes_no_living_holder_s_lease(
        self, place: Location, ahead_s: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two hours ahead, a second writer took the lease while the first wrote on until its next renewal."""
        process = start(HOLD, str(place / "lease"), "3")
        try:
            assert line_of(process) == "held"
            monkeypatch.setattr(lease_module, "time", Clock(ahead_s))
            refused = pytest.raises(RaytowerError, match="held by first since 20")
            with refused, writer_lease(place / "lease", owner="second", seconds=3):
                pass
        finally:
            process.kill()
            process.communicate()

    def test_a_dead_holder_s_clock_keeps_nobody_waiting(
        self, place: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A holder whose clock was two hours ahead and who was killed kept others waiting for two hours."""
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "time", Clock(7200.0))
            mine = {"owner": "first", "since": "2026", "token": "1"}
            dead = lease_module._ObjectLease(place / "lease", mine, 1.0)
            assert dead._try() is None
        # A job that waits for nobody waits for the dead, or it would fail each time that it is submitted again.
        began = time.monotonic()
        with writer_lease(place / "lease", owner="second", seconds=1) as lease:
            lease.check()
        assert 1.5 <= time.monotonic() - began < 30

    def test_a_clock_that_is_set_back_lengthens_no_lease(
        self, place: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(0.0)
        monkeypatch.setattr(lease_module, "time", clock)
        held = lease_module._ObjectLease(place / "lease", {"owner": "first", "token": "1"}, 0.5)
        read = held._read

        def read_later() -> Any:
            found = read()
            if found is not None:  # it was written a moment ago
                clock.ahead_s = -3600.0
            return found

        monkeypatch.setattr(held, "_read", read_later)
        assert held._try() is None
        assert held.is_held()
        time.sleep(0.6)
        assert not held.is_held()

    def test_lance_opens_the_same_place(self, s3: S3Server, prefix: str, place: Location) -> None:
        lance = pytest.importorskip("lance")
        uri, options = (place / "中 %20?" / "table").lance_uri()
        lance.write_dataset(pa.table({"a": [1, 2]}), uri, storage_options=options)
        assert lance.dataset(uri, storage_options=options).count_rows() == 2
        assert any(key.startswith(f"{prefix}/中 %20?/table/data/") for key in s3.keys("bucket", prefix))


def wait_for_loss(lease: Lease) -> None:
    deadline = time.monotonic() + 30
    with pytest.raises(RaytowerError, match="was lost"):  # noqa: PT012
        while time.monotonic() < deadline:
            lease.check()
            time.sleep(0.05)


class Clock:
    """In place of the module `time`: the time of day is `ahead_s` off."""

    monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    def time(self) -> float:
        return time.time() + self.ahead_s


class TestDirectories:
    def test_the_manifest_comes_last(self, s3: S3Server, prefix: str, place: Location) -> None:
        with publish_directory(place) as folder:
            for name in ("z.bin", "manifest.json", "raytower.json", "deep/a.bin"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        puts = [line for line in s3.requests() if line.startswith(f"PUT /bucket/{prefix}/")]
        order = ["deep/a.bin", "z.bin", "manifest.json", "raytower.json"]
        assert puts == [f"PUT /bucket/{prefix}/{name}" for name in order]
        assert s3.read("bucket", f"{prefix}/deep/a.bin") == b"deep/a.bin"

    def test_an_exception_publishes_nothing(self, s3: S3Server, prefix: str, place: Location) -> None:
        with pytest.raises(ValueError, match="interrupted"), publish_directory(place) as folder:  # noqa: PT012
            (folder / "a").write_text("1")
            raise ValueError("interrupted")
        assert s3.keys("bucket", prefix) == []

    def test_what_was_there_is_never_mixed_with_what_comes(
        self, s3: S3Server, prefix: str, place: Location
    ) -> None:
        for name in ("weights", "manifest.json", "stale"):
            s3.put("bucket", f"{prefix}/{name}", b"old")
        before = len(s3.requests())
        with publish_directory(place) as folder:
            for name in ("weights", "manifest.json"):
                (folder / name).write_text("new")
        lines = [line for line in s3.requests()[before:] if line.startswith(("PUT", "DELETE"))]
        changes = [line for line in lines if not line.endswith("/")]  # those only mark a folder
        assert changes == [
            f"DELETE /bucket/{prefix}/manifest.json",
            f"DELETE /bucket/{prefix}/stale",
            f"PUT /bucket/{prefix}/weights",
            f"PUT /bucket/{prefix}/manifest.json",
        ]
        assert [s3.read("bucket", key) for key in s3.keys("bucket", prefix)] == [b"new", b"new"]


class TestCache:
    CONTENT = b"0123456789" * 1000
    SHA256, SIZE = hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)

    @pytest.fixture
    def stored(self, s3: S3Server, prefix: str, place: Location) -> Location:
        s3.put("bucket", f"{prefix}/x", self.CONTENT)
        return place / "x"

    def _files(self, cache: Path) -> list[str]:
        return sorted(file.name for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock")

    def test_a_file_is_fetched_once(self, s3: S3Server, stored: Location, tmp_path: Path) -> None:
        path = stored.fetch(tmp_path, self.SHA256, self.SIZE)
        assert path.read_bytes() == self.CONTENT
        assert self._files(tmp_path) == [f"{self.SHA256}-x"]
        before = s3.requests()
        assert stored.fetch(tmp_path, self.SHA256, self.SIZE) == path
        assert s3.requests() == before

    @pytest.mark.parametrize("bad", [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", b""])
    def test_a_download_with_other_bytes_is_refused_and_not_kept(
        self, s3: S3Server, prefix: str, stored: Location, tmp_path: Path, bad: bytes
    ) -> None:
        s3.put("bucket", f"{prefix}/x", bad)
        with pytest.raises(FormatError, match=f"x.* has sha256 .*{self.SHA256[:12]}… was expected"):
            stored.fetch(tmp_path, self.SHA256, self.SIZE)
        assert self._files(tmp_path) == []
        s3.put("bucket", f"{prefix}/x", self.CONTENT)
        assert stored.fetch(tmp_path, self.SHA256, self.SIZE).read_bytes() == self.CONTENT

    @pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
    def test_a_damaged_copy_is_fetched_again(self, stored: Location, tmp_path: Path, damage: bytes) -> None:
        path = stored.fetch(tmp_path, self.SHA256, self.SIZE)
        path.write_bytes(damage)
        assert stored.fetch(tmp_path, self.SHA256, self.SIZE).read_bytes() == self.CONTENT

    def test_a_copy_that_was_touched_alone_is_not_fetched_again(
        self, s3: S3Server, stored: Location, tmp_path: Path
    ) -> None:
        path = stored.fetch(tmp_path, self.SHA256, self.SIZE)
        path.touch()
        before = s3.requests()
        assert stored.fetch(tmp_path, self.SHA256, self.SIZE) == path
        assert s3.requests() == before

    def test_a_missing_file_and_a_local_one(self, stored: Location, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no file at s3://"):
            (stored.parent / "none").fetch(tmp_path, self.SHA256, self.SIZE)
        (tmp_path / "own").write_bytes(b"1")
        assert Location.of(tmp_path / "own").fetch(tmp_path, "0" * 64, 1) == tmp_path / "own"

    def test_processes_at_once_share_one_download(
        self, s3: S3Server, stored: Location, tmp_path: Path
    ) -> None:
        script = (
            "import sys\nfrom pathlib import Path\nfrom raytower.storage import Location\n"
            "place = Location.of(sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.readline()\n"
            "print(Location.of(place.fetch(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))).sha256())\n"
        )
        arguments = (str(stored), str(tmp_path), self.SHA256, str(self.SIZE))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with ExitStack() as stack:
            processes = [stack.enter_context(python_process(script, *arguments, **pipes)) for _ in range(3)]
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            before = len(s3.requests())
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            assert [process.communicate()[0].strip() for process in processes] == [self.SHA256] * 3
        gets = [line for line in s3.requests()[before:] if line.startswith("GET")]
        assert len(gets) == 1
        assert self._files(tmp_path) == [f"{self.SHA256}-x"]

    def test_a_process_killed_in_a_download_leaves_nothing_in_the_way(
        self, stored: Location, tmp_path: Path
    ) -> None:
        script = (
            "import sys, time\nfrom pathlib import Path\nfrom raytower.storage import Location\n"
            "def hang(self, stream):\n    print('half', flush=True)\n    time.sleep(600)\n"
            "Location.read_chunk = hang\n"
            "Location.of(sys.argv[1]).fetch(Path(sys.argv[2]), sys.argv[3], 1)\n"
        )
        with python_process(
            script, str(stored), str(tmp_path), self.SHA256, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "half\n"
            process.kill()
        assert len(self._files(tmp_path)) == 1  # what it was writing, under a name that nobody reads
        assert stored.fetch(tmp_path, self.SHA256, self.SIZE).read_bytes() == self.CONTENT
        assert self._files(tmp_path) == [f"{self.SHA256}-x"]


class TestFailures:
    def _ask(self, uri: str) -> list[str]:
        return ["index", "list", "--index", uri]

    def _complaint(self, capfd: pytest.CaptureFixture[str]) -> str:
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert err.count("\n") == 1
        return err

    def test_an_endpoint_where_nobody_listens(self, capfd: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{closed.getsockname()[1]}"
            uri = f"s3://bucket/x?endpoint_override={address}&scheme=http"
            assert main(self._ask(uri)) == 1
            assert "cannot be reached" in self._complaint(capfd)
            for size in (1, 12 * MIB):
                with pytest.raises(StorageError, match=f"{address}.* cannot be reached") as failed:
                    Location.of(uri).write_bytes(b"x" * size)
                assert not isinstance(failed.value, InputError)

    def test_an_endpoint_that_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_module, "_SILENT_SECONDS", 1.0)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
            with pytest.raises(StorageError, match="cannot be reached"):
                Location.of(uri).exists()

    def test_a_bucket_that_does_not_exist(self, s3: S3Server, capfd: pytest.CaptureFixture[str]) -> None:
        place = Location.of(s3.uri("no-such-bucket/x"))
        with pytest.raises(InputError, match="no file at s3://no-such-bucket/x"):
            place.read_bytes()
        with pytest.raises(
            StorageRefusedError, match=r"bucket that does not exist.*allow_bucket_creation=true"
        ):
            place.make_dir()
        assert isinstance(StorageRefusedError("x"), InputError)
        assert main(self._ask(str(place))) == 2
        assert "holds no index" in self._complaint(capfd)

    def test_credentials_that_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with s3_server(tmp_path) as server:
            iam = boto3.client("iam", endpoint_url=f"http://{server.address}", region_name=REGION)
            iam.create_user(UserName="user")
            key = iam.create_access_key(UserName="user")["AccessKey"]
            policy = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            iam.put_user_policy(
                UserName="user",
                PolicyName="all",
                PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [policy]}),
            )
            server.put("bucket", "x", b"1")
            server.check_credentials()
            place = Location.of(server.uri("bucket/x"))
            for secret in ("nobody", "wrong"):
                if secret == "wrong":
                    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
                uses: list[Callable[[], object]] = [
                    place.read_bytes,
                    place.exists,
                    place.children,
                    place.make_dir,
                    lambda: place.write_bytes(b"2"),
                    lambda: place.write_bytes(b"2" * 12 * MIB),
                ]
                for use in uses:
                    with pytest.raises(StorageRefusedError, match=r"refuses access.*check the credentials"):
                        use()
            assert main(self._ask(server.uri("bucket"))) == 2
            assert "refuses access" in self._complaint(capfd)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
            assert place.read_bytes() == b"1"

    def test_a_process_that_used_it_ends_quietly(self, place: Location) -> None:
        script = (
            "import sys\nfrom raytower.storage import Location\n"
            "Location.of(sys.argv[1]).write_bytes(b'1')\nprint(Location.of(sys.argv[1]).exists())\n"
        )
        with python_process(
            script, str(place / "x"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.communicate(timeout=120) == ("True\n", "")
            assert process.returncode == 0

    @pytest.mark.usefixtures("ray_cluster")
    def test_a_worker_s_failure_reaches_the_user_as_one_message(self, s3: S3Server) -> None:
        def write(uri: str) -> None:
            Location.of(uri).write_bytes(b"1")

        workers = WorkersConfig(num_cpus=0.5)
        with pytest.raises(InputError, match=r"^s3://no-such-bucket\S* is in a bucket that does not exist"):
            on_ray(workers)(write, [(s3.uri("no-such-bucket/x"),)])
        with pytest.raises(RaytowerError, match=r"^s3://bucket/x\S* cannot be reached") as failed:
            on_ray(workers)(write, [("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http",)])
        assert not isinstance(failed.value, InputError)


@pytest.fixture(scope="class")
def built(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """An index in the bucket with two flat shards over 300 vectors."""
    vectors = clustered_vectors(300)
    embeddings = embeddings_of(tmp_path_factory.mktemp("flat") / "embeddings", vectors)
    for file in Path(embeddings).iterdir():
        s3.put("bucket", f"flat/embeddings/{file.name}", file.read_bytes())
    figures = build(s3.uri("bucket/flat/index"), s3.uri("bucket/flat/embeddings"), shards=2)
    assert (figures["version"], figures["shards"]) == ("000001", 2)
    return s3.uri("bucket/flat/index"), vectors


def _copy_embeddings(s3: S3Server, key: str, manifest: EmbeddingsManifest, folder: Path) -> pa.Table:
    """The rows of `s3://bucket/key`, whose files have the checksums of its manifest, by way of a folder here."""
    folder.mkdir()
    for entry in manifest.files:
        content = s3.read("bucket", f"{key}/{entry.name}")
        assert hashlib.sha256(content).hexdigest() == entry.sha256
        (folder / entry.name).write_bytes(content)
    manifest.write(Location.of(folder))
    return read_folder(folder)


class TestIndex:
    def test_encode_build_verify_and_search(
        self,
        s3: S3Server,
        prefix: str,
        ray_cluster: None,
        dummy_encoder_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The driver finds the endpoint in its environment; workers, which lack that, find it in what they are sent."""
        texts = write_corpus(tmp_path / "corpus.jsonl", 60)
        s3.put("bucket", f"{prefix}/corpus/texts.jsonl", (tmp_path / "corpus.jsonl").read_bytes())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.address}")
        root = f"s3://bucket/{prefix}"
        values = {
            "encoder": str(dummy_encoder_dir),
            "input": {"path": f"{root}/corpus"},
            "output": f"{root}/embeddings",
            "max_length": 64,
            "rows_per_file": 16,
            "workers": {"min": 1, "num": 2, "num_cpus": 0.5},
        }
        assert encode(make_config(EncodeConfig, values))["rows"] == 60
        assert encode(make_config(EncodeConfig, values))["files_encoded"] == 0
        local = encode_here(
            make_config(
                EncodeConfig,
                {
                    **values,
                    "input": {"path": str(tmp_path / "corpus.jsonl")},
                    "output": str(tmp_path / "out"),
                },
            )
        )
        remote = EmbeddingsManifest.read(Location.of(f"{root}/embeddings"))
        assert remote.fingerprint == local["fingerprint"]
        copied = _copy_embeddings(s3, f"{prefix}/embeddings", remote, tmp_path / "copy")
        assert copied["text"].to_pylist() == texts
        assert copied.drop_columns(["id"]).equals(read_folder(tmp_path / "out").drop_columns(["id"]))

        settings = ["--workers.num_cpus", "0.5", "--workers.num", "2", "--shards", "2"]
        command = ["index", "build", "--embeddings", f"{root}/embeddings", "--output", f"{root}/index"]
        assert main([*command, *settings]) == 0
        assert main(["index", "verify", "--index", f"{root}/index"]) == 0
        assert json.loads(capfd.readouterr().out.splitlines()[-1])["verified"] is True
        question = texts[33]
        assert main(["search", "--index", f"{root}/index", "--query", question, "--k", "3", "--json"]) == 0
        found = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert found["results"][0]["text"] == question
        assert found["results"][0]["score"] == pytest.approx(1.0, abs=1e-5)
        index = Index.open(
            f"{root}/index", encoder_fingerprint=Encoder.load(str(dummy_encoder_dir)).fingerprint
        )
        assert index.num_rows == 60

    def test_hits_are_those_of_brute_force(self, built: tuple[str, np.ndarray]) -> None:
        queries = clustered_vectors(20, seed=9)
        index = Index.open(built[0])
        assert found_ids(index, queries, 10) == brute_force(built[1], queries, 10)
        assert len(found_ids(index, queries[:1], 10, filter={"year": {"$lt": 2005}})[0]) == 5

    @pytest.mark.parametrize("shards", [2, 8])
    def test_an_index_opens_in_as_many_requests_whatever_its_shards(
        self, s3: S3Server, prefix: str, built: tuple[str, np.ndarray], shards: int
    ) -> None:
        place = s3.uri(f"bucket/{prefix}/index-{shards}")
        build(place, s3.uri("bucket/flat/embeddings"), shards=shards)
        Index.open(place)
        before = len(s3.requests())
        Index.open(place)
        asked = [line for line in s3.requests()[before:] if f"index-{shards}" in line]
        assert not [line for line in asked if "/shards/" in line], (
            "shards are in the cache, known by their checksums"
        )
        assert len(asked) < 20

    def test_damage_in_the_bucket(
        self, s3: S3Server, built: tuple[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = f"flat/index/shards/{open_manifest(built[0]).shards[1].digest}/vectors.faiss"
        whole = s3.read("bucket", key)
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path))
        try:
            for content in (bytes(damaged), whole[:-1]):
                s3.put("bucket", key, content)
                with pytest.raises(FormatError, match=r"vectors\.faiss.* has sha256"):
                    Index.open(built[0])
        finally:
            s3.put("bucket", key, whole)
        expected = found_ids(Index.open(built[0]), clustered_vectors(5, seed=2), 5)
        (copy,) = [path for path in tmp_path.rglob("*-vectors.faiss") if path.read_bytes() == whole]
        copy.write_bytes(whole[:-5])
        assert found_ids(Index.open(built[0]), clustered_vectors(5, seed=2), 5) == expected
        assert copy.read_bytes() == whole

    def test_verify_reads_the_bucket_not_the_cache(
        self, s3: S3Server, built: tuple[str, np.ndarray], capfd: pytest.CaptureFixture[str]
    ) -> None:
        Index.open(built[0])  # every shard is in the cache, whole
        key = f"flat/index/shards/{open_manifest(built[0]).shards[0].digest}/rows.npy"
        whole = s3.read("bucket", key)
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        s3.put("bucket", key, bytes(damaged))
        try:
            assert main(["index", "verify", "--index", built[0]]) == 2
            assert "rows.npy" in capfd.readouterr().err
        finally:
            s3.put("bucket", key, whole)

    def test_every_change_and_a_build_that_was_killed(
        self, s3: S3Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import raytower.index.build as module

        vectors = clustered_vectors(200)
        place, embeddings = s3.uri(f"bucket/{prefix}/index"), embeddings_of(tmp_path / "e", vectors)
        publish, builds = module.publish, []
        build_shard = module.build_shard
        monkeypatch.setattr(module, "build_shard", lambda *call: builds.append(1) or build_shard(*call))
        monkeypatch.setattr(module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(place, embeddings, shards=2)
        monkeypatch.setattr(module, "publish", publish)
        build(place, embeddings, shards=2)
        assert len(builds) == 2, "finished shards are found again in the bucket too"
        more = embeddings_of(tmp_path / "more", clustered_vectors(5, seed=3), 200)
        assert add_to_index(IndexAddConfig(index=place, embeddings=more))["rows"] == 205
        assert delete_from_index(IndexDeleteConfig(index=place, ids=["id 0"]))["rows"] == 204
        assert (
            set_in_index(IndexSetConfig(index=place, values={"year": 1}, filter={"year": 2001}))["changed"]
            == 1
        )
        assert compact_index(IndexCompactConfig(index=place), run=HERE)["rows"] == 204
        assert index_rollback(IndexRollbackConfig(index=place, to="000002"))["version"] == "000006"
        assert Index.open(place).num_rows == 205
        collected = collect_garbage(IndexGcConfig(index=place, keep=1, unfinished=True))
        assert collected["freed_bytes"] > 0
        assert Index.open(place).num_rows == 205
        assert index_verify(IndexVerifyConfig(index=place))["verified"]

    def test_two_writers_at_once_lose_nothing(self, s3: S3Server, prefix: str, tmp_path: Path) -> None:
        place = s3.uri(f"bucket/{prefix}/index")
        build(place, embeddings_of(tmp_path / "e", clustered_vectors(50)))

        def change(number: int) -> None:
            if number % 2:
                delete_from_index(IndexDeleteConfig(index=place, ids=[f"id {number}"]))
            else:
                folder = embeddings_of(
                    tmp_path / f"more-{number}", clustered_vectors(2, seed=number), 100 + number
                )
                add_to_index(IndexAddConfig(index=place, embeddings=folder))

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(change, range(6)))
        assert Index.open(place).num_rows == 50 + 3 * 2 - 3
        assert len(version_names(Location.of(place))) == 7
