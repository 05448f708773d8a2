"""Storage on a local disk: creation by one of many, compare-and-swap, leases, permissions, directories, URIs."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

import pytest

from raytower.errors import InputError, RaytowerError
from raytower.storage import (
    Location,
    StorageRefusedError,
    absolute_if_local,
    local,
    publish_directory,
    writer_lease,
)
from raytower.storage import location as location_module
from tests.support.storage_races import HOLD, line_of, race, start


def test_a_tilde_is_a_home_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~state.json` ended with a traceback; as in a shell it is a name like another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Location.of("~/x").path == str(tmp_path / "home" / "x")
    assert Location.of("~nobody of this name/x").path == str(tmp_path / "~nobody of this name" / "x")
    assert absolute_if_local("~nobody of this name") == "~nobody of this name"


def test_one_of_many_processes_creates_a_file(tmp_path: Path) -> None:
    answers = race(str(tmp_path / "new" / "x"))
    assert sorted(answers) == ["False"] * 7 + ["True"]
    assert (tmp_path / "new" / "x").read_bytes() == str(answers.index("True")).encode() * 100_000
    assert os.listdir(tmp_path / "new") == ["x"]


def test_creation_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", refuse)
    place = Location.of(tmp_path / "x")
    assert [place.put_if_absent(b"1"), place.put_if_absent(b"2")] == [True, False]
    assert place.read_bytes() == b"1"


def test_a_lease_has_one_holder_and_ends_with_it(tmp_path: Path) -> None:
    place = Location.of(tmp_path / "index" / "writer.lock")
    process = start(HOLD, str(place), "60")
    try:
        assert line_of(process) == "held"
        refused = pytest.raises(RaytowerError, match=r"writer\.lock is held by first since 20\d\d-")
        with refused, writer_lease(place, owner="second"):
            pass
        process.kill()
        with writer_lease(place, owner="second", wait_seconds=30) as lease:
            lease.check()
            (tmp_path / "index" / "writer.lock").unlink()
            with pytest.raises(RaytowerError, match="was lost"):
                lease.check()
    finally:
        process.kill()
        process.communicate()


def test_a_file_system_without_locks_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(StorageRefusedError, match=r"its file system has no locks.*lockd"),
        writer_lease(Location.of(tmp_path / "l"), owner="me"),
    ):
        pass


def test_the_umask_gives_the_permissions(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        place = Location.of(tmp_path / "team")
        with writer_lease(place / "writer.lock", owner="me"):
            (place / "x").put_if_absent(b"1")
            (place / "y").write_bytes(b"1")
            assert stat.S_IMODE((tmp_path / "team" / "writer.lock").stat().st_mode) == 0o664
        with publish_directory(place / "folder") as folder:
            (folder / "z").write_text("1")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "team").rglob("*")}
    assert modes == {"x": 0o664, "y": 0o664, "folder": 0o775, "z": 0o664}


class TestPublishedDirectories:
    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_the_new_one_takes_the_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
    ) -> None:
        if not can_exchange:
            monkeypatch.setattr(local, "exchange", lambda *_: False)
        for content in ("old", "new"):
            with publish_directory(Location.of(tmp_path / "d")) as folder:
                (folder / content).write_text(content)
        assert os.listdir(tmp_path) == ["d"]
        assert os.listdir(tmp_path / "d") == ["new"]

    def test_the_name_is_never_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Were the folder moved away before the new one comes, a crash in between would leave nothing."""
        (tmp_path / "d").mkdir()

        def refuse(*_: object) -> None:
            raise AssertionError("two steps")

        monkeypatch.setattr(os, "rename", refuse)
        with publish_directory(Location.of(tmp_path / "d")) as folder:
            (folder / "new").write_text("")
        assert os.listdir(tmp_path / "d") == ["new"]

    def test_a_link_stays_one(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "d").symlink_to(tmp_path / "disk")
        with publish_directory(Location.of(tmp_path / "d")) as folder:
            (folder / "new").write_text("")
        assert (tmp_path / "d").is_symlink()
        assert os.listdir(tmp_path / "disk") == ["new"]


def test_the_cache_lets_go_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for name, age in (("old", 9000), ("older", 9900), ("used", 5000), ("fresh", 10)):
        path = tmp_path / "ab" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (now - age, 0))
    monkeypatch.setenv("RAYTOWER_CACHE_BYTES", "250")
    location_module._evict(tmp_path)
    assert sorted(os.listdir(tmp_path / "ab")) == ["fresh", "used"]
    monkeypatch.setenv("RAYTOWER_CACHE_BYTES", "0")
    location_module._evict(tmp_path)
    assert os.listdir(tmp_path / "ab") == ["fresh"]
    monkeypatch.setenv("RAYTOWER_CACHE_BYTES", "50GiB")
    with pytest.raises(InputError, match="RAYTOWER_CACHE_BYTES is '50GiB'"):
        location_module._evict(tmp_path)


@pytest.mark.parametrize(
    "uri", ["abfs://acct:hush@c/p", "ftp://u:hush@h/p", "abfs://a@c/p?client_secret=hush"]
)
def test_credentials_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InputError, match="holds credentials") as refused:
        Location.of(uri)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "uri", ["gs://anonymous@b/p?endpoint_override=localhost:1&scheme=http", "abfs://acct@c/p%20q"]
)
def test_a_name_keeps_the_options(uri: str) -> None:
    place = Location.of(uri)
    assert Location.of(str(place)) == place
    assert ("anonymous@" in str(place), "acct@" in str(place)) == ("gs:" in uri, "abfs:" in uri)
