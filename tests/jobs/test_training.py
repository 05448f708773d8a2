"""Training: the stream of batches, the optimizer, and whole runs under Ray Train."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn

from raytower.config import make_config
from raytower.data.config import InputConfig
from raytower.data.pieces import survey
from raytower.errors import InputError, RaytowerError
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.storage import Location
from raytower.training.batches import count_steps, cut_batches, cut_distinct_batches, worker_slice
from raytower.training.classifier import train_classifier
from raytower.training.config import (
    OptimizerConfig,
    TrainClassifierConfig,
    TrainRerankerConfig,
    TrainRetrieverConfig,
)
from raytower.training.dev_recall import evaluate_recall, load_dev_set
from raytower.training.optimizer import load_optimizer, make_optimizer, make_schedule, save_optimizer
from raytower.training.reranker import train_reranker
from raytower.training.retriever import RetrieverTask, plan_train_retriever, train_retriever
from raytower.training.row_stream import StreamPlan, stream_batches
from raytower.training.runner import finished_run, run_identity, run_key
from raytower.training.windows import Window, plan_windows, read_window
from tests.support.tensorboard_events import read_scalars
from tests.support.tiny_models import build_tiny_encoder
from tests.support.tiny_training import write_labelled, write_pairs, write_scored, write_triples


def windows_of(piece_rows: list[int], window_rows: int, epochs: int, seed: int = 3) -> list[Window]:
    windows = plan_windows(piece_rows, seed=seed, window_rows=window_rows)
    taken = []
    for window in windows:
        if window.epoch == epochs:
            return taken
        taken.append(window)
    raise AssertionError("the windows must be endless")


class TestWindows:
    @given(
        piece_rows=st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=20),
        window_rows=st.integers(min_value=1, max_value=200),
    )
    def test_every_epoch_holds_every_piece_once_and_rows_add_up(
        self, piece_rows: list[int], window_rows: int
    ) -> None:
        windows = windows_of(piece_rows, window_rows, epochs=3)
        expected_first = 0
        for window in windows:
            assert window.first_row == expected_first
            assert window.num_rows == sum(piece_rows[index] for index in window.pieces)
            expected_first += window.num_rows
        for epoch in range(3):
            own = [window for window in windows if window.epoch == epoch]
            assert sorted(index for window in own for index in window.pieces) == list(range(len(piece_rows)))
            assert [window.number for window in own] == list(range(len(own)))
            assert all(window.num_rows >= window_rows for window in own[:-1])

    def test_epochs_have_orders_of_their_own_and_the_seed_decides_them(self) -> None:
        first = windows_of([5] * 12, 5, epochs=2)
        assert first == windows_of([5] * 12, 5, epochs=2)
        assert first != windows_of([5] * 12, 5, epochs=2, seed=4)
        assert [w.pieces for w in first[:12]] != [w.pieces for w in first[12:]]


def tables_of(rows: list[tuple[str, str | None]], sizes: list[int]) -> Iterator[pa.Table]:
    start = 0
    for size in sizes:
        part = rows[start : start + size]
        yield pa.table({"query": [a for a, _ in part], "id": pa.array([b for _, b in part], pa.string())})
        start += size


class TestBatches:
    @given(
        sizes=st.lists(st.integers(min_value=1, max_value=30), min_size=1, max_size=8),
        batch_size=st.integers(min_value=1, max_value=20),
    )
    def test_batches_hold_the_rows_in_order(self, sizes: list[int], batch_size: int) -> None:
        rows = [(str(number), None) for number in range(sum(sizes))]
        batches = list(cut_batches(tables_of(rows, sizes), batch_size))
        assert len(batches) == len(rows) // batch_size
        flat = [query for batch in batches for query in batch["query"]]
        assert flat == [query for query, _ in rows[: len(flat)]]

    @given(
        values=st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["1", "2", "3", None]))),
        batch_size=st.integers(min_value=1, max_value=3),
    )
    def test_distinct_batches_share_nothing_and_lose_no_row(
        self, values: list[tuple[str, str | None]], batch_size: int
    ) -> None:
        batches = list(
            cut_distinct_batches(tables_of(values, [len(values)]), batch_size, ["query", "id"], 999)
        )
        for batch in batches:
            assert len(batch["query"]) == batch_size == len(set(batch["query"]))
            ids = [name for name in batch["id"] if name is not None]
            assert len(ids) == len(set(ids))
        given_rows = Counter(
            row for batch in batches for row in zip(batch["query"], batch["id"], strict=True)
        )
        assert not given_rows - Counter(values)

    def test_a_row_that_collides_comes_in_the_next_batch(self) -> None:
        rows = [("a", None), ("a", None), ("b", None), ("c", None), ("a", None), ("d", None)]
        batches = list(cut_distinct_batches(tables_of(rows, [2, 4]), 2, ["query"], 99))
        assert [batch["query"] for batch in batches] == [["a", "b"], ["a", "c"], ["a", "d"]]

    def test_of_candidates_the_best_document_tells(self) -> None:
        table = pa.table({"query": ["a", "b", "c"], "documents": [["x", "y"], ["x", "z"], ["y", "x"]]})
        (batch,) = cut_distinct_batches([table], 2, ["query", "documents"], 99)
        assert batch["query"] == ["a", "c"]

    def test_rows_that_are_all_alike_are_refused(self) -> None:
        rows = [("a", None)] * 20
        with pytest.raises(InputError, match="without sharing a query; use sampler: shuffle"):
            list(cut_distinct_batches(tables_of(rows, [20]), 2, ["query"], 10))

    def test_workers_share_a_batch_without_loss(self) -> None:
        rows = {"query": list("abcdefgh")}
        shares = [worker_slice(rows, rank, 4)["query"] for rank in range(4)]
        assert shares == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]

    def test_steps(self) -> None:
        assert count_steps(100, 32, 1) == 3
        assert count_steps(100, 32, 2) == 6
        assert count_steps(100, 32, 0.1) == 1
        with pytest.raises(InputError, match="fewer than one batch of 32"):
            count_steps(31, 32, 1)


@pytest.mark.usefixtures("ray_cluster")
class TestRowStream:
    """Through Ray Data."""

    @pytest.fixture(scope="class")
    def plan(self, tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
        path = write_pairs(tmp_path_factory.mktemp("rows") / "pairs.tsv", 45)
        pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=7).pieces
        return StreamPlan(pieces=pieces, batch_size=8, num_batches=16, seed=3, window_rows=20)

    def test_epochs_flow_into_each_other_and_each_holds_every_row_once(self, plan: StreamPlan) -> None:
        queries = [*chain.from_iterable(batch["query"] for batch in stream_batches(plan))]
        assert len(queries) == 16 * 8
        first, second = queries[:45], queries[45:90]
        assert Counter(first) == Counter(second)
        assert len(set(first)) == 45
        assert first != second
        assert first != sorted(first)

    @settings(max_examples=8, deadline=None)
    @given(skip=st.integers(min_value=0, max_value=15))
    def test_skipping_continues_where_an_undisturbed_stream_would_be(
        self, plan: StreamPlan, skip: int
    ) -> None:
        assert list(stream_batches(plan, skip)) == list(stream_batches(plan))[skip:]

    def test_memory_holds_a_few_windows_however_slow_the_consumer(
        self, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray Data reads ahead without bound, so no more than a few windows are ever given to it at a time."""
        given_out: list[Window] = []

        def record(windows: list[Window], pieces: object, seed: int) -> Iterator[pa.Table]:
            given_out.extend(windows)
            return (read_window(window, plan.pieces, seed) for window in windows)

        monkeypatch.setattr("raytower.training.row_stream._execute", record)
        batches = stream_batches(StreamPlan(**{**vars(plan), "window_rows": 7, "num_batches": 10_000}))
        for taken in range(1, 10):
            next(batches)
            assert sum(window.num_rows for window in given_out) <= taken * 8 + 4 * 7

    def test_distinct_batches_continue_too(self, plan: StreamPlan) -> None:
        values = {**vars(plan), "distinct_columns": ("query", "document"), "num_batches": 12}
        whole = list(stream_batches(StreamPlan(**values)))
        assert list(stream_batches(StreamPlan(**values), 9)) == whole[9:]
        assert len(whole) == 12


