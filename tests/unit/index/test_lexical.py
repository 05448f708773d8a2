"""Lexical search of an index against bm25s, through builds, additions, replacements and deletions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import pytest

from raytower.errors import FormatError, InputError
from raytower.index.build import plan_build
from raytower.index.change import add_to_index, delete_from_index, set_in_index
from raytower.index.change_config import (
    IndexAddConfig,
    IndexDeleteConfig,
    IndexGcConfig,
    IndexRollbackConfig,
    IndexSetConfig,
    IndexVerifyConfig,
)
from raytower.index.collect import collect_garbage
from raytower.index.compact import compact_index, plan_compact
from raytower.index.config import IndexBuildConfig, IndexCompactConfig, TokensConfig
from raytower.index.manage import index_rollback, index_verify
from raytower.index.reader import Index
from raytower.index.tokens import tokens
from raytower.index.versions import open_manifest
from tests.support.index_cases import HERE, build, unit_vectors, write_embeddings

_SYLLABLES = "怎么开通微粒贷借呗还款逾期手机银行卡密码忘记转账额度提高利息计算方法时间地址"


def random_texts(count: int, seed: int) -> list[str]:
    """Questions of 3 to 18 characters, common ones more often, and some words and numbers."""
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(1, len(_SYLLABLES) + 1)
    texts = []
    for _ in range(count):
        drawn = random.choice(list(_SYLLABLES), random.integers(3, 19), p=odds / odds.sum())
        word = random.choice(["", "", "app ", "VIP-3 ", "iPhone15"])
        texts.append(word + "".join(drawn))
    return texts


def oracle(texts: Sequence[str], query: str, settings: TokensConfig | None = None) -> np.ndarray:
    """The scores (texts,) of bm25s, each token of the query as often as it stands there."""
    settings = settings or TokensConfig()
    corpus = [tokens(text, settings) for text in texts]
    known = set().union(*corpus)
    model = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    model.index(corpus, show_progress=False)
    scores = np.zeros(len(texts))
    for word in tokens(query, settings):
        if word in known:
            scores += model.get_scores([word])
    return scores


def check(index: Index, documents: dict[str, str], queries: Sequence[str], k: int = 10) -> None:
    """The hits are bm25s's best k but for ties, with its scores; so are the scores of given rows."""
    names, texts = list(documents), list(documents.values())
    hits = index.search_lexical(queries, k)
    everything = index.table.row_map.rows()
    ids = [document.id for document in index.documents(everything)]
    for number, query in enumerate(queries):
        expected = dict(zip(names, oracle(texts, query), strict=True))
        found = [document.id for document in index.documents(hits.rows[number])]
        scores = hits.scores[number][: len(found)]
        best = np.sort([score for score in expected.values() if score > 0])[::-1][:k]
        np.testing.assert_allclose(scores, best, rtol=2e-6)
        np.testing.assert_allclose(scores, [expected[name] for name in found], rtol=2e-6)
        assert len(set(found)) == len(found)
        given = index.lexical_scores([query], [everything])[0]
        np.testing.assert_allclose(given, [expected[name] for name in ids], rtol=2e-6, atol=1e-6)


def embedded(folder: Path, documents: dict[str, str], **columns: Any) -> str:
    vectors = unit_vectors(len(documents), seed=len(documents))
    return write_embeddings(folder, list(documents), vectors, list(documents.values()), columns)


def numbered(texts: Sequence[str], first: int = 0) -> dict[str, str]:
    return {f"d{first + number}": text for number, text in enumerate(texts)}


QUERIES = ["微粒贷怎么开通", "借呗借呗逾期", "iphone 15 手机密码", "vip-3", "的", "额度"]


def test_scores_are_those_of_bm25s_and_the_best_are_found(tmp_path: Path) -> None:
    documents = numbered(random_texts(1_500, 0))
    build(tmp_path / "index", embedded(tmp_path / "e", documents))
    check(Index.open(str(tmp_path / "index")), documents, [*QUERIES, *random_texts(20, 1)])


