"""Small encoding jobs, and how to run one without Ray: the worker that Ray would start encodes in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.config import make_config
from raytower.data.pieces import Piece
from raytower.encoding import job as job_module
from raytower.encoding import worker as worker_module
from raytower.encoding.config import EncodeConfig
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.encoding.worker import EncodedPiece, PieceEncoder, read_answer
from raytower.storage import Location


def write_corpus(path: Path, rows: int) -> list[str]:
    texts = [f"text {'long ' * (i % 7)}number {i}，在中国" for i in range(rows)]
    lines = [json.dumps({"id": f"doc {i}", "text": text, "year": 2000 + i}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def encode_config(encoder: Path, corpus: Path, output: Path, **changes: object) -> EncodeConfig:
    values = {
        "encoder": str(encoder),
        "input": {"path": str(corpus)},
        "output": str(output),
        "max_length": 64,
        "rows_per_file": 16,
        "workers": {"min": 1, "num": 2, "num_cpus": 0.5},
    }
    return make_config(EncodeConfig, {**values, **changes})


def read_folder(folder: Path) -> pa.Table:
    manifest = EmbeddingsManifest.read(Location.of(folder))
    return pa.concat_tables([pq.read_table(folder / item.name) for item in manifest.files])


def encode_here(config: EncodeConfig) -> dict[str, Any]:
    """`encode`, whose pieces go through one worker in this process, in order."""
    with no_ray():
        return job_module.encode(config)


@contextmanager
def no_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "ensure_ray", lambda _: None)
        patch.setattr(job_module, "check_room", lambda _: None)
        patch.setattr(job_module, "check_shared", lambda _: None)
        patch.setattr(job_module, "_run", _run)
        # The worker asks Ray for the list of pieces; here it is given the list itself.
        patch.setattr(worker_module, "ray", SimpleNamespace(get=lambda pieces: pieces))
        # The worker sets it for its own process; here it must be taken back.
        patch.setenv("RAYON_NUM_THREADS", os.environ.get("RAYON_NUM_THREADS", "1"))
        yield


def _run(job: Any, missing: Sequence[Piece]) -> list[EncodedPiece]:
    pieces: Any = list(job.pieces)
    worker = PieceEncoder(job.config, job.encoder.fingerprint, job.prefix, pieces)
    numbers = {piece.index: number for number, piece in enumerate(job.pieces)}
    answers = [worker({"piece": np.array([numbers[piece.index]])})["answer"] for piece in missing]
    return [read_answer(answer) for (answer,) in answers]