class TestOptimizer:
    def test_biases_and_norms_do_not_decay(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        groups = make_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert [parameter.dim() for parameter in groups[0]["params"]] == [2]
        assert [parameter.dim() for parameter in groups[1]["params"]] == [1, 1, 1]

    def test_schedule_warms_up_and_decays_linearly(self) -> None:
        """Defect of an older system: a warm-up flag that was parsed and never used."""
        optimizer = make_optimizer(nn.Linear(1, 1), OptimizerConfig(lr=1.0))
        schedule = make_schedule(optimizer, num_steps=10, warmup_ratio=0.4)
        seen = []
        for _ in range(10):
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
        assert schedule.get_last_lr()[0] == pytest.approx(0.0)

    def test_state_survives_as_safetensors(self, tmp_path: Path) -> None:
        def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            return next(model.parameters()).detach().clone()

        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, OptimizerConfig(lr=0.1))
        stepped(model, optimizer)
        save_optimizer(optimizer, tmp_path / "state.safetensors")
        twin = nn.Linear(3, 2)
        twin.load_state_dict(model.state_dict())
        restored = make_optimizer(twin, OptimizerConfig(lr=0.1))
        load_optimizer(restored, tmp_path / "state.safetensors")
        assert torch.equal(stepped(model, optimizer), stepped(twin, restored))


