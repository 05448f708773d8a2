"""Several sets of training rows and of dev rows in one run, and instructions by row: in this process, without Ray."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from scipy.stats import spearmanr
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from raytower.config import WorkersConfig, make_config
from raytower.data.config import NamedInput
from raytower.data.pieces import Survey, survey
from raytower.errors import InputError
from raytower.models.forward import ForwardEngine
from raytower.storage import Location
from raytower.training.batches import Rows
from raytower.training.columns import text_columns
from raytower.training.config import (
    RetrieverDevConfig,
    TrainClassifierConfig,
    TrainRerankerConfig,
    TrainRetrieverConfig,
)
from raytower.training.dev_recall import evaluate_recall, load_dev_set
from raytower.training.loop import TrainingPlan, train_worker
from raytower.training.mixing import SET
from raytower.training.model_card import model_card
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.row_stream import stream_batches
from raytower.training.runner import _describe_plan, _make_plan, run_identity
from raytower.training.step import TrainingStep
from raytower.training.task import Task
from tests.support.data_files import rows_of, write, write_jsonl
from tests.support.loop_here import answer_ray_train
from tests.support.tensorboard_events import read_scalars
from tests.support.tiny_training import (
    answer,
    question,
    write_candidates,
    write_pairs,
    write_scored,
    write_triples,
)

ONE = WorkersConfig(num=1)


def values_of(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "output": str(folder / "out"),
        "batch_size": 8,
        "max_length": 64,
        "dtype": "float32",
        "optimizer": {"lr": 1e-9},
        "workers": {"num": 1},
        **changes,
    }


def retriever(model: Path, folder: Path, **changes: Any) -> TrainRetrieverConfig:
    return make_config(TrainRetrieverConfig, values_of(model, folder, **changes))


def two_sets(folder: Path) -> dict[str, Any]:
    """40 pairs, and 24 scored pairs of which half match."""
    return {
        "ask": {"path": str(write_pairs(folder / "ask.tsv", 40)), "query_prefix": "ask: "},
        "sts": {"path": str(write_scored(folder / "sts.tsv", 24)), "objective": "cosent"},
    }


def plan_of(task_class: type[Task[Any]], config: Any) -> TrainingPlan:
    surveyed = task_class.survey(config)
    task = task_class.prepare(config, surveyed)
    return _make_plan(config, surveyed, task, ONE, Location.of(config.output).parent / "failure.json")


def step_of(model: torch.nn.Module, config: Any) -> TrainingStep:
    optimizer = make_optimizer(model, config.optimizer)
    return TrainingStep(model, optimizer, make_schedule(optimizer, 10, 0.0))


def first_of(name: str, batches: list[Rows]) -> Rows:
    return next(rows for rows in batches if rows[SET][0] == name)


class TestStream:
    def test_batches_are_of_one_set_and_each_set_has_epochs_of_its_own(
        self, still_encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """64 rows three times are 24 batches of 8: 15 of the 40 pairs, 9 of the 24 scored pairs."""
        config = retriever(still_encoder, tmp_path, train={"sets": two_sets(tmp_path)}, epochs=3)
        plan = plan_of(RetrieverTask, config)
        batches = list(stream_batches(plan.stream))
        assert plan.num_steps == len(batches) == 24
        rows: dict[str, list[str]] = {"ask": [], "sts": []}
        for batch in batches:
            (name,) = set(batch[SET])
            assert len(batch["query"]) == len(batch[SET]) == 8
            assert ("label" in batch) == (name == "sts")
            rows[name] += batch["query"]
        for name, size in (("ask", 40), ("sts", 24)):
            passes = [rows[name][first : first + size] for first in range(0, 3 * size, size)]
            assert len(rows[name]) == 3 * size
            assert Counter(passes[0]) == Counter(passes[1]) == Counter(passes[2])
            assert len(set(passes[0])) == size
            assert passes[0] != passes[1] != sorted(passes[1])
        said = capfd.readouterr().err
        assert "train.sets.ask: 40 rows, 15 of 24 batches, 3 passes" in said
        assert "train.sets.sts: 24 rows, 9 of 24 batches, 3 passes" in said

    @pytest.mark.parametrize("sampler", ["shuffle", "no_duplicates"])
    def test_a_stream_goes_on_at_any_batch(self, still_encoder: Path, tmp_path: Path, sampler: str) -> None:
        train = {"sets": two_sets(tmp_path), "mixing": "even"}
        config = retriever(
            still_encoder, tmp_path, train=train, epochs=2, sampler=sampler, shuffle_rows=16, batch_size=4
        )
        stream = plan_of(RetrieverTask, config).stream
        whole = list(stream_batches(stream))
        assert Counter(rows[SET][0] for rows in whole) == {"ask": 16, "sts": 16}
        for skip in (1, 13, 31, 32):
            assert list(stream_batches(stream, skip)) == whole[skip:]

    def test_weights_and_the_plan_of_a_dry_run(self, still_encoder: Path, tmp_path: Path) -> None:
        """Of 40 and of 24 rows that count twice: 5/11 and 6/11 of 8 batches. 8 rows of the 40 are never read."""
        sets = two_sets(tmp_path)
        sets["sts"]["weight"] = 2
        config = retriever(still_encoder, tmp_path, train={"sets": sets})
        surveyed = RetrieverTask.survey(config)
        plan = _describe_plan(config, surveyed, torch.nn.Linear(1, 1), ONE)
        assert plan["batches_of_sets"] == {"ask": 4, "sts": 4}
        assert (plan["rows"], plan["steps"], plan["unused_rows"]) == (64, 8, 8)


def test_each_set_has_its_objective_and_its_prompts(still_encoder: Path, tmp_path: Path) -> None:
    """The losses are those of sentence-transformers' vectors by the formulas, once by once and accumulated."""
    config = retriever(still_encoder, tmp_path, train={"sets": two_sets(tmp_path)}, document_prefix="doc: ")
    plan = plan_of(RetrieverTask, config)
    batches = list(stream_batches(plan.stream))
    ask, sts = first_of("ask", batches), first_of("sts", batches)
    peer = SentenceTransformer(str(still_encoder), device="cpu")

    def cosines(rows: Rows, prefix: str) -> torch.Tensor:
        left, right = (
            peer.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
            for texts in ([prefix + q for q in rows["query"]], ["doc: " + d for d in rows["document"]])
        )
        return left @ right.T

    contrastive = functional.cross_entropy(20 * cosines(ask, "ask: "), torch.arange(8))
    scores, labels = 20 * cosines(sts, "").diagonal(), torch.tensor(sts["label"])
    ordered = (scores[None] - scores[:, None])[labels[:, None] > labels[None]]
    cosent = torch.log(1 + ordered.exp().sum())
    step = step_of(plan.task.build(None).train(), config)
    for name, rows, expected in (("ask", ask, contrastive), ("sts", sts, cosent)):
        assert step.run(0, [rows], plan.task.backward) == pytest.approx(float(expected), abs=1e-4)
        assert step.observed == {f"loss/{name}": pytest.approx(float(expected), abs=1e-4)}
    both = step.run(1, [ask, sts], plan.task.backward)
    assert both == pytest.approx(float(contrastive + cosent) / 2, abs=1e-4)
    assert set(step.observed) == {"loss/ask", "loss/sts"}


