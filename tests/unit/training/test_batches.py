"""What a training run is made of: windows, batches, the optimizer, its identity, and what is refused before it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import fs as pafs
from torch import nn
from transformers import BertForSequenceClassification

from raytower.config import WorkersConfig
from raytower.data.config import InputConfig
from raytower.data.pieces import survey
from raytower.errors import InputError, OtherOutputError
from raytower.models.encoder import Encoder
from raytower.storage import Location
from raytower.training import runner
from raytower.training.batches import count_steps
from raytower.training.config import (
    OptimizerConfig,
    TrainRetrieverConfig,
)
from raytower.training.distinct_batches import DistinctOrders, value_hashes
from raytower.training.optimizer import load_optimizer, make_optimizer, make_schedule, save_optimizer
from raytower.training.retriever import RetrieverTask, plan_train_retriever, train_retriever
from raytower.training.row_stream import StreamPlan, stream_batches
from raytower.training.runner import _clear_half_published, finished_run, run_identity, run_key
from raytower.training.windows import Window, draw_documents, plan_windows, windows_from
from raytower.workers import Node
from tests.support.data_files import beir_folder
from tests.support.tiny_models import build_tiny_encoder, tiny_config
from tests.support.tiny_training import (
    retriever_config,
    write_pairs,
    write_rows,
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

    @given(
        piece_rows=st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=9),
        window_rows=st.integers(min_value=1, max_value=12),
        first_row=st.integers(min_value=0, max_value=60),
        batch_size=st.integers(min_value=1, max_value=20),
    )
    def test_windows_from_a_row_on(
        self, piece_rows: list[int], window_rows: int, first_row: int, batch_size: int
    ) -> None:
        def windows() -> Iterator[Window]:
            return plan_windows(piece_rows, seed=3, window_rows=window_rows)

        own = next(window for window in windows() if window.end_row > first_row)
        assert next(windows_from(windows(), first_row)) == own
        first = next(windows_from(windows(), first_row, batch_size))
        begin = own.first_row // batch_size * batch_size
        assert first.first_row <= begin < first.end_row
        taken = [
            window
            for window, _ in zip(windows_from(windows(), first_row, batch_size), range(9), strict=False)
        ]
        assert all(left.end_row == right.first_row for left, right in pairwise(taken))


class TestDrawing:
    """Of long candidate lists each epoch takes the first document and others by lot."""

    @given(
        lengths=st.lists(st.integers(min_value=2, max_value=9), min_size=1, max_size=12),
        count=st.integers(min_value=2, max_value=7),
        cut=st.integers(min_value=0, max_value=12),
    )
    def test_a_row_keeps_its_first_and_as_many_as_are_wanted(
        self, lengths: list[int], count: int, cut: int
    ) -> None:
        rows = [[f"{row} {place}" for place in range(length)] for row, length in enumerate(lengths)]
        scores = [[float(place) for place in range(length)] for length in lengths]
        table = pa.table({"documents": rows, "scores": scores})
        table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])  # in two chunks
        drawn = draw_documents(table, count, np.random.default_rng(1)).to_pydict()
        for given_row, documents, own in zip(rows, drawn["documents"], drawn["scores"], strict=True):
            assert len(documents) == min(count, len(given_row))
            assert documents == [given_row[int(place)] for place in own]
            assert own == sorted(set(own))
            assert own[0] == 0

    def test_every_other_document_comes_equally_often(self) -> None:
        table = pa.table({"documents": [list("abcde")] * 4000, "scores": [[0.0] * 5] * 4000})
        drawn = draw_documents(table, 3, np.random.default_rng(1))["documents"].to_pylist()
        counts = Counter(text for row in drawn for text in row)
        assert counts["a"] == 4000
        # Two of four: 2000 each, with a standard deviation of 32.
        assert all(abs(counts[text] - 2000) < 160 for text in "bcde")

    def test_epochs_draw_anew_and_a_run_draws_the_same_again(self, tmp_path: Path) -> None:
        row = {"query": "q", "documents": list("abcdefgh"), "scores": [1.0, *[0.0] * 7]}
        path = write_rows(
            tmp_path / "lists.jsonl", [json.dumps({**row, "query": f"q{i}"}) for i in range(20)]
        )
        pieces = survey(InputConfig(path=str(path)), "candidates", rows_per_piece=5).pieces

        def drawn(batches: slice, seed: int = 3) -> dict[str, list[str]]:
            """Of batches of five rows: four are an epoch, two a window."""
            plan = StreamPlan(
                pieces=pieces,
                batch_size=5,
                num_batches=batches.stop,
                seed=seed,
                window_rows=10,
                num_documents=3,
            )
            read = stream_batches(plan, batches.start)
            return {q: d for rows in read for q, d in zip(rows["query"], rows["documents"], strict=True)}

        first, second = drawn(slice(0, 4)), drawn(slice(4, 8))
        assert first.keys() == second.keys()
        assert first != second
        assert drawn(slice(0, 4)) == first
        assert drawn(slice(0, 4), seed=4) != first
        # A run that continues with the second window draws for it what it would have drawn.
        assert drawn(slice(2, 4)).items() <= first.items()
        assert drawn(slice(4, 8)) == second


def tables_of(rows: list[tuple[str, str | None]], sizes: list[int]) -> Iterator[pa.Table]:
    start = 0
    for size in sizes:
        part = rows[start : start + size]
        yield pa.table({"query": [a for a, _ in part], "id": pa.array([b for _, b in part], pa.string())})
        start += size


class TestBatches:
    def test_steps(self) -> None:
        assert count_steps(100, 32, 1) == 3
        assert count_steps(100, 32, 2) == 6
        assert count_steps(100, 32, 0.1) == 1
        with pytest.raises(InputError, match="fewer than one batch of 32"):
            count_steps(31, 32, 1)


def spread(
    rows: list[tuple[str, str | None]], sizes: list[int], batch_size: int, first: int = 0
) -> tuple[list[list[tuple[str, str | None]]], list[str]]:
    """The rows of each window in their new order, from the window `first` on, and what was told."""
    told: list[str] = []
    columns = ["query", "id"]
    orders = DistinctOrders(batch_size, columns, seed=1, first_row=sum(sizes[:first]), tell=told.append)
    windows = []
    for table in islice(tables_of(rows, sizes), first, None):
        ordered = table.take(pa.array(orders.next_order(value_hashes(table, columns))))
        windows.append(list(zip(*ordered.to_pydict().values(), strict=True)))
    return windows, told


def shares_something(batch: list[tuple[str, str | None]]) -> bool:
    columns = zip(*batch, strict=True)
    values = [[value for value in column if value is not None] for column in columns]
    return any(len(set(column)) < len(column) for column in values)


class TestDistinctBatches:
    """Rows that share a query or an id come in different batches, in an order that no run depends on."""

    ROWS = st.lists(
        st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["1", "2", "3", None])),
        min_size=1,
        max_size=60,
    )

    @given(rows=ROWS, cuts=st.lists(st.integers(min_value=1, max_value=60)), batch_size=st.integers(1, 9))
    def test_every_window_keeps_its_rows(
        self, rows: list[tuple[str, str | None]], cuts: list[int], batch_size: int
    ) -> None:
        edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
        sizes = [right - left for left, right in pairwise(edges)]
        windows, told = spread(rows, sizes, batch_size)
        for number, window in enumerate(windows):
            assert Counter(window) == Counter(rows[edges[number] : edges[number + 1]])
        flat = [row for window in windows for row in window]
        batches = [flat[at : at + batch_size] for at in range(0, len(flat), batch_size)]
        assert len(told) == (1 if any(map(shares_something, batches)) else 0)
        # A run that begins at any window's first whole batch makes the same batches from there on: it reads
        # the windows before that share that batch.
        for first_row in edges[:-1]:
            begin = first_row // batch_size * batch_size
            first = next(n for n, edge in enumerate(edges[1:]) if edge > begin)
            again = [row for window in spread(rows, sizes, batch_size, first)[0] for row in window]
            assert again[first_row - edges[first] :] == flat[first_row:]

    @given(
        groups=st.lists(st.integers(min_value=1, max_value=6), min_size=24, max_size=60),
        sizes=st.lists(st.integers(min_value=30, max_value=60), min_size=1, max_size=4),
        batch_size=st.integers(min_value=2, max_value=4),
        seed=st.integers(min_value=0, max_value=9),
    )
    def test_nothing_is_shared_where_there_are_batches_enough(
        self, groups: list[int], sizes: list[int], batch_size: int, seed: int
    ) -> None:
        """A window of 30 rows has six whole batches or more, and no value comes more than five times in it."""
        rows = [(f"{g}", None) for g, size in enumerate(groups) for _ in range(min(size, 5))]
        rows = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
        rows = (rows * 9)[: sum(sizes)]
        # Of 24 groups and more each window has each at most five times, if none lies in it twice.
        edges = np.cumsum([0, *sizes]).tolist()
        counts = [Counter(rows[left:right]).most_common(1)[0][1] for left, right in pairwise(edges)]
        assume(max(counts) <= 5)
        windows, told = spread(rows, sizes, batch_size)
        flat = [row for window in windows for row in window]
        batches = [flat[at : at + batch_size] for at in range(0, len(flat), batch_size)]
        assert not [batch for batch in batches if shares_something(batch)]
        assert told == []

    def test_rows_that_are_all_alike_come_all_the_same_and_it_is_told_once(self) -> None:
        """A run used to end here, hours after it began."""
        windows, told = spread([("a", None)] * 40, [20, 20], 4)
        assert [len(window) for window in windows] == [20, 20]
        (message,) = told
        assert "15 of 20 rows share a query or id with another row of their batch" in message
        assert "masked" in message

    def test_of_candidates_the_best_document_tells(self) -> None:
        table = pa.table(
            {"query": list("abcd"), "documents": [["x", "y"], ["x", "z"], ["y", "x"], ["y", "z"]]}
        )
        columns = ["query", "documents"]
        order = DistinctOrders(2, columns, seed=0).next_order(value_hashes(table, columns))
        best = [row[0] for row in table.take(pa.array(order))["documents"].to_pylist()]
        assert sorted(best[:2]) == sorted(best[2:]) == ["x", "y"]

    def test_rows_that_share_nothing_keep_their_order(self) -> None:
        """What is shuffled well stays so; the tail is taken from the front."""
        rows = [(str(number), None) for number in range(23)]
        windows, _ = spread(rows, [23], 5)
        numbers = [int(query) for query, _ in windows[0]]
        assert numbers[20:] == [0, 1, 2]
        assert numbers[:20] == list(range(3, 23))


def test_windows_of_many_small_pieces_are_gathered_in_one_pass() -> None:
    """A running sum: adding up anew for each piece took half a minute for 40,000 files."""

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    windows = list(islice(plan_windows(Counted([2] * 1000), seed=0, window_rows=600), 4))
    assert [window.num_rows for window in windows] == [600, 600, 600, 200]
    assert Counted.reads == 1000


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

    @pytest.mark.parametrize(
        ("shape", "after"),
        [
            ("constant", [1.0, 1.0, 1.0, 1.0]),
            # half a cosine over four steps: 1, cos²(π/8), 1/2, sin²(π/8)
            ("cosine", [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ],
    )
    def test_other_schedules_begin_alike(
        self, shape: Literal["constant", "cosine"], after: list[float]
    ) -> None:
        optimizer = make_optimizer(nn.Linear(1, 1), OptimizerConfig(lr=1.0))
        schedule = make_schedule(optimizer, num_steps=6, warmup_ratio=1 / 3, shape=shape)
        seen = []
        for _ in range(6):
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert seen == pytest.approx([0.5, 1.0, *after])

    def test_a_head_has_its_own_learning_rate(self) -> None:
        """What the backbone has not: a reranker's head, an encoder's projection; the pooler is the backbone's."""
        reranker = BertForSequenceClassification(tiny_config())
        encoder = nn.ModuleDict({"backbone": reranker.bert, "projection": nn.Linear(32, 8)})
        config = OptimizerConfig(lr=1.0, head_lr=3.0, weight_decay=0.1)
        for model, head in ((reranker, "classifier"), (encoder, "projection")):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = make_optimizer(model, config).param_groups
            found = {
                names[id(p)]: (group["lr"], group["weight_decay"])
                for group in groups
                for p in group["params"]
            }
            assert found == {
                name: (3.0 if name.startswith(head) else 1.0, 0.1 if parameter.dim() > 1 else 0.0)
                for name, parameter in model.named_parameters()
            }

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
        for workers in ({}, {"num": 4}, {"num": 2, "num_gpus": 1}):
            assert (
                self.identity(retriever_config(still_encoder, pairs, tmp_path / "out", workers=workers))
                == plain
            )
        assert self.identity(retriever_config(still_encoder, pairs, tmp_path / "out", seed=1)) != plain

    def test_an_output_of_before_stays_finished_with_another_number_of_workers(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """Their number was a part of the identity, and the default was 2."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        config = retriever_config(still_encoder, pairs, tmp_path / "out")
        identity = self.identity(config)
        (tmp_path / "out").mkdir()
        info = {"run": {**identity, "workers.num": 2}, "figures": {"steps": 3}}
        (tmp_path / "out" / "raytower.json").write_text(json.dumps(info), encoding="utf-8")
        with pytest.raises(InputError, match=r"has lost its weights; remove it"):
            finished_run(config, identity)
        (tmp_path / "out" / "model.safetensors").touch()
        assert finished_run(config, identity) == {"steps": 3}

    def test_two_hundred_steps_are_what_is_meant_where_nothing_is_said(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """Said, and not said, they were two runs. An output of before has null there."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)

        def config(**dev: Any) -> TrainRetrieverConfig:
            given = {"path": str(pairs), **dev}
            return retriever_config(still_encoder, pairs, tmp_path / "out", dev=given)

        identity = self.identity(config())
        assert self.identity(config(every_steps=200)) == self.identity(config(every_steps=None)) == identity
        assert self.identity(config(every_epochs=1)) != identity
        # A run of before that was killed is found by a hash of this, and goes on.
        assert identity["dev"]["every_steps"] is None
        (tmp_path / "out").mkdir()
        run = {**identity, "dev": {**identity["dev"], "every_steps": None}}
        info = {"run": run, "figures": {"steps": 3}}
        (tmp_path / "out" / "raytower.json").write_text(json.dumps(info), encoding="utf-8")
        (tmp_path / "out" / "model.safetensors").touch()
        assert finished_run(config(), identity) == {"steps": 3}

    def test_only_what_is_read_of_a_folder_counts(self, still_encoder: Path, tmp_path: Path) -> None:
        """The test split of a BEIR folder that is trained from; what lies beside a model's weights."""
        start = tmp_path / "start"
        shutil.copytree(still_encoder, start)
        folder = beir_folder(tmp_path / "set")
        changes = {"dev": {"path": str(folder), "split": "test"}}
        config = retriever_config(start, folder, tmp_path / "out")
        measured = retriever_config(start, folder, tmp_path / "out", **changes)
        before = self.identity(config), self.identity(measured)
        for name in ("README.txt", ".gitattributes", ".DS_Store", "picture.png"):
            (start / name).write_bytes(b"words")
        (folder / "README.txt").write_text("words")
        (folder / "notes.jsonl").write_text("{}\n")
        assert (self.identity(config), self.identity(measured)) == before
        judged = folder / "qrels" / "test.tsv"
        judged.write_text(judged.read_text() + "q2\td2\t1\n")
        assert self.identity(config) == before[0]
        after = self.identity(measured)
        assert {key for key in after if after[key] != before[1][key]} == {"content of dev"}

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
        assert (bucket / "run").exists(), "a dry run asks too"
        _clear_half_published(output, identity)
        assert not (bucket / "run").exists()


def test_a_dry_run_refuses_the_output_that_the_run_refuses(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    config = retriever_config(still_encoder, pairs, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    assert plan_train_retriever(config)["steps"] == 5
    assert finished_run(config, run_identity(config, RetrieverTask.survey(config))) is None
    info = {"run": {**run_identity(config, RetrieverTask.survey(config)), "seed": 1}, "figures": {}}
    (tmp_path / "out" / "raytower.json").write_text(json.dumps(info), encoding="utf-8")
    for call in (plan_train_retriever, train_retriever):
        with pytest.raises(OtherOutputError, match=r"made by another config or other data \(seed\)"):
            call(config)
    (tmp_path / "out" / "raytower.json").rename(tmp_path / "out" / "notes.json")
    for call in (plan_train_retriever, train_retriever):
        with pytest.raises(InputError, match=r"holds files of something else, as 'notes\.json'"):
            call(config)


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


def test_a_machine_with_gpus_trains_on_all_that_share_a_batch(
    still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trained on two of its cores, beside idle GPUs."""
    monkeypatch.setattr(runner, "find_nodes", lambda: [Node(cpus=48, gpus=6)])
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    config = retriever_config(still_encoder, pairs, tmp_path / "out", workers={})
    assert runner._workers(config) == WorkersConfig(num=4, num_cpus=12, num_gpus=1)
    assert plan_train_retriever(config)["workers"] == 4
    assert plan_train_retriever(config)["rows_per_worker_and_batch"] == 2


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
    with pytest.raises(InputError, match=r"holds files of something else, as 'notes\.txt'"):
        train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))


def test_fewer_rows_than_a_batch_are_refused(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 7)
    with pytest.raises(InputError, match="7 training rows are fewer than one batch of 8"):
        train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))
