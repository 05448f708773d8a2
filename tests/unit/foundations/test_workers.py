"""How many workers there are where a config leaves it to the machine, on machines that are named here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raytower import runtime
from raytower.config import FittedWorkersConfig, WorkersConfig
from raytower.errors import InputError
from raytower.workers import Node, fit_workers, gpu_share, most_of, plan_workers, worker_counts

LAPTOP = [Node(cpus=8)]
ONE_GPU = [Node(cpus=8, gpus=1)]
SERVER = [Node(cpus=96, gpus=8)]
CPU_CLUSTER = [Node(cpus=15)] * 3
GPU_CLUSTER = [Node(cpus=64, gpus=8), Node(cpus=8, gpus=1), Node(cpus=15)]


def fitted(nodes: list[Node], asked: dict[str, Any] | None = None, **how: Any) -> tuple[int, float, float]:
    workers = plan_workers(FittedWorkersConfig(**(asked or {})), nodes, **how)
    return workers.num, workers.num_cpus, workers.num_gpus


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (LAPTOP, (1, 8, 0)),
        (ONE_GPU, (1, 8, 1)),
        (SERVER, (8, 12, 1)),
        (CPU_CLUSTER, (3, 15, 0)),
        # The node without a GPU is left alone; 64 / 8 and 8 / 1 are both 8.
        (GPU_CLUSTER, (9, 8, 1)),
        ([Node(cpus=0), Node(cpus=4)], (1, 4, 0)),
        # A head that is small does not make small workers of all.
        ([Node(cpus=1), *CPU_CLUSTER], (3, 15, 0)),
        ([Node(cpus=8), Node(cpus=4)], (1, 8, 0)),
        ([Node(cpus=8), Node(cpus=5)], (2, 5, 0)),
    ],
)
def test_one_worker_a_gpu_and_else_one_a_machine(
    nodes: list[Node], expected: tuple[int, float, float]
) -> None:
    assert fitted(nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        (SERVER, {"num_gpus": 0}, (1, 96, 0)),
        (SERVER, {"num": 4}, (4, 24, 1)),
        (SERVER, {"num": 16}, (16, 6, 0)),  # there are not so many GPUs
        (SERVER, {"num": 2, "num_cpus": 1}, (2, 1, 1)),
        (LAPTOP, {"num": 2}, (2, 4, 0)),
        (LAPTOP, {"num": 16}, (16, 0.5, 0)),
        (LAPTOP, {"num_cpus": 3}, (1, 3, 0)),
        (CPU_CLUSTER, {"num": 6}, (6, 7, 0)),
        (CPU_CLUSTER, {"num": 2}, (2, 15, 0)),
        ([Node(cpus=1), *CPU_CLUSTER], {"num": 3}, (3, 15, 0)),
        ([Node(cpus=1), *CPU_CLUSTER], {"num": 4}, (4, 7, 0)),
        (LAPTOP, {"num_gpus": 1}, (1, 8, 1)),  # nodes with GPUs may come
    ],
)
def test_numbers_that_are_given_stay(
    nodes: list[Node], asked: dict[str, Any], expected: tuple[int, float, float]
) -> None:
    assert fitted(nodes, asked) == expected


def test_workers_share_a_batch_evenly() -> None:
    six = [Node(cpus=48, gpus=6)]
    assert fitted(six, share=64) == (4, 12, 1)
    assert fitted(six, share=60) == (6, 8, 1)
    assert fitted(SERVER, share=1) == (1, 96, 1)
    assert fitted(six, {"num": 3}, share=64)[0] == 3  # given: the config has refused it where it must


def test_workers_that_begin_decide_what_each_holds() -> None:
    """Of four, two began on the CPU, beside two GPUs."""
    two_gpus = [Node(cpus=16, gpus=2)]
    assert fitted(two_gpus, {"num": 4}, least=2) == (4, 8, 1)
    assert fitted(two_gpus, {"num": 4}) == (4, 4, 0)
    assert fitted(CPU_CLUSTER, {"num": 4}, least=1) == (4, 15, 0)
    assert fitted(LAPTOP, {"num": 4}, least=2) == (4, 4, 0)
    with pytest.raises(
        InputError, match=r"workers.min is 16, and the machines that are there have room for 8"
    ):
        fitted(SERVER, least=16)


def test_workers_that_take_equally_many_shares() -> None:
    assert worker_counts(2, 12) == [2, 3, 4, 6, 12]
    assert worker_counts(2, 5) == [5]
    assert [most_of([2, 4], places) for places in range(6)] == [0, 0, 2, 2, 4, 4]


def test_several_workers_on_a_machine_without_gpus() -> None:
    assert fitted(LAPTOP, per_cpu_node=2) == (2, 4, 0)
    assert fitted([Node(cpus=1)], per_cpu_node=2) == (1, 1, 0)
    assert fitted(LAPTOP, {"num": 1}, per_cpu_node=2) == (1, 8, 0)
    assert fitted(SERVER, per_cpu_node=2) == (8, 12, 1)
    assert fitted(SERVER, per_cpu_node=2, use_gpus=False) == (2, 48, 0)


def test_what_fits_on_each_node_is_never_more_than_it_has() -> None:
    for nodes in (LAPTOP, SERVER, CPU_CLUSTER, GPU_CLUSTER, [Node(cpus=1), *CPU_CLUSTER]):
        for num in range(1, 40):
            workers = plan_workers(FittedWorkersConfig(num=num), nodes)
            places = sum(
                int(
                    min(
                        node.cpus / workers.num_cpus,
                        node.gpus / workers.num_gpus if workers.num_gpus else num,
                    )
                )
                for node in nodes
            )
            assert places >= num, (nodes, num)


def test_a_cluster_without_nodes_asks_for_numbers() -> None:
    with pytest.raises(InputError, match=r"no node with CPUs now.*--workers\.num 4"):
        fitted([])
    assert fitted([], {"num": 16, "num_cpus": 8}) == (16, 8, 0)
    assert fitted([], {"num": 4, "num_gpus": 1}) == (4, 1, 1)


def test_a_line_says_what_the_machine_decided(capsys: pytest.CaptureFixture[str]) -> None:
    fit_workers(FittedWorkersConfig(), lambda: SERVER)
    assert (
        "workers: 8, each with 12 CPUs and 1 GPUs, of 96 CPUs and 8 GPUs on 1 machine ("
        in capsys.readouterr().err
    )
    given = FittedWorkersConfig(num=2, num_cpus=0.5, num_gpus=0)
    nobody: Any = None
    assert fit_workers(given, nobody) == WorkersConfig(num=2, num_cpus=0.5, num_gpus=0)
    assert capsys.readouterr().err == ""


def test_fewer_gpus_than_processes_are_shared() -> None:
    assert gpu_share(2, 8) == 1
    assert gpu_share(2, 2) == 1
    assert gpu_share(3, 1) == 0.33


class TestFoundNodes:
    """Ray answers as it would on a machine with GPUs, and PyTorch too."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(runtime, "get_num_cpus", lambda **_: 16)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        # A test before may have started one in this process.
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    @staticmethod
    def run_ray(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], dead: int = 0) -> None:
        found = [
            {"NodeID": f"{number}", "Alive": number >= dead, "Resources": node}
            for number, node in enumerate(nodes)
        ]
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "nodes", lambda: found)

    def test_before_ray_runs_it_is_this_machine(self) -> None:
        assert runtime.find_nodes() == [Node(cpus=16, gpus=2)]

    def test_a_local_ray_has_a_cpu_more_than_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_ray(monkeypatch, {"CPU": 17, "GPU": 2})
        assert runtime.find_nodes() == [Node(cpus=16, gpus=2)]
        self.run_ray(monkeypatch, {"CPU": 4})
        assert runtime.find_nodes() == [Node(cpus=3, gpus=0)]

    def test_a_pytorch_without_cuda_uses_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        self.run_ray(monkeypatch, {"CPU": 17, "GPU": 2})
        assert runtime.find_nodes() == [Node(cpus=16, gpus=0)]

    def test_of_a_cluster_the_nodes_that_are_there_and_have_cpus(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        self.run_ray(
            monkeypatch, {"CPU": 64, "GPU": 8}, {"CPU": 0}, {"CPU": 96, "GPU": 4}, {"CPU": 8}, dead=1
        )
        assert runtime.find_nodes() == [Node(cpus=95, gpus=4), Node(cpus=7)]

    @pytest.mark.parametrize(("held", "cpus"), [("1", 2), ("0.1", 2.9), ("0", 3), ("8", 0)])
    def test_what_a_submitted_job_s_own_process_holds_is_none_of_its_workers(
        self, held: str, cpus: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A training would ask for CPUs that its own driver holds until it has ended."""
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setenv("RAYTOWER_DRIVER_CPUS", held)
        self.run_ray(monkeypatch, {"CPU": 0}, {"CPU": 4}, {"CPU": 8})
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "1"))
        found = runtime.find_nodes()
        assert [node.cpus for node in found] == pytest.approx([cpus, 7] if cpus else [7])
