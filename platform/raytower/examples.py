"""An example config of every command: what `raytower config` starts from, and what jobs/*.yaml hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """The keys that an example sets, and what its rows look like."""

    values: dict[str, Any]
    comment: str = ""


_BACKBONE = "hfl/chinese-macbert-base"

EXAMPLES: dict[str, Example] = {
    "up": Example({"input": {"path": "data/corpus.tsv"}, "model": "intfloat/multilingual-e5-small"}),
    "demo": Example({"sample": "normal", "keep_serving": False}, "Nothing has to be set."),
    "train-retriever": Example(
        {
            "model": _BACKBONE,
            "train": {"path": "data/train.tsv", "format": "pairs"},
            "dev": {"path": "data/dev.tsv", "corpus": "data/corpus.tsv", "metric": "recall@10"},
            "output": "runs/encoder",
            "objective": {"name": "in_batch_negatives", "scale": 20.0, "margin": 0.0},
            "optimizer": {"lr": 2.0e-5},
            "batch_size": 64,
            "epochs": 1,
            "max_length": 64,
        },
        "Rows of pairs: `text <tab> similar text`, one a line.",
    ),
    "train-reranker": Example(
        {
            "model": "runs/encoder",
            "train": {"path": "runs/negatives.tsv", "format": "triples"},
            "output": "runs/reranker",
            "objective": {"name": "pointwise_regression", "loss": "bce"},
            "optimizer": {"lr": 2.0e-5},
            "batch_size": 32,
            "epochs": 1,
            "max_length": 128,
        },
        "Triples have a header, `query title neg_title`, as `raytower mine` writes it.",
    ),
    "train-classifier": Example(
        {
            "model": _BACKBONE,
            "train": {"path": "data/labelled_train.tsv"},
            "dev": {"path": "data/labelled_dev.tsv", "metric": "accuracy"},
            "output": "runs/classifier",
            "objective": {"name": "cross_entropy"},
            "optimizer": {"lr": 2.0e-5},
            "batch_size": 32,
            "epochs": 3,
            "max_length": 128,
        },
        'Rows: `text <tab> label`, or JSON lines {"text", "label"}.',
    ),
    "encode": Example(
        {
            "encoder": "runs/encoder",
            "input": {"path": "data/corpus.tsv"},
            "output": "runs/embeddings",
            "max_length": 256,
            "engine": "torch",
            "dtype": "float32",
        },
        "Texts one a line, `id <tab> text`, JSON lines, CSV, a BEIR folder or Parquet.",
    ),
    "export": Example(
        {"encoder": "runs/encoder", "output": "runs/encoder-onnx", "graph_dtype": "float32"},
        "float32 gives the same vectors or logits, int8 ones nearby in a third of the time.",
    ),
    "index build": Example(
        {
            "embeddings": "runs/embeddings",
            "output": "runs/index",
            "kind": "auto",
            "shards": "auto",
            "target": {"recall": 0.95, "k": 10, "memory": "8GiB"},
            "workers": {"num": 2, "num_cpus": 1, "num_gpus": 0},
        }
    ),
    "index sync": Example(
        {
            "index": "runs/index",
            "input": {"path": "data/corpus"},
            "gone": "delete",
            "max_gone": 0.5,
        },
        "Only what is new or changed is encoded.",
    ),
    "index add": Example({"index": "runs/index", "embeddings": "runs/more_embeddings", "upsert": True}),
    "index delete": Example(
        {"index": "runs/index", "input": {"path": "runs/deleted_ids.txt"}, "on_unknown": "fail"},
        "The file has an id a line.",
    ),
    "index set": Example(
        {"index": "runs/index", "input": {"path": "runs/values.jsonl"}, "on_unknown": "fail"},
        "Each row of the file has an id and the columns to change.",
    ),
    "index compact": Example(
        {
            "index": "runs/index",
            "target": {"memory": "8GiB"},
            "workers": {"num": 2, "num_cpus": 1, "num_gpus": 0},
        }
    ),
    "index convert": Example({"index": "runs/index"}),
    "index gc": Example({"index": "runs/index", "keep": 2}),
    "index list": Example({"index": "runs/index"}),
    "index verify": Example({"index": "runs/index"}),
    "index rollback": Example({"index": "runs/index", "to": "000001"}),
    "search": Example(
        {
            "index": "runs/index",
            "input": {"path": "data/queries.txt"},
            "output": "runs/recall.tsv",
            "k": 50,
            "reranker": None,
        },
        "Queries one a line, or `id <tab> query`; one query is given as `query` in place of input and output.",
    ),
    "rerank": Example(
        {
            "reranker": "runs/reranker",
            "input": {"path": "runs/recall.tsv"},
            "output": "runs/ranked.tsv",
            "k": 10,
        },
        "Rows: `query <tab> candidate [<tab> recall score]`, the rows of a query together.",
    ),
    "embed": Example({"encoder": "runs/encoder", "text": ["怎么才能开通微粒贷"], "role": "query"}),
    "pairs": Example(
        {
            "input": {"path": "data/corpus.jsonl"},
            "output": "data/pairs.tsv",
            "rules": ["title", "question", "heading", "law", "neighbour", "category"],
            "part": "all",
        },
        "Each row of the output says by which rule it was made.",
    ),
    "mine": Example(
        {
            "encoder": "runs/encoder",
            "index": "runs/index",
            "input": {"path": "data/train.tsv"},
            "output": "runs/negatives.tsv",
            "recall_k": 50,
            "skip_top": 5,
            "num_negatives": 1,
        }
    ),
    "evaluate": Example(
        {
            "encoder": "runs/encoder",
            "index": "runs/index",
            "queries": {"path": "data/dev.tsv", "format": "pairs"},
            "reranker": None,
            "k": [1, 5, 10, 20, 50],
            "output": "runs/report",
        },
        "With a reranker both stages are measured.",
    ),
    "tune-fusion": Example(
        {
            "reranker": "runs/reranker",
            "index": "runs/index",
            "queries": {"path": "data/dev.tsv", "format": "pairs"},
            "recall_k": 100,
            "store": True,
        },
        "Dev queries, never those that are evaluated later.",
    ),
    "classify": Example(
        {
            "encoder": "runs/encoder",
            "index": "runs/label-index",
            "input": {"path": "data/dev.txt"},
            "output": "runs/predictions.tsv",
            "mode": "labels",
            "k": 10,
        },
        "Mode labels: the index is built over label texts, and the nearest one is the prediction.",
    ),
    "tune-classify": Example(
        {
            "encoder": "runs/encoder",
            "index": "runs/labelled-index",
            "input": {"path": "data/dev.txt"},
            "output": "runs/votes.json",
            "mode": "votes",
        },
        "Dev rows, never those that are measured later.",
    ),
    "similarity": Example(
        {
            "encoder": "runs/encoder",
            "input": {"path": "data/pairs.tsv"},
            "output": "runs/similarity.tsv",
            "threshold": 0.8,
        },
        "Pairs have a header, `query title label`, or are JSON lines.",
    ),
    "serve": Example(
        {
            "index": "runs/index",
            "reranker": None,
            "host": "127.0.0.1",
            "port": 8000,
            "layout": "together",
            "replicas": 1,
        },
        "Loopback unless told otherwise; set api_key_env before opening it to others.",
    ),
    "serve file": Example({"index": "runs/index", "replicas": 2}),
    "serve reload": Example({"url": "http://127.0.0.1:8000"}),
    "serve rollback": Example({"url": "http://127.0.0.1:8000"}),
    "serve status": Example({"url": "http://127.0.0.1:8000"}),
    "cluster init": Example({"replace": False}, "Nothing has to be set."),
    "submit": Example(
        {
            "job": "encode",
            "arguments": ["--config", "encode.yaml"],
            "address": "http://127.0.0.1:8265",
            "shared": ["/mnt/data"],
        },
        "On the command line: raytower submit encode --config encode.yaml --address … --shared /mnt/data",
    ),
    "refresh": Example(
        {
            "model": _BACKBONE,
            "train": {"path": "data/train.tsv"},
            "corpus": {"path": "data/corpus.tsv"},
            "queries": {"path": "data/dev.tsv"},
            "output": "runs/refresh",
            "rounds": 3,
            "metric": "ndcg@10",
            "training": {"batch_size": 64, "max_length": 64, "epochs": 1},
            "mining": {"num_negatives": 4, "max_score_ratio": 0.95},
        },
        "Each round trains on negatives that the round before still takes for answers.",
    ),
    "adapt": Example(
        {
            "model": "intfloat/multilingual-e5-small",
            "corpus": {"path": "data/corpus.jsonl"},
            "output": "runs/adapted",
            "teacher": None,
            "metric": "ndcg@10",
            "training": {"batch_size": 64, "max_length": 128, "epochs": 1},
        },
        "No labels are read; the dev set is made of the corpus too, and says so.",
    ),
    "pipeline": Example(
        {
            "state": "runs/pipeline.json",
            "steps": [
                {
                    "job": "train-retriever",
                    "config": {
                        "model": _BACKBONE,
                        "train": {"path": "data/train.tsv", "format": "pairs"},
                        "output": "runs/encoder",
                        "batch_size": 64,
                        "max_length": 64,
                    },
                },
                {
                    "job": "encode",
                    "config": {
                        "encoder": "runs/encoder",
                        "input": {"path": "data/corpus.tsv"},
                        "output": "runs/embeddings",
                    },
                },
                {"job": "index build", "config": {"embeddings": "runs/embeddings", "output": "runs/index"}},
                {
                    "job": "evaluate",
                    "config": {
                        "encoder": "runs/encoder",
                        "index": "runs/index",
                        "queries": {"path": "data/dev.tsv", "format": "pairs"},
                        "output": "runs/report",
                    },
                },
            ],
        },
        "Run it again after a change, and only what depends on the change runs.",
    ),
}
