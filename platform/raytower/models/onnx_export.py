"""Exporting a backbone as an ONNX graph, in float32 or with 8-bit matrices, and proving it against torch.

The graph maps input_ids and attention_mask (B, L) to last_hidden_state (B, L, H), which is what sentence-transformers
and Optimum look for in `onnx/`; pooling, projection and normalisation stay in the encoder, so both engines share them.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raytower.errors import FormatError, RaytowerError, import_extra
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.models.fetching import is_intact, keep, sha256_of
from raytower.models.onnx_engine import OnnxBackbone
from raytower.storage import cache_dir, locked

GRAPH_NAMES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
GRAPH_FOLDER = "onnx"
INFO_KEY = "onnx"
# Counts up when the same weights would give another graph; older graphs in caches are then left alone.
_GRAPH_VERSION = 2
_OPSET = 17
# Protobuf cannot hold more than 2 GiB in one message; above this weights go to files beside the graph.
_ONE_FILE_BYTES = 1_800_000_000
LEAST_COSINE = {"float32": 0.9999, "int8": 0.5}
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


def use_onnx(encoder: Encoder, dtype: str, directory: Path | None = None) -> None:
    """Put the graph of `encoder` (see `graph_for`) in the place of its backbone, whose weights are let go."""
    graph = graph_for(encoder, dtype, directory)
    encoder.backbone = OnnxBackbone.open(graph, encoder.backbone.config)  # type: ignore[assignment]


def graph_for(encoder: Encoder, dtype: str, directory: Path | None = None) -> Path:
    """The graph of `encoder`: the one that `raytower export` put into `directory`, else this machine's cached one.

    A graph that is in neither place, or is not the one that was put into the cache, is exported there, whole or not at
    all; any number of workers may ask at once.

    Raises:
        MissingExtraError: the extra [onnx] is not installed.
        FormatError: the directory's graph is damaged, or belongs to other weights.
        RaytowerError: the exported graph does not compute what the backbone does.
    """
    import_extra("onnxruntime")
    recorded = None if directory is None else _recorded_graph(directory, encoder, dtype)
    if recorded is not None:
        return recorded
    folder = cache_dir() / GRAPH_FOLDER / f"{encoder.fingerprint}-{dtype}-{_GRAPH_VERSION}"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not is_intact(folder):
            beside = folder.with_name(f".{folder.name}.tmp")  # one at a time: the lock is ours
            shutil.rmtree(beside, ignore_errors=True)
            try:
                export_graph(encoder, dtype, beside)
                keep(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder / GRAPH_NAMES[dtype]


def export_graph(encoder: Encoder, dtype: str, folder: Path) -> dict[str, float]:
    """Write the graph of a torch encoder in float32 into `folder`; returns least_cosine and mean_cosine to torch.

    Raises:
        MissingExtraError: the extra [onnx] is not installed.
        RaytowerError: the graph cannot be made, or its vectors are too far from torch's (`LEAST_COSINE`).
    """
    for name in ("onnx", "onnxruntime"):
        import_extra(name)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / GRAPH_NAMES[dtype]
    if dtype == "float32":
        _trace(encoder, place)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            exact = Path(name) / GRAPH_NAMES["float32"]
            _trace(encoder, exact)
            _quantise(exact, place)
    found = compare_with_torch(encoder, place)
    if not found["least_cosine"] >= LEAST_COSINE[dtype]:
        raise RaytowerError(
            f"the {dtype} graph gives vectors with a cosine of only {found['least_cosine']:.4f} to torch's (at least "
            f"{LEAST_COSINE[dtype]}); use engine torch for this model"
        )
    return found


def compare_with_torch(encoder: Encoder, graph: Path) -> dict[str, float]:
    """Least and mean cosine between torch's vectors and the graph's, over built-in texts in two padded batches."""
    backbone = OnnxBackbone.open(graph, encoder.backbone.config)
    other = Encoder(backbone, encoder.tokenizer, encoder.settings, list(encoder.projections), encoder.prompts)  # type: ignore[arg-type]
    cosines = []
    for texts in (_SAMPLE_TEXTS[::2], _SAMPLE_TEXTS[1::2]):
        exact_BD, vector_BD = _vectors(encoder, texts), _vectors(other, texts)
        norms = np.linalg.norm(exact_BD, axis=1) * np.linalg.norm(vector_BD, axis=1)
        cosines.append((exact_BD * vector_BD).sum(1) / norms)
    cosine_N = np.concatenate(cosines)
    return {
        "least_cosine": round(float(cosine_N.min()), 6),
        "mean_cosine": round(float(cosine_N.mean()), 6),
    }


def _recorded_graph(directory: Path, encoder: Encoder, dtype: str) -> Path | None:
    info = read_encoder_info(directory)
    record = info.get(INFO_KEY, {}).get(dtype)
    if record is None:
        return None
    if info.get("fingerprint") != encoder.fingerprint:
        found = info.get("fingerprint", "by an older formula, which left config.json out")[:48]
        raise FormatError(
            f"the {dtype} graph in {str(directory)!r} was exported from weights with fingerprint {found}, these have "
            f"{encoder.fingerprint}; run `raytower export` again"
        )
    for name, sha256 in record["files"].items():
        place = directory / GRAPH_FOLDER / name
        if not place.is_file() or sha256_of(place) != sha256:
            raise FormatError(
                f"{str(place)!r} is missing or is not the graph that was exported; run `raytower export` again"
            )
    return directory / GRAPH_FOLDER / GRAPH_NAMES[dtype]


class _HiddenStates(nn.Module):
    """The part of the encoder that goes into the graph."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def _trace(encoder: Encoder, place: Path) -> None:
    names = ["input_ids", "attention_mask"]
    ids_BL = torch.randint(0, int(encoder.backbone.config.vocab_size), (2, 7))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 4:] = 0
    shape = {0: "batch", 1: "length"}
    # The exporter gives the wrapped modules the wrapper's mode afterwards: dropout would be on without a word.
    module = _HiddenStates(encoder.backbone).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # dynamo=False: needs no onnxscript, is five times as fast, and its graph ran faster (2.13, MiniLM).
            torch.onnx.export(
                module,
                (ids_BL, mask_BL),
                str(place),
                dynamo=False,
                opset_version=_OPSET,
                input_names=names,
                output_names=["last_hidden_state"],
                dynamic_axes=dict.fromkeys([*names, "last_hidden_state"], shape),
            )
    except Exception as error:
        kind = getattr(encoder.backbone.config, "model_type", "this")
        raise RaytowerError(
            f"a backbone of type {kind!r} cannot be exported to ONNX: {error}; use engine torch"
        ) from error


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
def _vectors(encoder: Encoder, texts: tuple[str, ...]) -> NDArray[np.float64]:
    length = min(encoder.max_length, encoder.max_positions)
    batch = encoder.tokenizer(
        list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    vector_BD: Any = encoder(batch["input_ids"], batch["attention_mask"])
    return np.asarray(vector_BD.double().cpu())
