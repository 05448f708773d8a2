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
    render: str | None = None  # what a person sees, where that is not any result's table
    always_rendered: bool = False  # where the output is no terminal, too
    positions: tuple[str, ...] = ()  # keys that may be given without their names, in this order
    example: str = ""  # arguments, as help shows them
    part: str | None = None  # parts its arguments from those that it passes on, which become one of its keys


COMMANDS: dict[str, Command] = {
    "up": Command(
        "texts in, a served search page out: encode, index and serve; again, and only what changed is encoded",
        "raytower.up.config:UpConfig",
        "raytower.up.job:up",
        "raytower.up.job:plan_up",
        positions=("input",),
        example="questions.txt --model intfloat/multilingual-e5-small",
    ),
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
        example="--model hfl/chinese-macbert-base --train data/train.tsv --output runs/encoder",
    ),
    "train-reranker": Command(
        "train a cross-encoder from scored pairs, triples or candidates",
        "raytower.training.config:TrainRerankerConfig",
        "raytower.training.reranker:train_reranker",
        "raytower.training.reranker:plan_train_reranker",
        example="--model runs/encoder --train runs/negatives.tsv --output runs/reranker",
    ),
    "train-classifier": Command(
        "train a text classifier, the fine-tuned baseline",
        "raytower.training.config:TrainClassifierConfig",
        "raytower.training.classifier:train_classifier",
        "raytower.training.classifier:plan_train_classifier",
        example="--model hfl/chinese-macbert-base --train data/labelled.tsv --output runs/classifier",
    ),
    "encode": Command(
        "encode a corpus into a folder of Parquet files",
        "raytower.encoding.config:EncodeConfig",
        "raytower.encoding.job:encode",
        "raytower.encoding.job:plan",
        example="--encoder runs/encoder --input data/corpus.tsv --output runs/embeddings",
    ),
    "export": Command(
        "put an ONNX graph, float32 or int8, into a copy of an encoder, reranker or classifier directory",
        "raytower.models.config:ExportConfig",
        "raytower.export:export",
        "raytower.export:plan_export",
        example="--encoder runs/encoder --output runs/encoder-onnx --graph-dtype int8",
    ),
    "index build": Command(
        "build and publish a sharded index from embeddings",
        "raytower.index.config:IndexBuildConfig",
        "raytower.index.build:build_index",
        "raytower.index.build:plan_build",
        example="--embeddings runs/embeddings --output runs/index --target.recall 0.98",
    ),
    "index sync": Command(
        "make an index equal to a folder of texts, encoding only what is new or changed",
        "raytower.index.change_config:IndexSyncConfig",
        "raytower.index.sync:sync_index",
        "raytower.index.sync:plan_sync",
        positions=(
            "index",
            "input",
        ),
        example="runs/index data/corpus",
    ),
    "index add": Command(
        "add documents; --upsert replaces those with the same id",
        "raytower.index.change_config:IndexAddConfig",
        "raytower.index.change:add_to_index",
        "raytower.index.change:plan_add",
        positions=(
            "index",
            "embeddings",
        ),
        example="runs/index runs/more_embeddings --upsert",
    ),
    "index delete": Command(
        "delete documents by id or by filter",
        "raytower.index.change_config:IndexDeleteConfig",
        "raytower.index.change:delete_from_index",
        "raytower.index.change:plan_delete",
        positions=("index",),
        example='runs/index --ids \'["a7", "b2"]\'',
    ),
    "index set": Command(
        "change columns of documents, by id or by filter, without encoding anything",
        "raytower.index.change_config:IndexSetConfig",
        "raytower.index.change:set_in_index",
        "raytower.index.change:plan_set",
        positions=("index",),
        example='runs/index --values \'{"price": 3}\' --filter \'{"sku": "a7"}\'',
    ),
    "index compact": Command(
        "build shards over all documents anew",
        "raytower.index.config:IndexCompactConfig",
        "raytower.index.compact:compact_index",
        "raytower.index.compact:plan_compact",
        positions=("index",),
        example="runs/index --kind hnsw",
    ),
    "index convert": Command(
        "make an index of format 2 one of format 3",
        "raytower.index.config:IndexConvertConfig",
        "raytower.index.convert:convert_index",
        "raytower.index.convert:plan_convert",
        positions=("index",),
        example="runs/index --remove-old",
    ),
    "index gc": Command(
        "remove old versions and shards that none needs",
        "raytower.index.change_config:IndexGcConfig",
        "raytower.index.collect:collect_garbage",
        "raytower.index.collect:plan_gc",
        positions=("index",),
        example="runs/index --keep 2",
    ),
    "index list": Command(
        "list the versions of an index",
        "raytower.index.change_config:IndexListConfig",
        "raytower.index.manage:index_list",
        render="raytower.cli.tables:render_versions",
        positions=("index",),
        example="runs/index",
    ),
    "index verify": Command(
        "read an index again and prove its checksums, counts and ids",
        "raytower.index.change_config:IndexVerifyConfig",
        "raytower.index.manage:index_verify",
        positions=("index",),
        example="runs/index",
    ),
    "index rollback": Command(
        "publish a version that equals an earlier one",
        "raytower.index.change_config:IndexRollbackConfig",
        "raytower.index.manage:index_rollback",
        positions=(
            "index",
            "to",
        ),
        example="runs/index 000003",
    ),
    "search": Command(
        "ask an index a question, or each of a file of questions (--input, --output)",
        "raytower.retrieval.config:SearchConfig",
        "raytower.ranked.search:search_one_or_many",
        "raytower.ranked.search:plan_one_or_many",
        "raytower.cli.tables:render_search_or_figures",
        always_rendered=True,
        positions=(
            "index",
            "query",
        ),
        example="runs/index 怎么才能开通微粒贷 --k 5",
    ),
    "rerank": Command(
        "score and sort a file of candidates with a reranker",
        "raytower.ranked.config:RerankFileConfig",
        "raytower.ranked.rerank:rerank",
        "raytower.ranked.rerank:plan_rerank",
        example="--reranker runs/reranker --input runs/recall.tsv --output runs/ranked.tsv --k 10",
    ),
    "embed": Command(
        "the vectors of a few texts as JSON; `encode` is for a corpus",
        "raytower.retrieval.config:EmbedConfig",
        "raytower.retrieval.embed:embed",
        "raytower.retrieval.embed:plan_embed",
        "raytower.retrieval.embed:render_embed",
        positions=(
            "encoder",
            "text",
        ),
        example="runs/encoder 怎么才能开通微粒贷 --role query",
    ),
    "pairs": Command(
        "make training pairs of a corpus's structure: titles, headings, articles, questions, neighbours, categories",
        "raytower.adapt.config:PairsConfig",
        "raytower.adapt.pairs:pairs",
        "raytower.adapt.pairs:plan_pairs",
        example="--input data/corpus.jsonl --output data/pairs.tsv",
    ),
    "mine": Command(
        "mine hard negatives for training pairs from an index",
        "raytower.annotation.config:MineConfig",
        "raytower.annotation.mine:mine",
        "raytower.annotation.mine:plan_mine",
        example="--encoder runs/encoder --index runs/index --input data/train.tsv --output runs/negatives.tsv",
    ),
    "evaluate": Command(
        "measure recall, MRR, nDCG and more of an index or a run file, or test how evaluations differ",
        "raytower.evaluation.config:EvaluateConfig",
        "raytower.evaluation.evaluate:evaluate",
        "raytower.evaluation.evaluate:plan_evaluate",
        "raytower.cli.tables:render_evaluation",
        example="--encoder runs/encoder --index runs/index --queries data/dev.tsv --output runs/report",
    ),
    "tune-fusion": Command(
        "tune how a reranker's logits are mixed with recall scores, or without one words with vectors, on dev queries",
        "raytower.evaluation.config:TuneFusionConfig",
        "raytower.evaluation.tuning:tune_fusion_on_dev",
        "raytower.evaluation.tuning:plan_tune_fusion",
        "raytower.cli.tables:render_tuning",
        example="--reranker runs/reranker --index runs/index --queries data/dev.tsv",
    ),
    "classify": Command(
        "label texts by nearest labels, by votes of labelled texts, or by a trained classifier",
        "raytower.annotation.config:ClassifyConfig",
        "raytower.annotation.classify:classify",
        "raytower.annotation.classify:plan_classify",
        example="--classifier runs/classifier --mode classifier --input data/new.txt --output runs/labels.tsv",
    ),
    "tune-classify": Command(
        "find votes, chances, a cut and a threshold for classify, on dev rows",
        "raytower.annotation.config:TuneClassifyConfig",
        "raytower.annotation.tune_classify:tune_classify",
        "raytower.annotation.tune_classify:plan_tune_classify",
        example="--encoder runs/encoder --index runs/index --mode votes --input data/dev.txt --output runs/votes.json",
    ),
    "similarity": Command(
        "score a file of text pairs",
        "raytower.annotation.config:SimilarityConfig",
        "raytower.annotation.similarity:similarity",
        "raytower.annotation.similarity:plan_similarity",
        example="--encoder runs/encoder --input data/pairs.tsv --output runs/similarity.tsv",
    ),
    "serve": Command(
        "serve an index, or several, over HTTP",
        "raytower.serving.config:ServeConfig",
        "raytower.serving.job:serve",
        "raytower.serving.plan:plan_serve",
        positions=("index",),
        example="runs/index --port 8000",
    ),
    "serve file": Command(
        "print the Serve config file of a server, for `serve deploy` and for a RayService",
        "raytower.serving.config:ServeConfig",
        "raytower.serving.plan:serve_file",
        render="raytower.serving.plan:render_serve_file",
        always_rendered=True,
        positions=("index",),
        example="runs/index --replicas 2",
    ),
    "serve reload": Command(
        "move a running server to a newer index version, or to other models, without a failed request",
        "raytower.serving.config:ServeReloadConfig",
        "raytower.serving.client:reload_server",
        example="--url http://127.0.0.1:8000 --index-version 000007",
    ),
    "serve rollback": Command(
        "move a running server back to what it served before",
        "raytower.serving.config:ServeRollbackConfig",
        "raytower.serving.client:roll_server_back",
        example="--url http://127.0.0.1:8000",
    ),
    "serve status": Command(
        "what a running server serves, on which processes",
        "raytower.serving.config:ServeStatusConfig",
        "raytower.serving.client:server_status",
        example="--url http://127.0.0.1:8000",
    ),
    "cluster init": Command(
        "make the token that `ray up cluster.yaml` hands to every node, once for each user",
        "raytower.cluster.config:ClusterInitConfig",
        "raytower.cluster.token:init_cluster",
        "raytower.cluster.token:plan_init",
    ),
    "submit": Command(
        "run a job on a cluster: upload, check, start, show its log, end as it ends",
        "raytower.cluster.config:SubmitConfig",
        "raytower.cluster.submit:submit",
        "raytower.cluster.submit:plan_submit",
        positions=("job",),
        example="encode --address http://127.0.0.1:8265 --config jobs/encode_corpus.yaml --shared /mnt/data",
        part="raytower.cluster.arguments:own_arguments",
    ),
    "refresh": Command(
        "train an encoder in rounds: mine negatives, train, encode, index, measure, and again while it gets better",
        "raytower.refresh.config:RefreshConfig",
        "raytower.refresh.job:refresh",
        "raytower.refresh.job:plan_refresh",
        example="--model runs/encoder --train data/train.tsv --corpus data/corpus.tsv --queries data/dev.tsv "
        "--output runs/refresh",
    ),
    "adapt": Command(
        "train an encoder on a corpus without labels, and keep it where a pseudo-dev set shows a gain",
        "raytower.adapt.config:AdaptConfig",
        "raytower.adapt.job:adapt",
        "raytower.adapt.job:plan_adapt",
        example="--model intfloat/multilingual-e5-small --corpus data/corpus.jsonl --output runs/adapted",
    ),
    "pipeline": Command(
        "run several jobs from one file, each once what it reads is there; a finished step is skipped",
        "raytower.pipeline.config:PipelineConfig",
        "raytower.pipeline.job:run_pipeline",
        "raytower.pipeline.job:plan_pipeline",
        "raytower.cli.tables:render_pipeline",
        example="--config jobs/pipeline.yaml",
    ),
}


def find_reference(reference: str) -> Any:
    """The object that `module:name` names, imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
