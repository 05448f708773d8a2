"""Exporting a model's transformer as an ONNX graph, in float32 or with 8-bit matrices, and proving it against torch.

An encoder's graph maps input_ids and attention_mask (B, L) to last_hidden_state (B, L, H); pooling, projection and
normalisation stay in the encoder, so both engines share them. The graph of a reranker or classifier maps the same, and
token_type_ids where its tokenizer gives them, to logits (B, C). sentence-transformers and Optimum look for these names
in `onnx/`.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytower.errors import FormatError, RaytowerError, import_extra
from raytower.models.chunks import load_rows
from raytower.models.directory import read_info
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.models.fetching import cached_folder, sha256_of
from raytower.models.onnx_engine import OnnxGraph
from raytower.models.sequence_classifier import SequenceClassifier
from raytower.models.tokenising import tokenise
from raytower.storage import cache_dir

Model = Encoder | SequenceClassifier
GRAPH_NAMES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
GRAPH_FOLDER = "onnx"
INFO_KEY = "onnx"
# Counts up when the same weights would give another graph; older graphs in caches are then left alone.
_GRAPH_VERSION = 2
_OPSET = 17
# Protobuf cannot hold more than 2 GiB in one message; above this weights go to files beside the graph.
_ONE_FILE_BYTES = 1_800_000_000
LEAST_COSINE = {"float32": 0.9999, "int8": 0.5}
# Most that a logit may differ from torch's, as a share of the largest logit, or of 1 where that is less.
LARGEST_DIFFERENCE = {"float32": 1e-3, "int8": 0.5}
# Short and long, two languages, and of unequal length within a batch, so that padding is checked too.
_SAMPLE_TEXTS = (
    "cat",
    "How do I reset the password of my account?",
    "如何重置我的账户密码?",
    "The invoice of March was paid twice; the second payment has to be returned within fourteen days.",
    "语义检索把文本映射为向量,向量相近的文本意思也相近。",
    "Retrieval finds candidates quickly, a cross-encoder then orders them by reading query and text together. "
    * 4,
    "第一条 为了保护民事主体的合法权益,调整民事关系,维护社会和经济秩序,制定本法。" * 4,
    "x = [1, 2, 3]; print(sum(x) / len(x))  # 2.0",
)


@dataclass(frozen=True)
class _Kind:
    """What of a model goes into its graph: the attribute that holds the transformer, and what that gives."""

    body: str
    output: str

    @classmethod
    def of(cls, model: Model) -> _Kind:
        return cls("backbone", model.output_name) if isinstance(model, Encoder) else cls("model", "logits")


def body_of(model: Model) -> nn.Module:
    """The transformer of a model: torch's, or a graph in its place."""
    return cast(nn.Module, getattr(model, _Kind.of(model).body))


def put_body(model: Model, body: nn.Module) -> None:
    """Put `body` in the place of the transformer of `model`."""
    setattr(model, _Kind.of(model).body, body)


def open_graph(model: Model, dtype: str, directory: Path | None = None) -> OnnxGraph:
    """The graph of `model` (see `graph_for`), ready to take the place of its transformer."""
    return OnnxGraph.open(graph_for(model, dtype, directory), body_of(model).config)


def check_exportable(model: Model) -> None:
    """Raises RaytowerError, with the reason, where such a model has no graph."""
    if not isinstance(model, Encoder) and model.graph_refusal is not None:
        raise RaytowerError(f"{model.graph_refusal}; use engine torch")


def graph_for(model: Model, dtype: str, directory: Path | None = None) -> Path:
    """The graph of `model`: the one that `raytower export` put into `directory`, else this machine's cached one.

    A graph that is in neither place, or is not the one that was put into the cache, is exported there, whole or not at
    all; any number of workers may ask at once.

    Raises:
        MissingExtraError: the extra [onnx] is not installed.
        FormatError: the directory's graph is damaged, or belongs to other weights.
        RaytowerError: the exported graph does not compute what the model does.
    """
    check_exportable(model)
    import_extra("onnxruntime")
    recorded = None if directory is None else _recorded_graph(directory, model, dtype)
    if recorded is not None:
        return recorded
    folder = cache_dir() / GRAPH_FOLDER / f"{model.fingerprint}-{dtype}-{_GRAPH_VERSION}"
    cached_folder(folder, lambda beside: export_graph(model, dtype, beside))
    return folder / GRAPH_NAMES[dtype]


def export_graph(model: Model, dtype: str, folder: Path) -> dict[str, float]:
    """Write the graph of a torch model in float32 into `folder`; returns what `compare_with_torch` finds.

    Raises:
        MissingExtraError: the extra [onnx] is not installed.
        RaytowerError: the graph cannot be made, or what it gives is too far from torch's (`LEAST_COSINE`,
            `LARGEST_DIFFERENCE`).
    """
    check_exportable(model)
    for name in ("onnx", "onnxruntime"):
        import_extra(name)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / GRAPH_NAMES[dtype]
    if dtype == "float32":
        _trace(model, place)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            exact = Path(name) / GRAPH_NAMES["float32"]
            _trace(model, exact)
            _quantise(exact, place)
    found = compare_with_torch(model, place)
    if isinstance(model, Encoder):
        is_near = found["least_cosine"] >= LEAST_COSINE[dtype]
        said = f"vectors with a cosine of only {found['least_cosine']:.4f} to torch's (at least {LEAST_COSINE[dtype]})"
    else:
        most = LARGEST_DIFFERENCE[dtype] * max(1.0, found["largest_logit"])
        is_near = found["largest_difference"] <= most
        said = (
            f"logits that differ from torch's by up to {found['largest_difference']:.4f} (at most {most:.4f})"
        )
    if not is_near:  # NaN is no more near than a large difference
        raise RaytowerError(f"the {dtype} graph gives {said}; use engine torch for this model")
    return found