def test_a_score_by_hand(tmp_path: Path) -> None:
    build(tmp_path / "index", embedded(tmp_path / "e", {"a": "red red", "b": "red blue green", "c": "blue"}))
    index = Index.open(str(tmp_path / "index"))
    # 3 documents of 2 tokens on average; red is in 2 of them: ln(1 + 1.5 / 2.5). In a it occurs twice in 2 tokens.
    inverse = np.log(1.6)
    hits = index.search_lexical(["Red!", "red red"], 3)
    a, b = inverse * 2 / (2 + 1.2), inverse * 1 / (1 + 1.2 * (0.25 + 0.75 * 3 / 2))
    np.testing.assert_allclose(hits.scores, [[a, b], [2 * a, 2 * b]], rtol=1e-6)
    assert hits.rows.tolist() == [[0, 1], [0, 1]]


def test_candidates_are_taken_by_what_repeats_in_the_query(tmp_path: Path) -> None:
    """Once each, x outweighs y, and the candidates would all hold x."""
    texts = ["x"] * 60 + ["y"] * 70
    build(tmp_path / "index", embedded(tmp_path / "e", numbered(texts)))
    hits = Index.open(str(tmp_path / "index")).search_lexical(["x y y y", "x y"], 10)
    assert (hits.rows[0] >= 60).all()
    assert (hits.rows[1] < 60).all()


