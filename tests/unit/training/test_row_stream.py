"""The stream of batches: the same rows for any number of workers, each read once, in a thread that ends with it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import multiprocessing

from raytower.data.config import InputConfig
from raytower.data.pieces import Piece, read_piece, survey
from raytower.errors import InputError
from raytower.training.batches import Rows
from raytower.training.distinct_batches import DistinctOrders, value_hashes
from raytower.training.exchange import Alone, Exchange, GroupExchange
from raytower.training.mixing import SET
from raytower.training.row_stream import MixedPlan, StreamPlan, stream_batches
from raytower.training.windows import Window, plan_windows, readers_of, workers_of
from tests.support.tiny_training import cut_batches, read_whole_window, worker_slice, write_pairs, write_rows
from tests.support.worker_group import end_worker, join_group

WORKERS = [1, 2, 4]


class Board:
    """Where workers that are threads of this process lay down what they send each other."""

    def __init__(self, num_workers: int) -> None:
        self.laid_down: list[Any] = [None] * num_workers
        # A worker that waits for nobody fails, and is not waited for.
        self.barrier = threading.Barrier(num_workers, timeout=30)
        self.branches: defaultdict[int, Board] = defaultdict(lambda: Board(num_workers))
        self.lock = threading.Lock()


class ThreadExchange:
    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.num_workers = board, rank, len(board.laid_down)
        self.num_branches = 0

    def to_all(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        return self._pass([values] * self.num_workers)

    def to_each(self, tables: Sequence[pa.Table]) -> list[pa.Table]:
        return self._pass(tables)

    def branch(self) -> ThreadExchange:
        with self.board.lock:
            board = self.board.branches[self.num_branches]
        self.num_branches += 1
        return ThreadExchange(board, self.rank)

    def _pass(self, messages: Sequence[Any]) -> list[Any]:
        self.board.laid_down[self.rank] = messages
        self.board.barrier.wait()
        here = [messages[self.rank] for messages in self.board.laid_down]
        self.board.barrier.wait()
        return here


def of_workers(num_workers: int, run: Callable[[Exchange], Any]) -> list[Any]:
    """What `run` gives for each of so many workers at once."""
    if num_workers == 1:
        return [run(Alone())]
    board = Board(num_workers)
    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(run, [ThreadExchange(board, rank) for rank in range(num_workers)]))


def windows_of(plan: StreamPlan) -> Iterator[Window]:
    rows = [piece.num_rows for piece in plan.pieces]
    return plan_windows(rows, seed=plan.seed, window_rows=plan.window_rows)


def whole_batches(plan: StreamPlan) -> list[Rows]:
    """The batches of the run as one process makes them that reads and orders whole windows."""
    tables = (read_whole_window(w, plan.pieces, plan.seed, plan.num_documents) for w in windows_of(plan))
    if plan.distinct_columns:
        tables = _spread(plan, tables)
    return list(islice(cut_batches(tables, plan.batch_size), plan.num_batches))


def _spread(plan: StreamPlan, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    orders = DistinctOrders(plan.batch_size, plan.distinct_columns, seed=plan.seed)
    for table in tables:
        yield table.take(pa.array(orders.next_order(value_hashes(table, plan.distinct_columns))))


def assert_same_for_all(plan: StreamPlan, skips: Sequence[int], workers: Sequence[int] = WORKERS) -> None:
    whole = whole_batches(plan)
    assert len(whole) == plan.num_batches
    for num_workers in workers:
        for skip in skips:
            streams = of_workers(
                num_workers, lambda exchange, skip=skip: list(stream_batches(plan, skip, exchange=exchange))
            )
            for rank, batches in enumerate(streams):
                assert batches == [worker_slice(rows, rank, num_workers) for rows in whole[skip:]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    """45 rows in pieces of 7: an epoch is two windows or three."""
    path = write_pairs(tmp_path_factory.mktemp("rows") / "pairs.tsv", 45)
    pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=7).pieces
    return StreamPlan(pieces=pieces, batch_size=8, num_batches=16, seed=3, window_rows=20)


class TestBatches:
    def test_epochs_flow_into_each_other_and_each_holds_every_row_once(self, plan: StreamPlan) -> None:
        queries = [*chain.from_iterable(batch["query"] for batch in stream_batches(plan))]
        assert len(queries) == 16 * 8
        first, second = queries[:45], queries[45:90]
        assert Counter(first) == Counter(second)
        assert len(set(first)) == 45
        assert first != second
        assert first != sorted(first)

    def test_workers_train_on_the_batches_of_one_and_go_on_within_a_window(self, plan: StreamPlan) -> None:
        # within a window, in the next epoch, before the last
        assert_same_for_all(plan, skips=[0, 1, 6, 15])

    @settings(max_examples=15)
    @given(
        rows_per_piece=st.integers(1, 12),
        batch_size=st.sampled_from([4, 8, 20]),
        window_rows=st.integers(1, 60),
        seed=st.integers(0, 99),
        skip=st.integers(0, 9),
        is_distinct=st.booleans(),
        workers=st.sampled_from(WORKERS),
    )
    def test_whatever_the_sizes(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        rows_per_piece: int,
        batch_size: int,
        window_rows: int,
        seed: int,
        skip: int,
        is_distinct: bool,
        workers: int,
    ) -> None:
        # Every third query and every fifth document comes again.
        rows = [f"query {i % 15}\tanswer {i % 21}" for i in range(45)]
        path = write_rows(tmp_path_factory.mktemp("rows") / "pairs.tsv", rows)
        pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=rows_per_piece).pieces
        plan = StreamPlan(
            pieces=pieces,
            batch_size=batch_size,
            num_batches=10,
            seed=seed,
            window_rows=window_rows,
            distinct_columns=("query", "document", "query_id") if is_distinct else (),
        )
        assert_same_for_all(plan, [skip], [workers])

    def test_documents_are_drawn_as_for_one(self, tmp_path: Path) -> None:
        """Lists of two to nine documents, of which three are drawn: a worker draws for its pieces what one would."""
        rows = [
            {
                "query": f"q{i}",
                "documents": [f"d{i}.{k}" for k in range(2 + i * 5 % 8)],
                "scores": [float(-k) for k in range(2 + i * 5 % 8)],
            }
            for i in range(45)
        ]
        path = write_rows(tmp_path / "lists.jsonl", list(map(json.dumps, rows)))
        pieces = survey(InputConfig(path=str(path)), "candidates", rows_per_piece=4).pieces
        plan = StreamPlan(
            pieces=pieces, batch_size=8, num_batches=12, seed=5, window_rows=15, num_documents=3
        )
        assert_same_for_all(plan, skips=[0, 7])
        lengths = {len(documents) for rows in whole_batches(plan) for documents in rows["documents"]}
        assert lengths == {2, 3}

    def test_distinct_batches_continue_too(self, plan: StreamPlan) -> None:
        distinct = replace(plan, distinct_columns=("query", "document"), num_batches=12)
        assert_same_for_all(distinct, skips=[0, 1, 3, 6, 9])

    def test_a_run_of_before_goes_on_with_its_batches(self, tmp_path: Path) -> None:
        """The first rows of batches that were made when each worker read whole windows by Ray Data."""
        rows = [f"query {i % 15}\tanswer {i % 21}" for i in range(45)]
        path = write_rows(tmp_path / "pairs.tsv", rows)
        pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=7).pieces
        plan = StreamPlan(pieces=pieces, batch_size=9, num_batches=10, seed=3, window_rows=20)
        assert [(rows["query"][0], rows["document"][0]) for rows in stream_batches(plan)] == PLAIN_BEFORE
        plan = replace(plan, distinct_columns=("query", "document"))
        told: list[str] = []
        found = [(rows["query"][0], rows["document"][0]) for rows in stream_batches(plan, tell=told.append)]
        assert found == DISTINCT_BEFORE


PLAIN_BEFORE = [
    ("query 2", "answer 17"),
    ("query 14", "answer 2"),
    ("query 3", "answer 18"),
    ("query 6", "answer 0"),
    ("query 9", "answer 3"),
    ("query 11", "answer 11"),
    ("query 10", "answer 10"),
    ("query 4", "answer 13"),
    ("query 6", "answer 0"),
    ("query 8", "answer 17"),
]
DISTINCT_BEFORE = [
    ("query 8", "answer 8"),
    ("query 8", "answer 17"),
    ("query 2", "answer 17"),
    ("query 2", "answer 2"),
    ("query 3", "answer 3"),
    ("query 2", "answer 11"),
    ("query 7", "answer 7"),
    ("query 11", "answer 11"),
    ("query 9", "answer 18"),
    ("query 4", "answer 4"),
]


def mixed_plan(plan: StreamPlan, pairs: Path) -> MixedPlan:
    """A second set of 30 triples beside the rows of `plan`, with other columns and windows."""
    lines = ["query\ttitle\tneg_title", *(f"q{i % 10}\td{i}\tn{i}" for i in range(30))]
    path = write_rows(pairs, lines)
    pieces = survey(InputConfig(path=str(path)), "triples", rows_per_piece=4).pieces
    other = replace(plan, pieces=pieces, num_batches=9, window_rows=12, distinct_columns=("query",))
    return MixedPlan(
        **{**vars(plan), "pieces": (*plan.pieces, *pieces), "num_batches": 16 + 9},
        sets={"first": plan, "other": other},
    )


class TestSets:
    @pytest.fixture(scope="class")
    def mixed(self, plan: StreamPlan, tmp_path_factory: pytest.TempPathFactory) -> MixedPlan:
        return mixed_plan(plan, tmp_path_factory.mktemp("rows") / "triples.tsv")

    @pytest.mark.parametrize("num_workers", WORKERS)
    def test_workers_train_on_the_batches_of_one(self, mixed: MixedPlan, num_workers: int) -> None:
        """Each set's batches are those that it has alone; they begin anywhere, within a set's window too."""
        whole = list(stream_batches(mixed))
        for name, own in mixed.sets.items():
            batches = [{**rows, SET: [name] * 8} for rows in whole_batches(own)]
            assert [rows for rows in whole if rows[SET][0] == name] == batches
        for skip in (0, 1, 11, 24, 25):
            streams = of_workers(
                num_workers, lambda exchange, skip=skip: list(stream_batches(mixed, skip, exchange=exchange))
            )
            for rank, batches in enumerate(streams):
                assert batches == [worker_slice(rows, rank, num_workers) for rows in whole[skip:]]

    def test_a_worker_may_come_to_the_windows_of_sets_in_another_order(
        self, mixed: MixedPlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half of the pieces of each set are read slowly, which are other ones of each worker."""

        def late(piece: Piece) -> pa.Table:
            time.sleep(0.02 * (("negative" in piece.schema.names) == (piece.index % 2 == 0)))
            return read_piece(piece)

        whole = list(stream_batches(mixed))
        monkeypatch.setattr("raytower.training.row_stream.read_piece", late)
        streams = of_workers(4, lambda exchange: list(stream_batches(mixed, exchange=exchange)))
        for rank, batches in enumerate(streams):
            assert batches == [worker_slice(rows, rank, 4) for rows in whole]

    def test_workers_that_stop_after_the_same_batch_wait_for_nobody(self, mixed: MixedPlan) -> None:
        before = threading.active_count()
        for workers in WORKERS:
            for taken in (0, 1, 2, 5, 13, 24, 25):

                def run(exchange: Exchange, taken: int = taken) -> list[Rows]:
                    with closing(stream_batches(mixed, exchange=exchange)) as batches:
                        return list(islice(batches, taken))

                assert [len(batches) for batches in of_workers(workers, run)] == [taken] * workers
        assert threading.active_count() == before


