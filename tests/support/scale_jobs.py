"""Small jobs for clusters whose nodes come with demand: their inputs, and `raytower`'s arguments that ask for nodes.

A GPU of such a node is one to Ray alone. So a training asks for GPU nodes by their label, and a rerank, which computes
where PyTorch sees no GPU on a CPU, by the GPU itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel

from raytower.models.encoder import Encoder, EncoderSettings
from tests.support.autoscaled import Kind
from tests.support.index_cases import unit_vectors, write_embeddings
from tests.support.tiny_models import build_tiny_reranker, tiny_config, tiny_tokenizer
from tests.support.tiny_training import write_pairs

ROWS_PER_FILE = 16
_LARGE_ROWS = 40_000
POOL = {"pool": "gpu"}
KINDS = {"cpu": Kind(cpus=1, most=2), "gpu": Kind(cpus=1, gpus=1, labels=POOL, most=2)}
CPU_WORKERS = {"num": 2, "num_cpus": 1, "num_gpus": 0}


class ScaleJobs:
    """Inputs in a folder, and the configs of the jobs that read them and one another's outputs."""

    def __init__(self, folder: Path, num_texts: int, layers: int = 96) -> None:
        self.folder = folder
        torch.manual_seed(0)
        # Many thin layers, and a text at a time: a file takes some tenths of a second.
        backbone = BertModel(tiny_config(num_hidden_layers=layers, initializer_range=0.2))
        Encoder(backbone, tiny_tokenizer(), EncoderSettings(max_length=64)).eval().save(folder / "encoder")
        build_tiny_reranker(folder / "reranker")
        texts = [f"number {row} {'long ' * (row % 9)}" for row in range(num_texts)]
        rows = [json.dumps({"id": f"doc {row}", "text": text}) for row, text in enumerate(texts)]
        (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        asked = [f"which number is {row}?\t{texts[row]}" for row in range(0, num_texts, 8)]
        (folder / "questions.tsv").write_text("\n".join(asked) + "\n", encoding="utf-8")
        candidates = [f"{line.split(chr(9))[0]}\t{text}" for line in asked for text in texts[:8]]
        (folder / "candidates.tsv").write_text("\n".join(candidates) + "\n", encoding="utf-8")
        write_pairs(folder / "pairs.tsv", 64)

    def encode(self, output: str = "embeddings", **workers: Any) -> tuple[str, ...]:
        values = {
            "encoder": str(self.folder / "encoder"),
            "input": {"path": str(self.folder / "corpus.jsonl")},
            "max_length": 64,
            "rows_per_file": ROWS_PER_FILE,
            "tokens_per_batch": 1,
            "workers": {"min": 1, **CPU_WORKERS, **workers},
        }
        return self._job(("encode",), output, values)

    def build(self) -> tuple[str, ...]:
        values = {
            "embeddings": str(self.folder / "embeddings"),
            "kind": "hnsw",
            "shards": 2,
            "workers": CPU_WORKERS,
        }
        return self._job(("index", "build"), "index", values)

    def build_large(self) -> tuple[str, ...]:
        """Of vectors that nothing has encoded: shards that take seconds, so that a second node is there in time."""
        vectors = self.folder / "vectors"
        if not vectors.exists():
            names = [f"id {row}" for row in range(_LARGE_ROWS)]
            write_embeddings(vectors, names, unit_vectors(_LARGE_ROWS, 64), rows_per_file=_LARGE_ROWS // 4)
        values = {
            "embeddings": str(vectors),
            "kind": "hnsw",
            "hnsw": {"ef_construction": 400},
            "shards": 4,
            "lexical": False,
            "workers": CPU_WORKERS,
        }
        return self._job(("index", "build"), "large", values)

    def evaluate(self) -> tuple[str, ...]:
        values = {
            "encoder": str(self.folder / "encoder"),
            "index": str(self.folder / "index"),
            "queries": {"path": str(self.folder / "questions.tsv"), "format": "pairs"},
            "k": [1, 5, 10],
        }
        return self._job(("evaluate",), "report", values)

    def train(self, **workers: Any) -> tuple[str, ...]:
        values = {
            "model": str(self.folder / "encoder"),
            "train": {"path": str(self.folder / "pairs.tsv")},
            "batch_size": 16,
            "epochs": 3,
            "max_length": 32,
            "dtype": "float32",
            "workers": {**CPU_WORKERS, "label_selector": POOL, **workers},
        }
        return self._job(("train-retriever",), "model", values)

    def rerank(self, output: str = "ranked.tsv") -> tuple[str, ...]:
        values = {
            "reranker": str(self.folder / "reranker"),
            "input": {"path": str(self.folder / "candidates.tsv")},
            "workers": {"num": 1, "num_cpus": 1, "num_gpus": 1},
        }
        return self._job(("rerank",), output, values)

    def _job(self, command: tuple[str, ...], output: str, values: dict[str, Any]) -> tuple[str, ...]:
        config = self.folder / f"{'-'.join(command)}-{output}.json"
        config.write_text(json.dumps({**values, "output": str(self.folder / output)}), encoding="utf-8")
        return (*command, "--config", str(config))
