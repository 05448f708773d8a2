"""Steps chained by one file, and the demo's sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.data.queries import read_queries
from raytower.demo.sample import SampleSizes, write_sample
from raytower.errors import InputError
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import plan_pipeline, run_pipeline


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


def test_every_step_is_checked_before_the_first_runs(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 2 \(index build\): unknown key 'knd'"):
        run_pipeline(pipeline(tmp_path, dummy_encoder_dir, knd="flat"))
    config = make_config(
        PipelineConfig, {"state": str(tmp_path / "s"), "steps": [{"job": "serve", "config": {}}]}
    )
    with pytest.raises(InputError, match=r"steps\.1\.job is 'serve'"):
        run_pipeline(config)
    assert not list(tmp_path.iterdir())


def test_the_demos_sample_judges_every_question_by_an_answer_of_its_corpus(tmp_path: Path) -> None:
    files = write_sample(tmp_path / "data", SampleSizes(train=20, dev=10, test=10, corpus=100), seed=1)
    corpus = [json.loads(line) for line in files.corpus.read_text(encoding="utf-8").splitlines()]
    assert len(corpus) == files.num_corpus == 100
    ids = {row["_id"] for row in corpus}
    for split in ("dev", "test"):
        queries = read_queries(str(files.beir), "beir", split)
        assert len(queries) == 10
        assert queries.relevant is not None
        assert all(set(judged) <= ids and judged for judged in queries.relevant)
    assert len(files.train_pairs.read_text(encoding="utf-8").splitlines()) == files.num_train >= 20
