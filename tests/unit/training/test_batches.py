"""What a training run is made of: windows, batches, the optimizer, its identity, and what is refused before it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs
from torch import nn

from raytower.errors import InputError
from raytower.models.encoder import Encoder
from raytower.storage import Location
from raytower.training.batches import count_steps, cut_batches, cut_distinct_batches, worker_slice
from raytower.training.config import (
    OptimizerConfig,
    TrainRetrieverConfig,
)
from raytower.training.optimizer import load_optimizer, make_optimizer, make_schedule, save_optimizer
from raytower.training.retriever import RetrieverTask, plan_train_retriever, train_retriever
from raytower.training.runner import finished_run, run_identity, run_key
from raytower.training.windows import Window, plan_windows
from tests.support.tiny_models import build_tiny_encoder
from tests.support.tiny_training import (
    retriever_config,
    write_pairs,
)


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
        assert changed == [{"content of train"}, {"content of dev"}, {"content of start"}]

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


def test_an_output_of_another_config_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="made by another config"):
        train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))


def test_fewer_rows_than_a_batch_are_refused(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 7)
    with pytest.raises(InputError, match="7 training rows are fewer than one batch of 8"):
        train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))
