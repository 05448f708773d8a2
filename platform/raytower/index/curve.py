"""The measured curve of an index version as a picture: recall against the search parameter.

A manifest keeps every point that the build measured; this draws them with matplotlib, imported only here and only when
asked. Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from raytower.errors import FormatError, InputError, MissingExtraError
from raytower.index.manifest import IndexManifest
from raytower.index.search import SHARDS_PROBE
from raytower.storage import Location

_SIZE_INCHES = (6.4, 4.4)
_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class CurveLine:
    """Points of one setting, by rising value of the search parameter."""

    label: str
    values: tuple[int, ...]
    recalls: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """What one set of axes shows. `chosen` is the point (value, recall) that searches use by default."""

    parameter: str
    lines: tuple[CurveLine, ...]
    chosen: tuple[int, float]


def write_curve(manifest: IndexManifest, place: str | Location) -> None:
    """Write the curve of a version to a PNG file, atomically.

    Raises:
        InputError: the name does not end in .png, or the version has no curve, saying why.
        MissingExtraError: matplotlib is not installed.
    """
    target = Location.of(place)
    if not target.name.lower().endswith(".png"):
        raise InputError(f"curve is {str(place)!r}; the picture is a PNG, so its name must end in .png")
    picture = io.BytesIO()
    draw_curve(manifest).savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    target.write_bytes(picture.getvalue())


def draw_curve(manifest: IndexManifest) -> Any:
    """A matplotlib Figure: recall against the search parameter, one line for each `k_factor`, the target, the choice.

    An index placed by cluster has a second set of axes: recall against the number of placed shards that are visited.

    Raises:
        InputError: the version has no curve. MissingExtraError: matplotlib is not installed.
    """
    curves = curves_of(manifest)
    figure_class = _import_figure()
    width, height = _SIZE_INCHES
    figure = figure_class(figsize=(width * len(curves), height), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        _draw(axes, curve, manifest)
    figure.suptitle(
        f"{manifest.kind}, {manifest.rows:,} rows, {len(manifest.shards)} shards, version {manifest.version}"
        + (
            f" (measured on {manifest.recall_version})"
            if manifest.recall_version not in ("", manifest.version)
            else ""
        )
    )
    return figure


def curves_of(manifest: IndexManifest) -> tuple[Curve, ...]:
    """The measured points of a version, grouped into lines; a second curve where it was placed by cluster.

    Raises:
        InputError: nothing was measured, because the kind searches exactly or because there was too little to measure.
        FormatError: the setting that searches use is not among the points.
    """
    points = [point for point in manifest.recall_curve if point["parameter"] is not None]
    if not points:
        why = (
            "kind flat searches exactly, so it has no search parameter to choose and no curve"
            if manifest.kind == "flat"
            else "it was built over a single row, where there is no recall to measure"
        )
        raise InputError(f"index version {manifest.version} has no curve to plot: {why}")
    parameter = str(points[0]["parameter"])
    factors = sorted({point.get("k_factor") for point in points}, key=lambda factor: factor or 0)
    lines = tuple(_line(points, factor) for factor in factors)
    used = manifest.search_parameters
    wanted = (used.get(parameter), used.get("k_factor"))
    chosen = {(point["value"], point.get("k_factor")): point["recall"] for point in points}
    if wanted not in chosen:
        raise FormatError(
            f"the manifest of index version {manifest.version} searches with {used}, a setting that its curve does not "
            "hold; build the index again"
        )
    return Curve(parameter, lines, (used[parameter], chosen[wanted])), *_placement_curve(manifest)


def _line(points: list[dict[str, Any]], factor: int | None) -> CurveLine:
    own = sorted((point["value"], point["recall"]) for point in points if point.get("k_factor") == factor)
    values, recalls = zip(*own, strict=True)
    return CurveLine("measured" if factor is None else f"k_factor {factor}", values, recalls)


def _placement_curve(manifest: IndexManifest) -> tuple[Curve, ...]:
    points = sorted((point[SHARDS_PROBE], point["recall"]) for point in manifest.placement_curve)
    if not points:
        return ()
    values, recalls = zip(*points, strict=True)
    probe = manifest.search_parameters[SHARDS_PROBE]
    return (Curve(SHARDS_PROBE, (CurveLine("measured", values, recalls),), (probe, dict(points)[probe])),)


def _draw(axes: Any, curve: Curve, manifest: IndexManifest) -> None:
    for line in curve.lines:
        axes.plot(line.values, line.recalls, marker=".", label=line.label)
    value, recall = curve.chosen
    axes.plot(
        [value],
        [recall],
        linestyle="none",
        marker="o",
        markersize=11,
        fillstyle="none",
        color="black",
        label=f"chosen: {curve.parameter} {value}, recall {recall:.4f}",
    )
    axes.axhline(
        manifest.recall_target, linestyle="--", color="gray", label=f"target {manifest.recall_target:g}"
    )
    # Values are tried in steps of a quarter, which are even on a logarithmic axis; shards visited are few.
    if curve.parameter != SHARDS_PROBE:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.set_xlabel(curve.parameter)
    axes.set_ylabel(f"recall@{manifest.recall_k} against exact search")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "matplotlib is not installed, and index list --curve draws with it; install it with: "
            "pip install 'raytower[plot]'"
        ) from error
    return Figure
