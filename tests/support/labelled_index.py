"""Indexes over a few labelled rows by a tiny encoder, and the jobs of classification over them. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from raytower.annotation.classify import classify
from raytower.annotation.config import ClassifyConfig, TuneClassifyConfig
from raytower.annotation.tune_classify import tune_classify
from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from tests.support.encoding_here import encode_here
from tests.support.index_cases import build

Rows = list[tuple[str, str]]


class LabelledIndexes:
    """A tiny encoder and indexes over labelled rows, made in a folder of the test."""

    def __init__(self, encoder: Path, folder: Path) -> None:
        self.encoder = str(encoder)
        self.folder = folder
        self._number = 0

    def embed(self, rows: Rows, first: int = 0) -> str:
        """Embeddings of labelled rows, with ids 0, 1, … from `first` on."""
        self._number += 1
        corpus = self.folder / f"corpus{self._number}.jsonl"
        lines = [
            {"id": str(first + number), "text": text, "label": label}
            for number, (text, label) in enumerate(rows)
        ]
        corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
        output = self.folder / f"embeddings{self._number}"
        values = {"encoder": self.encoder, "input": {"path": str(corpus)}, "max_length": 64}
        encode_here(make_config(EncodeConfig, {**values, "output": str(output)}))
        return str(output)

    def index(self, rows: Rows) -> str:
        embeddings = self.embed(rows)
        place = self.folder / f"index{self._number}"
        build(place, embeddings, shards=1)
        return str(place)

    def rows(self, rows: Rows) -> str:
        self._number += 1
        path = self.folder / f"rows{self._number}.tsv"
        path.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
        return str(path)

    def classify(self, index: str, rows: Rows, **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        output = self.folder / f"labels{self._number}.jsonl"
        values = {"encoder": self.encoder, "index": index, "input": {"path": self.rows(rows)}}
        config = {**values, "output": str(output), "file_type": "jsonl", **more}
        result = classify(make_config(ClassifyConfig, config))
        return result, [json.loads(line) for line in output.read_text().splitlines()]

    def tune(self, index: str, rows: Rows, **more: Any) -> dict[str, Any]:
        values = {"encoder": self.encoder, "index": index, "input": {"path": self.rows(rows)}}
        output = self.folder / "tuned.json"
        return tune_classify(make_config(TuneClassifyConfig, {**values, "output": str(output), **more}))

    def cosines(self, text: str, others: list[str]) -> np.ndarray:
        engine = ForwardEngine(Encoder.load(self.encoder))
        return engine.encode(others).astype(np.float64) @ engine.encode([text])[0].astype(np.float64)
