"""`raytower demo`: the whole way on real input, from a sample of InsuranceQA to answers over HTTP.

Every step is the job that its own command runs; the demo only writes their configs, compares what comes out on dev,
and promotes a stage only where it makes the dev metric better.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytower.annotation.config import MineConfig
from raytower.annotation.mine import mine
from raytower.config import make_config
from raytower.data.queries import read_queries
from raytower.demo.config import DemoConfig
from raytower.demo.sample import DemoFiles, SampleSizes, find_demo_model, write_sample
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.errors import import_extra
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.progress import log
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.tune_fusion import TunedFusion, store_fusion, tune_on_queries
from raytower.runtime import ensure_ray
from raytower.serving.config import ServeConfig
from raytower.serving.deploy import DIRECT, start, stop
from raytower.training.config import TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.reranker import train_reranker
from raytower.training.retriever import train_retriever

QUESTIONS = (
    "Does renters insurance cover a stolen laptop?",
    "Can I get life insurance if I have diabetes?",
    "How much car insurance do I need?",
)
METRICS = (
    "hit@1",
    "hit@10",
    "recall@1",
    "recall@5",
    "recall@10",
    "recall@20",
    "recall@50",
    "mrr@10",
    "ndcg@10",
)
_MAX_LENGTH = 128
_PROMOTION_METRIC = "mrr@10"
_SAMPLE = SampleSizes(train=900, dev=200, test=300, corpus=3000)
_EVERYTHING = SampleSizes(train=None, dev=None, test=None, corpus=None)


def plan_demo(config: DemoConfig) -> dict[str, Any]:
    """What the demo would do, and on how much."""
    sizes = _EVERYTHING if config.full else _SAMPLE
    return {"model": find_demo_model(), "sample": vars(sizes), "serves_on": f"http://127.0.0.1:{config.port}"}


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole way and return the final table's figures.

    Raises:
        MissingExtraError: the packages of the extra [demo] are not installed.
    """
    find_demo_model(), import_extra("insuranceqa_data")
    folder = (
        Path(config.work_dir).absolute()
        if config.work_dir
        else Path(tempfile.mkdtemp(prefix="raytower-demo-"))
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _Demo(config, folder).run()
    finally:
        if config.work_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


class _Demo:
    def __init__(self, config: DemoConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.model = find_demo_model()
        self.seconds: dict[str, float] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        with _timed(self.seconds, "start"):
            sizes = _EVERYTHING if self.config.full else _SAMPLE
            files = write_sample(self.folder / "data", sizes, self.config.seed)
            ensure_ray()
        log(
            f"sample: {files.num_train} training pairs, {files.num_corpus} answers; files under {self.folder}"
        )
        base = self._measure_encoder("zero-shot", self.model, files)
        trained_dir = self._train_encoder(files)
        trained = self._measure_encoder("trained", trained_dir, files)
        name = "trained" if trained > base else "zero-shot"
        encoder = trained_dir if name == "trained" else self.model
        log(_verdict("training", base, trained))
        reranker, tuned = self._train_reranker(files, name, encoder)
        fused = tuned.fused_mrr > tuned.recall_mrr and tuned.fusion.weight > 0
        log(f"reranker alone: dev {_PROMOTION_METRIC} {tuned.rerank_mrr:.4f}")
        log(
            _verdict(f"fused reranking (weight {tuned.fusion.weight:.2f})", tuned.recall_mrr, tuned.fused_mrr)
        )
        with _timed(self.seconds, "evaluate reranker"):
            self._evaluate("reranked", encoder, name, files, "test", reranker=reranker)
        answers = self._serve(encoder, name, reranker if fused else None)
        total = time.perf_counter() - started
        print(self._table(name, fused))
        print(answers)
        return {
            "seconds": round(total, 1),
            "seconds_by_stage": {stage: round(value, 1) for stage, value in self.seconds.items()},
            "served": {"encoder": name, "reranker": fused},
            "dev": {
                "zero-shot": base,
                "trained": trained,
                "recall": tuned.recall_mrr,
                "reranker alone": tuned.rerank_mrr,
                "fused": tuned.fused_mrr,
                "fusion_weight": tuned.fusion.weight,
            },
            "test": {
                row: {metric: values[metric] for metric in METRICS} for row, values in self.rows.items()
            },
        }

    def _train_encoder(self, files: DemoFiles) -> str:
        output = str(self.folder / "encoder")
        with _timed(self.seconds, "train retriever"):
            train_retriever(
                make_config(
                    TrainRetrieverConfig,
                    {
                        "model": self.model,
                        "train": {"path": str(files.train_pairs), "format": "pairs"},
                        "output": output,
                        "batch_size": 32,
                        "max_length": _MAX_LENGTH,
                        "optimizer": {"lr": 5e-5},
                        "seed": self.config.seed,
                    },
                )
            )
        return output

    def _measure_encoder(self, name: str, encoder: str, files: DemoFiles) -> float:
        """Encode, index and evaluate; the test row goes into the table, the dev metric comes back."""
        with _timed(self.seconds, f"encode {name}"):
            encode(
                make_config(
                    EncodeConfig,
                    {
                        "encoder": encoder,
                        "input": {"path": str(files.corpus)},
                        "output": str(self.folder / f"embeddings-{name}"),
                        "max_length": _MAX_LENGTH,
                        "dtype": "bfloat16",
                        "workers": {"min": 2, "num": 2},
                    },
                )
            )
        with _timed(self.seconds, f"index {name}"):
            build_index(
                make_config(
                    IndexBuildConfig,
                    {
                        "embeddings": str(self.folder / f"embeddings-{name}"),
                        "output": str(self.folder / f"index-{name}"),
                        "kind": "hnsw",
                        "shards": 2,
                    },
                )
            )
        with _timed(self.seconds, f"evaluate {name}"):
            self._evaluate(name, encoder, name, files, "test")
            dev = self._evaluate(None, encoder, name, files, "dev")
        return float(dev[_PROMOTION_METRIC])

    def _evaluate(
        self, row: str | None, encoder: str, index: str, files: DemoFiles, split: str, **changes: Any
    ) -> dict[str, Any]:
        values = {
            "encoder": encoder,
            "index": str(self.folder / f"index-{index}"),
            "queries": {"path": str(files.beir), "format": "beir", "split": split},
            "recall_k": self.config.recall_k,
            "k": [1, 5, 10, 20, 50],
            "dtype": "bfloat16",
            "max_length": _MAX_LENGTH,
            "rerank_max_length": _MAX_LENGTH,
            "output": str(self.folder / "reports" / f"{(row or index).replace(' ', '-')}-{split}"),
            **changes,
        }
        figures = evaluate(make_config(EvaluateConfig, values))
        if row is not None:
            self.rows[row] = figures
        return figures

    def _train_reranker(self, files: DemoFiles, index: str, encoder: str) -> tuple[str, TunedFusion]:
        negatives, output = self.folder / "negatives.tsv", str(self.folder / "reranker")
        with _timed(self.seconds, "mine"):
            mine(
                make_config(
                    MineConfig,
                    {
                        "encoder": encoder,
                        "index": str(self.folder / f"index-{index}"),
                        "input": {"path": str(files.train_pairs)},
                        "output": str(negatives),
                        # Negatives a little below the top: the hardest are often right, and a cross-encoder
                        # that starts from scratch learns nothing from them in a minute.
                        "recall_k": 200,
                        "skip_top": 10,
                        "num_negatives": 1,
                        "seed": self.config.seed,
                    },
                )
            )
        with _timed(self.seconds, "train reranker"):
            train_reranker(
                make_config(
                    TrainRerankerConfig,
                    {
                        "model": encoder,
                        "train": {"path": str(negatives), "format": "triples"},
                        "output": output,
                        "batch_size": 16,
                        "epochs": 0.5,
                        "max_length": _MAX_LENGTH,
                        "optimizer": {"lr": 1e-4},
                        "seed": self.config.seed,
                    },
                )
            )
        with _timed(self.seconds, "tune fusion"):
            tuned = self._tune(encoder, index, output, files)
            store_fusion(output, tuned)
        return output, tuned

    def _tune(self, encoder: str, index: str, reranker: str, files: DemoFiles) -> TunedFusion:
        model = Encoder.load(encoder)
        opened = Index.open(str(self.folder / f"index-{index}"), encoder_fingerprint=model.fingerprint)
        retriever = Retriever(
            ForwardEngine(model, max_length=_MAX_LENGTH),
            opened,
            CrossScorer(CrossEncoder.load(reranker), dtype="bfloat16"),
            query_prefix=model.prefix_for("query"),
        )
        queries = read_queries(str(files.beir), "beir", "dev")
        assert queries.relevant is not None, "a BEIR folder judges by id"
        return tune_on_queries(retriever, queries.texts, queries.relevant, recall_k=self.config.recall_k)

    def _serve(self, encoder: str, index: str, reranker: str | None) -> str:
        values = {
            "encoder": encoder,
            "index": str(self.folder / f"index-{index}"),
            "reranker": reranker,
            "port": self.config.port,
        }
        with _timed(self.seconds, "serve"):
            base = start(make_config(ServeConfig, values))
            lines = [line for question in QUESTIONS for line in _ask(base, question, self.config.recall_k)]
        if self.config.keep_serving:
            _wait(base)
        stop()
        return "\n".join(lines)

    def _table(self, encoder: str, fused: bool) -> str:
        served = "reranked" if fused else encoder
        lines = ["", "| test questions | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
        for name, values in self.rows.items():
            cells = [_cell(values, metric) for metric in METRICS]
            lines.append(f"| {name}{' (served)' if name == served else ''} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _cell(values: Mapping[str, Any], metric: str) -> str:
    low, high = values["intervals"][metric]
    return f"{values[metric]:.3f} [{low:.3f}, {high:.3f}]"


def _verdict(stage: str, before: float, after: float) -> str:
    """Say whether a stage is promoted, and by which figures."""
    if after > before:
        return f"{stage}: dev {_PROMOTION_METRIC} {before:.4f} → {after:.4f}: promoted"
    return f"{stage}: dev {_PROMOTION_METRIC} {before:.4f} → {after:.4f}: no better, so it is NOT served"


def _ask(base: str, question: str, recall_k: int) -> list[str]:
    """Ask the server over HTTP and render its three best answers with both scores."""
    body = json.dumps({"query": question, "k": 3, "recall_k": recall_k, "timeout_ms": 20_000}).encode()
    request = urllib.request.Request(f"{base}/v1/search", body, {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=30) as response:
        answer = json.load(response)
    lines = [f"\n{question}   ({answer['timings_ms']['total']:.0f} ms)"]
    for hit in answer["results"][0]:
        rerank = "–" if hit["rerank_score"] is None else f"{hit['rerank_score']:.3f}"
        text = hit["text"] if len(hit["text"]) <= 110 else hit["text"][:110] + "…"
        lines.append(
            f"  {hit['rank']}. recall {hit['recall_score']:.3f}  rerank {rerank}  [{hit['id']}] {text}"
        )
    return lines


def _wait(base: str) -> None:
    log(f"\nserving at {base}/  (Ctrl-C ends it); or ask:")
    log(
        f"curl -s {base}/v1/search -H 'Content-Type: application/json' "
        '-d \'{"query": "Does renters insurance cover theft?", "k": 3}\''
    )
    try:
        while True:
            time.sleep(0.5)
    except KeyboardInterrupt:
        log("stopping")


class _timed:  # noqa: N801 - used as a function
    """Adds the seconds of a block to a stage's total."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        log(f"— {self.stage}")
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        elapsed = time.perf_counter() - self.started
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + elapsed
        log(f"  {self.stage}: {elapsed:.1f} s")
