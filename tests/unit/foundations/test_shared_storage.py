"""Whether all nodes see an output: which are asked, what is said where one does not, and what stays behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from raytower.errors import InputError, RaytowerError
from raytower.shared_storage import Answers, _see_and_write, nodes_to_ask, probe
from raytower.storage import Location

NODES = {"n1": "10.0.0.1", "n2": "10.0.0.2"}


def node(name: str, *, cpus: float = 4, gpus: float = 0, alive: bool = True) -> dict[str, object]:
    resources = {"CPU": cpus, "GPU": gpus, "memory": 1e9}
    return {"NodeID": name, "NodeManagerAddress": f"ip-{name}", "Alive": alive, "Resources": resources}


def by_views(views: dict[str, Path]) -> Callable[[Sequence[str], Location, str], Answers]:
    """Asks as if each node had what lies at its folder at the path of the output."""

    def ask(nodes: Sequence[str], folder: Location, mark: str) -> Answers:
        return {name: _see_and_write(str(views[name]), mark, name) for name in nodes}

    return ask


def test_the_nodes_that_may_work_are_asked_and_this_one_is_not() -> None:
    there = [
        node("own"),
        node("a"),
        node("b", cpus=0, gpus=1),
        node("head", cpus=0),
        node("lost", alive=False),
    ]
    assert nodes_to_ask(there, "own") == {"a": "ip-a", "b": "ip-b"}
    assert nodes_to_ask([node("own")], "own") == {}


def test_a_folder_that_all_see_is_taken_and_nothing_stays_in_it(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder"
    probe(Location.of(output), NODES, by_views({"n1": output, "n2": output}))
    assert list(output.iterdir()) == []


def test_of_a_file_its_folder_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file.tsv").write_text("1\n")
    probe(Location.of(tmp_path / "file.tsv"), NODES, by_views({"n1": tmp_path, "n2": tmp_path}))
    assert [path.name for path in tmp_path.iterdir()] == ["file.tsv"]


@pytest.mark.parametrize("there", ["nothing", "a folder of its own"])
def test_a_node_without_it_is_named_with_the_path(there: str, tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    if there != "nothing":
        own.mkdir()
    with pytest.raises(InputError) as raised:
        probe(Location.of(shared), NODES, by_views({"n1": shared, "n2": own}))
    assert str(raised.value) == (
        f"output '{shared}' is not shared: node 10.0.0.2 does not find there what this one wrote, and 3 nodes would "
        "write there; name a URI that every node sees (s3://…, gs://…), or a folder that is mounted at the same path "
        "on all"
    )
    assert list(shared.iterdir()) == []


def test_what_a_node_may_only_read_is_refused(tmp_path: Path) -> None:
    def ask(nodes: Sequence[str], folder: Location, mark: str) -> Answers:
        return {"n1": "", "n2": "cannot use it (Read-only file system)"}

    with pytest.raises(InputError, match=r"node 10.0.0.1 what it writes there does not arrive here"):
        probe(Location.of(tmp_path), NODES, ask)
    with pytest.raises(InputError, match=r"node 10.0.0.2 cannot use it \(Read-only file system\)"):
        probe(Location.of(tmp_path), {"n2": "10.0.0.2"}, ask)


def test_a_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(RaytowerError, match=r"node 10.0.0.1 did not answer within 300 s") as raised:
        probe(Location.of(tmp_path), NODES, lambda nodes, folder, mark: dict.fromkeys(nodes))
    assert not isinstance(raised.value, InputError)
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_is_lost_meanwhile_is_done_without(tmp_path: Path) -> None:
    probe(
        Location.of(tmp_path),
        NODES,
        lambda nodes, folder, mark: {"n2": _see_and_write(str(tmp_path), mark, "n2")},
    )
    assert list(tmp_path.iterdir()) == []