def test_each_set_of_a_reranker_has_its_objective(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    sets = {
        "lists": {"path": str(write_candidates(tmp_path / "a.jsonl", 16)), "objective": "listwise_softmax"},
        "judged": str(write_scored(tmp_path / "b.tsv", 16)),
    }
    config = make_config(
        TrainRerankerConfig, values_of(dummy_reranker_dir, tmp_path, train={"sets": sets}, batch_size=4)
    )
    plan = plan_of(RerankerTask, config)
    batches = list(stream_batches(plan.stream))
    lists, judged = first_of("lists", batches), first_of("judged", batches)
    peer = PeerCrossEncoder(str(dummy_reranker_dir), device="cpu")

    def logits(pairs: list[tuple[str, str]]) -> torch.Tensor:
        return torch.from_numpy(peer.predict(pairs, activation_fn=torch.nn.Identity()))

    pairs = [(q, d) for q, own in zip(lists["query"], lists["documents"], strict=True) for d in own]
    listwise = functional.cross_entropy(logits(pairs).reshape(4, 3), torch.zeros(4, dtype=torch.long))
    pointwise = functional.binary_cross_entropy_with_logits(
        logits(list(zip(judged["query"], judged["document"], strict=True))), torch.tensor(judged["label"])
    )
    step = step_of(plan.task.build(None).eval(), config)
    assert step.run(0, [lists], plan.task.backward) == pytest.approx(float(listwise), abs=1e-4)
    assert step.run(0, [judged], plan.task.backward) == pytest.approx(float(pointwise), abs=1e-4)
    assert set(step.observed) == {"loss/judged"}


def test_a_teacher_and_a_guide_serve_the_sets_that_ask_for_them(
    still_encoder: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    sets = {
        "hard": {"path": str(write_triples(tmp_path / "hard.tsv", 16)), "objective": "margin_mse"},
        "ask": str(write_pairs(tmp_path / "ask.tsv", 16)),
        "sts": {"path": str(write_scored(tmp_path / "sts.tsv", 16)), "objective": "cosent"},
    }
    config = retriever(
        still_encoder,
        tmp_path,
        train={"sets": sets},
        teacher=str(dummy_reranker_dir),
        guide={"encoder": str(still_encoder)},
        matryoshka={"dims": [32, 8]},
        gradient_cache=4,
    )
    plan = plan_of(RetrieverTask, config)
    task = cast(RetrieverTask, plan.task)
    step = step_of(task.build(None).train(), config)
    batches = list(stream_batches(plan.stream))
    asked = {}
    for name in sets:
        rows = first_of(name, batches)
        assert np.isfinite(step.run(0, [rows], task.backward))
        taught = task._taught(text_columns(rows), task.set_of(rows).config)
        asked[name] = (taught.teacher_BK is not None, taught.guide is not None)
    assert asked == {"hard": (True, False), "ask": (False, True), "sts": (False, False)}
    assert cast(Any, task.sets["hard"].config.objective).scale > 0


def test_a_share_of_each_set_of_a_reranker_measures_it(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    """5 triples are 10 judged pairs, and 4 judged pairs stand beside them."""
    sets = {
        "hard": {"path": str(write_triples(tmp_path / "a.tsv", 20)), "objective": "pairwise_margin"},
        "judged": str(write_scored(tmp_path / "b.tsv", 16)),
    }
    values = values_of(dummy_reranker_dir, tmp_path, train={"sets": sets}, dev={"share": 0.25})
    config = make_config(TrainRerankerConfig, values)
    surveyed = RerankerTask.survey(config)
    assert surveyed.num_rows == 15 + 12
    task = RerankerTask(config, config.start, None, surveyed.set_aside)
    assert task.scored_dev is not None
    assert len(task.scored_dev.labels) == 10 + 4


class TestRefusals:
    def test_a_set_smaller_than_a_batch(self, still_encoder: Path, tmp_path: Path) -> None:
        sets = {**two_sets(tmp_path), "few": str(write_pairs(tmp_path / "few.tsv", 7))}
        config = retriever(still_encoder, tmp_path, train={"sets": sets})
        with pytest.raises(InputError, match=r"^train\.sets\.few: 7 rows are fewer than one batch of 8"):
            RetrieverTask.survey(config)

    def test_rows_that_the_objective_of_the_set_does_not_take(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        sets = two_sets(tmp_path)
        sets["sts"]["path"] = sets["ask"]["path"]
        with pytest.raises(InputError, match=r"(?s)^train\.sets\.sts: .*ask\.tsv"):
            RetrieverTask.survey(retriever(still_encoder, tmp_path, train={"sets": sets}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train": {}}, r"train\.path is required and not given; name training rows, or several sets"),
            ({"train": {"path": "a", "sets": {"x": "b"}}}, r"train\.path is 'a' and train\.sets are x"),
            ({"train": {"sets": {"x": {"weight": 2}}}}, r"train\.sets\.x\.path is required"),
            ({"train": {"sets": {"x": {"path": "p", "weight": 0}}}}, r"train\.sets\.x\.weight is 0; it must"),
            ({"train": {"sets": {"x/y": "p"}}}, r"train\.sets: 'x/y' cannot be the name of a set"),
            ({"train": {"sets": {"x": "p"}, "mixing": 0.5}}, r"train\.mixing is 0\.5; it must be 'prop"),
            ({"train": {"path": "p", "mixing": "even"}}, r"train\.mixing is even, and train\.path names one"),
            (
                {"train": {"sets": {"x": {"path": "p", "objective": {"name": "cosent", "scael": 1}}}}},
                r"unknown key 'train\.sets\.x\.objective\.scael'; known are name, scale",
            ),
            (
                {"train": {"sets": {"x": {"path": "p", "objective": "cosemt"}}}},
                r"train\.sets\.x\.objective\.name is 'cosemt'.*nearest is 'cosent'",
            ),
            (
                {"train": {"sets": {"x": {"path": "p", "objective": "embedding_distillation"}, "y": "q"}}},
                "the sets have the objectives embedding_distillation, in_batch_negatives",
            ),
            (
                {"train": {"sets": {"x": "p"}}, "teacher": "t"},
                "teacher is set, and no set's objective follows",
            ),
            (
                {"train": "t", "instruction_format": "Instruct: "},
                r"instruction_format is 'Instruct: ': \{\} must",
            ),
            ({"train": "t", "dev": {"path": "d", "chosen_by": "x"}}, "there are no dev sets: remove it"),
            (
                {"train": "t", "dev": {"sets": {"a": "d", "b": "e"}, "chosen_by": "c"}},
                r"dev\.chosen_by is 'c', which is no dev set; choose one of: a, b",
            ),
            (
                {"train": "t", "dev": {"sets": {"a": {"path": "d", "metric": "auc", "corpus": "c"}}}},
                r"dev\.sets\.a\.corpus is set, and dev\.sets\.a\.metric auc searches none",
            ),
            (
                {"train": "t", "dev": {"sets": {"a": "d"}, "share": 0.1}},
                r"dev\.share is 0\.1 and dev\.sets are a",
            ),
        ],
    )
    def test_configs(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_config(TrainRetrieverConfig, {"model": "m", "output": "o", **changes})

    def test_objectives_of_a_reranker_with_other_logits(self) -> None:
        sets = {"x": {"path": "p", "objective": "pointwise_cross_entropy"}}
        with pytest.raises(
            InputError, match=r"train\.sets\.x\.objective pointwise_cross_entropy reads 2 logits"
        ):
            make_config(TrainRerankerConfig, {"model": "m", "output": "o", "train": {"sets": sets}})


class TestConfigs:
    def test_what_a_set_does_not_give_is_as_it_stands_beside_the_sets(self) -> None:
        values = {
            "model": "m",
            "output": "o",
            "objective": "margin_mse",
            "teacher": "t",
            "train": {
                "format": "triples",
                "sets": {"a": "p", "b": {"path": "q", "format": "scored", "objective": "angle"}},
            },
        }
        config = make_config(TrainRetrieverConfig, values)
        a, b = config.of_set("a"), config.of_set("b")
        assert (a.train.path, a.train.format, a.objective.name, a.teacher) == (
            "p",
            "triples",
            "margin_mse",
            "t",
        )
        assert (b.train.path, b.train.format, b.objective.name, b.teacher) == ("q", "scored", "angle", None)
        assert a.train.sets is None

    def test_one_set_is_written_down_as_it_was_before_there_could_be_several(self) -> None:
        """So that finished outputs, and the checkpoints of a run that was killed, are known again."""
        values = {"model": "m", "output": "o", "train": "t", "dev": "d"}
        for config_class in (TrainRetrieverConfig, TrainRerankerConfig, TrainClassifierConfig):
            dumped = make_config(config_class, values).model_dump(mode="json")
            given = {*dumped, *dumped["train"], *dumped["dev"]}
            assert not given & {"sets", "mixing", "chosen_by", "instruction_format"}

    def test_the_identity_holds_what_every_set_reads(self, still_encoder: Path, tmp_path: Path) -> None:
        sets = two_sets(tmp_path)
        dev = {"sets": {"near": sets["ask"]["path"]}}
        config = retriever(still_encoder, tmp_path, train={"sets": sets}, dev=dev)
        before = run_identity(config, RetrieverTask.survey(config))
        write_scored(tmp_path / "sts.tsv", 32)
        after = run_identity(config, RetrieverTask.survey(config))
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {"content of train.sets.sts", "rows"}
        assert before["content of train.sets.ask"] == before["content of dev.sets.near"]


class TestInstructions:
    @pytest.mark.parametrize("form", ["jsonl", "parquet"])
    def test_rows_say_them_where_they_are_read(self, tmp_path: Path, form: str) -> None:
        rows = [
            {"query": "q1", "document": "d1", "instruction": "find"},
            {"query": "q2", "document": "d2", "instruction": ""},
            {"query": "q3", "document": "d3", "instruction": None},
        ]
        path = tmp_path / f"rows.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            write_jsonl(path, rows)
        read = survey(NamedInput(path=str(path), instructions=True), "pairs")
        assert [row["instruction"] for row in rows_of(read)] == ["find", "", None]
        assert read.unread_columns == ()
        other = survey(NamedInput(path=str(path)), "pairs")
        assert "instruction" not in other.schema.names
        assert other.unread_columns == ("instruction",)

    def test_a_table_with_a_header_says_them_too(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "rows.tsv", "query\ttitle\tneg_title\tprompt\nq1\td1\tn1\tfind\nq2\td2\tn2\t\n"
        )
        read = rows_of(survey(NamedInput(path=str(path), instructions=True), "triples"))
        assert [(row["negative"], row["instruction"]) for row in read] == [("n1", "find"), ("n2", "")]

    def test_every_record_of_a_row_has_its_instruction(self, tmp_path: Path) -> None:
        path = write_jsonl(
            tmp_path / "rows.jsonl",
            [
                {"query": "q1", "positive": ["a", "b"], "negatives": ["c"], "prompt": "find"},
                {"query": "q2", "positive": "a", "negatives": ["c", "d"]},
            ],
        )
        read = rows_of(survey(NamedInput(path=str(path), instructions=True), "candidates"))
        assert [(row["documents"][0], row["instruction"]) for row in read] == [
            ("a", "find"),
            ("b", "find"),
            ("a", None),
        ]

    def test_they_stand_before_their_queries_in_place_of_the_prefix(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """By sentence-transformers' vectors, in a step and in dev metrics; of 8 rows every second says none."""
        rows = [{"query": question(i), "document": answer(i)} for i in range(8)]
        said = [{**row, "instruction": f"find {i}"} if i % 2 else row for i, row in enumerate(rows)]
        path = write_jsonl(tmp_path / "rows.jsonl", said)
        config = retriever(
            still_encoder,
            tmp_path,
            train={"path": str(path)},
            dev={"path": str(path), "metric": "mrr@3"},
            query_prefix="q: ",
            instruction_format="Instruct: {}\nQuery: ",
        )
        plan = plan_of(RetrieverTask, config)
        (batch,) = stream_batches(plan.stream)
        model = plan.task.build(None)
        loss = step_of(model.train(), config).run(0, [batch], plan.task.backward)
        numbers = [
            rows.index({"query": q, "document": d})
            for q, d in zip(batch["query"], batch["document"], strict=True)
        ]
        texts = [(f"Instruct: find {i}\nQuery: " if i % 2 else "q: ") + question(i) for i in range(8)]
        peer = SentenceTransformer(str(still_encoder), device="cpu")
        left, right = (
            torch.from_numpy(peer.encode(some, normalize_embeddings=True))
            for some in (texts, [answer(i) for i in range(8)])
        )
        cosine = left @ right.T
        ours = cosine[numbers][:, numbers]
        assert loss == pytest.approx(float(functional.cross_entropy(20 * ours, torch.arange(8))), abs=1e-4)
        # The rank of each query's own document is one more than the documents before it.
        rank = 1 + (cosine > cosine.diagonal()[:, None]).sum(1)
        expected = float(torch.where(rank <= 3, 1 / rank, 0).mean())
        assert plan.task.evaluate(model.eval())["mrr@3"] == pytest.approx(expected)


class _Fixed:
    """Vectors by text."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str], prefix: str = "") -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


class TestDevSets:
    def test_a_beir_folder_gives_grades_and_its_corpus(self, tmp_path: Path) -> None:
        """By hand: grades 2 of a and 1 of b, found b, c, a: (1/1 + 2/2) / (2/1 + 1/log2(3)) at 3."""
        folder = tmp_path / "set"
        write_jsonl(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": name} for name in "abc"])
        write_jsonl(folder / "queries.jsonl", [{"_id": "1", "text": "q"}])
        write(folder / "qrels" / "dev.tsv", "query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t1\n1\tc\t0\n")
        dev = load_dev_set(RetrieverDevConfig(path=str(folder), metric="ndcg@3"))
        assert sorted(dev.corpus) == ["a", "b", "c"]
        vectors = {"q": [1.0, 0.0], "b": [0.9, 0.1], "c": [0.8, 0.2], "a": [0.7, 0.3]}
        engine = cast(ForwardEngine, _Fixed(vectors))
        measured = evaluate_recall(engine, dev, "ndcg@3", ("", ""))
        assert measured["ndcg@3"] == pytest.approx(2 / (2 + 1 / np.log2(3)))
        assert measured["recall@1"] == 0.5
        assert evaluate_recall(engine, dev, "mrr@2", ("", ""))["mrr@2"] == 1

    def test_each_is_measured_by_its_metric_and_prompts_and_one_or_the_mean_chooses(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        train = write_pairs(tmp_path / "train.tsv", 16)
        sts = write_scored(tmp_path / "sts.tsv", 24)
        sets = {
            "ask": {"path": str(train), "query_prefix": "ask: "},
            "sts": {"path": str(sts), "metric": "spearman"},
        }
        dev = {"sets": sets, "metric": "mrr@3", "patience": 1}
        config = retriever(still_encoder, tmp_path, train=str(train), dev=dev)
        task = RetrieverTask.prepare(config, RetrieverTask.survey(config))
        measured = task.evaluate(task.build(None).eval())
        peer = SentenceTransformer(str(still_encoder), device="cpu")

        def cosines(queries: list[str], documents: list[str]) -> np.ndarray:
            left, right = (peer.encode(texts, normalize_embeddings=True) for texts in (queries, documents))
            return left @ right.T

        pairs = [line.split("\t") for line in train.read_text().splitlines()]
        ask = cosines(["ask: " + query for query, _ in pairs], [document for _, document in pairs])
        rank = 1 + (ask > ask.diagonal()[:, None]).sum(1)
        mrr = float(np.where(rank <= 3, 1 / rank, 0).mean())
        scored = [line.split("\t") for line in sts.read_text().splitlines()[1:]]
        scores = cosines([row[0] for row in scored], [row[1] for row in scored]).diagonal()
        correlation = spearmanr(scores, [float(row[2]) for row in scored]).statistic
        assert measured["ask/mrr@3"] == pytest.approx(mrr)
        assert measured["sts/spearman"] == pytest.approx(correlation, abs=1e-3)
        assert measured["mean"] == pytest.approx((measured["ask/mrr@3"] + measured["sts/spearman"]) / 2)
        assert task.dev is not None
        assert (task.dev.metric, task.dev.patience) == ("mean", 1)
        chosen = retriever(still_encoder, tmp_path, train=str(train), dev={**dev, "chosen_by": "sts"})
        task = RetrieverTask.prepare(chosen, RetrieverTask.survey(chosen))
        assert task.dev is not None
        assert task.dev.metric == "sts/spearman"

    def test_a_share_of_each_training_set_is_a_dev_set_of_its_name(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        sets = {
            "a": str(write_pairs(tmp_path / "a.tsv", 20)),
            "b": str(write_triples(tmp_path / "b.tsv", 40)),
        }
        config = retriever(still_encoder, tmp_path, train={"sets": sets}, dev={"share": 0.25})
        surveyed: Survey = RetrieverTask.survey(config)
        task = RetrieverTask.prepare(config, surveyed)
        assert surveyed.num_rows == 15 + 30
        assert {name: len(dev.pairs[0]) for name, dev in task.dev_sets.items()} == {"a": 5, "b": 10}

    def test_rows_that_the_metric_cannot_measure_name_their_set(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        sets = {"ask": {"path": str(write_pairs(tmp_path / "a.tsv", 16)), "metric": "auc"}}
        config = retriever(still_encoder, tmp_path, train=str(tmp_path / "a.tsv"), dev={"sets": sets})
        with pytest.raises(InputError, match=r"^dev\.sets\.ask: "):
            RetrieverTask.prepare(config, RetrieverTask.survey(config))


def test_losses_and_metrics_of_sets_are_logged_and_a_run_goes_on_with_the_same(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """8 steps of two sets, measured after 4 and 8; the second run continues from the checkpoint of step 4."""
    sets = two_sets(tmp_path)
    dev = {
        "sets": {"ask": sets["ask"]["path"], "sts": {"path": sets["sts"]["path"], "metric": "auc"}},
        "every_steps": 4,
    }
    config = retriever(
        still_encoder,
        tmp_path,
        train={"sets": sets},
        dev=dev,
        optimizer={"lr": 1e-2},
        log_every_steps=4,
    )
    reported = answer_ray_train(monkeypatch, tmp_path)
    outcomes = []
    for checkpoint in (lambda: None, lambda: reported[0][0]):
        monkeypatch.setattr(ray.train, "get_checkpoint", checkpoint)
        outcomes.append(train_worker({"plan": plan_of(RetrieverTask, config)}))
    whole, continued = outcomes
    assert [row["step"] for row in whole["curve"]] == [4, 8]
    assert all({"loss/ask", "loss/sts"} & set(row) for row in whole["curve"])
    assert {name for row in whole["curve"] for name in row} == {"step", "loss", "loss/ask", "loss/sts", "lr"}
    for first, second in zip(whole["curve"], continued["curve"], strict=True):
        assert second == pytest.approx(first, abs=1e-5)
    assert [row["step"] for row in whole["history"]] == [4, 8]
    assert {"ask/recall@10", "sts/auc", "mean"} <= set(whole["history"][0])
    assert reported[0][1]["mean"] == whole["history"][0]["mean"]
    means = whole["history"][0]
    line = f"step 4: dev ask/recall@10 {means['ask/recall@10']:.4f}  sts/auc {means['sts/auc']:.4f}  mean "
    assert line in capfd.readouterr().err
    logged = read_scalars(tmp_path / "out.tensorboard")
    assert {"dev/ask/recall@10", "dev/sts/auc", "dev/mean", "train/loss/ask", "train/loss/sts"} <= set(logged)
    card = model_card(config, {**whole, "steps": 8}, whole["history"])
    assert "| train.sets.sts | weight 1, objective cosent |" in card
    assert str(tmp_path) not in card
    assert json.dumps(whole)
