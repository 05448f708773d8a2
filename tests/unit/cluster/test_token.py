"""`raytower cluster init`: one token, for its owner alone."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from raytower.cli import main
from raytower.cluster.config import ClusterInitConfig
from raytower.cluster.token import init_cluster
from raytower.errors import InputError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".ray" / "auth_token"


def run(place: Path, *, replace: bool = False) -> dict[str, object]:
    return init_cluster(ClusterInitConfig(token_file=str(place), replace=replace))


def test_it_is_made_once_and_only_its_owner_reads_it(place: Path) -> None:
    assert run(place) == {"token_file": str(place), "made": True}
    token = place.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert run(place) == {"token_file": str(place), "made": False}
    assert place.read_text() == token


def test_a_new_one_takes_its_place_where_that_is_asked_for(place: Path) -> None:
    run(place)
    token = place.read_text()
    assert run(place, replace=True)["made"]
    assert place.read_text() != token
    assert [path.name for path in place.parent.iterdir()] == ["auth_token"]


def test_one_that_others_may_read_is_refused(place: Path) -> None:
    run(place)
    place.chmod(0o644)
    with pytest.raises(InputError, match=r"mode 644, not 600.*chmod 600"):
        run(place)
    run(place, replace=True)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_an_empty_one_is_none(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_text("\n")
    with pytest.raises(InputError, match="holds no token; --replace"):
        run(place)


def test_a_folder_in_its_place_is_refused_and_no_token_stays_beside_it(place: Path) -> None:
    place.mkdir(parents=True)
    for replace in (False, True):
        with pytest.raises(InputError, match="token_file: "):
            run(place, replace=replace)
    assert [path.name for path in place.parent.iterdir()] == ["auth_token"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="--token_file"):
        run(tmp_path / "file" / "auth_token")


def test_the_token_is_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["cluster", "init", "--dry-run"]) == 0
    place = tmp_path / ".ray" / "auth_token"
    assert not place.exists()
    assert main(["cluster", "init", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {"token_file": str(place), "made": True}
    assert place.read_text() not in said.out + said.err