def retriever_config(encoder: Path, pairs: Path, output: Path, **changes: object) -> TrainRetrieverConfig:
    values = {
        "model": str(encoder),
        "train": {"path": str(pairs)},
        "output": str(output),
        "batch_size": 8,
        "max_length": 32,
        "dtype": "float32",
        "optimizer": {"lr": 1e-3},
        "workers": {"num": 1, "num_cpus": 0.5},
    }
    return make_config(TrainRetrieverConfig, {**values, **changes})


@pytest.mark.usefixtures("ray_cluster")
class TestRetrieverRuns:
    def test_two_workers_end_with_the_weights_of_one_and_a_finished_run_rests(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        one = train_retriever(retriever_config(still_encoder, pairs, tmp_path / "one"))
        config = retriever_config(still_encoder, pairs, tmp_path / "two", workers={"num": 2, "num_cpus": 0.5})
        two = train_retriever(config)
        assert one["steps"] == two["steps"] == 5
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        start = load_file(still_encoder / "model.safetensors")
        assert max(float((first[name] - start[name]).abs().max()) for name in first) > 1e-3
        # Attention ignores a shift of all keys: the gradient of a key's bias is rounding noise, which Adam scales up.
        # Elsewhere the noise, which differs with the machine, stays far below the 3e-3 that weights move by.
        for name in (name for name in first if not name.endswith("key.bias")):
            assert torch.allclose(first[name], second[name], rtol=0, atol=3e-4), name
        assert train_retriever(config) == two
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".train")]

    def test_the_best_checkpoint_is_published_and_not_the_last(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """The learning rate rises until it destroys the model: the dev metric falls at the end."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 64)
        dev = {"path": str(pairs), "metric": "recall@1", "every_steps": 4, "patience": 9}
        config = retriever_config(
            still_encoder,
            pairs,
            tmp_path / "out",
            dev=dev,
            epochs=4,
            optimizer={"lr": 0.3, "warmup_ratio": 1.0, "max_grad_norm": 1e6},
            checkpoint_every_steps=3,
            keep_checkpoints=1,
        )
        figures = train_retriever(config)
        info = json.loads((tmp_path / "out" / "raytower.json").read_text())
        history = {entry["step"]: entry["recall@1"] for entry in info["history"]}
        assert list(history) == [4, 8, 12, 16, 20, 24, 28, 32]
        assert figures["best"] == max(history.values())
        assert history[figures["best_step"]] == figures["best"] > history[32]
        published = Encoder.load(tmp_path / "out")
        assert info["fingerprint"] == published.fingerprint
        assert config.dev is not None
        engine = ForwardEngine(published, max_length=32)
        measured = evaluate_recall(engine, load_dev_set(config.dev), "recall@1", ("", ""))
        assert measured["recall@1"] == pytest.approx(figures["best"], abs=1e-6)

    def test_relative_paths_reach_the_workers_and_prefixes_become_the_models_prompts(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers run in directories of their own."""
        monkeypatch.chdir(still_encoder.parent)
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        prefixes = {"query_prefix": "q: ", "document_prefix": ""}
        config = retriever_config(Path(still_encoder.name), pairs, tmp_path / "out", **prefixes)
        assert train_retriever(config)["steps"] == 1
        trained = Encoder.load(tmp_path / "out")
        assert (trained.prefix_for("query"), trained.prefix_for("document")) == ("q: ", "")

    def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        config = retriever_config(
            still_encoder, pairs, tmp_path / "out", optimizer={"lr": 1e30}, checkpoint_every_steps=1
        )
        with pytest.raises(
            RaytowerError, match=r"is (nan|inf).* at step \d+, whose batch begins with 'what is"
        ):
            train_retriever(config)
        assert not (tmp_path / "out").exists()
        kept = list(tmp_path.glob(".out.*.train/checkpoint_*/model/model.safetensors"))
        assert kept, "the last good checkpoint stays"
        for path in kept:
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())

    def test_an_output_of_another_config_is_refused(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="made by another config"):
            train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))

    def test_fewer_rows_than_a_batch_are_refused(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 7)
        with pytest.raises(InputError, match="7 training rows are fewer than one batch of 8"):
            train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))