def test_changes_are_in_force_at_once(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    documents = numbered(random_texts(800, 2))
    build(place, embedded(tmp_path / "e", documents))
    queries = [*QUERIES, *random_texts(6, 3)]

    added = numbered(random_texts(300, 4), 800) | numbered(random_texts(100, 5), 100)
    embeddings = embedded(tmp_path / "more", added)
    add_to_index(IndexAddConfig(index=place, embeddings=embeddings, upsert=True))
    documents |= added
    check(Index.open(place), documents, queries)

    gone = [f"d{number}" for number in range(150, 600)]
    delete_from_index(IndexDeleteConfig(index=place, ids=gone))
    documents = {name: text for name, text in documents.items() if name not in gone}
    check(Index.open(place), documents, queries)

    one = {"d5": "全新的一句话 ZX-81"}
    add_to_index(IndexAddConfig(index=place, embeddings=embedded(tmp_path / "one", one), upsert=True))
    documents |= one
    check(Index.open(place), documents, [*queries, "zx 81", "ZX-81"])

    compact_index(IndexCompactConfig(index=place), run=HERE)
    check(Index.open(place), documents, queries)
    index_rollback(IndexRollbackConfig(index=place, to="000002"))
    collect_garbage(IndexGcConfig(index=place, keep=1, unfinished=True))
    index_verify(IndexVerifyConfig(index=place))
    rolled = numbered(random_texts(800, 2)) | added
    check(Index.open(place), rolled, queries)


def test_many_small_changes_add_up(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    documents = numbered(random_texts(60, 6))
    build(place, embedded(tmp_path / "e", documents))
    for number in range(20):
        more = {f"d{number * 5}": f"第{number}次 changed", f"n{number}": f"新的 number {number}"}
        add_to_index(
            IndexAddConfig(index=place, embeddings=embedded(tmp_path / f"e{number}", more), upsert=True)
        )
        documents |= more
    lexical = open_manifest(place).lexical
    assert lexical is not None
    assert len(lexical.counts) < 17
    check(Index.open(place), documents, ["changed number 7", *QUERIES])


def test_filters_and_values_that_are_set(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    documents = numbered(random_texts(400, 7))
    years = pa.array([2000 + number % 20 for number in range(400)])
    build(place, embedded(tmp_path / "e", documents, year=years), indexed=["year"])
    set_in_index(IndexSetConfig(index=place, values={"year": 1990}, filter={"year": {"$lt": 2002}}))
    index = Index.open(place)
    check(index, documents, QUERIES[:3])
    query = random_texts(1, 8)[0]
    scores = oracle(list(documents.values()), query)
    kept = [number for number in range(400) if number % 20 < 2 and scores[number] > 0]
    hits = index.search_lexical([query], 10, filter={"year": 1990})
    np.testing.assert_allclose(hits.scores[0], np.sort(scores[kept])[::-1][:10], rtol=2e-6)
    assert set(hits.rows[0].tolist()) <= {int(document.id[1:]) for document in index.documents(hits.rows[0])}
    with pytest.raises(InputError, match="no column 'colour'"):
        index.search_lexical([query], 10, filter={"colour": 1})


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("ab-1234/5", "part"),
        ("AB 1234", "part"),
        ("0x80070005", "error"),
        ("err conn", "error"),
        ("GB/T19001-2016", "norm"),
        ("19001", "norm"),
        ("民法典 1165", "law"),
        ("第1165条", "law"),
        ("iphone 15", "phone"),
        ("手机壳", "phone"),
        ("abc123", "wide"),
        ("ＡＢＣ", "wide"),
    ],
)
def test_codes_are_found_by_their_whole_and_by_their_parts(query: str, wanted: str, codes: Index) -> None:
    hits = codes.search_lexical([query], 3)
    assert codes.documents(hits.rows[0])[0].id == wanted


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("codes")
    documents = {
        "part": "密封圈 AB-1234/5 库存",
        "other": "密封圈 AB-9234/6 库存",
        "error": "连接失败 ERR_CONN_0x80070005 怎么办",
        "norm": "质量管理体系 GB/T 19001-2016 要求",
        "old": "质量管理体系 GB/T 24001-2008 要求",
        "law": "《民法典》第1165条 过错责任",
        "next": "《民法通则》第1166条 无过错责任",
        "phone": "iPhone15手机壳 透明",
        "wide": "型号ＡＢＣ１２３的说明书",
    }
    build(folder / "index", embedded(folder / "e", documents))
    return Index.open(str(folder / "index"))


def test_queries_without_tokens_have_no_hits(codes: Index) -> None:
    hits = codes.search_lexical(["?!", "", "密封圈", "ꭶꮼ"], 5)
    assert [(row >= 0).sum() for row in hits.rows] == [0, 0, 2, 0]
    assert codes.search_lexical(["?!"], 5).rows.shape == (1, 0)
    assert codes.search_lexical([], 5).rows.shape == (0, 0)
    rows = np.array([0, 1])
    np.testing.assert_array_equal(codes.lexical_scores(["?!", "民"], [rows, rows[:0]])[0], [0, 0])
    with pytest.raises(InputError, match="k is 0"):
        codes.search_lexical(["密"], 0)
    with pytest.raises(FormatError, match="holds no row 99"):
        codes.lexical_scores(["密"], [np.array([99])])


def test_texts_without_tokens_a_strange_script_and_a_very_long_text(tmp_path: Path) -> None:
    documents = {
        "none": "?!",
        "strange": "ꦧꦱ ꦗꦮ",
        "long": "很长的话 long story " * 20_000,
        "thai": "ภาษาไทย",
        "z": "ꦧꦱ",
    }
    build(tmp_path / "index", embedded(tmp_path / "e", documents))
    check(Index.open(str(tmp_path / "index")), documents, ["ꦧꦱ", "长话 story", "ไทย", "?"])


def test_an_index_without_tokens_at_all(tmp_path: Path) -> None:
    build(tmp_path / "index", embedded(tmp_path / "e", {"a": "?", "b": "!"}))
    assert Index.open(str(tmp_path / "index")).search_lexical(["?", "word"], 5).rows.shape == (2, 0)


def test_an_index_without_a_lexical_side_names_the_remedy_and_gets_one(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    documents = numbered(random_texts(200, 9))
    build(place, embedded(tmp_path / "e", documents), lexical=False)
    with pytest.raises(InputError, match=r"no lexical side.*index compact --lexical true"):
        Index.open(place).search_lexical(["借"], 5)
    before = open_manifest(place)
    assert before.lexical is None
    config = IndexCompactConfig(index=place, lexical=True)
    assert plan_compact(config) == {"parent": "000001", "compacted": False, "lexical": True}
    compact_index(config, run=HERE)
    after = open_manifest(place)
    assert after.shards == before.shards
    check(Index.open(place), documents, QUERIES)
    more = {"new": "connected 借呗"}
    add_to_index(IndexAddConfig(index=place, embeddings=embedded(tmp_path / "more", more)))
    check(Index.open(place), documents | more, QUERIES)

    compact_index(IndexCompactConfig(index=place, tokens=TokensConfig(stemmer="english")), run=HERE)
    hits = Index.open(place).search_lexical(["connections"], 5)
    assert hits.rows.shape == (1, 1)
    compact_index(IndexCompactConfig(index=place, lexical=False), run=HERE)
    assert open_manifest(place).lexical is None
    assert not Index.open(place).table.has_tokens


def test_the_tokens_of_a_version_are_those_of_its_queries(tmp_path: Path) -> None:
    place, documents = str(tmp_path / "index"), {"a": "connected lines", "b": "a table"}
    build(place, embedded(tmp_path / "e", documents), tokens={"stemmer": "english"})
    add_to_index(IndexAddConfig(index=place, embeddings=embedded(tmp_path / "f", {"c": "connecting"})))
    hits = Index.open(place).search_lexical(["connection"], 5)
    assert sorted(hits.rows[0].tolist()) == [0, 2]


def test_a_version_from_before_opens_and_a_build_from_before_is_known(tmp_path: Path) -> None:
    place, embeddings = tmp_path / "index", embedded(tmp_path / "e", {"a": "x", "b": "y"})
    build(place, embeddings, lexical=False)
    path = place / "versions" / "000001.json"
    text = path.read_text(encoding="utf-8").replace(',\n "lexical": null', "")
    assert "lexical" not in text
    path.write_text(text, encoding="utf-8")
    assert Index.open(str(place)).num_rows == 2


def test_a_damaged_file_of_counts_is_told(tmp_path: Path) -> None:
    place = tmp_path / "index"
    build(place, embedded(tmp_path / "e", {"a": "x", "b": "y"}))
    (file,) = (place / "lexical").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FormatError, match="bytes, the version says"):
        Index.open(str(place))


def test_the_plan_says_what_the_lexical_side_takes(tmp_path: Path) -> None:
    embeddings = embedded(tmp_path / "e", numbered(random_texts(300, 10)))
    values = {"embeddings": embeddings, "output": str(tmp_path / "index")}
    with_it = plan_build(IndexBuildConfig(**values))
    without = plan_build(IndexBuildConfig(**values, lexical=False))
    assert without["predicted_lexical_bytes"] == 0
    more = with_it["predicted_disk_bytes"] - without["predicted_disk_bytes"]
    assert more == with_it["predicted_lexical_bytes"] > 0


def test_long_queries_and_huge_k_are_bounded(tmp_path: Path) -> None:
    """A passage as a query asks the inverted index for the terms that weigh most; its scores are of all of them."""
    texts = [" ".join(f"t{n}x{m}" for m in range(200)) + " common" for n in range(6)]
    build(tmp_path / "i", embedded(tmp_path / "e", numbered(texts)), lexical=True)
    index = Index.open(str(tmp_path / "i"))
    asked: list[int] = []
    real = index.table.best_matches
    index.table.best_matches = lambda words, *rest: asked.append(len(words)) or real(words, *rest)  # type: ignore[method-assign,func-returns-value]
    hits = index.search_lexical([texts[3] + " " + texts[3]], 2**62)
    assert max(asked) <= 128 * 4
    assert hits.rows[0, 0] == 3
    np.testing.assert_allclose(hits.scores[0, 0], oracle(texts, texts[3] + " " + texts[3])[3], rtol=1e-5)
