"""`raytower search --input`: the hits of a file of queries, beside brute force and beside one search a query."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raytower.cli import main
from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.fusion import Fusion
from raytower.ranked import search as search_module
from raytower.ranked.rows import ranked_file_type
from raytower.ranked.search import SearchWorker, plan_one_or_many, search_one_or_many
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.search import search
from raytower.retrieval.tune_fusion import store_fusion
from raytower.storage import Location
from tests.support.run_files import read_run
from tests.support.served_index import TEXTS, write_version
from tests.support.tiny_models import build_tiny_encoder

QUERIES = ["sun 3", "moon", "a star at night", "月亮 7", "nothing of it", "sun 3"]


@dataclass(frozen=True)
class World:
    """A flat index over TEXTS, ids 000001/0 and on, and its encoder."""

    index: str
    encoder: Path

    def scores(self, query: str) -> np.ndarray:
        """Inner product of the query with every text."""
        engine = ForwardEngine(Encoder.load(self.encoder))
        vectors = engine.encode([query, *TEXTS]).astype(np.float64)
        return vectors[1:] @ vectors[0]


@pytest.fixture(scope="module")
def world(dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    index = tmp_path_factory.mktemp("world") / "index"
    write_version(index, "000001", dummy_encoder_dir)
    return World(str(index), dummy_encoder_dir)


@pytest.fixture
def queries(tmp_path: Path) -> str:
    (tmp_path / "queries.txt").write_text("".join(f"{query}\n" for query in QUERIES), encoding="utf-8")
    return str(tmp_path / "queries.txt")


def config_of(world: World, queries: str, output: Path, **more: Any) -> SearchConfig:
    values = {"index": world.index, "input": queries, "output": str(output), "k": 3}
    return make_config(SearchConfig, {**values, **more})


def test_a_tsv_holds_query_text_and_score(world: World, queries: str, tmp_path: Path) -> None:
    result = search_one_or_many(config_of(world, queries, tmp_path / "recall.tsv", rows_per_batch=4))
    rows = [line.split("\t") for line in (tmp_path / "recall.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == [query for query in QUERIES for _ in range(3)]
    for place, query in enumerate(QUERIES):
        expected = np.sort(world.scores(query))[::-1][:3]
        assert [float(row[2]) for row in rows[3 * place : 3 * place + 3]] == pytest.approx(expected, abs=2e-6)
        for _, text, score in rows[3 * place : 3 * place + 3]:
            assert world.scores(query)[TEXTS.index(text)] == pytest.approx(float(score), abs=2e-6)
    assert (result["queries"], result["hits"], result["queries_without_hits"]) == (6, 18, 0)
    assert (result["file_type"], result["index_version"]) == ("tsv", "000001")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["queries.txt", "recall.tsv"]


@pytest.mark.parametrize("reranks", [False, True])
def test_every_type_holds_what_one_search_a_query_finds(
    world: World, queries: str, tmp_path: Path, dummy_reranker_dir: Path, reranks: bool
) -> None:
    more: dict[str, Any] = {"reranker": str(dummy_reranker_dir), "recall_k": 5} if reranks else {}
    names = ["query_id", "query", "rank", "id", "score", "text"]
    names += ["recall_score", "rerank_score"] if reranks else []
    expected = []
    for line, query in enumerate(QUERIES, start=1):
        one = search(make_config(SearchConfig, {"index": world.index, "query": query, "k": 3, **more}))
        for hit in one["results"]:
            expected.append({**hit, "query_id": f"queries:{line}", "query": query})
    for name in ("a.jsonl", "a.parquet", "a.trec"):
        search_one_or_many(config_of(world, queries, tmp_path / name, **more))
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    for rows in (list(map(json.loads, lines)), pq.read_table(tmp_path / "a.parquet").to_pylist()):
        assert [list(row) for row in rows] == [names] * len(expected)
        for row, hit in zip(rows, expected, strict=True):
            exact = ("query_id", "query", "rank", "id", "text")
            assert {name: row[name] for name in exact} == {name: hit[name] for name in exact}
            for score in [name for name in names if name.endswith("score")]:
                assert row[score] == pytest.approx(hit[score], abs=1e-5)
    run = read_run(tmp_path / "a.trec")
    assert [(query, doc) for query, ranked in run.items() for doc, _ in ranked] == [
        (hit["query_id"], hit["id"]) for hit in expected
    ]


def test_ids_of_queries_come_back(world: World, tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("id\ttext\nq 7\tsun 3\nq8\tmoon\n")
    search_one_or_many(config_of(world, str(tmp_path / "q.tsv"), tmp_path / "a.jsonl", k=1))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["query_id"], row["query"]) for row in rows] == [("q 7", "sun 3"), ("q8", "moon")]


def test_a_filter_and_queries_without_hits(
    world: World, queries: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search_one_or_many(config_of(world, queries, tmp_path / "a.tsv", filter="number < 0"))
    assert (result["hits"], result["queries_without_hits"]) == (0, 6)
    assert (tmp_path / "a.tsv").read_bytes() == b""
    assert "6 queries found nothing" in capsys.readouterr().err
    with pytest.raises(InputError, match="filter cannot be evaluated"):
        search_one_or_many(config_of(world, queries, tmp_path / "b.tsv", filter="no_column = 1"))


def test_a_job_that_was_killed_goes_on(
    world: World, queries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_MAX_QUERIES_PER_SHARE", 2)
    search_one_or_many(config_of(world, queries, tmp_path / "whole.jsonl"))
    done: list[list[str]] = []

    def killed(worker: SearchWorker, table: Any, sink: Any) -> Any:
        done.append(table["text"].to_pylist())
        if "nothing of it" in done[-1] and len(done) == 3:
            raise KeyboardInterrupt
        return call(worker, table, sink)

    call = SearchWorker.__call__
    monkeypatch.setattr(SearchWorker, "__call__", killed)
    config = config_of(world, queries, tmp_path / "a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        search_one_or_many(config)
    assert not (tmp_path / "a.jsonl").exists()
    # How many rows go at once changes nothing of what is kept.
    search_one_or_many(config.model_copy(update={"rows_per_batch": 100}))
    assert done == [QUERIES[:2], QUERIES[2:4], QUERIES[4:], QUERIES[4:]]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_parts_of_another_fusion_are_not_kept(
    world: World, queries: str, tmp_path: Path, dummy_reranker_dir: Path
) -> None:
    reranker = tmp_path / "reranker"
    CrossEncoder.load(dummy_reranker_dir).save(reranker)
    config = config_of(world, queries, tmp_path / "a.tsv", reranker=str(reranker))
    file_type, surveyed, shares = search_module._prepare(config)
    before = search_module._job(config, file_type, surveyed, shares).identity
    store_fusion(str(reranker), Fusion(weight=0.5))
    assert search_module._job(config, file_type, surveyed, shares).identity != before


def test_the_plan_counts_and_does_nothing(
    world: World, queries: str, tmp_path: Path, dummy_reranker_dir: Path
) -> None:
    more = {"reranker": str(dummy_reranker_dir), "recall_k": 20}
    plan = plan_one_or_many(config_of(world, queries, tmp_path / "a.tsv", **more))
    assert (plan["rows"], plan["reranked_pairs"], plan["parts"], plan["workers"], plan["on_ray"]) == (
        6,
        120,
        1,
        1,
        False,
    )
    assert [place.name for place in tmp_path.iterdir()] == ["queries.txt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"query": "a", "input": "q.txt"}, "and both are given; give one of them"),
        ({}, "and neither is given; give one of them"),
        ({"input": "q.txt"}, "output is not; name the file"),
        ({"query": "a", "output": "a.tsv"}, "output is given, which a search for one query does not read"),
        ({"query": "a", "workers": {"num": 2}}, "workers is given, which a search for one"),
        ({"input": "q.txt", "output": "a.tsv", "format": "tsv"}, "it is called 'file_type' now"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(SearchConfig, {"index": "i", **values})


@pytest.mark.parametrize(
    ("output", "file_type", "message"),
    [
        ("a.csv", None, "which tells no type"),
        ("a", None, "which tells no type"),
        ("a.tsv.gz", None, "which tells no type"),
        ("a.tsv", "jsonl", "which is tsv, and file_type is jsonl"),
        ("theirs.tsv", None, "exists and is no tsv result"),
        ("theirs.jsonl", None, "exists and is no jsonl result"),
        ("theirs.parquet", None, "exists and is no parquet result"),
        ("theirs.trec", None, "exists and is no trec result"),
        ("queries.txt", None, "inside the input"),
    ],
)
def test_an_output_that_would_mislead_or_destroy(
    world: World, queries: str, tmp_path: Path, output: str, file_type: str | None, message: str
) -> None:
    for suffix in ("tsv", "jsonl", "parquet", "trec"):
        (tmp_path / f"theirs.{suffix}").write_text('{"id": "mine"}\n')
    with pytest.raises(InputError, match=message):
        search_one_or_many(config_of(world, queries, tmp_path / output, file_type=file_type))
    assert Path(queries).read_text(encoding="utf-8").splitlines() == QUERIES


def test_a_former_result_is_replaced(world: World, queries: str, tmp_path: Path) -> None:
    for name in ("a.tsv", "a.jsonl", "a.parquet", "a.trec"):
        search_one_or_many(config_of(world, queries, tmp_path / name))
        once = (tmp_path / name).read_bytes()
        search_one_or_many(config_of(world, queries, tmp_path / name))
        assert (tmp_path / name).read_bytes() == once


def test_another_encoder_is_refused_before_any_work(world: World, queries: str, tmp_path: Path) -> None:
    other = build_tiny_encoder(tmp_path / "other", seed=7)
    with pytest.raises(FormatError, match="fingerprint"):
        search_one_or_many(config_of(world, queries, tmp_path / "a.tsv", encoder=str(other)))
    assert not (tmp_path / ".a.tsv.parts").exists()


def test_bad_queries_go_to_quarantine(world: World, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "sun"}\n{"text": "  "}\n{"text": "moon"}\n')
    with pytest.raises(InputError, match=r"q\.jsonl:2"):
        search_one_or_many(config_of(world, str(tmp_path / "q.jsonl"), tmp_path / "a.tsv"))
    more = {"on_error": "quarantine", "k": 1}
    result = search_one_or_many(config_of(world, str(tmp_path / "q.jsonl"), tmp_path / "a.tsv", **more))
    assert (result["queries"], result["rejected_rows"]) == (2, 1)


def test_a_text_with_a_tab_is_no_tsv(dummy_encoder_dir: Path, queries: str, tmp_path: Path) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir, 1, ["a\tb"])
    there = World(str(tmp_path / "index"), dummy_encoder_dir)
    with pytest.raises(InputError, match="set file_type to jsonl"):
        search_one_or_many(config_of(there, queries, tmp_path / "a.tsv"))
    search_one_or_many(config_of(there, queries, tmp_path / "a.jsonl"))
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["text"] == "a\tb"


def test_the_last_line_of_standard_output_is_the_figures(
    world: World, queries: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [world.index, "--input", queries, "--output", str(tmp_path / "a.tsv"), "--k", "2"]
    assert main(["search", *given]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hits"] == 12
    assert main(["search", world.index, "sun 3", "--k", "1"]) == 0
    assert "sun 3" in capsys.readouterr().out
    assert Location.of(tmp_path / "a.tsv").is_file()


def test_parts_that_were_read_in_another_way_are_not_kept(
    world: World, queries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same, the queries are not: a resumed job mixed both."""
    identities = []

    def seen(job: Any, *_: Any) -> Any:
        identities.append(job.identity)
        raise InputError("enough")

    monkeypatch.setattr("raytower.ranked.search.run_shares", seen)
    for fields in (["title", "text"], ["text"], ["text"]):
        values = {"index": world.index, "output": str(tmp_path / "a.tsv")}
        with pytest.raises(InputError, match="enough"):
            search_one_or_many(
                make_config(SearchConfig, {**values, "input": {"path": queries, "text_fields": fields}})
            )
    assert identities[0] != identities[1] == identities[2]


def test_scored_pairs_of_somebody_are_no_former_result(tmp_path: Path) -> None:
    """They have three columns and a number, too, and were replaced without a word."""
    (tmp_path / "dev.tsv").write_text("how to lend\tloans\t1\n")
    with pytest.raises(InputError, match="no tsv result of this job"):
        ranked_file_type(str(tmp_path / "dev.tsv"), None)
    (tmp_path / "dev.tsv").write_text("how to lend\tloans\t0.731000\n")
    assert ranked_file_type(str(tmp_path / "dev.tsv"), None) == "tsv"
