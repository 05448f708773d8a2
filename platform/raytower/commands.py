"""The table of commands: what each is for, and where its config, its job and its plan live.

It imports none of them: a command is imported when it runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """Where a command's config, job and plan live; imported only when it runs."""

    help: str
    config: str
    run: str
    plan: str | None = None
    render: str | None = None  # how a person sees the result, where that is more than the JSON line


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole way on a sample: train, encode, index, evaluate, rerank, serve",
        "raytower.demo.config:DemoConfig",
        "raytower.demo.run:run_demo",
        "raytower.demo.run:plan_demo",
    ),
    "train-retriever": Command(
        "train a two-tower encoder: in-batch negatives, SimCSE, distillation and others",
        "raytower.training.config:TrainRetrieverConfig",
        "raytower.training.retriever:train_retriever",
        "raytower.training.retriever:plan_train_retriever",
    ),
    "train-reranker": Command(
        "train a cross-encoder from scored pairs, triples or candidates",
        "raytower.training.config:TrainRerankerConfig",
        "raytower.training.reranker:train_reranker",
        "raytower.training.reranker:plan_train_reranker",
    ),
    "train-classifier": Command(
        "train a text classifier, the fine-tuned baseline",
        "raytower.training.config:TrainClassifierConfig",
        "raytower.training.classifier:train_classifier",
        "raytower.training.classifier:plan_train_classifier",
    ),
    "encode": Command(
        "encode a corpus into a folder of Parquet files",
        "raytower.encoding.config:EncodeConfig",
        "raytower.encoding.job:encode",
        "raytower.encoding.job:plan",
    ),
    "export": Command(
        "put an ONNX graph, float32 or int8, into a copy of an encoder directory",
        "raytower.models.config:ExportConfig",
        "raytower.export:export",
        "raytower.export:plan_export",
    ),
    "index build": Command(
        "build and publish a sharded index from embeddings",
        "raytower.index.config:IndexBuildConfig",
        "raytower.index.build:build_index",
        "raytower.index.build:plan_build",
    ),
    "index sync": Command(
        "make an index equal to a folder of texts, encoding only what is new or changed",
        "raytower.index.change_config:IndexSyncConfig",
        "raytower.index.sync:sync_index",
        "raytower.index.sync:plan_sync",
    ),
    "index add": Command(
        "add documents; --upsert true replaces those with the same id",
        "raytower.index.change_config:IndexAddConfig",
        "raytower.index.change:add_to_index",
        "raytower.index.change:plan_add",
    ),
    "index delete": Command(
        "delete documents by id or by filter",
        "raytower.index.change_config:IndexDeleteConfig",
        "raytower.index.change:delete_from_index",
        "raytower.index.change:plan_delete",
    ),
    "index set": Command(
        "change columns of documents, by id or by filter, without encoding anything",
        "raytower.index.change_config:IndexSetConfig",
        "raytower.index.change:set_in_index",
        "raytower.index.change:plan_set",
    ),
    "index compact": Command(
        "build shards over all documents anew",
        "raytower.index.config:IndexCompactConfig",
        "raytower.index.compact:compact_index",
        "raytower.index.compact:plan_compact",
    ),
    "index convert": Command(
        "make an index of format 2 one of format 3 (--index URI [--remove_old true])",
        "raytower.index.config:IndexConvertConfig",
        "raytower.index.convert:convert_index",
        "raytower.index.convert:plan_convert",
    ),
    "index gc": Command(
        "remove old versions and shards that none needs (--keep N)",
        "raytower.index.change_config:IndexGcConfig",
        "raytower.index.collect:collect_garbage",
        "raytower.index.collect:plan_gc",
    ),
    "index list": Command(
        "list the versions of an index",
        "raytower.index.change_config:IndexListConfig",
        "raytower.index.manage:index_list",
    ),
    "index verify": Command(
        "read an index again and prove its checksums, counts and ids",
        "raytower.index.change_config:IndexVerifyConfig",
        "raytower.index.manage:index_verify",
    ),
    "index rollback": Command(
        "publish a version that equals an earlier one (--to VERSION)",
        "raytower.index.change_config:IndexRollbackConfig",
        "raytower.index.manage:index_rollback",
    ),
    "search": Command(
        "ask an index a question (--index URI --query TEXT [--k N] [--json])",
        "raytower.retrieval.config:SearchConfig",
        "raytower.retrieval.search:search",
        "raytower.retrieval.search:plan_search",
        "raytower.retrieval.search:render_search",
    ),
    "mine": Command(
        "mine hard negatives for training pairs from an index",
        "raytower.annotation.config:MineConfig",
        "raytower.annotation.mine:mine",
        "raytower.annotation.mine:plan_mine",
    ),
    "evaluate": Command(
        "measure recall, MRR and nDCG of an index, with or without a reranker",
        "raytower.evaluation.config:EvaluateConfig",
        "raytower.evaluation.evaluate:evaluate",
        "raytower.evaluation.evaluate:plan_evaluate",
    ),
    "classify": Command(
        "label texts by nearest labels, by votes of labelled texts, or by a trained classifier",
        "raytower.annotation.config:ClassifyConfig",
        "raytower.annotation.classify:classify",
        "raytower.annotation.classify:plan_classify",
    ),
    "similarity": Command(
        "score a file of text pairs",
        "raytower.annotation.config:SimilarityConfig",
        "raytower.annotation.similarity:similarity",
        "raytower.annotation.similarity:plan_similarity",
    ),
    "serve": Command(
        "serve an index over HTTP",
        "raytower.serving.config:ServeConfig",
        "raytower.serving.deploy:serve",
        "raytower.serving.deploy:plan_serve",
    ),
    "pipeline": Command(
        "run several jobs one after the other from one file; a finished step is skipped",
        "raytower.pipeline.config:PipelineConfig",
        "raytower.pipeline.job:run_pipeline",
        "raytower.pipeline.job:plan_pipeline",
    ),
}


def find_reference(reference: str) -> Any:
    """The object that `module:name` names, imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
