"""The jobs of the campaign: how each is started, how far it has come, and what it leaves, read by other libraries."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from transformers import BertModel

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig
from raytower.models.encoder import Encoder, EncoderSettings
from tests.support.encoding_here import encode_here
from tests.support.index_cases import build, unit_vectors, write_embeddings
from tests.support.killed_jobs import training_that_restarts
from tests.support.s3_server import S3Server
from tests.support.tiny_models import build_tiny_encoder, tiny_config, tiny_tokenizer
from tests.support.tiny_training import write_pairs

NUM_TEXTS = 160
ROWS_PER_FILE = 16
NUM_BUILT = 1600
NUM_SHARDS = 8
NUM_QUERIES = 160
NUM_STEPS = 30
_PART = re.compile(r"(^|/)part-\d{8}\.parquet$")
_SHARD = re.compile(r"(^|/)shards/[0-9a-f]+/shard\.json$")
_STEP = re.compile(r"step (\d+)/\d+")
_OF_A_RUN = ("seconds", "queries_per_second", "milliseconds", "output", "settings")
Content = dict[str, Any]


class Prepared:
    """Models, rows, embeddings and indexes that all runs read and none changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        build_tiny_encoder(folder / "encoder")
        torch.manual_seed(0)
        # Many thin layers: a file, or a batch of queries, takes some tenths of a second.
        slow = Encoder(
            BertModel(tiny_config(num_hidden_layers=6, initializer_range=0.2)),
            tiny_tokenizer(),
            EncoderSettings(max_length=64),
        )
        slow.eval().save(folder / "slow")
        texts = [f"number {row} {'long ' * (row % 9)}" for row in range(NUM_TEXTS)]
        rows = [{"id": f"doc {row}", "text": text} for row, text in enumerate(texts)]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [f"which number is {row}?\t{texts[row % NUM_TEXTS]}" for row in range(NUM_QUERIES)]
        (folder / "questions.tsv").write_text("\n".join(asked) + "\n")
        write_pairs(folder / "pairs.tsv", NUM_STEPS)
        ids = [f"id {row}" for row in range(NUM_BUILT)]
        write_embeddings(folder / "vectors", ids, unit_vectors(NUM_BUILT, 32), rows_per_file=300)
        build(folder / "changed", str(folder / "vectors"), shards=3, lexical=False)
        delete_from_index(IndexDeleteConfig(index=str(folder / "changed"), ids=ids[::7]))
        values = {"encoder": str(folder / "slow"), "input": {"path": str(folder / "corpus.jsonl")}}
        encode_here(make_config(EncodeConfig, {**values, "output": str(folder / "documents")}))
        build(folder / "index", str(folder / "documents"), shards=2)


@dataclass
class Case:
    """One run of a job: what it reads and writes, and how it is doing. `folder` is a scratch folder of its own."""

    prepared: Path
    folder: Path
    s3: S3Server | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "out").mkdir()
        self.log = self.folder / "0.log"

    def input(self, name: str) -> str:
        """Something prepared, where this run reads it."""
        return self.s3.uri(f"bucket/prepared/{name}") if self.s3 else str(self.prepared / name)

    def output(self, name: str) -> str:
        """A place that this run may write."""
        return self.s3.uri(f"bucket/{self._key}/{name}") if self.s3 else str(self.folder / "out" / name)

    @property
    def _key(self) -> str:
        return self.folder.name

    def sizes(self) -> dict[str, int]:
        """Name and bytes of every file that the run has written to its outputs, hidden ones too."""
        if self.s3 is None:
            top = self.folder / "out"
            found: dict[str, int] = {}
            for folder, _, names in os.walk(top):  # which passes over what goes meanwhile
                for path in (Path(folder, name) for name in names):
                    with suppress(FileNotFoundError):
                        found[str(path.relative_to(top))] = path.stat().st_size
            return found
        pages = self.s3.client.get_paginator("list_objects_v2").paginate(
            Bucket="bucket", Prefix=f"{self._key}/"
        )
        return {
            item["Key"].removeprefix(f"{self._key}/"): item["Size"]
            for page in pages
            for item in page.get("Contents", ())
        }

    def unfinished_bytes(self) -> int:
        """Of the largest file that is being written, beside its name or before it is uploaded."""
        places = [*(self.folder / "out").rglob(".*.tmp"), *(self.folder / "tmp").glob("raytower-*/content")]
        sizes = [0]
        for path in places:
            with suppress(FileNotFoundError):  # renamed meanwhile
                sizes.append(path.stat().st_size)
        return max(sizes)

    def bring(self, name: str) -> None:
        """Copy something prepared to the place of an output of that name, because the job changes it."""
        if self.s3 is None:
            shutil.copytree(self.prepared / name, self.folder / "out" / name)
        else:
            upload(self.s3, self.prepared / name, f"{self._key}/{name}")

    def fetched(self) -> Path:
        """The outputs in a local folder."""
        if self.s3 is None:
            return self.folder / "out"
        top = Path(tempfile.mkdtemp(dir=self.folder))
        for name in self.sizes():
            if name and not name.endswith("/"):  # else it marks a folder
                (top / name).parent.mkdir(parents=True, exist_ok=True)
                (top / name).write_bytes(self.s3.read("bucket", f"{self._key}/{name}"))
        return top


