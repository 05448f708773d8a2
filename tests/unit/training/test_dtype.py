"""The precision of a training whose config leaves it to the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raytower.config import FittedWorkersConfig
from raytower.errors import InputError
from raytower.models import device
from raytower.training import runner
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import finished_run, run_identity, with_dtype
from raytower.workers import Node
from tests.support.tiny_training import retriever_config, write_pairs


def has_bf16(monkeypatch: pytest.MonkeyPatch, it_has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: it_has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    device.warn_of_slow_dtype.cache_clear()


@pytest.mark.parametrize(
    ("cpu_has_it", "asked_gpus", "gpus_there", "expected"),
    [
        (False, 0, 0, "float32"),
        (True, 0, 0, "bfloat16"),
        (False, 1, 0, "bfloat16"),  # a cluster whose GPU nodes come with demand
        (False, None, 2, "bfloat16"),
        (False, None, 0, "float32"),
        (False, 0, 2, "float32"),
    ],
)
def test_auto_is_what_the_workers_multiply(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpu_has_it: bool,
    asked_gpus: int | None,
    gpus_there: int,
    expected: str,
) -> None:
    """Training in bfloat16, the default before, took 12.7 times as long as float32 on a CPU that emulates it."""
    has_bf16(monkeypatch, cpu_has_it)
    monkeypatch.setattr(runner, "find_nodes", lambda: [Node(cpus=2, gpus=gpus_there)])
    config = retriever_config(tmp_path, tmp_path / "pairs.tsv", tmp_path / "out", dtype="auto")
    config = config.model_copy(
        update={"workers": FittedWorkersConfig(num=1, num_cpus=1, num_gpus=asked_gpus)}
    )
    assert with_dtype(config).dtype == expected
    assert with_dtype(config.model_copy(update={"dtype": "float16"})).dtype == "float16"


def test_emulated_bfloat16_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has_bf16(monkeypatch, False)
    for _ in range(2):
        device.warn_of_slow_dtype("bfloat16", "cpu")
        device.warn_of_slow_dtype("float32", "cpu")
        device.warn_of_slow_dtype("bfloat16", "cuda")
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("set dtype to float32") == 1
    has_bf16(monkeypatch, True)
    device.warn_of_slow_dtype("bfloat16", "cpu")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_what_another_machine_trained_is_finished(
    monkeypatch: pytest.MonkeyPatch, still_encoder: Path, tmp_path: Path
) -> None:
    """And what was trained by default before there was auto; but a precision that is asked for is another run's."""
    pairs = write_pairs(tmp_path / "pairs.tsv", 8)
    config = retriever_config(still_encoder, pairs, tmp_path / "out", dtype="auto")
    survey = RetrieverTask.survey(config)
    has_bf16(monkeypatch, True)
    trained = run_identity(with_dtype(config), survey)
    assert trained["dtype"] == "bfloat16"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "raytower.json").write_text(json.dumps({"run": trained, "figures": {"steps": 1}}))
    (tmp_path / "out" / "model.safetensors").touch()

    has_bf16(monkeypatch, False)
    here = run_identity(with_dtype(config), survey)
    assert here["dtype"] == "float32"
    assert finished_run(config, here) == {"steps": 1}
    asked = config.model_copy(update={"dtype": "float32"})
    with pytest.raises(InputError, match=r"other data \(dtype\)"):
        finished_run(asked, here)
