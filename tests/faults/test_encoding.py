"""Encoding runs that lose a worker, a node, the driver, memory or disk space; the folder must not show it."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import BertModel

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import RaytowerError
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.forward import ForwardEngine
from raytower.storage import Location
from tests.support.encoding_here import encode_here
from tests.support.killed_jobs import command_with, kill_once
from tests.support.processes import clean_environment, wait_for
from tests.support.tiny_models import tiny_config, tiny_tokenizer

NUM_TEXTS = 320
ROWS_PER_FILE = 16
NUM_FILES = NUM_TEXTS // ROWS_PER_FILE


@pytest.fixture(scope="module")
def slow_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many thin layers: a file takes some tenths of a second, so that a kill meets the work half-way."""
    torch.manual_seed(0)
    backbone = BertModel(tiny_config(num_hidden_layers=48, initializer_range=0.2))
    folder = tmp_path_factory.mktemp("models") / "slow"
    Encoder(backbone, tiny_tokenizer(), EncoderSettings(max_length=64)).eval().save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": f"doc {i}", "text": f"number {i} {'long ' * (i % 9)}"} for i in range(NUM_TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_values(encoder: Path, corpus: Path, output: Path) -> dict[str, Any]:
    """Two workers that take one text at a time."""
    return {
        "encoder": str(encoder),
        "input": {"path": str(corpus)},
        "output": str(output),
        "max_length": 64,
        "rows_per_file": ROWS_PER_FILE,
        "tokens_per_batch": 1,
        "workers": {"min": 1, "num": 2, "num_cpus": 1},
    }


def read_folder(folder: Path) -> pa.Table:
    manifest = EmbeddingsManifest.read(Location.of(folder))
    assert {path.name for path in folder.iterdir()} == {
        "job.json",
        "manifest.json",
        *(item.name for item in manifest.files),
    }
    return pa.concat_tables([pq.read_table(folder / item.name) for item in manifest.files])


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, slow_encoder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    figures = encode_here(make_config(EncodeConfig, run_values(slow_encoder, corpus, output)))
    assert figures["files_encoded"] == NUM_FILES
    table = read_folder(output)
    assert table["id"].to_pylist() == [f"doc {i}" for i in range(NUM_TEXTS)]
    return table


def parts_in(folder: Path) -> dict[str, int]:
    """Finished files with the time they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


def encoding_workers(root: psutil.Process) -> list[psutil.Process]:
    """The actors that encode, among the descendants of `root`."""
    return [process for process in root.children(recursive=True) if "PieceEncoder" in command_of(process)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_a_killed_job_continues_with_what_is_missing_and_replaces_a_killed_worker(
    undisturbed: pa.Table,
    slow_encoder: Path,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The whole job is killed; where it goes on, a worker is killed."""
    output = tmp_path / "out"
    values = run_values(slow_encoder, corpus, output)
    kill_once(
        lambda: len(parts_in(output)) >= 3,
        command_with("encode", values, tmp_path),
        clean_environment(RAY_AUTH_MODE="disabled"),
        tmp_path / "first.log",
    )
    kept = parts_in(output)
    assert 3 <= len(kept) < NUM_FILES
    assert not (output / "manifest.json").exists()
    # A worker that was killed while it wrote leaves a beginning that nobody takes for a part.
    (output / ".part-00000019.parquet.0123.tmp").write_bytes(b"PAR1 and then nothing")
    finished_at_kill: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: len(parts_in(output)) >= len(kept) + 2, "a second file")
        encoding_workers(psutil.Process())[-1].send_signal(signal.SIGKILL)
        finished_at_kill.append(len(parts_in(output)))

    thread = threading.Thread(target=kill_one)
    thread.start()
    figures = encode(make_config(EncodeConfig, values))
    thread.join()
    assert finished_at_kill[0] < NUM_FILES - 2, "the worker was killed when there was nothing left to do"
    assert f"{len(kept)} of {NUM_FILES} files are finished already" in capfd.readouterr().err
    assert figures["files_encoded"] == NUM_FILES - len(kept)
    assert figures["rows"] == NUM_TEXTS
    assert {name: time for name, time in parts_in(output).items() if name in kept} == kept
    assert read_folder(output).equals(undisturbed)


