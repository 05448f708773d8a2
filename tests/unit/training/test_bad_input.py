"""Bad input to training: one clear error each, before any worker starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytower.cli.arguments import read_arguments
from raytower.config import load_config, make_config
from raytower.errors import InputError, MissingExtraError
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.static_embedding import StaticBackbone, StaticConfig
from raytower.objectives.config import CoSENT, EmbeddingDistillation, LambdaLoss
from raytower.storage import Location
from raytower.storage.errors import StorageError, StorageRefusedError
from raytower.training.classifier import ClassifierTask, plan_train_classifier, train_classifier
from raytower.training.config import (
    TrainClassifierConfig,
    TrainJobConfig,
    TrainRerankerConfig,
    TrainRetrieverConfig,
)
from raytower.training.loop import lasting_failure, probe_storage
from raytower.training.reranker import RerankerTask, plan_train_reranker, train_reranker
from raytower.training.retriever import RetrieverTask, plan_train_retriever, train_retriever
from raytower.training.step import NotANumberError
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_training import (
    write_candidates,
    write_labelled,
    write_lines,
    write_pairs,
    write_rows,
    write_scored,
    write_triples,
)

KINDS = {
    "retriever": (TrainRetrieverConfig, RetrieverTask.survey, RetrieverTask.prepare),
    "reranker": (TrainRerankerConfig, RerankerTask.survey, RerankerTask.prepare),
    "classifier": (TrainClassifierConfig, ClassifierTask.survey, ClassifierTask.prepare),
}


def refused(kind: str, model: Path, rows: Path, **changes: Any) -> str:
    """The message that a job of this kind ends with, before any worker starts."""
    config_class, survey, make_task = KINDS[kind]
    values = {
        "model": str(model),
        "train": {"path": str(rows)},
        "output": str(rows.parent / "out"),
        "batch_size": 8,
        "max_length": 32,
        "workers": {"num": 1},
        **changes,
    }
    config: Any = make_config(config_class, values)

    def check() -> None:
        make_task(config, survey(config))

    with pytest.raises(InputError) as caught:
        check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("objective", "label", "words"),
    [
        ({"name": "cosine_embedding"}, 0.5, "label 0.5 is none of 1, 0 and -1"),
        ({"name": "cosine_regression"}, 5, "-1..1"),
    ],
)
def test_labels_out_of_range_for_an_encoder(
    dummy_encoder_dir: Path, tmp_path: Path, objective: dict[str, Any], label: float, words: str
) -> None:
    train = write_scored(tmp_path / "train.tsv", 32, low=label)
    message = refused("retriever", dummy_encoder_dir, train, objective=objective)
    assert words in message
    assert "train.tsv" in message


@pytest.mark.parametrize(
    ("objective", "label", "words"),
    [
        ({"name": "pointwise_cross_entropy"}, 0.5, "label 0.5"),
        ({"name": "pointwise_regression", "loss": "bce"}, 3, "label 3 is outside 0..1"),
    ],
)
def test_labels_out_of_range_for_a_reranker(
    dummy_encoder_dir: Path, tmp_path: Path, objective: dict[str, Any], label: float, words: str
) -> None:
    train = write_scored(tmp_path / "train.tsv", 32, low=label)
    assert words in refused("reranker", dummy_encoder_dir, train, objective=objective)


def test_scores_of_candidates_out_of_range_for_a_reranker(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_candidates(tmp_path / "train.jsonl", 32)
    message = refused("reranker", dummy_encoder_dir, train, objective={"name": "pointwise_cross_entropy"})
    assert "label 2" in message


def test_a_label_outside_the_list_of_labels(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "train.tsv", 16)
    labels = write_rows(tmp_path / "label.txt", [f"topics##{topic}" for topic in "abcdefg"])
    message = refused("classifier", dummy_encoder_dir, train, labels=str(labels))
    assert "label 'topics##h' is not in labels" in message
    assert "2 rows" in message


def test_a_dev_label_that_is_never_trained(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "train.tsv", 16)
    dev = write_rows(tmp_path / "dev.tsv", ["a text\tother##z"])
    message = refused("classifier", dummy_encoder_dir, train, dev={"path": str(dev)})
    assert "label 'other##z' is none of the 8 labels" in message


def test_one_label_makes_no_classifier(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.tsv", [f"text {i}\tA##B" for i in range(16)])
    assert "the only label is 'A##B'" in refused("classifier", dummy_encoder_dir, train)


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_one_class_of_dev_pairs_has_no_auc(dummy_encoder_dir: Path, tmp_path: Path, kind: str) -> None:
    train = write_scored(tmp_path / "train.tsv", 32)
    dev = write_scored(tmp_path / "dev.tsv", 16, low=1)
    objective = {"name": "cosine_embedding"} if kind == "retriever" else {"name": "pointwise_cross_entropy"}
    changes = {"dev": {"path": str(dev), "metric": "auc"}, "objective": objective}
    message = refused(kind, dummy_encoder_dir, train, **changes)
    assert "all 16 labels are 1; dev.metric auc needs pairs of both classes" in message


def test_graded_dev_labels_need_spearman(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_scored(tmp_path / "train.tsv", 32)
    dev = write_scored(tmp_path / "dev.tsv", 16, low=0.5)
    changes = {"dev": {"path": str(dev), "metric": "auc"}, "objective": {"name": "cosine_regression"}}
    assert "use spearman for graded labels" in refused("retriever", dummy_encoder_dir, train, **changes)


@pytest.mark.parametrize("rows", ["\u200b\u200d\tan answer", " \tan answer"])
def test_a_text_that_is_empty_after_cleaning(dummy_encoder_dir: Path, tmp_path: Path, rows: str) -> None:
    train = write_rows(tmp_path / "train.tsv", ["a question\tan answer", rows])
    message = refused("retriever", dummy_encoder_dir, train)
    assert "train.tsv" in message
    assert "line 2" in message or ":2" in message


def test_bad_rows_go_to_quarantine_whatever_the_format(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    rows = [*(f"question {i}\tanswer {i}" for i in range(20)), "no second column"]
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write_rows(tmp_path / "train.tsv", rows))},
        "output": str(tmp_path / "out"),
        "on_error": "quarantine",
    }
    surveyed = RetrieverTask.survey(make_config(TrainRetrieverConfig, values))
    assert (surveyed.num_rows, surveyed.num_rejected) == (20, 1)
    assert [path.parent.name for path in tmp_path.rglob("train.tsv-pairs-*.jsonl")] == ["out.quarantine"]


@pytest.mark.parametrize("column", ["query", "document"])
def test_pairs_with_the_same_text_everywhere(dummy_encoder_dir: Path, tmp_path: Path, column: str) -> None:
    rows = [f"question {i}\tthe same" if column == "document" else f"the same\tanswer {i}" for i in range(32)]
    message = refused("retriever", dummy_encoder_dir, write_rows(tmp_path / "train.tsv", rows))
    assert f"all 32 training rows have the same {column}, 'the same'" in message


def _triples(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    return write_rows(path, ["query\ttitle\tneg_title", *("\t".join(row) for row in rows)])


def _candidates(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    lists = ({"query": query, "documents": texts, "scores": [1, 0]} for query, *texts in rows)
    return write_rows(path, [json.dumps(row) for row in lists])


@pytest.mark.parametrize(("write", "name"), [(_triples, "train.tsv"), (_candidates, "train.jsonl")])
def test_negatives_of_their_own_let_rows_share_a_query_or_a_document(
    dummy_encoder_dir: Path, tmp_path: Path, write: Any, name: str
) -> None:
    """Of pairs no row would have a negative. Here none has one where all negatives are answers to the one query."""
    numbers = range(8)
    for rows in (
        [(f"question {i}", "the answer", f"other {i}") for i in numbers],
        [("the question", f"answer {i}", f"other {i}") for i in numbers],
        [("the question", "the answer", f"other {i}") for i in numbers],
    ):
        prepared = make_config(
            TrainRetrieverConfig,
            {
                "model": str(dummy_encoder_dir),
                "train": str(write(tmp_path / name, rows)),
                "output": str(tmp_path / "out"),
                "batch_size": 8,
                "max_length": 32,
                "workers": {"num": 1},
            },
        )
        RetrieverTask.prepare(prepared, RetrieverTask.survey(prepared))
    turned = [("the question", f"answer {i}", f"answer {7 - i} ") for i in numbers]
    message = refused("retriever", dummy_encoder_dir, write(tmp_path / name, turned))
    assert (
        "all 8 training rows have the same query, 'the question', and each of their negatives is the"
        in message
    )


def test_graded_dev_labels_of_a_reranker_have_no_metric(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """It said "use spearman", which train-reranker does not measure."""
    train = write_scored(tmp_path / "train.tsv", 32)
    dev = write_scored(tmp_path / "dev.tsv", 16, low=0.5)
    message = refused("reranker", dummy_encoder_dir, train, dev={"path": str(dev), "metric": "auc"})
    assert (
        "auc, accuracy and f1 all do, and this job measures nothing else; name rows of two classes" in message
    )
    assert "spearman" not in message


@pytest.mark.parametrize("kind", ["retriever", "reranker", "classifier"])
def test_max_length_beyond_the_positions(dummy_encoder_dir: Path, tmp_path: Path, kind: str) -> None:
    write = {"retriever": write_pairs, "reranker": write_scored, "classifier": write_labelled}[kind]
    train = write(tmp_path / "train.tsv", 16)
    assert "max_length is 65; this model has positions for 1 to 64" in refused(
        kind, dummy_encoder_dir, train, max_length=65
    )


@pytest.mark.parametrize("kind", ["retriever", "reranker", "classifier"])
def test_fewer_rows_than_one_step(dummy_encoder_dir: Path, tmp_path: Path, kind: str) -> None:
    config_class, train_job, write = {
        "retriever": (TrainRetrieverConfig, train_retriever, write_pairs),
        "reranker": (TrainRerankerConfig, train_reranker, write_scored),
        "classifier": (TrainClassifierConfig, train_classifier, write_labelled),
    }[kind]
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write(tmp_path / "train.tsv", 15))},
        "output": str(tmp_path / "out"),
        "batch_size": 8,
        "accumulate_batches": 2,
        "max_length": 32,
    }
    config: Any = make_config(config_class, values)
    with pytest.raises(InputError, match="15 training rows are fewer than one batch of 16"):
        train_job(config)


def test_a_place_that_cannot_be_written_is_found_before_training(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write_pairs(tmp_path / "train.tsv", 16))},
        "output": str(tmp_path / "file" / "out"),
        "batch_size": 8,
        "max_length": 32,
    }
    with pytest.raises(InputError, match="cannot be written"):
        train_retriever(make_config(TrainRetrieverConfig, values))
    # And by each worker, which may see another file system than the driver.
    with pytest.raises(InputError, match="cannot be written by the worker on"):
        probe_storage(Location.of(tmp_path / "file"), 0)
    probe_storage(Location.of(tmp_path / "new"), 0)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_worker_cannot_use_a_part_of_a_gpu_nor_two(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """NCCL refuses two workers on one GPU, and nothing would use a second one."""
    values = {"model": str(dummy_encoder_dir), "train": {"path": "x.tsv"}, "output": str(tmp_path / "out")}
    for config_class in (TrainRetrieverConfig, TrainRerankerConfig, TrainClassifierConfig):
        for number in (0.5, 2):
            with pytest.raises(
                InputError, match=f"workers.num_gpus is {number}; a training worker computes on one GPU"
            ):
                make_config(config_class, {**values, "workers": {"num_gpus": number}})
        for number in (0, 1):
            make_config(config_class, {**values, "workers": {"num_gpus": number}})


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InputError("no such label"), {"failure": "no such label", "is_input": True}),
        (
            MissingExtraError("peft is not installed"),
            {"failure": "peft is not installed", "is_input": False},
        ),
        (NotANumberError("the loss is nan", 0), {"failure": "the loss is nan", "is_input": False}),
        (StorageRefusedError("denied"), {"failure": "denied", "is_input": True}),
        (StorageError("unreachable"), None),
        (RuntimeError("Connection closed by peer"), None),
        (KeyError("a bug"), None),
    ],
)
def test_only_failures_that_a_new_start_would_meet_again_end_a_run(
    error: Exception, failure: dict[str, Any] | None
) -> None:
    assert lasting_failure(error, 64) == failure


def test_memory_that_ran_out_ends_a_run_with_what_to_change() -> None:
    failure = lasting_failure(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 32)
    assert failure is not None
    assert "share of a batch, 32 rows, does not fit into its memory (CUDA out of memory. Tried" in str(
        failure["failure"]
    )
    assert "lower batch_size" in str(failure["failure"])


def test_simcse_without_dropout(still_encoder: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.txt", 16)
    assert "both passes would be equal" in refused(
        "retriever", still_encoder, train, objective={"name": "simcse"}
    )


def test_distillation_without_a_teacher(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_triples(tmp_path / "train.tsv", 16)
    message = refused("retriever", dummy_encoder_dir, train, objective={"name": "margin_mse"})
    assert "set teacher to a reranker directory" in message


def test_a_teacher_that_does_not_exist(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_triples(tmp_path / "train.tsv", 16)
    changes = {"objective": {"name": "margin_mse"}, "teacher": str(tmp_path / "nothing")}
    assert "nothing" in refused("retriever", dummy_encoder_dir, train, **changes)


def test_a_dry_run_makes_the_same_checks(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    values = {
        "model": str(dummy_encoder_dir),
        "train": {"path": str(write_triples(tmp_path / "train.tsv", 16))},
        "output": str(tmp_path / "out"),
        "batch_size": 8,
        "max_length": 32,
    }
    distilled = {"objective": {"name": "margin_mse"}, "teacher": str(tmp_path / "nothing")}
    with pytest.raises(InputError, match="nothing"):
        plan_train_retriever(make_config(TrainRetrieverConfig, {**values, **distilled}))
    assert plan_train_retriever(make_config(TrainRetrieverConfig, values))["steps"] == 2
    assert plan_train_reranker(make_config(TrainRerankerConfig, values))["steps"] == 2
    labelled = {"path": str(write_labelled(tmp_path / "labelled.tsv", 16))}
    plan = plan_train_classifier(make_config(TrainClassifierConfig, {**values, "train": labelled}))
    assert (plan["steps"], plan["labels"]) == (2, 8)


def test_a_teacher_that_nobody_follows(
    dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    train = write_pairs(tmp_path / "train.tsv", 16)
    message = refused("retriever", dummy_encoder_dir, train, teacher=str(dummy_reranker_dir))
    assert "objective in_batch_negatives follows none" in message


@pytest.mark.parametrize("teacher", [None, "reranker"])
def test_vectors_are_followed_of_an_encoder_alone(
    dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path, teacher: str | None
) -> None:
    train = write_lines(tmp_path / "train.txt", 16)
    changes = {
        "objective": "embedding_distillation",
        "teacher": None if teacher is None else str(dummy_reranker_dir),
    }
    words = (
        "follows the vectors of a teacher, and none is named; set teacher to an encoder directory"
        if teacher is None
        else "it is no encoder"
    )
    assert words in refused("retriever", dummy_encoder_dir, train, **changes)


def test_a_guide_that_does_not_exist(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 16)
    assert "nothing" in refused("retriever", dummy_encoder_dir, train, guide=str(tmp_path / "nothing"))


def test_grades_below_zero_for_a_reranker(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """A teacher's logits: known before training, though the objective compares lists."""
    train = write_candidates(tmp_path / "train.jsonl", 16, documents=5)
    message = refused("reranker", dummy_encoder_dir, train, objective="lambda_loss")
    assert "label -1 is outside 0..30" in message
    assert "train.jsonl" in message
    config = make_config(
        TrainRerankerConfig,
        {
            "model": str(dummy_encoder_dir),
            "train": str(train),
            "output": str(tmp_path / "out"),
            "objective": "rank_net",
            "max_length": 32,
        },
    )
    RerankerTask.prepare(config, RerankerTask.survey(config))