class TestShares:
    @given(
        number=st.integers(0, 99),
        num_pieces=st.integers(1, 20),
        first_row=st.integers(0, 99),
        rows=st.integers(1, 60),
        own=st.integers(1, 5),
        workers=st.integers(1, 7),
    )
    def test_of_each_batch_every_worker_has_its_part(
        self, number: int, num_pieces: int, first_row: int, rows: int, own: int, workers: int
    ) -> None:
        window = Window(0, number, tuple(range(num_pieces)), first_row, rows)
        shares = workers_of(window, own * workers, workers)
        assert len(shares) == rows
        for place, worker in enumerate(shares.tolist()):
            assert worker == (first_row + place) % (own * workers) // own
        readers = readers_of(window, workers)
        assert len(readers) == num_pieces
        counts = np.bincount(readers, minlength=workers)
        assert counts.max() - counts.min() <= 1

    def test_pieces_go_round_on_from_window_to_window(self) -> None:
        windows = [Window(0, number, (0, 1, 2), 30 * number, 30) for number in range(3)]
        assert [readers_of(window, 4).tolist() for window in windows] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]

    def test_the_workers_together_read_every_row_once(
        self, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every worker read everything: 64 of them 9.6 TB for 150 GB."""
        read: list[int] = []

        def counted(piece: Piece) -> pa.Table:
            read.append(piece.index)
            return read_piece(piece)

        monkeypatch.setattr("raytower.training.row_stream.read_piece", counted)
        for workers in WORKERS:
            read.clear()
            of_workers(workers, lambda exchange: list(stream_batches(plan, exchange=exchange)))
            windows = islice(windows_of(plan), 20)
            wanted = [index for window in windows if window.first_row < 16 * 8 for index in window.pieces]
            assert Counter(read) == Counter(wanted)


class TestThread:
    def test_one_window_is_read_ahead_however_slow_the_step(
        self, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []

        def counted(piece: Piece) -> pa.Table:
            read.append(piece.num_rows)
            return read_piece(piece)

        monkeypatch.setattr("raytower.training.row_stream.read_piece", counted)
        slow = replace(plan, window_rows=7, num_batches=10_000)
        with closing(stream_batches(slow)) as batches:
            for taken in range(1, 10):
                next(batches)
                # The batch, what is left of its last window, and the window that is read ahead.
                assert sum(read) <= taken * 8 + 7 + 14

    def test_an_error_reaches_the_step_and_the_thread_ends(self, tmp_path: Path) -> None:
        path = write_pairs(tmp_path / "pairs.tsv", 45)
        pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=7).pieces
        plan = StreamPlan(pieces=pieces, batch_size=8, num_batches=16, seed=3, window_rows=20)
        before = threading.active_count()
        with closing(stream_batches(plan)) as batches:
            next(batches)
            path.write_text("too short")
            with pytest.raises(InputError, match="has changed since it was surveyed"):
                list(batches)
        assert threading.active_count() == before

    def test_workers_that_stop_after_the_same_batch_wait_for_nobody(self, plan: StreamPlan) -> None:
        """Patience ends a run in its midst. One worker may need the next window for a batch, and another not."""
        before = threading.active_count()
        for workers in WORKERS:
            for taken in range(1, 7):

                def run(exchange: Exchange, taken: int = taken) -> list[Rows]:
                    with closing(stream_batches(plan, exchange=exchange)) as batches:
                        return list(islice(batches, taken))

                assert [len(batches) for batches in of_workers(workers, run)] == [taken] * workers
        assert threading.active_count() == before


def _exchange_worker(rank: int, folder: Path, pieces: Sequence[Piece]) -> None:
    join_group(folder, rank)
    exchange = GroupExchange()
    gathered = exchange.to_all(np.full((2 * rank, 3), 7 + rank, dtype=np.uint64))
    assert [part.tolist() for part in gathered] == [[], [[8] * 3] * 2]
    assert [part.dtype for part in gathered] == [np.uint64] * 2
    assert [part.shape for part in exchange.to_all(np.empty((0, 3)))] == [(0, 3), (0, 3)]
    tables = [pa.table({"from": [rank] * to, "to": [to] * to}) for to in range(2)]
    arrived = exchange.to_each(tables)
    assert [table.to_pydict() for table in arrived] == [
        {"from": [sender] * rank, "to": [rank] * rank} for sender in range(2)
    ]
    for distinct in ((), ("query", "document")):
        plan = StreamPlan(
            pieces=pieces,
            batch_size=8,
            num_batches=16,
            seed=3,
            window_rows=20,
            distinct_columns=distinct,
        )
        batches = list(stream_batches(plan, 3, exchange=exchange))
        assert batches == [worker_slice(rows, rank, 2) for rows in whole_batches(plan)[3:]]
    mixed = mixed_plan(plan, folder / f"triples{rank}.tsv")
    batches = list(stream_batches(mixed, 3, exchange=exchange))
    assert batches == [worker_slice(rows, rank, 2) for rows in list(stream_batches(mixed))[3:]]
    (folder / f"done{rank}").touch()
    end_worker()


@pytest.mark.processes
def test_two_processes_exchange_rows_over_their_own_group(plan: StreamPlan, tmp_path: Path) -> None:
    multiprocessing.spawn(_exchange_worker, (tmp_path, plan.pieces), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]