class TestIdentity:
    """What makes a job started again the same job."""

    def identity(self, config: TrainRetrieverConfig) -> dict[str, Any]:
        return run_identity(config, RetrieverTask.survey(config))

    def test_every_file_and_the_starting_weights_count(self, still_encoder: Path, tmp_path: Path) -> None:
        start = tmp_path / "start"
        shutil.copytree(still_encoder, start)
        pairs, dev_file = write_pairs(tmp_path / "pairs.tsv", 8), write_pairs(tmp_path / "dev.tsv", 8)
        config = retriever_config(start, pairs, tmp_path / "out", dev={"path": str(dev_file)})
        seen = [self.identity(config)]
        assert self.identity(config) == seen[0]
        for path in (pairs, dev_file):
            # As many bytes and rows as before, and another content.
            path.write_text(path.read_text().replace("aaa 0", "aaa 9"))
            seen.append(self.identity(config))
        build_tiny_encoder(start, seed=7)
        seen.append(self.identity(config))
        changed = [{key for key in later if later[key] != earlier[key]} for earlier, later in pairwise(seen)]
        assert changed == [{"content of train"}, {"content of dev"}, {"weights of start"}]

    def test_keys_that_change_nothing_do_not_count(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        plain = self.identity(retriever_config(still_encoder, pairs, tmp_path / "out"))
        free = {"checkpoint_every_steps": 1, "log_every_steps": 1, "max_failures": 0, "keep_checkpoints": 5}
        assert self.identity(retriever_config(still_encoder, pairs, tmp_path / "other", **free)) == plain
        assert self.identity(retriever_config(still_encoder, pairs, tmp_path / "out", seed=1)) != plain

    def test_an_output_that_is_half_published_elsewhere_is_published_again(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Object stores know no rename: raytower.json comes last, and is missing after a kill."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        config = retriever_config(still_encoder, pairs, tmp_path / "out")
        identity = self.identity(config)
        bucket = tmp_path / "bucket"
        (bucket / "run").mkdir(parents=True)
        (bucket / "run" / "model.safetensors").write_bytes(b"half")
        output = Location(pafs.SubTreeFileSystem(str(bucket), pafs.LocalFileSystem()), "run")
        monkeypatch.setattr(Location, "of", staticmethod(lambda _: output))
        with pytest.raises(InputError, match="no training job wrote it"):
            finished_run(config, identity)
        (bucket / f".run.{run_key(identity)}.train").mkdir()
        assert finished_run(config, identity) is None
        assert not (bucket / "run").exists()


def test_dry_run_plans_without_ray(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    plan = plan_train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))
    assert (plan["rows"], plan["steps"], plan["workers"]) == (40, 5, 1)
    parameters = dict(Encoder.load(still_encoder).named_parameters())
    pooler = sum(p.numel() for name, p in parameters.items() if "pooler" in name)
    whole = sum(p.numel() for p in parameters.values())
    # Weights, gradient and two moments of what trains, four bytes each; the pooler is only held.
    assert plan["predicted_state_bytes_per_worker"] == 16 * (whole - pooler) + 4 * pooler
    assert plan["trainable_parameters"] == whole - pooler


def test_a_batch_that_workers_cannot_share_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"make it a multiple of workers\.num"):
        retriever_config(still_encoder, tmp_path / "x", tmp_path / "y", batch_size=9, workers={"num": 2})