def compare_with_torch(model: Model, graph: Path) -> dict[str, float]:
    """How near what a graph gives is to torch's, over built-in texts in two padded batches.

    Returns:
        Of an encoder `least_cosine` and `mean_cosine` of its vectors. Of a reranker or classifier
        `largest_difference` and `mean_difference` of its logits, and `largest_logit`, by torch, for their scale.
    """
    exact = _results(model)
    body = body_of(model)
    put_body(model, OnnxGraph.open(graph, body.config))
    try:
        found = _results(model)
    finally:
        put_body(model, body)
    if isinstance(model, Encoder):
        norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(found, axis=1)
        cosine_N = (exact * found).sum(1) / norms
        figures = {"least_cosine": cosine_N.min(), "mean_cosine": cosine_N.mean()}
    else:
        apart_NC = np.abs(exact - found)
        figures = {
            "largest_difference": apart_NC.max(),
            "mean_difference": apart_NC.mean(),
            "largest_logit": np.abs(exact).max(),
        }
    return {name: round(float(value), 6) for name, value in figures.items()}


def _recorded_graph(directory: Path, model: Model, dtype: str) -> Path | None:
    info = read_encoder_info(directory) if isinstance(model, Encoder) else read_info(directory)
    record = info.get(INFO_KEY, {}).get(dtype)
    if record is None:
        return None
    if info.get("fingerprint") != model.fingerprint:
        found = info.get("fingerprint", "by an older formula, which left config.json out")[:48]
        raise FormatError(
            f"the {dtype} graph in {str(directory)!r} was exported from weights with fingerprint {found}, these have "
            f"{model.fingerprint}; run `raytower export` again"
        )
    for name, sha256 in record["files"].items():
        place = directory / GRAPH_FOLDER / name
        if not place.is_file() or sha256_of(place) != sha256:
            raise FormatError(
                f"{str(place)!r} is missing or is not the graph that was exported; run `raytower export` again"
            )
    return directory / GRAPH_FOLDER / GRAPH_NAMES[dtype]


class _Body(nn.Module):
    """The part of a model that goes into the graph: its inputs by position, and one tensor out."""

    def __init__(self, body: nn.Module, names: list[str], output: str) -> None:
        super().__init__()
        self.body = body
        self._names = names
        self._output = output

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.body(**dict(zip(self._names, inputs, strict=True)))
        return cast(Tensor, getattr(found, self._output))


def _trace(model: Model, place: Path) -> None:
    kind, body = _Kind.of(model), body_of(model)
    inputs = _example_inputs(model)
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    axes[kind.output] = {0: "batch", 1: "length"} if kind.output == "last_hidden_state" else {0: "batch"}
    # The exporter gives the wrapped modules the wrapper's mode afterwards: dropout would be on without a word.
    module = _Body(body, list(inputs), kind.output).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # dynamo=False: needs no onnxscript, is five times as fast, and its graph ran faster (2.13, MiniLM).
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(place),
                dynamo=False,
                opset_version=_OPSET,
                input_names=list(inputs),
                output_names=[kind.output],
                dynamic_axes=axes,
            )
    except Exception as error:
        name = getattr(body.config, "model_type", "this")
        raise RaytowerError(
            f"a model of type {name!r} cannot be exported to ONNX: {error}; use engine torch"
        ) from error


def _example_inputs(model: Model) -> dict[str, Tensor]:
    """Two rows (2, L) as the model's tokenizer gives them, one of them filled up where `max_length` leaves room."""
    rows = _padded(model, _SAMPLE_TEXTS[:2])
    rows.setdefault("attention_mask", torch.ones_like(rows["input_ids"]))
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: rows[name] for name in names if name in rows}


def _padded(model: Model, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts, or each with another one where the model reads pairs, as one batch."""
    length = min(model.max_length, model.max_positions)
    if isinstance(model, Encoder):
        block = tokenise(model.tokenizer, [model.prepared(texts)], length)
    else:
        block = model.tokenise([texts, texts[::-1]] if model.reads_pairs else [texts], length)
    return load_rows(block, np.arange(len(texts)), model.padding, torch.device("cpu"))


def _quantise(source: Path, place: Path) -> None:
    """Matrices to 8 bits, one scale a column; activations are quantised as they come.

    With one scale for a whole matrix the least cosine of MiniLM was 0.93, with one a column 0.99. Embedding tables stay
    float32: quantised they save disk and cost speed. The reduced range cannot overflow the 16-bit sums of processors
    without VNNI, so that all nodes of a cluster compute the same vectors.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = sum(path.stat().st_size for path in source.parent.iterdir())
    with _without_preprocessing_hint():
        quantize_dynamic(
            source,
            place,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=size > _ONE_FILE_BYTES,
        )


@contextmanager
def _without_preprocessing_hint() -> Iterator[None]:
    """ONNX Runtime tells the root logger to fold constants first; the exporter has done that."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


@torch.inference_mode()
def _results(model: Model) -> NDArray[np.float64]:
    """What a model gives for the built-in texts, in two batches: vectors (N, D) or logits (N, C)."""
    batches = [_padded(model, _SAMPLE_TEXTS[start::2]) for start in (0, 1)]
    compute = model if isinstance(model, Encoder) else model.logits
    return np.asarray(torch.cat([compute(**batch) for batch in batches]).double())
