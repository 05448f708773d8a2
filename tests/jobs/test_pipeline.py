"""Steps chained by one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.errors import InputError
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import plan_pipeline, run_pipeline
from tests.support.tiny_training import retriever_config, write_pairs


def pipeline(folder: Path, encoder: Path, **index: Any) -> PipelineConfig:
    encode = {
        "encoder": str(encoder),
        "input": {"path": str(folder / "corpus.txt")},
        "output": str(folder / "embeddings"),
        "max_length": 64,
    }
    build = {"embeddings": str(folder / "embeddings"), "output": str(folder / "index"), **index}
    evaluate = {
        "encoder": str(encoder),
        "index": str(folder / "index"),
        "queries": {"path": str(folder / "dev.tsv"), "format": "pairs"},
        "output": str(folder / "report"),
    }
    steps = [
        {"job": "encode", "config": encode},
        {"job": "index build", "config": build},
        {"job": "evaluate", "config": evaluate},
    ]
    return make_config(PipelineConfig, {"state": str(folder / "state.json"), "steps": steps})


@pytest.mark.usefixtures("ray_cluster")
def test_finished_steps_are_skipped_and_a_change_runs_what_follows_it(
    dummy_encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"answer number {i}\n" for i in range(40)))
    (tmp_path / "dev.tsv").write_text(
        "answer number 3?\tanswer number 3\nanswer number 17!\tanswer number 17\n"
    )
    config = pipeline(tmp_path, dummy_encoder_dir)
    first = run_pipeline(config)["steps"]
    assert [step["skipped"] for step in first] == [False, False, False]
    assert first[2]["queries"] == 2
    assert (tmp_path / "report" / "run.trec").is_file()
    assert [step["skipped"] for step in run_pipeline(config)["steps"]] == [True, True, True]
    changed = pipeline(tmp_path, dummy_encoder_dir, kind="hnsw")
    assert [step["skipped"] for step in plan_pipeline(changed)["steps"]] == [True, False, False]
    again = run_pipeline(changed)["steps"]
    assert [step["skipped"] for step in again] == [True, False, False]
    assert again[1]["version"] == "000002"


@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_training_is_made_anew_in_place_of_the_former(still_encoder: Path, tmp_path: Path) -> None:
    """It ended with "output exists and was made by another config"; after a change of the rows alone it was skipped."""
    pairs = write_pairs(tmp_path / "pairs.tsv", 16)
    state, output = str(tmp_path / "state.json"), tmp_path / "encoder"

    def run(epochs: int) -> bool:
        config = retriever_config(still_encoder, pairs, output, epochs=epochs).model_dump(mode="json")
        step = {"job": "train-retriever", "config": config}
        (figures,) = run_pipeline(make_config(PipelineConfig, {"state": state, "steps": [step]}))["steps"]
        assert figures["steps"] == 2 * epochs
        return not figures["skipped"]

    assert [run(1), run(1), run(2), run(2)] == [True, False, True, False]
    former = tmp_path / ".encoder.former-1"
    steps = [
        json.loads((folder / "raytower.json").read_text())["figures"]["steps"] for folder in (former, output)
    ]
    assert steps == [2, 4]


def test_every_step_is_checked_before_the_first_runs(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 2 \(index build\): unknown key 'knd'"):
        run_pipeline(pipeline(tmp_path, dummy_encoder_dir, knd="flat"))
    config = make_config(
        PipelineConfig, {"state": str(tmp_path / "s"), "steps": [{"job": "serve", "config": {}}]}
    )
    with pytest.raises(InputError, match=r"steps\.1\.job is 'serve'"):
        run_pipeline(config)
    assert not list(tmp_path.iterdir())


# Written down by the raytower of before, whose keys were compute.dtype, workers.max, rerank_k, depth and so on.
FORMER_KEYS = [
    "0b78b71dcd63dbba",
    "de793d3ad8339387",
    "85671f7731bcc982",
    "e1e3c7cc51bf4d72",
    "bc4ef0145dabf71f",
    "e4fa3cd67fe739b2",
    "91db3fc08878d2d2",
]


def every_job(**evaluate: Any) -> PipelineConfig:
    texts = {"encoder": "encoder", "index": "index", "input": {"path": "texts.tsv"}}
    workers = {"min": 2, "num": 4}
    target = {"memory": "1GiB", "queries": "dev.tsv"}
    judged = {"index": "index", "queries": {"path": "dev.tsv"}, "reranker": "reranker", "recall_k": 20}
    configs: dict[str, dict[str, Any]] = {
        "train-retriever": {"model": "m", "train": {"path": "pairs.tsv"}, "output": "encoder"},
        "encode": {"encoder": "encoder", "input": {"path": "corpus.txt"}, "output": "embeddings"}
        | {"max_length": 64, "dtype": "bfloat16", "workers": workers},
        "index build": {
            "embeddings": "embeddings",
            "output": "index",
            "workers": {"num": 3},
            "target": target,
        },
        "evaluate": {"encoder": "encoder", **judged, "rerank_max_length": 128, **evaluate},
        "mine": {**texts, "input": {"path": "pairs.tsv"}, "output": "negatives.jsonl"}
        | {"format": "candidates", "file_type": "jsonl", "recall_k": 30, "rows_per_batch": 16},
        "classify": {**texts, "output": "labels.jsonl", "file_type": "jsonl", "max_length": 32},
        "similarity": {"encoder": "encoder", "input": {"path": "scored.tsv"}, "output": "cosines.tsv"},
    }
    steps = [{"job": job, "config": config} for job, config in configs.items()]
    return make_config(PipelineConfig, {"state": "state.json", "steps": steps})


def test_steps_that_were_finished_before_keys_were_renamed_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from then on by what they read, too."""
    monkeypatch.chdir(tmp_path)
    contents = {"corpus.txt": "1"}
    monkeypatch.setattr("raytower.pipeline.job.content_of", lambda kind, name, *_: contents.get(name, "0"))
    monkeypatch.setattr("raytower.pipeline.job.content_of_output", lambda *_: "1")
    monkeypatch.setattr("raytower.pipeline.job.mark_of", lambda *_: "1")
    for step in every_job().steps:
        Path(step.config.get("output", "x")).write_text("made before")
    Path("state.json").write_text(json.dumps({key: {"number": n} for n, key in enumerate(FORMER_KEYS)}))
    steps = run_pipeline(every_job())["steps"]
    assert [(step["skipped"], step["number"]) for step in steps] == [(True, n) for n in range(7)]
    assert json.loads(Path("state.json").read_text())["format_version"] == 3
    changed = plan_pipeline(every_job(recall_k=21))["steps"]
    assert [step["skipped"] for step in changed] == [True, True, True, False, True, True, True]
    contents["corpus.txt"] = "2"
    changed = plan_pipeline(every_job())["steps"]
    assert [step["skipped"] for step in changed] == [True, False, False, False, False, False, True]
