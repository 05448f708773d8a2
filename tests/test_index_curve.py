"""The measured curve as a picture: what is drawn, and every refusal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.cli import run_command
from raytower.config import make_config
from raytower.errors import FormatError, InputError, MissingExtraError
from raytower.index.curve import curves_of, draw_curve, write_curve
from raytower.index.manage import IndexListConfig, index_list
from raytower.index.manifest import IndexManifest
from raytower.index.versions import publish, version_folder
from raytower.storage import Location

PNG_HEADER = b"\x89PNG\r\n\x1a\n"


def point(value: int, recall: float, **extra: int) -> dict[str, Any]:
    return {"parameter": "nprobe", "value": value, **extra, "recall": recall}


def manifest(**changes: Any) -> IndexManifest:
    values: dict[str, Any] = {
        "version": "v000001",
        "parent": None,
        "operation": "build",
        "fingerprint": "f" * 64,
        "encoder": "some-encoder",
        "metric": "cosine",
        "dim": 8,
        "prefix": "",
        "query_prefix": "",
        "max_length": 64,
        "kind": "ivf_flat",
        "kind_reason": "asked for",
        "parameters": {"nlist": 30},
        "rows": 0,
        "shards": (),
        "spec_sha256": "",
        "recall_k": 10,
        "recall_target": 0.95,
        "recall": 0.96,
        "recall_queries": 256,
        "recall_target_reached": True,
        "recall_curve": (point(1, 0.6), point(2, 0.8), point(4, 0.96), point(8, 0.999)),
        "recall_version": "v000001",
        "search_parameters": {"nprobe": 4},
    }
    return IndexManifest(**{**values, **changes})


TWO_FACTORS = {
    "kind": "ivf_pq",
    "recall_curve": (
        point(1, 0.5, k_factor=4),
        point(2, 0.7, k_factor=4),
        point(2, 0.8, k_factor=16),
        point(1, 0.6, k_factor=16),
        point(4, 0.97, k_factor=16),
    ),
    "search_parameters": {"nprobe": 4, "k_factor": 16},
}


def drawn_points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.get_lines()}


def published(folder: Path, *manifests: IndexManifest) -> str:
    for item in manifests:
        item.write(version_folder(Location.of(folder), item.version))
        publish(Location.of(folder), item.version)
    return str(folder)


class TestWhatIsDrawn:
    def test_every_point_the_target_and_the_choice(self) -> None:
        (axes,) = draw_curve(manifest()).axes
        points = drawn_points(axes)
        assert points["measured"] == [(1, 0.6), (2, 0.8), (4, 0.96), (8, 0.999)]
        assert points["chosen: nprobe 4, recall 0.9600"] == [(4, 0.96)]
        assert {height for _, height in points["target 0.95"]} == {0.95}
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("nprobe", "recall@10 against exact search")

    def test_a_line_for_each_k_factor(self) -> None:
        (axes,) = draw_curve(manifest(**TWO_FACTORS)).axes
        points = drawn_points(axes)
        assert points["k_factor 4"] == [(1, 0.5), (2, 0.7)]
        assert points["k_factor 16"] == [(1, 0.6), (2, 0.8), (4, 0.97)]
        assert points["chosen: nprobe 4, recall 0.9700"] == [(4, 0.97)]

    def test_the_choice_is_on_the_line_of_its_k_factor(self) -> None:
        chosen = {"nprobe": 2, "k_factor": 4}
        (curve,) = curves_of(manifest(**{**TWO_FACTORS, "search_parameters": chosen}))
        assert curve.chosen == (2, 0.7)

    def test_an_index_placed_by_cluster_shows_the_shards_visited_too(self) -> None:
        placed = manifest(
            placement_curve=(
                {"shards_probe": 1, "share": 0.5, "recall": 0.7},
                {"shards_probe": 2, "share": 1.0, "recall": 0.96},
            ),
            search_parameters={"nprobe": 4, "shards_probe": 2},
        )
        recall, visited = draw_curve(placed).axes
        assert drawn_points(recall)["chosen: nprobe 4, recall 0.9600"] == [(4, 0.96)]
        assert drawn_points(visited)["measured"] == [(1, 0.7), (2, 0.96)]
        assert drawn_points(visited)["chosen: shards_probe 2, recall 0.9600"] == [(2, 0.96)]

    def test_a_version_that_did_not_measure_says_which_did(self) -> None:
        title = draw_curve(manifest(version="v000003", recall_version="v000001")).get_suptitle()
        assert title.endswith("version v000003 (measured on v000001)")
        assert draw_curve(manifest()).get_suptitle().endswith("version v000001")

    def test_the_picture_is_a_png_with_ink_in_it(self, tmp_path: Path) -> None:
        from matplotlib.image import imread

        write_curve(manifest(**TWO_FACTORS), str(tmp_path / "curve.png"))
        assert (tmp_path / "curve.png").read_bytes().startswith(PNG_HEADER)
        pixels = imread(tmp_path / "curve.png")
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10
        assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


class TestRefusals:
    def test_flat_has_no_curve(self) -> None:
        exact = {"parameter": None, "value": None, "recall": 1.0}
        flat = manifest(kind="flat", parameters={}, recall_curve=(exact,), search_parameters={})
        with pytest.raises(
            InputError, match="v000001 has no curve to plot: kind flat searches exactly, so it has no search"
        ):
            draw_curve(flat)

    def test_a_single_row_has_no_curve(self) -> None:
        with pytest.raises(InputError, match="built over a single row"):
            draw_curve(manifest(kind="hnsw", recall_curve=(), search_parameters={"efSearch": 11}))

    def test_a_choice_that_was_never_measured_is_a_damaged_manifest(self) -> None:
        with pytest.raises(
            FormatError, match=r"searches with \{'nprobe': 5\}, a setting that its curve does not"
        ):
            curves_of(manifest(search_parameters={"nprobe": 5}))

    def test_only_png(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"curve is '.*curve\.pdf'; .* must end in \.png"):
            write_curve(manifest(), str(tmp_path / "curve.pdf"))
        assert not list(tmp_path.iterdir())

    def test_without_matplotlib_the_install_line_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'raytower\[plot\]'"):
            draw_curve(manifest())

    def test_a_version_without_a_file_is_refused(self) -> None:
        with pytest.raises(InputError, match="version is 'v000001', which names the version whose curve"):
            make_config(IndexListConfig, {"index": "index", "version": "v000001"})


class TestIndexList:
    def test_the_published_version_or_the_one_that_is_named(self, tmp_path: Path) -> None:
        index = published(
            tmp_path / "index",
            manifest(),
            manifest(version="v000002", recall_version="v000002", **TWO_FACTORS),
        )
        place = str(tmp_path / "curve.png")
        listed = index_list(IndexListConfig(index=index, curve=place))
        assert listed["curve"] == {"file": place, "version": "v000002"}
        newest = (tmp_path / "curve.png").read_bytes()
        listed = index_list(IndexListConfig(index=index, curve=place, version="v000001"))
        assert listed["curve"] == {"file": place, "version": "v000001"}
        assert (tmp_path / "curve.png").read_bytes() != newest
        assert "curve" not in index_list(IndexListConfig(index=index))

    def test_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        index = published(tmp_path / "index", manifest())
        arguments = ["--index", index, "--curve", str(tmp_path / "a.png"), "--version"]
        assert run_command("index list", [*arguments, "v000001"]) == 0
        assert (tmp_path / "a.png").read_bytes().startswith(PNG_HEADER)
        assert run_command("index list", [*arguments, "v000009"]) == 2
        assert "has no version 'v000009'; it has: v000001" in capsys.readouterr().err