LOSE_A_NODE = """
import sys, threading
from pathlib import Path
import psutil, ray
from ray.cluster_utils import Cluster
from raytower.config import load_config, to_json
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from tests.faults.test_encoding import encoding_workers, parts_in
from tests.support.processes import wait_for

config = load_config(EncodeConfig, sys.argv[1])
output = Path(config.output)
# One CPU each: of two workers one must be on the node that will be lost.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
lost = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)
(raylet,) = lost.all_processes["raylet"]
seen = {}

def lose():
    raylet_process = psutil.Process(raylet.process.pid)
    wait_for(lambda: bool(encoding_workers(raylet_process)), "a worker on the second node")
    before = len(parts_in(output))
    wait_for(lambda: len(parts_in(output)) >= before + 3, "work on both nodes")
    seen["workers"] = len(encoding_workers(raylet_process))
    seen["finished"] = len(parts_in(output))
    cluster.remove_node(lost, allow_graceful=False)

thread = threading.Thread(target=lose)
thread.start()
figures = encode(config)
thread.join()
# Not to stdout: Ray shows its own messages there.
Path(sys.argv[2]).write_text(to_json({**seen, "figures": figures}))
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_is_done_without(
    undisturbed: pa.Table, slow_encoder: Path, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_values(slow_encoder, corpus, output)))
    # Its own folder, short because sockets lie in it: the cluster's address must not be found by other processes.
    session = tempfile.mkdtemp(prefix="rt")
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOSE_A_NODE, str(config), str(tmp_path / "found.json")],
            env=clean_environment(RAY_AUTH_MODE="disabled", RAY_TMPDIR=session),
            capture_output=True,
            text=True,
            timeout=400,
        )
    finally:
        shutil.rmtree(session, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["workers"] == 1
    assert found["finished"] < NUM_FILES - 2, "the node was lost when there was nothing left to do"
    assert found["figures"]["files_encoded"] == NUM_FILES
    assert read_folder(output).equals(undisturbed)


# --- memory --------------------------------------------------------------------------------------------------------


class HungryBackbone(torch.nn.Module):
    """Raises what an allocator does when more than `limit` tokens are asked of it at once."""

    def __init__(self, backbone: Any, limit: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.config, self.limit, self.error = backbone, backbone.config, limit, error
        self.sizes: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.sizes.append(input_ids.numel())
        if input_ids.numel() > self.limit:
            raise self.error
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
    MemoryError(),
]
TEXTS = [f"{'long ' * (i % 11)}{i}" for i in range(60)]


def hungry_engine(encoder_dir: Path, limit: int, error: Exception) -> tuple[ForwardEngine, HungryBackbone]:
    encoder = Encoder.load(encoder_dir)
    backbone = HungryBackbone(encoder.backbone, limit, error)
    fingerprint = encoder.fingerprint
    encoder.backbone = backbone  # type: ignore[assignment]
    engine = ForwardEngine(encoder, tokens_per_batch=1000)
    assert engine.fingerprint == fingerprint
    return engine, backbone


class TestMemory:
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "onnx", "python"])
    def test_a_budget_that_does_not_fit_is_halved_until_it_does(
        self, dummy_encoder_dir: Path, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        exact = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(TEXTS)
        engine, backbone = hungry_engine(dummy_encoder_dir, 200, error)
        with caplog.at_level(logging.WARNING):
            found = engine.encode(TEXTS)
        np.testing.assert_allclose(found, exact, atol=1e-6)
        # The longest have 54 tokens: batches of 18, of 9 and of 4 of them are too much, 2 are not.
        assert [record.getMessage() for record in caplog.records] == [
            "out of memory on cpu at tokens_per_batch 1000; going on with 486",
            "out of memory on cpu at tokens_per_batch 486; going on with 243",
            "out of memory on cpu at tokens_per_batch 243; going on with 108",
        ]
        assert engine.tokens_per_batch == 108
        backbone.sizes.clear()
        engine.encode(TEXTS)
        assert max(backbone.sizes) <= 108

    def test_one_text_that_does_not_fit_says_what_to_change(self, dummy_encoder_dir: Path) -> None:
        engine, backbone = hungry_engine(dummy_encoder_dir, 10, OUT_OF_MEMORY[0])
        with pytest.raises(
            RaytowerError,
            match=r"one text of 54 tokens does not fit into the memory of cpu .*lower max_length \(now 64\)",
        ):
            engine.encode(TEXTS)
        assert backbone.sizes[-1] == 54

    def test_other_failures_are_not_taken_for_it(self, dummy_encoder_dir: Path) -> None:
        engine, backbone = hungry_engine(dummy_encoder_dir, 200, RuntimeError("CUDA error: illegal address"))
        with pytest.raises(RuntimeError, match="illegal address"):
            engine.encode(TEXTS)
        assert len(backbone.sizes) == 1


# --- disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_stops_the_job_which_goes_on_once_there_is_room(
    dummy_encoder_dir: Path, corpus: Path, tmp_path: Path, small_disk: Path
) -> None:
    values = run_values(dummy_encoder_dir, corpus, small_disk / "out")
    with pytest.raises(RaytowerError, match=r"^no space is left for \S*part-\d+\.parquet"):
        encode(make_config(EncodeConfig, values))
    # The disk may be full between a file and its record; such a file is not relied upon.
    kept = {
        name: time
        for name, time in parts_in(small_disk / "out").items()
        if (small_disk / "out" / f".{name}.json").exists()
    }
    assert 0 < len(kept) < NUM_FILES
    assert not (small_disk / "out" / "manifest.json").exists()
    for name in kept:
        assert pq.read_metadata(small_disk / "out" / name).num_rows == ROWS_PER_FILE
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    # A worker that Ray is still ending may write a file that it had begun.
    assert 0 < encode_here(make_config(EncodeConfig, values))["files_encoded"] <= NUM_FILES - len(kept)
    assert {name: time for name, time in parts_in(small_disk / "out").items() if name in kept} == kept
    elsewhere = tmp_path / "elsewhere"
    encode_here(make_config(EncodeConfig, {**values, "output": str(elsewhere)}))
    assert read_folder(small_disk / "out").equals(read_folder(elsewhere))
