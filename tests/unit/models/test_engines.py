"""Rerankers and classifiers by ONNX Runtime, engine auto, and what export makes of each kind of model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from transformers import BertForSequenceClassification

from raytower.config import make_config
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.export import export, plan_export
from raytower.models import engine_choice, onnx_export
from raytower.models.config import ExportConfig
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.engine_choice import race
from raytower.models.forward import ForwardEngine
from raytower.models.logits_engine import LogitsEngine
from raytower.models.onnx_engine import OnnxGraph
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.retrieval.config import SearchConfig
from tests.support.tiny_models import build_tiny_encoder, build_tiny_reranker, tiny_config, tiny_tokenizer

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

QUERIES = ["a", "what is this?", "在中国", "long " * 30, "no"]
DOCUMENTS = ["it is a cat", "no", "他们 ask, 我们 answer.", "b", "very " * 30]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTOWER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each kind."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    names = {0: "A##B", 1: "A##C", 2: "D"}
    config = tiny_config(id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=0.2)
    TextClassifier(BertForSequenceClassification(config), tiny_tokenizer(), max_length=64).eval().save(
        root / "classifier"
    )
    return {
        "encoder": build_tiny_encoder(root / "encoder"),
        "reranker": build_tiny_reranker(root / "reranker"),
        "two logits": build_tiny_reranker(root / "two", seed=1, num_labels=2),
        "classifier": root / "classifier",
    }


def scores(folder: Path, **settings: Any) -> Any:
    return CrossScorer(CrossEncoder.load(folder), **settings).score(QUERIES, DOCUMENTS)


class TestLogits:
    @pytest.mark.parametrize("kind", ["reranker", "two logits"])
    def test_a_float32_graph_gives_torchs_logits_for_any_batch(
        self, kind: str, folders: dict[str, Path]
    ) -> None:
        exact = scores(folders[kind])
        engine = CrossScorer(CrossEncoder.load(folders[kind]), engine="onnx")
        assert isinstance(engine.model.model, OnnxGraph)
        assert list(engine.model.parameters()) == []
        np.testing.assert_allclose(engine.score(QUERIES, DOCUMENTS), exact, atol=1e-5)
        alone = [engine.score([query], [text])[0] for query, text in zip(QUERIES, DOCUMENTS, strict=True)]
        np.testing.assert_allclose(alone, exact, atol=1e-5)
        assert np.ptp(exact) > 0.1

    def test_a_classifier_gives_the_same_probabilities(self, folders: dict[str, Path]) -> None:
        by_torch = ClassifierEngine(TextClassifier.load(folders["classifier"]))
        by_onnx = ClassifierEngine(TextClassifier.load(folders["classifier"]), engine="onnx")
        assert by_onnx.labels == ("A##B", "A##C", "D")
        assert by_onnx.fingerprint == by_torch.fingerprint
        np.testing.assert_allclose(by_onnx.probabilities(QUERIES), by_torch.probabilities(QUERIES), atol=1e-6)

    def test_int8_is_near(self, folders: dict[str, Path]) -> None:
        exact, found = scores(folders["reranker"]), scores(folders["reranker"], engine="onnx", dtype="int8")
        assert 1e-5 < np.abs(found - exact).max() < 0.2 * np.abs(exact).max()


class TestAuto:
    @pytest.mark.parametrize(("torch_seconds", "onnx_seconds"), [(3.0, 2.0), (2.0, 3.0)])
    @pytest.mark.parametrize("kind", ["encoder", "reranker", "classifier"])
    def test_the_faster_one_is_taken_by_the_clock(
        self,
        kind: str,
        torch_seconds: float,
        onnx_seconds: float,
        folders: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        now = 0.0
        load: dict[str, Callable[..., Any]] = {
            "encoder": lambda **more: ForwardEngine(Encoder.load(folders[kind]), **more),
            "reranker": lambda **more: CrossScorer(CrossEncoder.load(folders[kind]), **more),
            "classifier": lambda **more: ClassifierEngine(TextClassifier.load(folders[kind]), **more),
        }

        def tick(self: Any) -> None:
            nonlocal now
            body = self.encoder.backbone if kind == "encoder" else self.model.model
            now += onnx_seconds if isinstance(body, OnnxGraph) else torch_seconds

        monkeypatch.setattr(ForwardEngine, "_race", tick)
        monkeypatch.setattr(LogitsEngine, "_race", tick)
        monkeypatch.setattr(engine_choice.time, "perf_counter", lambda: now)
        engine = load[kind](engine="auto")
        faster = "onnx" if onnx_seconds < torch_seconds else "torch"
        assert engine.settled.engine == faster
        body = engine.encoder.backbone if kind == "encoder" else engine.model.model
        assert isinstance(body, OnnxGraph) == (faster == "onnx")
        said = capsys.readouterr().err
        times = f"torch {torch_seconds * 1000:.1f} ms, onnx {onnx_seconds * 1000:.1f} ms"
        assert said == f"engine auto takes {faster}: the faster on a few texts: {times}\n"

    def test_the_least_time_of_several_rounds_counts_and_the_first_run_does_not(self) -> None:
        now, ran = 0.0, []

        def way(name: str, seconds: list[float]) -> Callable[[], None]:
            def run() -> None:
                nonlocal now
                ran.append(name)
                now += seconds.pop(0)

            return run

        slow_at_first, steady = [50.0, 4.0, 1.0, 4.0], [0.0, 2.0, 2.0, 2.0]
        found = race({"torch": way("torch", slow_at_first), "onnx": way("onnx", steady)}, lambda: now)
        assert found == {"torch": 1.0, "onnx": 2.0}
        assert ran == ["torch", "onnx"] * 4

    def test_a_real_race_leaves_the_same_vectors(self, folders: dict[str, Path]) -> None:
        exact = ForwardEngine(Encoder.load(folders["encoder"])).encode(QUERIES)
        engine = ForwardEngine(Encoder.load(folders["encoder"]), engine="auto")
        assert engine.settled.engine in ("torch", "onnx")
        np.testing.assert_allclose(engine.encode(QUERIES), exact, atol=1e-5)

    def test_torch_without_onnx_runtime_and_where_no_graph_can_be_made(
        self,
        folders: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        exact = scores(folders["reranker"])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", None)
            np.testing.assert_array_equal(scores(folders["reranker"], engine="auto"), exact)
        assert "engine auto takes torch: no ONNX: ONNX, which engine onnx" in capsys.readouterr().err

        def fail(*_: Any) -> None:
            raise RaytowerError("a model of type 'odd' cannot be exported")

        monkeypatch.setattr(onnx_export, "graph_for", fail)
        np.testing.assert_array_equal(scores(folders["reranker"], engine="auto"), exact)
        assert "takes torch: no ONNX: a model of type 'odd'" in capsys.readouterr().err

    def test_a_precision_of_one_engine_alone_needs_no_race(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_choice, "race", lambda *_: pytest.fail("there is nothing to choose"))
        for dtype, engine in (("int8", "onnx"), ("bfloat16", "torch")):
            model = CrossEncoder.load(folders["reranker"])
            assert CrossScorer(model, engine="auto", dtype=dtype).settled.engine == engine  # type: ignore[arg-type]


class TestExport:
    @pytest.mark.parametrize("kind", ["reranker", "two logits", "classifier"])
    def test_the_directory_is_the_model_with_its_graph(
        self, kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = "classifier" if kind == "classifier" else "reranker"
        config = make_config(ExportConfig, {key: str(folders[kind]), "output": str(tmp_path / "out")})
        assert plan_export(config)["parameters"] > 10_000
        figures = export(config)
        assert figures["kind"] == key
        assert figures["largest_difference"] < 1e-4
        assert figures["largest_logit"] > 0.1
        assert (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size == figures["bytes"]
        monkeypatch.setattr(onnx_export, "export_graph", lambda *_: pytest.fail("it has a graph"))
        if key == "classifier":
            exact = ClassifierEngine(TextClassifier.load(folders[kind])).probabilities(QUERIES)
            model = TextClassifier.load(tmp_path / "out")
            engine = ClassifierEngine(model, engine="onnx", directory=tmp_path / "out")
            np.testing.assert_allclose(engine.probabilities(QUERIES), exact, atol=1e-6)
        else:
            found = scores(tmp_path / "out", engine="onnx", directory=tmp_path / "out")
            np.testing.assert_allclose(found, scores(folders[kind]), atol=1e-5)
        assert {**export(config), "seconds": 0} == {**figures, "seconds": 0}

    def test_the_peer_library_scores_the_copy_alike(self, folders: dict[str, Path], tmp_path: Path) -> None:
        export(ExportConfig(reranker=str(folders["reranker"]), output=str(tmp_path / "out")))
        pairs = list(zip(QUERIES, DOCUMENTS, strict=True))
        before, after = (
            PeerCrossEncoder(str(folder), device="cpu").predict(pairs)
            for folder in (folders["reranker"], tmp_path / "out")
        )
        np.testing.assert_array_equal(before, after)

    @pytest.mark.parametrize(
        ("key", "kind", "message"),
        [
            ("encoder", "reranker", "is a reranker .BertForSequenceClassification.: it is no encoder"),
            ("encoder", "classifier", "it is no encoder, and as one it would lose its head"),
            ("reranker", "encoder", "it is no reranker"),
            ("reranker", "classifier", "is a classifier .BertForSequenceClassification.: it is no reranker"),
            ("classifier", "encoder", "it is no classifier"),
            ("classifier", "reranker", "is a reranker .BertForSequenceClassification.: it is no classifier"),
        ],
    )
    def test_the_wrong_class_is_refused(
        self, key: str, kind: str, message: str, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        config = make_config(ExportConfig, {key: str(folders[kind]), "output": str(tmp_path / "out")})
        for command in (export, plan_export):
            with pytest.raises(FormatError, match=message):
                command(config)
        assert not (tmp_path / "out").exists()

    def test_an_encoder_may_still_be_trained_from_a_reranker(self, folders: dict[str, Path]) -> None:
        assert Encoder.load(folders["reranker"], from_classifier=True).dim == 32

    @pytest.mark.parametrize("values", [{}, {"encoder": "a", "reranker": "b"}])
    def test_exactly_one_model_is_named(self, values: dict[str, str]) -> None:
        with pytest.raises(InputError, match="exactly one of encoder, reranker, classifier"):
            make_config(ExportConfig, {**values, "output": "o"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "onnx", "dtype": "bfloat16"}, "set engine to torch"),
        ({"dtype": "int8"}, "set engine to onnx"),
    ],
)
def test_a_config_refuses_a_precision_that_its_engine_lacks(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(SearchConfig, {"index": "i", "query": "q", **values})