def test_lists_without_an_order_for_a_reranker(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"query": f"q{i}", "documents": ["a", "b"], "scores": [1, 1]}) for i in range(16)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    assert "every label is 1" in refused("reranker", dummy_encoder_dir, train, objective="rank_net")


def test_a_format_that_the_objective_does_not_train_from(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 16)
    message = refused(
        "retriever",
        dummy_encoder_dir,
        train,
        train={"path": str(train), "format": "pairs"},
        objective={"name": "simcse"},
    )
    assert "objective simcse trains from lines" in message


def test_a_scale_that_the_teacher_leaves_behind(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    rows = [
        json.dumps({"query": f"q{i}", "documents": ["a", "b"], "scores": [9 + i / 8, -1]}) for i in range(16)
    ]
    train = write_rows(tmp_path / "train.jsonl", rows)
    objective = {"name": "margin_mse", "scale": 1}
    message = refused("retriever", dummy_encoder_dir, train, objective=objective)
    assert "objective.scale is 1, so differences of cosines reach 2" in message
    assert "median 10.9" in message


def test_matryoshka_beyond_the_embedding(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 16)
    message = refused("retriever", dummy_encoder_dir, train, matryoshka={"dims": [64, 8]})
    assert "matryoshka.dims asks for 64 dimensions, and the encoder has 32" in message


def test_lora_layers_that_do_not_exist(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train.tsv", 16)
    message = refused("retriever", dummy_encoder_dir, train, lora={"target_modules": ["wq"]})
    assert "linear layers are" in message
    assert "'query'" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"name": "in_batch"}}, "in_batch_negatives"),
        (
            {"objective": {"scal": 3}},
            "unknown key 'objective.scal'; the nearest known key is 'objective.scale'",
        ),
        ({"objective": {"name": "simcse", "margin": 0.1}}, "unknown key 'objective.margin'"),
        ({"model": None}, "name an encoder by model or by init_from"),
        ({"dev": {"path": "x", "metric": "recal@10"}}, "dev.metric"),
        ({"dev": {"path": "x", "metric": "auc", "corpus": "y"}}, "dev.metric auc searches none"),
        ({"dev": {"path": "x", "threshold": 0.5}}, "dev.metric recall@10 has none"),
        (
            {"dev": {"path": "x", "every_steps": 10, "every_epochs": 1}},
            "dev.every_steps is 10 and dev.every_epochs 1; give one of them",
        ),
        (
            {"dev": {"metric": "recall@1"}},
            "dev.path is required and not given; name dev rows, or give dev.share",
        ),
        (
            {"dev": {"path": "x", "share": 0.1}},
            "dev.path is 'x' and dev.share 0.1; dev rows come from one of them",
        ),
        ({"dev": {"share": 1.0}}, "dev.share is 1.0; it must be"),
        ({"dev": {"share": 0.1, "split": "dev"}}, "dev.split is 'dev', and dev.share takes dev rows from"),
        (
            {"guide": "g", "objective": "hardest_negative"},
            "guide is set, and objective hardest_negative asks none",
        ),
        (
            {"objective": "embedding_distillation", "teacher": "t", "matryoshka": {"dims": [8]}},
            "objective embedding_distillation follows whole vectors",
        ),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_configs_that_name_what_does_not_exist(
    dummy_encoder_dir: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    values = {"model": str(dummy_encoder_dir), "train": {"path": "x"}, "output": "y", **changes}
    with pytest.raises(InputError) as caught:
        make_config(TrainRetrieverConfig, json.loads(json.dumps(values)))
    assert words in str(caught.value)


def test_plain_text_on_the_command_line_stays_as_typed() -> None:
    given = ["--model", "2024", "--train", "x", "--output", "y", "--query_prefix"]
    arguments = read_arguments(TrainRetrieverConfig, (), [*given, "query: ", "--teacher", "null"])
    config = load_config(TrainRetrieverConfig, None, arguments.overrides)
    assert (config.model, config.query_prefix, config.teacher) == ("2024", "query: ", None)


def test_objectives_on_the_command_line() -> None:
    given = ["--model", "m", "--train", "x", "--output", "y"]

    def config_of(config_class: type[TrainJobConfig], *more: str) -> Any:
        return load_config(config_class, None, read_arguments(config_class, (), [*given, *more]).overrides)

    more = ["--objective.more_negatives", "query_query,document_document", "--guide", "g"]
    config = config_of(TrainRetrieverConfig, *more, "--guide.margin", "0.1", "--guide.relative")
    assert config.objective.more_negatives == ("query_query", "document_document")
    assert (config.guide.encoder, config.guide.margin, config.guide.relative) == ("g", 0.1, True)
    assert config_of(
        TrainRetrieverConfig, "--objective", "cosent", "--objective.scale", "5"
    ).objective == CoSENT(scale=5)
    distilled = config_of(TrainRetrieverConfig, "--objective", "embedding_distillation", "--teacher", "t")
    assert distilled.objective == EmbeddingDistillation(loss="cosine")
    ranked = config_of(TrainRerankerConfig, "--objective", "lambda_loss", "--objective.k", "10")
    assert ranked.objective == LambdaLoss(k=10)


def test_every_job_config_is_frozen_and_shares_its_keys() -> None:
    for config_class in (TrainRetrieverConfig, TrainRerankerConfig, TrainClassifierConfig):
        assert issubclass(config_class, TrainJobConfig)
        assert set(TrainJobConfig.model_fields) <= set(config_class.model_fields)


@pytest.mark.parametrize(
    ("objective", "write"),
    [("in_batch_negatives", write_pairs), ("cosent", write_scored), ("simcse", write_lines)],
)
def test_a_batch_of_one_row_has_nothing_to_compare(
    dummy_encoder_dir: Path, tmp_path: Path, objective: str, write: Callable[[Path, int], Path]
) -> None:
    """The loss was 0 at every step, and the same weights were published after hours."""
    train = write(tmp_path / ("train.txt" if write is write_lines else "train.tsv"), 16)
    message = refused("retriever", dummy_encoder_dir, train, objective=objective, batch_size=1)
    assert f"batch_size is 1, and objective {objective} compares the rows of a batch" in message


def test_a_batch_of_one_row_with_negatives_of_its_own_or_none_needed(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    for objective, write in (("in_batch_negatives", write_triples), ("cosine_regression", write_scored)):
        values = {
            "model": str(dummy_encoder_dir),
            "train": str(write(tmp_path / f"{objective}.tsv", 16)),
            "output": str(tmp_path / "out"),
            "objective": objective,
            "batch_size": 1,
            "max_length": 32,
        }
        config = make_config(TrainRetrieverConfig, values)
        RetrieverTask.prepare(config, RetrieverTask.survey(config))


def test_lists_of_equal_scores_have_no_order(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    lists = [{"query": f"q{n}", "documents": ["a", "b"], "scores": [n, n]} for n in range(16)]
    train = write_rows(tmp_path / "train.jsonl", [json.dumps(row) for row in lists])
    message = refused("reranker", dummy_encoder_dir, train, objective="rank_net")
    assert "the scores of each row are all equal, and objective rank_net learns their order" in message


@pytest.mark.parametrize("kind", ["reranker", "classifier"])
def test_a_table_of_vectors_takes_no_head(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model").mkdir()
    backbone = StaticBackbone(StaticConfig(vocab_size=len(tiny_tokenizer()), hidden_size=4))
    Encoder(backbone, tiny_tokenizer(), EncoderSettings()).save(tmp_path / "model")
    write, name = (write_candidates, "train.jsonl") if kind == "reranker" else (write_labelled, "train.tsv")
    message = refused(kind, tmp_path / "model", write(tmp_path / name, 16))
    assert "is a StaticEmbedding, a table of token vectors, on which no" in message
