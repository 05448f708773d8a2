"""What a worker asks of its node beside CPUs and GPUs: the selector's grammar and rule are Ray's own."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from ray._private.label_utils import validate_label_selector

from raytower.config import FittedWorkersConfig, WorkersConfig, load_config, make_config
from raytower.encoding.config import EncodeConfig
from raytower.errors import InputError
from raytower.requirements import has_labels, refuse_requirements
from raytower.serving.config import ServeConfig
from raytower.workers import Node, fit_workers, plan_workers, refuse_without_room

GPU_KIND, MARKET = "ray.io/accelerator-type", "ray.io/market-type"
SPOT = Node(
    cpus=3, gpus=1, labels={MARKET: "spot", GPU_KIND: "L4"}, resources={"CPU": 4, "GPU": 1, "license": 2}
)
OWN = Node(cpus=15, labels={MARKET: "on-demand", "ray.io/node-id": "ab12"}, resources={"CPU": 16})
HEAD = Node(cpus=0, labels={"ray.io/node-group": "head"})


@pytest.mark.parametrize(
    ("wanted", "spot", "on_demand", "unlabelled"),
    [
        ("spot", True, False, False),
        ("!spot", False, True, True),
        ("in(spot, on-demand)", True, True, False),
        ("in(spot)", True, False, False),
        ("!in(spot,reserved)", False, True, True),
        ("other", False, False, False),
    ],
)
def test_which_nodes_a_value_means(wanted: str, spot: bool, on_demand: bool, unlabelled: bool) -> None:
    nodes = [{MARKET: "spot"}, {MARKET: "on-demand"}, {"zone": "spot"}]
    assert [has_labels({MARKET: wanted}, labels) for labels in nodes] == [spot, on_demand, unlabelled]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (MARKET, "spot"),
        (MARKET, "!spot"),
        (GPU_KIND, "in(L4, A10G)"),
        (GPU_KIND, "!in(L4,A10G)"),
        ("zone", "us-west-2a"),
        ("a.b-c_d", "x"),
        ("zone", "in()"),
        ("zone", "in(a"),
        ("zone", "-a"),
        ("zone", "a b"),
        ("zone", "!!a"),
        ("zone", "a" * 64),
        ("-zone", "a"),
        ("zone/", "a"),
        ("zone!", "a"),
        ("z" * 64, "a"),
    ],
)
def test_what_is_refused_is_what_ray_refuses(name: str, wanted: str) -> None:
    refused = validate_label_selector({name: wanted}) is not None
    with pytest.raises(ValueError, match=re.escape(name)) if refused else nullcontext():
        refuse_requirements({}, {name: wanted})


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (
            {"label_selector": {MARKET: "spot!"}},
            r"workers\.label_selector\.ray\.io/market-type is 'spot!'; give",
        ),
        ({"resources": {"GPU": 1}}, r"workers\.resources names GPU.*ask for it by workers\.num_gpus"),
        ({"resources": {"memory": 1}}, r"workers\.resources names memory.*leave it out"),
        ({"resources": {"license": 0}}, r"workers\.resources\.license is 0; it must be a number > 0"),
        ({"num_gpus": 1.5}, r"workers\.num_gpus is 1\.5; above 1 they are whole"),
    ],
)
def test_bad_requirements_are_refused_with_the_config(workers: dict[str, object], message: str) -> None:
    values = {"encoder": "e", "input": "i", "output": "o", "workers": workers}
    with pytest.raises(InputError, match=message):
        make_config(EncodeConfig, values)


def test_a_selector_is_given_whole_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    """Names of labels have dots, as dotted keys have."""
    (tmp_path / "c.yaml").write_text(
        "{encoder: e, input: i, output: o, workers: {num: 2, label_selector: {ray.io/market-type: spot}}}"
    )
    assert load_config(EncodeConfig, tmp_path / "c.yaml").workers.label_selector == {MARKET: "spot"}
    above = {"workers.label_selector": {GPU_KIND: "L4"}, "workers.resources": {"license": 0.5}}
    workers = load_config(EncodeConfig, tmp_path / "c.yaml", above).workers
    assert (workers.num, workers.label_selector) == (2, {GPU_KIND: "L4"})
    assert workers.ray_options == {"resources": {"license": 0.5}, "label_selector": {GPU_KIND: "L4"}}
    assert FittedWorkersConfig().ray_options == {}


def test_a_server_takes_them_too_and_one_process_does_not() -> None:
    values = {"index": "i", "label_selector": {MARKET: "!spot"}, "resources": {"license": 1}}
    assert make_config(ServeConfig, values).label_selector == {MARKET: "!spot"}
    with pytest.raises(InputError, match=r"label_selector\.ray\.io/market-type is '';"):
        make_config(ServeConfig, {**values, "label_selector": {MARKET: ""}})
    with pytest.raises(InputError, match="server uvicorn runs here; leave out resources and label_selector"):
        make_config(ServeConfig, {**values, "server": "uvicorn"})


class TestPlan:
    """Only the nodes that a worker may run on decide how many there are, and what each holds."""

    def test_nodes_without_the_labels_do_not_count(self) -> None:
        plan = plan_workers(FittedWorkersConfig(label_selector={MARKET: "spot"}), [HEAD, SPOT, OWN])
        assert (plan.num, plan.num_cpus, plan.num_gpus) == (1, 3, 1)
        assert plan.label_selector == {MARKET: "spot"}
        plan = plan_workers(FittedWorkersConfig(label_selector={MARKET: "!spot"}), [SPOT, OWN])
        assert (plan.num, plan.num_cpus, plan.num_gpus) == (1, 15, 0)

    def test_workers_share_the_resources_of_a_node(self) -> None:
        asked = FittedWorkersConfig(num_gpus=0.25, resources={"license": 1})
        assert plan_workers(asked, [SPOT]).num == 2
        assert plan_workers(FittedWorkersConfig(num_gpus=0.25), [SPOT]).num == 4
        assert plan_workers(FittedWorkersConfig(num_gpus=0, resources={"license": 3}, num=1), [SPOT]).num == 1

    def test_numbers_that_are_given_keep_what_else_is_asked_for(self) -> None:
        asked = FittedWorkersConfig(num=1, num_cpus=1, num_gpus=0, resources={"license": 1})
        nobody: list[Node] = []
        assert fit_workers(asked, lambda: nobody).resources == {"license": 1}

    def test_no_node_that_could_decide(self) -> None:
        with pytest.raises(
            InputError,
            match=r'no node with CPUs and labels \{"ray\.io/market-type": "reserved"\} \(they are: 1 with 4 CPU, '
            r'1 GPU, labels \{"ray\.io/accelerator-type": "L4", "ray\.io/market-type": "spot"\}; 1 with 16 CPU',
        ):
            plan_workers(FittedWorkersConfig(label_selector={MARKET: "reserved"}), [SPOT, OWN])


class TestRoom:
    def test_a_worker_that_a_node_can_hold(self, capsys: pytest.CaptureFixture[str]) -> None:
        worker = WorkersConfig(
            num_cpus=4, num_gpus=1, resources={"license": 2}, label_selector={GPU_KIND: "L4"}
        )
        refuse_without_room(worker, [OWN, SPOT])
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        "more",
        [
            {"num_cpus": 17},
            {"num_gpus": 2},
            {"resources": {"license": 3}},
            {"label_selector": {MARKET: "reserved"}},
            {"num_cpus": 8, "label_selector": {MARKET: "spot"}},
        ],
    )
    def test_one_that_no_node_can_hold(
        self, more: dict[str, object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        worker = WorkersConfig(**more)  # type: ignore[arg-type]
        with pytest.raises(
            InputError, match=r"a process asks for .*, and no node has that: 1 with .*; 1 with "
        ):
            refuse_without_room(worker, [OWN, SPOT])
        # A launcher's nodes come with demand.
        refuse_without_room(worker, [HEAD, OWN, SPOT])
        assert "no node has room for a process now that asks for" in capsys.readouterr().err

    def test_a_cluster_without_cpus_waits_for_nodes(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Where `ray start` was told an autoscaler's config by hand, no node has a launcher's label."""
        refuse_without_room(WorkersConfig(num_cpus=4), [Node(cpus=0)])
        assert "the job waits until one comes" in capsys.readouterr().err

    def test_the_message_names_what_is_there_and_the_remedy(self) -> None:
        worker = WorkersConfig(num_gpus=1, label_selector={MARKET: "reserved"})
        with pytest.raises(InputError) as caught:
            refuse_without_room(worker, [OWN, OWN, Node(cpus=0)])
        assert str(caught.value) == (
            'a process asks for 1 CPU, 1 GPU, labels {"ray.io/market-type": "reserved"}, and no node has that: 2 with '
            '16 CPU, labels {"ray.io/market-type": "on-demand"}; 1 with nothing of it and no labels; ask for less by '
            "num_cpus, num_gpus, resources and label_selector, or start nodes that have it (`ray start --labels, "
            "--resources`)"
        )