def upload(s3: S3Server, folder: Path, prefix: str) -> None:
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        below = path.relative_to(folder).as_posix()
        s3.put("bucket", prefix if path == folder else f"{prefix}/{below}", path.read_bytes())


@dataclass(frozen=True)
class Job:
    """How a job is run and judged. `name` is that of plan.SENSIBLE."""

    name: str
    command: tuple[str, ...]
    values: Callable[[Case], dict[str, Any]]
    done: Callable[[Case, int], float]
    """The share that is done, of a run that is under way; an output that is whole has so many bytes."""
    read: Callable[[Path], Content]
    """What the run has left in its folder of outputs: arrays, and values that JSON can hold."""
    works_in: str = ""
    """What the names of the processes that do the work begin with; none: the driver does it."""
    changes: str | None = None
    """What is prepared and changed by the job."""
    bytes_of: str = ""
    """The file whose size says how far the job has come."""


# --- how far it has come -------------------------------------------------------------------------------------------


def _parts(case: Case, whole: int) -> float:
    return sum(bool(_PART.search(name)) for name in case.sizes()) / (NUM_TEXTS // ROWS_PER_FILE)


def _steps(case: Case, whole: int) -> float:
    said = _STEP.findall(case.log.read_text(errors="replace"))
    return int(said[-1]) / NUM_STEPS if said else 0.0


def _shards(case: Case, whole: int) -> float:
    # Each shard has a note when it is whole. A job that changes an index begins with the three of it.
    there = sum(bool(_SHARD.search(name)) for name in case.sizes())
    return there / NUM_SHARDS


def _new_shards(case: Case, whole: int) -> float:
    return max(_shards(case, whole) - 3 / NUM_SHARDS, 0.0)


def _bytes(case: Case, whole: int) -> float:
    return case.unfinished_bytes() / max(whole, 1)


# --- what it leaves ------------------------------------------------------------------------------------------------


def _read_embeddings(top: Path) -> Content:
    folder = top / "documents"
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = [row for file in manifest["files"] for row in pq.read_table(folder / file["name"]).to_pylist()]
    named = ("fingerprint", "dim", "dtype", "rows", "tokens", "similarity", "normalised")
    return {
        "ids": [row["id"] for row in rows],
        "texts": [row["text"] for row in rows],
        "vectors": np.array([row["embedding"] for row in rows], np.float32),
        "manifest": {name: manifest[name] for name in named},
        # On an object store the lease stays, marked as given up.
        "files": sorted(path.name for path in folder.iterdir() if path.name != ".encode.lock"),
    }


def _read_model(top: Path) -> Content:
    info = json.loads((top / "model" / "raytower.json").read_text())
    weights = load_file(top / "model" / "model.safetensors")
    return {
        "losses": np.array([row["loss"] for row in info["curve"]]),
        "steps": [row["step"] for row in info["curve"]],
        "best_step": info["figures"]["best_step"],
        **{f"weight {name}": value for name, value in weights.items()},
    }


def _read_index(top: Path) -> Content:
    (folder,) = (path.parent for path in top.glob("*/versions"))
    newest = max((folder / "versions").glob("*.json"), key=lambda path: int(path.stem))
    manifest = json.loads(newest.read_text())
    table = lance.dataset(str(folder / "table.lance"), version=manifest["table_version"]).to_table()
    order = np.argsort(table["row"].to_numpy())
    vector_of = dict(zip(table["row"].to_pylist(), table["vector"].to_pylist(), strict=True))
    shards = []
    for entry in manifest["shards"]:
        place = folder / "shards" / entry["digest"]
        index, rows = faiss.read_index(str(place / "vectors.faiss")), np.load(place / "rows.npy")
        held = index.reconstruct_n(0, index.ntotal)
        live = [number for number, row in enumerate(rows.tolist()) if row in vector_of]
        wanted = np.array([vector_of[row] for row in rows[live].tolist()], np.float32)
        shards.append([index.ntotal, bool(np.allclose(held[live], wanted, atol=1e-6))])
    named = ("version", "parent", "operation", "rows", "kind", "next_row", "dim", "metric", "changed_rows")
    return {
        "ids": [table["id"].to_pylist()[at] for at in order],
        "texts": [table["text"].to_pylist()[at] for at in order],
        "vectors": np.array(table["vector"].to_pylist(), np.float32)[order],
        "shards": shards,
        "manifest": {name: manifest[name] for name in named},
    }


def _read_negatives(top: Path) -> Content:
    return {"lines": (top / "negatives.tsv").read_text().splitlines()}


def _read_report(top: Path) -> Content:
    report = json.loads((top / "report" / "report.json").read_text())
    lines = [line.split() for line in (top / "report" / "run.trec").read_text().splitlines()]
    return {
        "run": [(line[0], line[2]) for line in lines],
        "scores": np.array([float(line[4]) for line in lines]),
        "figures": _untimed(report),
        "per_query": (top / "report" / "per_query.jsonl").read_text().splitlines(),
    }


def _untimed(value: Any) -> Any:
    """A report without how long it took, and where it was written to."""
    if not isinstance(value, dict):
        return value
    return {name: _untimed(item) for name, item in value.items() if name not in _OF_A_RUN}


def differences(found: Content, wanted: Content, tolerance: float = 1e-4) -> list[str]:
    """What of two contents is not the same, arrays to `tolerance`; empty where all is."""
    said = [f"{name} is there on one side alone" for name in sorted(found.keys() ^ wanted.keys())]
    for name in sorted(found.keys() & wanted.keys()):
        one, other = found[name], wanted[name]
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            if one.shape != other.shape:
                said.append(f"{name} has shape {one.shape}, not {other.shape}")
            elif one.size and not (gap := float(np.abs(one - other).max())) <= tolerance:
                said.append(f"{name} differs by {gap:.2g}")
        elif one != other:
            said.append(f"{name} is {str(one)[:200]}, not {str(other)[:200]}")
    return said


# --- the jobs ------------------------------------------------------------------------------------------------------


def _training(case: Case) -> dict[str, Any]:
    values = training_that_restarts(case.prepared / "encoder", case.input("pairs.tsv"), case.output("model"))
    return {**values, "log_dir": str(case.folder / "tensorboard")}


def _encoding(case: Case) -> dict[str, Any]:
    return {
        "encoder": str(case.prepared / "slow"),
        "input": {"path": case.input("corpus.jsonl")},
        "output": case.output("documents"),
        "max_length": 64,
        "rows_per_file": ROWS_PER_FILE,
        "tokens_per_batch": 1,
        "workers": {"min": 1, "num": 2, "num_cpus": 1},
    }


def _building(case: Case) -> dict[str, Any]:
    return {
        "embeddings": case.input("vectors"),
        "output": case.output("built"),
        "kind": "hnsw",
        "hnsw": {"ef_construction": 200},
        "shards": NUM_SHARDS,
        "lexical": False,
        "workers": {"num": 2, "num_cpus": 1},
    }


def _compacting(case: Case) -> dict[str, Any]:
    return {
        "index": case.output("changed"),
        "kind": "hnsw",
        "shards": NUM_SHARDS,
        "workers": {"num": 2, "num_cpus": 1},
    }


def _mining(case: Case) -> dict[str, Any]:
    return {
        "encoder": str(case.prepared / "slow"),
        "index": case.input("index"),
        "input": {"path": case.input("questions.tsv")},
        "output": case.output("negatives.tsv"),
        "recall_k": 30,
        "num_negatives": 5,
        "rows_per_batch": 8,
        "tokens_per_batch": 64,
    }


def _evaluating(case: Case) -> dict[str, Any]:
    return {
        "encoder": str(case.prepared / "slow"),
        "index": case.input("index"),
        "queries": {"path": case.input("questions.tsv"), "format": "pairs"},
        "output": case.output("report"),
        "k": [1, 5, 10],
        "rows_per_batch": 8,
        "tokens_per_batch": 64,
    }


JOBS = {
    job.name: job
    for job in (
        Job("training", ("train-retriever",), _training, _steps, _read_model, "ray::RayTrainWorker"),
        Job("encoding", ("encode",), _encoding, _parts, _read_embeddings, "ray::MapWorker"),
        Job("building", ("index", "build"), _building, _shards, _read_index, "ray::"),
        Job("compacting", ("index", "compact"), _compacting, _new_shards, _read_index, "ray::", "changed"),
        Job("mining", ("mine",), _mining, _bytes, _read_negatives, bytes_of="negatives.tsv"),
        Job("evaluating", ("evaluate",), _evaluating, _bytes, _read_report, bytes_of="report/run.trec"),
    )
}
