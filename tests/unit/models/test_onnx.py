"""The ONNX engine and `raytower export`: torch's vectors in float32, near ones in int8, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, DistilBertConfig, MPNetConfig, PreTrainedModel, RobertaConfig

from raytower.cli import main
from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.errors import FormatError, InputError, MissingExtraError, RaytowerError
from raytower.export import export, plan_export
from raytower.models import onnx_engine, onnx_export
from raytower.models.compute import check_compute
from raytower.models.config import ExportConfig
from raytower.models.encoder import Encoder, EncoderSettings, PoolingMode, Projection
from raytower.models.forward import ForwardEngine
from raytower.models.onnx_export import export_graph, graph_for
from raytower.storage import StorageError
from tests.support.tiny_models import build_tiny_encoder, tiny_config, tiny_tokenizer
from tests.support.warm import in_two_processes

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

# One token, unequal lengths within a batch, Chinese, and one text that is cut at 64.
TEXTS = ["a", "what is this?", "在中国", "long " * 30, "他们 ask, 我们 answer.", "no"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def least_cosine(left: NDArray[Any], right: NDArray[Any]) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(1) / norms).min())


def tiny_backbones() -> dict[str, PreTrainedModel]:
    """Positions counted from the ids (RoBERTa), relative positions (MPNet), and no token types (DistilBERT)."""
    shared = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "max_position_embeddings": 70}
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    configs = {
        "bert": tiny_config(),
        "roberta": RobertaConfig(**shared, **layers),
        "mpnet": MPNetConfig(**shared, **layers),
        "distilbert": DistilBertConfig(**shared, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    }
    return {name: AutoModel.from_config(config) for name, config in configs.items()}


class TestVectors:
    @pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert"])
    def test_a_float32_graph_gives_torchs_vectors_for_any_batch(self, kind: str) -> None:
        torch.manual_seed(0)
        encoder = Encoder(tiny_backbones()[kind], tiny_tokenizer(), EncoderSettings(max_length=64)).eval()
        exact = ForwardEngine(encoder).encode(TEXTS)
        engine = ForwardEngine(encoder, engine="onnx")
        assert list(engine.encoder.backbone.parameters()) == []
        assert least_cosine(engine.encode(TEXTS), exact) > 1 - 1e-6
        alone = np.concatenate([engine.encode([text]) for text in TEXTS])
        assert least_cosine(alone, exact) > 1 - 1e-6

    @pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken"])
    def test_pooling_projection_and_prefix_are_those_of_torch(self, pooling: PoolingMode) -> None:
        torch.manual_seed(0)
        settings = EncoderSettings(pooling=pooling, normalise=False, max_length=64, lower_case=True)
        backbone = AutoModel.from_config(tiny_config())
        encoder = Encoder(backbone, tiny_tokenizer(), settings, [Projection(32, 8)]).eval()
        exact = ForwardEngine(encoder).encode(TEXTS, "the ")
        found = ForwardEngine(encoder, engine="onnx").encode(TEXTS, "the ")
        assert found.shape == (len(TEXTS), 8)
        np.testing.assert_allclose(found, exact, atol=1e-5)

    def test_int8_is_near_and_the_same_every_time(self, dummy_encoder_dir: Path) -> None:
        exact = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(TEXTS)
        found = ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx", dtype="int8").encode(TEXTS)
        again = ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx", dtype="int8").encode(TEXTS)
        np.testing.assert_array_equal(found, again)
        assert 0.97 < least_cosine(found, exact) < 1 - 1e-6  # near, and really of 8 bits

    def test_exporting_leaves_no_dropout_behind(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        encoder = Encoder.load(dummy_encoder_dir)
        export_graph(encoder, "float32", tmp_path / "graph")
        assert not [name for name, module in encoder.named_modules() if module.training]

    def test_a_graph_that_computes_something_else_is_refused(
        self, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trace = onnx_export._trace

        def trace_another(model: Encoder, place: Path) -> None:
            trace(Encoder.load(build_tiny_encoder(tmp_path / "other", seed=7)), place)

        monkeypatch.setattr(onnx_export, "_trace", trace_another)
        with pytest.raises(
            RaytowerError, match=r"float32 graph gives vectors with a cosine of only .*engine torch"
        ):
            ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx")
        assert not list((tmp_path / "cache" / "onnx").iterdir())


def make_graph(directory: Path) -> str:
    return str(graph_for(Encoder.load(directory), "float32"))


def note_graph(rank: int, directory: Path, folder: Path) -> None:
    (folder / str(rank)).write_text(make_graph(directory))


def make_graph_of_other_weights(folder: Path) -> str:
    return make_graph(build_tiny_encoder(folder.parent.parent / "other", seed=3))


class TestCache:
    def test_a_graph_is_exported_once_and_never_into_the_models_directory(
        self, dummy_encoder_dir: Path, cache: Path
    ) -> None:
        before = sorted(dummy_encoder_dir.rglob("*"))
        first = make_graph(dummy_encoder_dir)
        assert first.startswith(str(cache))
        written = Path(first).stat().st_mtime_ns
        assert make_graph(dummy_encoder_dir) == first
        assert Path(first).stat().st_mtime_ns == written
        assert sorted(dummy_encoder_dir.rglob("*")) == before

    @pytest.mark.processes
    def test_workers_that_export_at_once_end_with_one_whole_graph(
        self, dummy_encoder_dir: Path, cache: Path, tmp_path: Path
    ) -> None:
        in_two_processes(note_graph, dummy_encoder_dir, tmp_path)
        first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
        assert first == second
        assert [path.name for path in (cache / "onnx").iterdir()] == [Path(first).parent.name]

    def test_a_graph_that_was_changed_in_the_cache_is_made_again(self, dummy_encoder_dir: Path) -> None:
        graph = Path(make_graph(dummy_encoder_dir))
        intact = graph.read_bytes()
        graph.write_bytes(Path(make_graph_of_other_weights(graph.parent.parent)).read_bytes())
        assert graph.read_bytes() != intact
        exact = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(TEXTS)
        again = ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx").encode(TEXTS)
        assert least_cosine(again, exact) > 1 - 1e-6

    def test_a_cache_that_cannot_be_written_is_named(
        self, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(StorageError, match=r"file/cache.* cannot be used"):
            make_graph(dummy_encoder_dir)

    def test_other_weights_have_another_graph(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        other = build_tiny_encoder(tmp_path / "other", seed=3)
        assert make_graph(dummy_encoder_dir) != make_graph(other)
        exact = ForwardEngine(Encoder.load(other)).encode(TEXTS)
        assert least_cosine(ForwardEngine(Encoder.load(other), engine="onnx").encode(TEXTS), exact) > 1 - 1e-6


class TestExport:
    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    def test_the_directory_is_the_encoder_with_a_graph_in_it(
        self, dtype: str, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out"
        config = make_config(
            ExportConfig, {"encoder": str(dummy_encoder_dir), "output": str(output), "graph_dtype": dtype}
        )
        assert plan_export(config)["parameters"] > 10_000
        assert not output.exists()
        figures = export(config)
        assert (output / figures["file"]).stat().st_size == figures["bytes"]
        assert figures["fingerprint"] == Encoder.load(output).fingerprint
        assert figures["least_cosine"] > (0.9999 if dtype == "float32" else 0.9)
        assert figures["least_cosine"] <= figures["mean_cosine"] <= 1
        exact = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode(TEXTS)
        assert least_cosine(SentenceTransformer(str(output), device="cpu").encode(TEXTS), exact) > 1 - 1e-6

        def refuse(*_: object) -> None:
            raise AssertionError("the directory's own graph should be used")

        monkeypatch.setattr(onnx_export, "export_graph", refuse)
        engine = ForwardEngine(Encoder.load(output), engine="onnx", dtype=dtype, directory=output)  # type: ignore[arg-type]
        assert least_cosine(engine.encode(TEXTS), exact) > (1 - 1e-6 if dtype == "float32" else 0.97)

    def test_the_graph_has_the_names_that_other_libraries_look_for(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        import onnxruntime

        export(ExportConfig(encoder=str(dummy_encoder_dir), output=str(tmp_path / "out")))
        session = onnxruntime.InferenceSession(
            tmp_path / "out" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
        (hidden,) = session.get_outputs()
        assert (hidden.name, hidden.shape) == ("last_hidden_state", ["batch", "length", 32])

    def test_a_second_run_changes_nothing_and_another_output_is_never_replaced(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        config = ExportConfig(encoder=str(dummy_encoder_dir), output=str(tmp_path / "out"))
        first = export(config)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
        second = export(config)
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
        for values in (
            {"graph_dtype": "int8"},
            {"encoder": str(build_tiny_encoder(tmp_path / "other", seed=2))},
        ):
            with pytest.raises(InputError, match=r"exists and is no .* export of this encoder"):
                export(config.model_copy(update=values))
        with pytest.raises(InputError, match="choose a new output"):
            export(config.model_copy(update={"output": str(dummy_encoder_dir)}))

    def test_a_damaged_graph_and_one_of_other_weights_are_refused(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        export(ExportConfig(encoder=str(dummy_encoder_dir), output=str(output)))
        weights = load_file(output / "model.safetensors")
        intact = (output / "model.safetensors").read_bytes()
        weights["embeddings.word_embeddings.weight"][7] += 1
        save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            FormatError, match=r"exported from weights with fingerprint .* run `raytower export` again"
        ):
            ForwardEngine(Encoder.load(output), engine="onnx", directory=output)
        (output / "model.safetensors").write_bytes(intact)
        graph = output / "onnx" / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-10])
        with pytest.raises(FormatError, match="is missing or is not the graph that was exported"):
            ForwardEngine(Encoder.load(output), engine="onnx", directory=output)

    def test_from_the_command_line(
        self, dummy_encoder_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        capfd.readouterr()
        assert main(["export", "--encoder", str(dummy_encoder_dir), "--output", str(tmp_path / "out")]) == 0
        (line,) = capfd.readouterr().out.splitlines()
        assert json.loads(line)["least_cosine"] > 0.9999


class TestRefusals:
    VALUES: ClassVar = {"encoder": "e", "input": {"path": "p"}, "output": "o"}

    @pytest.mark.parametrize(
        ("engine", "dtype", "message"),
        [
            ("torch", "int8", "set engine to onnx, or choose dtype float32 or bfloat16 or float16"),
            ("onnx", "bfloat16", "set engine to torch, or choose dtype float32 or int8"),
            ("tensorflow", "float32", "one of torch, onnx or auto"),
        ],
    )
    def test_an_engine_that_lacks_a_precision(self, engine: str, dtype: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_compute(engine, dtype)
        with pytest.raises(InputError):
            make_config(EncodeConfig, {**self.VALUES, "engine": engine, "dtype": dtype})

    def test_the_config_names_the_remedy(self) -> None:
        with pytest.raises(InputError, match="set engine to onnx"):
            make_config(EncodeConfig, {**self.VALUES, "dtype": "int8"})
        with pytest.raises(InputError, match=r"set workers.num_gpus to 0, or engine to torch"):
            make_config(EncodeConfig, {**self.VALUES, "engine": "onnx", "workers": {"num_gpus": 1}})

    def test_onnx_on_a_gpu(self, dummy_encoder_dir: Path) -> None:
        with pytest.raises(InputError, match="engine onnx computes on CPUs, not on cuda"):
            ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx", device="cuda")

    def test_a_missing_extra_names_the_install_line(
        self, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'raytower\[onnx\]'"):
            ForwardEngine(Encoder.load(dummy_encoder_dir), engine="onnx")
        with pytest.raises(MissingExtraError, match=r"pip install 'raytower\[onnx\]'"):
            export(ExportConfig(encoder=str(dummy_encoder_dir), output=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()

    def test_a_file_that_is_no_graph(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "graph.onnx").write_bytes(b"nonsense")
        with pytest.raises(FormatError, match="cannot be loaded by ONNX Runtime"):
            onnx_engine.OnnxGraph.open(tmp_path / "graph.onnx", None)