def test_max_length_beyond_the_positions_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    with pytest.raises(InputError, match="max_length is 65"):
        plan_train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out", max_length=65))


def job_values(model: Path, train: Path, output: Path, **changes: object) -> dict[str, Any]:
    return {
        "model": str(model),
        "train": {"path": str(train)},
        "output": str(output),
        "batch_size": 16,
        "max_length": 32,
        "workers": {"num": 2, "num_cpus": 0.5},
        **changes,
    }


@pytest.mark.usefixtures("ray_cluster")
def test_reranker_learns_from_triples_and_loads_with_the_peer(still_encoder: Path, tmp_path: Path) -> None:
    train, dev = write_triples(tmp_path / "triples.tsv", 64), write_scored(tmp_path / "dev.tsv", 64)
    values = job_values(
        still_encoder,
        train,
        tmp_path / "reranker",
        dev={"path": str(dev), "every_steps": 8},
        epochs=6,
        optimizer={"lr": 3e-3},
        lora={"rank": 8},
        dtype="float32",
    )
    figures = train_reranker(make_config(TrainRerankerConfig, values))
    assert figures["steps"] == 24
    assert 0.6 < figures["best"] <= 1.0
    peer = PeerCrossEncoder(str(tmp_path / "reranker"), device="cpu").predict([("find a", "a is here")])
    assert 0.0 < float(peer[0]) < 1.0


@pytest.mark.usefixtures("ray_cluster")
def test_classifier_learns_and_writes_its_log(still_encoder: Path, tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "train.tsv", 64)
    values = job_values(
        still_encoder,
        train,
        tmp_path / "classifier",
        dev={"path": str(train), "metric": "accuracy", "every_steps": 8, "patience": 1},
        epochs=40,
        optimizer={"lr": 5e-3},
        log_every_steps=4,
        dtype="float32",
    )
    figures = train_classifier(make_config(TrainClassifierConfig, values))
    assert figures["best"] > 0.9
    # Eight texts of each topic are learnt long before the last step, so patience ends the run.
    assert figures["steps"] < 160
    assert TextClassifier.load(tmp_path / "classifier").labels[0] == "topics##a"
    info = json.loads((tmp_path / "classifier" / "raytower.json").read_text())
    logged = read_scalars(tmp_path / "classifier.tensorboard")
    assert logged["train/loss"] == pytest.approx(
        {row["step"]: row["loss"] for row in info["curve"]}, rel=1e-5
    )
    assert logged["dev/accuracy"].keys() == {row["step"] for row in info["history"]}
    assert set(logged) >= {"train/lr", "train/rows_per_second", "dev/f1"}
