"""`raytower export`: a model directory with an ONNX graph in it, in float32 or int8, proved against torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from raytower.errors import InputError, OtherOutputError
from raytower.models.config import ExportConfig
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.directory import INFO_NAME, read_info, resolve_model
from raytower.models.encoder import Encoder
from raytower.models.fetching import checksums
from raytower.models.onnx_export import (
    GRAPH_FOLDER,
    GRAPH_NAMES,
    INFO_KEY,
    Model,
    body_of,
    check_exportable,
    export_graph,
)
from raytower.models.text_classifier import TextClassifier
from raytower.progress import log
from raytower.storage import Location, output_folder, publish_directory

_CLASSES: Mapping[str, type[Encoder] | type[CrossEncoder] | type[TextClassifier]] = {
    "encoder": Encoder,
    "reranker": CrossEncoder,
    "classifier": TextClassifier,
}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write `output`: the model, and its transformer as a graph in `onnx/`; it appears when it is whole.

    The directory loads as before with either library. Every command with engine onnx or auto takes the graph from it,
    and SentenceTransformer(output, backend="onnx") finds `onnx/model.onnx` (int8: name the file model_int8.onnx).

    Returns:
        output, kind, graph_dtype, fingerprint, file, bytes, seconds, and how near the graph is to torch over built-in
        texts: least_cosine and mean_cosine of an encoder's vectors, largest_difference and mean_difference of a
        reranker's or classifier's logits, with largest_logit for their scale.

    Raises:
        InputError: no such model, one of another kind, or an output that holds something else.
        MissingExtraError: the extra [onnx] is not installed.
        RaytowerError: a model that cannot be exported, or a graph that is too far from torch.
    """
    started = time.perf_counter()
    model = _load(config)
    results = _earlier_results(config, model.fingerprint)
    if results is not None:
        log(f"{config.output} is finished; nothing to do")
    else:
        with publish_directory(Location.of(config.output)) as folder:
            results = export_graph(model, config.graph_dtype, folder / GRAPH_FOLDER)
            files = checksums(folder / GRAPH_FOLDER)
            results["bytes"] = sum((folder / GRAPH_FOLDER / name).stat().st_size for name in files)
            record = {config.graph_dtype: {"files": files, **results}}
            model.save(folder, {**read_info(resolve_model(config.source)), INFO_KEY: record})
    return {**_plan(config, model), **results, "seconds": round(time.perf_counter() - started, 3)}


def plan_export(config: ExportConfig) -> dict[str, Any]:
    """The plan for --dry-run: what would be written, and about how large it is."""
    model = _load(config)
    _earlier_results(config, model.fingerprint)
    parameters = sum(parameter.numel() for parameter in body_of(model).parameters())
    return {**_plan(config, model), "parameters": parameters}


def _load(config: ExportConfig) -> Model:
    model: Model = _CLASSES[config.kind].load(config.source)
    check_exportable(model)
    return model


def _plan(config: ExportConfig, model: Model) -> dict[str, Any]:
    return {
        "output": config.output,
        "kind": config.kind,
        "graph_dtype": config.graph_dtype,
        "fingerprint": model.fingerprint,
        "file": f"{GRAPH_FOLDER}/{GRAPH_NAMES[config.graph_dtype]}",
    }


def _earlier_results(config: ExportConfig, fingerprint: str) -> dict[str, float] | None:
    """What an earlier run of this job found, None where there was none. Raises InputError at something else there,
    OtherOutputError at another export."""
    output = output_folder(config.output, INFO_NAME)
    if not output.children():
        return None
    place = output / INFO_NAME
    info = place.read_json() if place.is_file() else {}
    record = info.get(INFO_KEY, {}).get(config.graph_dtype)
    if info.get("fingerprint") == fingerprint and record is not None:
        return {name: value for name, value in record.items() if name != "files"}
    error = OtherOutputError if INFO_KEY in info else InputError
    raise error(
        f"output {config.output!r} exists and is no {config.graph_dtype} export of this {config.kind}; choose a new "
        "output, or remove the old one"
    )
