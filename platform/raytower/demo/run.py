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
from raytower.demo.orders import RankedAnswer, orders_table, rank_answers
from raytower.demo.sample import SAMPLES, DemoFiles, find_demo_model, write_sample
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.errors import import_extra
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.reader import Index
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.device import default_device, fast_dtype
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.progress import log
from raytower.retrieval.retriever import Retriever
from raytower.retrieval.tune_fusion import TunedFusion, store_fusion, tune_on_queries
from raytower.runtime import ensure_ray
from raytower.serving.config import ServeConfig
from raytower.serving.deploy import DIRECT, Server, start, stop
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
_PROMOTION_METRIC = "mrr@10"
# The first sentences say what an answer is about, and a training's minutes go by its tokens.
_MAX_LENGTH = 64
_ENCODER_TRAINING: dict[str, Any] = {"batch_size": 32, "optimizer": {"lr": 5e-5}}
_NEGATIVES = 3
_RERANKER_TRAINING: dict[str, Any] = {
    "objective": "listwise_softmax",
    "batch_size": 4,
    "epochs": 0.3,
    "optimizer": {"lr": 1e-4},
}


def plan_demo(config: DemoConfig) -> dict[str, Any]:
    """What the demo would do, and on how much."""
    return {
        "model": config.model or find_demo_model(),
        "sample": vars(SAMPLES[config.sample]),
        "serves_on": f"http://127.0.0.1:{config.port}",
    }


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole way and return the final table's figures.

    Raises:
        MissingExtraError: the packages of the extra [demo] are not installed.
    """
    if config.model is None:
        find_demo_model()
    import_extra("insuranceqa_data")
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
        self.model = config.model or find_demo_model()
        # A small sample is done before a second worker has started.
        self.encoding: dict[str, Any] = {"workers": {"num": 1}} if config.sample == "small" else {}
        self.dtype = fast_dtype(default_device())
        self.seconds: dict[str, float] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        with _timed(self.seconds, "start"):
            files = write_sample(self.folder / "data", SAMPLES[self.config.sample], self.config.seed)
            ensure_ray()
        log(
            f"sample: {files.num_train} training pairs, {files.num_corpus} answers; files under {self.folder}. Of "
            f"texts the first {_MAX_LENGTH} tokens are read, less than most answers have, so that this takes minutes"
        )
        base = self._measure_encoder("zero-shot", self.model, files)
        trained_dir = self._train_encoder(files)
        trained = self._measure_encoder("trained", trained_dir, files)
        name = "trained" if trained > base else "zero-shot"
        encoder = trained_dir if name == "trained" else self.model
        verdicts = [_verdict("training", base, trained)]
        reranker, tuned, orders = self._train_reranker(files, name, encoder)
        fused = tuned.fused_mrr > tuned.recall_mrr
        verdicts += _rerank_verdicts(tuned)
        if fused:
            with _timed(self.seconds, "evaluate reranked"):
                self._evaluate("reranked", encoder, name, files, "test", reranker=reranker)
        server: Server | None = None
        try:
            server, served = self._serve(encoder, name, reranker if fused else None)
            total = time.perf_counter() - started
            print("\n".join([self._table(name, fused), "", *verdicts]))
            for question, answers, (ids, milliseconds) in zip(QUESTIONS, orders, served, strict=True):
                print(orders_table(question, answers, tuned.fusion.weight, fused))
                print(f"answered over HTTP in {milliseconds:.0f} ms: {', '.join(ids)}", flush=True)
            if self.config.keep_serving:
                _wait(server.url)
        finally:
            if server is not None:
                stop(server)
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
            "questions": {
                question: {"answers": [answer.to_dict() for answer in answers], "served": ids}
                for question, answers, (ids, _) in zip(QUESTIONS, orders, served, strict=True)
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
                        "max_length": _MAX_LENGTH,
                        "dtype": self.dtype,
                        "seed": self.config.seed,
                        **_ENCODER_TRAINING,
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
                        "dtype": self.dtype,
                        **self.encoding,
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
            "dtype": self.dtype,
            "max_length": _MAX_LENGTH,
            "rerank_max_length": _MAX_LENGTH,
            "output": str(self.folder / "reports" / f"{(row or index).replace(' ', '-')}-{split}"),
            **changes,
        }
        figures = evaluate(make_config(EvaluateConfig, values))
        if row is not None:
            self.rows[row] = figures
        return figures

    def _train_reranker(
        self, files: DemoFiles, index: str, encoder: str
    ) -> tuple[str, TunedFusion, list[list[RankedAnswer]]]:
        """Mine, train and tune; returns the reranker's directory, its fusion, and what it does to QUESTIONS."""
        negatives, output = self.folder / "negatives.jsonl", str(self.folder / "reranker")
        with _timed(self.seconds, "mine"):
            mine(
                make_config(
                    MineConfig,
                    {
                        "encoder": encoder,
                        "index": str(self.folder / f"index-{index}"),
                        "input": {"path": str(files.train_pairs)},
                        "output": str(negatives),
                        "format": "candidates",
                        "file_type": "jsonl",
                        # From where the reranker will have to tell answers apart: the first ranks of recall.
                        "recall_k": 20,
                        "num_negatives": _NEGATIVES,
                        "dtype": self.dtype,
                        "max_length": _MAX_LENGTH,
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
                        "train": {"path": str(negatives), "format": "candidates"},
                        "output": output,
                        "max_length": _MAX_LENGTH,
                        "dtype": self.dtype,
                        "seed": self.config.seed,
                        **_RERANKER_TRAINING,
                    },
                )
            )
        with _timed(self.seconds, "rerank dev"):
            retriever = self._retriever(encoder, index, output)
            queries = read_queries(str(files.beir), "beir", "dev")
            assert queries.relevant is not None, "a BEIR folder judges by id"
            recall_k = self.config.recall_k
            tuned = tune_on_queries(retriever, queries.texts, queries.relevant, recall_k=recall_k)
            store_fusion(output, tuned)
            return output, tuned, rank_answers(retriever, tuned.fusion, QUESTIONS, recall_k)

    def _retriever(self, encoder: str, index: str, reranker: str) -> Retriever:
        model = Encoder.load(encoder)
        opened = Index.open(str(self.folder / f"index-{index}"), encoder_fingerprint=model.fingerprint)
        return Retriever(
            ForwardEngine(model, max_length=_MAX_LENGTH, dtype=self.dtype),
            opened,
            CrossScorer(CrossEncoder.load(reranker), dtype=self.dtype, max_length=_MAX_LENGTH),
            query_prefix=model.prefix_for("query"),
        )

    def _serve(
        self, encoder: str, index: str, reranker: str | None
    ) -> tuple[Server, list[tuple[list[str], float]]]:
        """Start the server: it, and for each of QUESTIONS the ids that it answers and its milliseconds."""
        values = {
            "encoder": encoder,
            "index": str(self.folder / f"index-{index}"),
            "reranker": reranker,
            "dtype": self.dtype,
            "max_length": _MAX_LENGTH,
            "rerank_max_length": _MAX_LENGTH,
            "port": self.config.port,
        }
        with _timed(self.seconds, "serve"):
            server = start(make_config(ServeConfig, values))
            return server, [_ask(server.url, question, self.config.recall_k) for question in QUESTIONS]

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


def _rerank_verdicts(tuned: TunedFusion) -> list[str]:
    """What the reranker is worth alone and fused, on dev, and whether it is served."""
    weight = f"fused reranking (weight {tuned.fusion.weight:.2f})"
    return [
        f"reranker alone: dev {_PROMOTION_METRIC} {tuned.recall_mrr:.4f} → {tuned.rerank_mrr:.4f}",
        _verdict(weight, tuned.recall_mrr, tuned.fused_mrr),
    ]


def _ask(base: str, question: str, recall_k: int) -> tuple[list[str], float]:
    """Ask the server over HTTP: the ids of its three best answers, best first, and the milliseconds it took."""
    body = json.dumps({"query": question, "k": 3, "recall_k": recall_k, "timeout_ms": 20_000}).encode()
    request = urllib.request.Request(f"{base}/v1/search", body, {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=30) as response:
        answer = json.load(response)
    return [hit["id"] for hit in answer["results"][0]], answer["timings_ms"]["total"]


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
