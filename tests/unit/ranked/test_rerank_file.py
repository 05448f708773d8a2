"""`raytower rerank`: candidates of a file in the order of a reranker, beside sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import CrossEncoder as PeerCrossEncoder

from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.fusion import Fusion
from raytower.ranked import rerank as rerank_module
from raytower.ranked.config import RerankFileConfig
from raytower.ranked.rerank import plan_rerank, rerank
from raytower.ranked.search import search_one_or_many
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.tune_fusion import store_fusion
from tests.support.served_index import write_version

CANDIDATES = {
    "when are you open": ["opening hours", "a password", "the stock market", "hours"],
    "reset it": ["a password", "how to reset a password"],
    "你们几点": ["时出来", "我要上", "a"],
}


def write_candidates(path: Path, scores: bool = False) -> str:
    lines = [
        f"{query}\t{text}" + (f"\t{1 - place / 10}" if scores else "")
        for query, texts in CANDIDATES.items()
        for place, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def peer_order(reranker: Path) -> list[tuple[str, str, float]]:
    """Query, text and probability by the peer library alone, best first."""
    model = PeerCrossEncoder(str(reranker), device="cpu")
    rows = []
    for query, texts in CANDIDATES.items():
        scores = model.predict([(query, text) for text in texts])
        for place in np.argsort(-scores, kind="stable"):
            rows.append((query, texts[place], float(scores[place])))
    return rows


def config_of(reranker: Path, input: str, output: Path, **more: Any) -> RerankFileConfig:
    values = {"reranker": str(reranker), "input": input, "output": str(output)}
    return make_config(RerankFileConfig, {**values, **more})


@pytest.mark.parametrize("scores", [False, True])
def test_candidates_are_scored_and_sorted(dummy_reranker_dir: Path, tmp_path: Path, scores: bool) -> None:
    candidates = write_candidates(tmp_path / "c.tsv", scores)
    result = rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.tsv", rows_per_batch=2))
    rows = [line.split("\t") for line in (tmp_path / "a.tsv").read_text(encoding="utf-8").splitlines()]
    expected = peer_order(dummy_reranker_dir)
    assert [tuple(row[:2]) for row in rows] == [row[:2] for row in expected]
    assert [float(row[2]) for row in rows] == pytest.approx([row[2] for row in expected], abs=2e-6)
    assert (result["queries"], result["pairs"], result["written"], result["fused"]) == (3, 9, 9, False)


def test_the_best_of_each_query_as_json_lines_and_parquet(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    candidates = write_candidates(tmp_path / "c.txt", scores=True)
    for name in ("a.jsonl", "a.parquet"):
        rerank(config_of(dummy_reranker_dir, candidates, tmp_path / name, k=1))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    best = {}
    for query, text, score in peer_order(dummy_reranker_dir):
        best.setdefault(query, (text, score))
    assert {row["query"]: row["text"] for row in rows} == {query: text for query, (text, _) in best.items()}
    for row in rows:
        assert row["score"] == pytest.approx(best[row["query"]][1], abs=1e-6)
        assert 1 / (1 + np.exp(-row["rerank_score"])) == pytest.approx(row["score"], abs=1e-6)
        place = CANDIDATES[row["query"]].index(row["text"])
        assert row["recall_score"] == pytest.approx(1 - place / 10)
        assert (row["rank"], row["query_id"], row["id"]) == (1, None, None)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == rows


@pytest.mark.parametrize("name", ["recall.tsv", "recall.jsonl", "recall.parquet"])
def test_recall_then_rerank_is_what_search_does_at_once(
    name: str, dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    reranker = tmp_path / "reranker"
    CrossEncoder.load(dummy_reranker_dir).save(reranker)
    store_fusion(str(reranker), Fusion(weight=0.4, recall_mean=0.3, recall_std=0.2))
    (tmp_path / "q.txt").write_text("sun 3\nmoon\nsun 3\n")
    values = {"index": str(tmp_path / "index"), "input": str(tmp_path / "q.txt")}

    def found(output: str, **more: Any) -> Any:
        config = {**values, "output": str(tmp_path / output), **more}
        return search_one_or_many(make_config(SearchConfig, config))

    found(name, k=20)
    found("once.jsonl", k=5, recall_k=20, reranker=str(reranker))
    if name == "recall.tsv":
        # Equal queries without ids would be one.
        lines = (tmp_path / name).read_text().splitlines()[:40]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    result = rerank(config_of(reranker, str(tmp_path / name), tmp_path / "ranked.jsonl", k=5))
    assert result["fused"]
    once, twice = (
        [json.loads(line) for line in (tmp_path / file).read_text(encoding="utf-8").splitlines()]
        for file in ("once.jsonl", "ranked.jsonl")
    )
    assert len(twice) == (10 if name == "recall.tsv" else 15)
    for left, right in zip(once, twice, strict=False):
        assert [left[key] for key in ("query", "rank", "text")] == [
            right[key] for key in ("query", "rank", "text")
        ]
        assert right["score"] == pytest.approx(left["score"], abs=1e-5)
        if name != "recall.tsv":
            assert (right["id"], right["query_id"]) == (left["id"], left["query_id"])
    alone = config_of(reranker, str(tmp_path / name), tmp_path / "alone.jsonl", k=5, fusion_weight=1)
    rerank(alone)
    first = json.loads((tmp_path / "alone.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["rank"] == 1


def test_a_query_is_never_torn(
    dummy_reranker_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = write_candidates(tmp_path / "c.tsv")
    rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "whole.tsv"))
    monkeypatch.setattr(rerank_module, "_MAX_PAIRS_PER_SHARE", 1)
    assert plan_rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.tsv"))["parts"] == 3
    rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.tsv"))
    assert (tmp_path / "a.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_what_cannot_be_done(dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.tsv").write_text("a\tx\nb\ty\na\tz\n")
    torn = config_of(dummy_reranker_dir, str(tmp_path / "torn.tsv"), tmp_path / "a.tsv")
    for command in (rerank, plan_rerank):
        with pytest.raises(InputError, match="the rows of query 'a' do not stand together in the input"):
            command(torn)
    candidates = write_candidates(tmp_path / "c.tsv")
    with pytest.raises(FormatError, match=r"is an encoder .* it is no reranker"):
        rerank(config_of(dummy_encoder_dir, candidates, tmp_path / "a.tsv"))
    with pytest.raises(InputError, match=r"not all rows of .* have a recall score to mix with"):
        rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.tsv", fusion_weight=0.5))
    with pytest.raises(InputError, match=r"the input has none; write \.tsv or \.jsonl"):
        rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.trec"))
    (tmp_path / "mixed.tsv").write_text("a\tx\t0.5\na\ty\n")
    with pytest.raises(InputError, match=r"mixed\.tsv:2: 2 columns, expected 3 \(query, document, score\)"):
        rerank(config_of(dummy_reranker_dir, str(tmp_path / "mixed.tsv"), tmp_path / "a.tsv"))
    (tmp_path / "word.tsv").write_text("a\tx\tgood\n")
    with pytest.raises(InputError, match="'good' is not a finite number"):
        rerank(config_of(dummy_reranker_dir, str(tmp_path / "word.tsv"), tmp_path / "a.tsv"))
    assert not (tmp_path / "a.tsv").exists()


def test_a_stored_fusion_without_recall_scores_is_said(
    dummy_reranker_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reranker = tmp_path / "reranker"
    CrossEncoder.load(dummy_reranker_dir).save(reranker)
    store_fusion(str(reranker), Fusion(weight=0.0))
    candidates = write_candidates(tmp_path / "c.tsv")
    assert not rerank(config_of(reranker, candidates, tmp_path / "a.tsv"))["fused"]
    assert "which the input has not" in capsys.readouterr().err
    rows = [line.split("\t")[:2] for line in (tmp_path / "a.tsv").read_text().splitlines()]
    assert rows == [list(row[:2]) for row in peer_order(dummy_reranker_dir)]
    # Weight 0 trusts recall alone, so the order stays.
    write_candidates(tmp_path / "s.tsv", scores=True)
    assert rerank(config_of(reranker, str(tmp_path / "s.tsv"), tmp_path / "b.tsv"))["fused"]
    texts = [line.split("\t")[1] for line in (tmp_path / "b.tsv").read_text().splitlines()]
    assert texts == [text for texts in CANDIDATES.values() for text in texts]


def test_names_in_a_header_or_in_json_lines(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    candidates = write_candidates(tmp_path / "c.tsv")
    rerank(config_of(dummy_reranker_dir, candidates, tmp_path / "a.tsv"))
    rows = [line.split("\t") for line in Path(candidates).read_text(encoding="utf-8").splitlines()]
    named = "".join(f"{title}\t{query}\n" for query, title in [("query", "title"), *rows])
    (tmp_path / "named.tsv").write_text(named, encoding="utf-8")
    lines = [json.dumps({"query": query, "title": title}) for query, title in rows]
    (tmp_path / "named.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("named.tsv", "named.jsonl"):
        rerank(config_of(dummy_reranker_dir, str(tmp_path / name), tmp_path / "b.tsv"))
        assert (tmp_path / "b.tsv").read_bytes() == (tmp_path / "a.tsv").read_bytes()


TITLED = ["opening hours", "a password", "the stock market"]


def test_titles_of_an_index_come_through(
    dummy_encoder_dir: Path, dummy_reranker_dir: Path, tmp_path: Path
) -> None:
    """Of the documents that have one, in what search finds, at once or reranked, and in what rerank makes of that."""
    titles = ["Hours", None, "Stocks"]
    write_version(tmp_path / "index", "000001", dummy_encoder_dir, 1, TITLED, titles)
    title_of = dict(zip(TITLED, titles, strict=True))
    (tmp_path / "q.txt").write_text("when are you open\nreset it\n")
    values = {"index": str(tmp_path / "index"), "input": str(tmp_path / "q.txt"), "k": 3}
    for name, more in (
        ("recall.jsonl", {}),
        ("recall.parquet", {}),
        ("once.jsonl", {"reranker": str(dummy_reranker_dir)}),
    ):
        search_one_or_many(make_config(SearchConfig, {**values, "output": str(tmp_path / name), **more}))
    for name in ("recall.jsonl", "recall.parquet"):
        for ending in ("jsonl", "parquet"):
            output = tmp_path / f"{name}.{ending}"
            rerank(config_of(dummy_reranker_dir, str(tmp_path / name), output))
    names = ["query_id", "query", "rank", "id", "score", "text", "title"]
    for place in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.parquet")]:
        if place.suffix == ".parquet":
            rows = pq.read_table(place).to_pylist()
        else:
            rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 6
        assert [row["title"] for row in rows] == [title_of[row["text"]] for row in rows], place
        assert list(rows[0])[:7] == names
    # Without titles there is no such column, and what was written with them is a former result.
    plain = write_candidates(tmp_path / "c.tsv")
    rerank(config_of(dummy_reranker_dir, plain, tmp_path / "recall.parquet.parquet"))
    assert "title" not in pq.read_schema(tmp_path / "recall.parquet.parquet").names
    rerank(config_of(dummy_reranker_dir, str(tmp_path / "once.jsonl"), tmp_path / "recall.parquet.parquet"))


def test_a_title_alone_is_the_document(dummy_reranker_dir: Path, tmp_path: Path) -> None:
    """Beside a text it is the title of that document, which was taken for the document, and the text was not read."""
    rows = [("q", "a title", "opening hours"), ("q", "", "a password")]
    alone = "".join(f"{query}\t{text}\n" for query, _, text in rows)
    both = "".join(f"{query}\t{title}\t{text}\n" for query, title, text in rows)
    (tmp_path / "alone.tsv").write_text(f"query\ttitle\n{alone}")
    (tmp_path / "both.tsv").write_text(f"query\ttitle\ttext\n{both}")
    found = {}
    for name in ("alone", "both"):
        rerank(config_of(dummy_reranker_dir, str(tmp_path / f"{name}.tsv"), tmp_path / f"{name}.jsonl"))
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        found[name] = {row["text"]: row for row in map(json.loads, lines)}
    assert found["alone"].keys() == found["both"].keys() == {"opening hours", "a password"}
    for text, row in found["alone"].items():
        assert "title" not in row
        assert row["score"] == pytest.approx(found["both"][text]["score"], abs=1e-6)
    assert {text: row["title"] for text, row in found["both"].items()} == {
        "opening hours": "a title",
        "a password": None,
    }
