"""`raytower export`: an encoder directory with an ONNX graph in it, in float32 or int8, proved against torch."""

from __future__ import annotations

import time
from typing import Any

from raytower.errors import InputError
from raytower.models.config import ExportConfig
from raytower.models.directory import INFO_NAME, read_info, resolve_model
from raytower.models.encoder import Encoder
from raytower.models.fetching import checksums
from raytower.models.onnx_export import GRAPH_FOLDER, GRAPH_NAMES, INFO_KEY, export_graph
from raytower.progress import log
from raytower.storage import Location, output_folder, publish_directory

_RESULTS = ("least_cosine", "mean_cosine", "bytes")


def export(config: ExportConfig) -> dict[str, Any]:
    """Write `output`: the encoder, and its backbone as a graph in `onnx/`; it appears when it is whole.

    The directory loads as before with either library. `raytower encode` with engine onnx takes the graph from
    it, and SentenceTransformer(output, backend="onnx") finds `onnx/model.onnx` (int8: name the file model_int8.onnx).

    Returns:
        output, graph_dtype, fingerprint, file, bytes, least_cosine and mean_cosine to torch over built-in texts,
        seconds.

    Raises:
        InputError: no such encoder, or an output that holds something else.
        MissingExtraError: the extra [onnx] is not installed.
        RaytowerError: a backbone that cannot be exported, or a graph whose vectors are too far from torch's.
    """
    started = time.perf_counter()
    source = resolve_model(config.encoder)
    encoder = Encoder.load(config.encoder)
    results = _earlier_results(config, encoder.fingerprint)
    if results is not None:
        log(f"{config.output} is finished; nothing to do")
    else:
        with publish_directory(Location.of(config.output)) as folder:
            results = export_graph(encoder, config.graph_dtype, folder / GRAPH_FOLDER)
            files = checksums(folder / GRAPH_FOLDER)
            results["bytes"] = sum((folder / GRAPH_FOLDER / name).stat().st_size for name in files)
            record = {config.graph_dtype: {"files": files, **results}}
            encoder.save(folder, {**read_info(source), INFO_KEY: record})
    return {
        **_plan(config, encoder),
        **{name: results[name] for name in _RESULTS},
        "seconds": round(time.perf_counter() - started, 3),
    }


def plan_export(config: ExportConfig) -> dict[str, Any]:
    """The plan for --dry-run: what would be written, and about how large it is."""
    encoder = Encoder.load(config.encoder)
    _earlier_results(config, encoder.fingerprint)
    parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    return {**_plan(config, encoder), "parameters": parameters}


def _plan(config: ExportConfig, encoder: Encoder) -> dict[str, Any]:
    return {
        "output": config.output,
        "graph_dtype": config.graph_dtype,
        "fingerprint": encoder.fingerprint,
        "file": f"{GRAPH_FOLDER}/{GRAPH_NAMES[config.graph_dtype]}",
    }


def _earlier_results(config: ExportConfig, fingerprint: str) -> dict[str, float] | None:
    """What an earlier run of this job found, None where there was none. Raises InputError at something else there."""
    output = output_folder(config.output, INFO_NAME)
    if not output.children():
        return None
    place = output / INFO_NAME
    info = place.read_json() if place.is_file() else {}
    if info.get("fingerprint") == fingerprint and config.graph_dtype in info.get(INFO_KEY, {}):
        return dict(info[INFO_KEY][config.graph_dtype])
    raise InputError(
        f"output {config.output!r} exists and is no {config.graph_dtype} export of this encoder; choose a new output, "
        "or remove the old one"
    )
