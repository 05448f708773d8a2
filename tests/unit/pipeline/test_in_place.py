"""Steps without an output of their own, what each step came from, how it stands, and one pipeline at a time.

Jobs run in this process. `work` is a corpus that becomes an index, which is kept up to date, compacted and published.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytower.adapt import job as adapt_job
from raytower.cli import main
from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.evaluation.config import TuneFusionConfig
from raytower.index.build import build_index
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig
from raytower.index.compact import compact_index
from raytower.index.config import IndexBuildConfig
from raytower.index.reader import Index
from raytower.index.versions import open_manifest, version_names
from raytower.pipeline import content
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import (
    STEP_JOBS,
    _order,
    _prepare,
    pipeline_status,
    plan_pipeline,
    run_pipeline,
)
from raytower.refresh import job as refresh_job
from raytower.storage import Location, writer_lease
from tests.support.encoding_here import encode_here
from tests.support.index_cases import HERE
from tests.support.processes import ROOT
from tests.support.tiny_training import write_pairs

ENCODE, BUILD, SYNC, COMPACT, GC, RELOAD = JOBS = (
    "encode",
    "index build",
    "index sync",
    "index compact",
    "index gc",
    "serve reload",
)
URL = "http://127.0.0.1:9"


class Work:
    """The folder of a pipeline, the jobs that ran, and what a server was told."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, encoder: Path) -> None:
        patch.chdir(folder)
        shutil.copytree(encoder, "encoder")
        Path("corpus.jsonl").write_text(rows(range(20)))
        Path("fresh.jsonl").write_text(rows(range(24)))
        self.ran: list[str] = []
        self.told: list[Any] = []
        self.fail_in: str | None = None
        jobs: dict[str, Callable[[Any], dict[str, Any]]] = {
            ENCODE: encode_here,
            BUILD: lambda config: build_index(config, HERE),
            SYNC: find_reference(COMMANDS[SYNC].run),
            COMPACT: lambda config: compact_index(config, HERE),
            GC: find_reference(COMMANDS[GC].run),
            RELOAD: self.told_server,
        }
        real = {COMMANDS[job].run: self._counted(job, run) for job, run in jobs.items()}
        patch.setattr(
            "raytower.pipeline.job.find_reference", lambda name: real.get(name) or find_reference(name)
        )

    def told_server(self, config: Any) -> dict[str, Any]:
        self.told.append(open_manifest(config.index).version)
        return {"changed": True}

    def _counted(self, job: str, run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        def counted(config: Any) -> dict[str, Any]:
            if self.fail_in == job:
                raise RaytowerError("no more room")
            self.ran.append(job)
            return run(config)

        return counted

    def config(self, change: dict[str, dict[str, Any]] | None = None, **more: Any) -> PipelineConfig:
        configs: dict[str, dict[str, Any]] = {
            ENCODE: {"encoder": "encoder", "input": "corpus.jsonl", "output": "runs/embeddings"},
            BUILD: {"embeddings": "runs/embeddings", "output": "runs/index", "kind": "flat"},
            SYNC: {"index": "runs/index", "input": "fresh.jsonl", "encoder": "encoder"},
            COMPACT: {"index": "runs/index"},
            GC: {"index": "runs/index", "keep": 1},
            RELOAD: {"index": "runs/index", "url": URL},
        }
        steps = [{"job": job, "config": {**configs[job], **(change or {}).get(job, {})}} for job in JOBS]
        return make_config(PipelineConfig, {"state": "runs/state.json", "steps": steps, **more})

    def run(self, change: dict[str, dict[str, Any]] | None = None) -> list[str]:
        config = self.config(change)
        planned = [step["job"] for step in plan_pipeline(config)["steps"] if not step["skipped"]]
        self.ran.clear()
        ran = [step["job"] for step in run_pipeline(config)["steps"] if not step["skipped"]]
        assert ran == list(dict.fromkeys(self.ran))
        assert planned[:1] == ran[:1]
        return ran


def rows(numbers: range) -> str:
    return "".join(json.dumps({"id": str(n), "text": f"text number {n}"}) + "\n" for n in numbers)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dummy_encoder_dir: Path) -> Work:
    return Work(tmp_path, monkeypatch, dummy_encoder_dir)


def test_texts_in_and_a_served_version_out_and_again_only_what_has_changed(work: Work) -> None:
    """`serve reload` and what changes an index were no steps."""
    assert work.run() == list(JOBS)
    assert Index.open("runs/index").num_rows == 24
    (version,) = version_names(Location.of("runs/index"))
    assert work.told == [version]
    assert work.run() == []
    Path("fresh.jsonl").write_text(rows(range(26)))
    assert work.run() == [SYNC, COMPACT, GC, RELOAD]
    assert Index.open("runs/index").num_rows == 26
    assert work.told == [version, open_manifest("runs/index").version]
    assert work.run() == []
    assert work.run({SYNC: {"workers": {"num": 1}}, RELOAD: {"timeout_s": 5}}) == [], "they change no result"


def test_a_changed_corpus_is_built_and_brought_up_to_date_again(work: Work) -> None:
    """The build refused to take the place of what its own pipeline had changed in the index."""
    work.run()
    Path("corpus.jsonl").write_text(rows(range(5, 20)))
    assert work.run() == list(JOBS)
    assert Index.open("runs/index").num_rows == 24
    assert work.run() == []
    Path("corpus.jsonl").write_text(rows(range(20)))
    assert work.run()[-4:] == [SYNC, COMPACT, GC, RELOAD], "back to what was built first"
    assert Index.open("runs/index").num_rows == 24
    assert work.run() == []


def test_what_others_have_changed_is_made_right_again_but_never_built_over(work: Work) -> None:
    work.run()
    delete_from_index(IndexDeleteConfig(index="runs/index", ids=["3"]))
    told = len(work.told)
    assert work.run() == [SYNC, COMPACT, GC, RELOAD]
    assert Index.open("runs/index").num_rows == 24
    assert len(work.told) == told + 1
    assert work.run() == []
    delete_from_index(IndexDeleteConfig(index="runs/index", ids=["3"]))
    Path("corpus.jsonl").write_text(rows(range(5, 20)))
    with pytest.raises(InputError, match=r"was changed \d+ times since it was built"):
        run_pipeline(work.config())


def test_a_build_takes_no_change_of_others_back_that_later_steps_have_built_upon(work: Work) -> None:
    """A document that was deleted by hand came back: the compaction after it counted all as the pipeline's own."""
    steps = [vars(step) for step in work.config().steps if step.job in (ENCODE, BUILD, COMPACT)]
    config = make_config(PipelineConfig, {"state": "runs/state.json", "steps": steps})
    run_pipeline(config)
    delete_from_index(IndexDeleteConfig(index="runs/index", ids=["3"]))
    run_pipeline(config)
    Path("corpus.jsonl").write_text(rows(range(30)))
    with pytest.raises(InputError, match="was changed 1 times since it was built"):
        run_pipeline(config)
    assert Index.open("runs/index").num_rows == 19
    replaced = [*steps[:1], {**steps[1], "config": {**steps[1]["config"], "replace": True}}, *steps[2:]]
    run_pipeline(make_config(PipelineConfig, {"state": "runs/state.json", "steps": replaced}))
    assert Index.open("runs/index").num_rows == 30
    Path("corpus.jsonl").write_text(rows(range(31)))
    run_pipeline(config)
    assert Index.open("runs/index").num_rows == 31, "all of it is the pipeline's own again"


def test_a_build_takes_the_place_of_what_steps_of_other_settings_have_changed(work: Work) -> None:
    """With both changed at once it was refused, as if others had changed the index."""
    work.run()
    Path("corpus.jsonl").write_text(rows(range(5, 20)))
    assert work.run({SYNC: {"max_gone": 0.9}, COMPACT: {"seed": 1}}) == list(JOBS)
    assert Index.open("runs/index").num_rows == 24


@pytest.mark.parametrize("part", ["shards", "lexical"])
def test_an_index_that_is_not_whole_is_built_again(work: Work, part: str) -> None:
    """It counted as finished, and `index build`, which its reader's message asks for, had nothing to build."""
    work.run()
    shutil.rmtree(f"runs/index/{part}")
    assert [step["state"] for step in pipeline_status(work.config())["steps"]][1] == "changed"
    assert BUILD in work.run()
    assert Index.open("runs/index").num_rows == 24
    assert work.run() == []
    config = make_config(IndexBuildConfig, {**work.config().steps[1].config, "output": "runs/alone"})
    build_index(config, HERE)
    shutil.rmtree(f"runs/alone/{part}")
    build_index(config, HERE)
    assert Index.open("runs/alone").num_rows == 20
    delete_from_index(IndexDeleteConfig(index="runs/alone", ids=["3"]))
    shutil.rmtree(f"runs/alone/{part}")
    with pytest.raises(FormatError, match="changed 1 times since this build, which replace: true does anew"):
        build_index(config, HERE)


def test_the_same_step_twice_is_two_steps(work: Work) -> None:
    """They shared one record, so that neither was ever finished."""
    steps = [vars(step) for step in work.config().steps]
    twice = [*steps[:2], steps[3], *steps[2:4]]
    config = make_config(PipelineConfig, {"state": "runs/state.json", "steps": twice})
    assert [step["job"] for step in run_pipeline(config)["steps"]] == [ENCODE, BUILD, COMPACT, SYNC, COMPACT]
    assert [step["skipped"] for step in run_pipeline(config)["steps"]] == [True] * 5
    Path("fresh.jsonl").write_text(rows(range(26)))
    assert [step["skipped"] for step in run_pipeline(config)["steps"]] == [True] * 3 + [False] * 2
    assert [step["state"] for step in pipeline_status(config)["steps"]] == ["finished"] * 5


def test_a_step_that_failed_says_so_and_goes_on(work: Work) -> None:
    work.fail_in = COMPACT
    with pytest.raises(RaytowerError, match="no more room"):
        run_pipeline(work.config())
    stands = pipeline_status(work.config())["steps"]
    assert [step["state"] for step in stands] == ["finished"] * 3 + ["missing"] * 3
    assert [step["why"] for step in stands[3:]] == [
        "it failed: no more room",
        "what it reads is made anew",
        "what it reads is made anew",
    ]
    work.fail_in = None
    assert work.run() == [COMPACT, GC, RELOAD]


def test_who_reads_what_a_later_step_changes_is_refused(work: Work) -> None:
    steps = [vars(step) for step in work.config().steps]
    early = make_config(PipelineConfig, {"state": "s", "steps": [*steps[:2], steps[5], *steps[2:5]]})
    with pytest.raises(
        InputError,
        match=r"step 3 serve reload reads index 'runs/index', which step 4 index sync changes after it",
    ):
        plan_pipeline(early)


def test_a_reload_that_does_not_name_its_index_is_refused(work: Work) -> None:
    with pytest.raises(InputError, match=r"step 6 \(serve reload\): index is null.*name the index"):
        plan_pipeline(work.config({RELOAD: {"index": None}}))


def test_reloads_of_one_server_wait_for_each_other(work: Work) -> None:
    """Side by side the server refused the second: "another change is under way"."""
    reload = {"index": "runs/index", "url": URL}
    others = [{**reload, "collection": "a"}, {**reload, "collection": "b"}, {**reload, "url": f"{URL}9"}]
    steps = [vars(step) for step in work.config().steps[:2]]
    steps += [{"job": RELOAD, "config": config} for config in others]
    config = make_config(PipelineConfig, {"state": "s", "steps": steps})
    assert _order(_prepare(config)) == [
        frozenset(),
        frozenset({0}),
        frozenset({1}),
        frozenset({1, 2}),
        frozenset({1}),
    ]


def test_a_reload_without_a_reranker_reads_none(work: Work) -> None:
    *_, reload = _prepare(work.config({RELOAD: {"reranker": "none", "encoder": "encoder"}}))
    assert [item.key for item in reload.inputs] == ["encoder", "index"]


def test_tuning_changes_what_it_stores_its_weight_in(work: Work) -> None:
    def changes(**settings: Any) -> str | None:
        values = {"index": "runs/index", "queries": "dev.tsv", **settings}
        config = {"state": "s", "steps": [{"job": "tune-fusion", "config": values}]}
        return _prepare(make_config(PipelineConfig, config))[0].written

    write_pairs(Path("dev.tsv"), 4)
    assert COMMANDS["tune-fusion"].config.endswith(TuneFusionConfig.__name__)
    assert changes(encoder="encoder") == "runs/index"
    assert changes(reranker="runs/reranker") == "runs/reranker"
    assert changes(reranker="runs/reranker", store=False) is None


@pytest.mark.parametrize(("job", "module"), [("refresh", refresh_job), ("adapt", adapt_job)])
def test_a_pipeline_inside_a_step_reads_what_its_steps_read(work: Work, job: str, module: Any) -> None:
    """And nothing of what they make: a file that mining reads by a key of its own counts too."""
    write_pairs(Path("dev.tsv"), 4)
    write_pairs(Path("train.tsv"), 8)
    values: dict[str, Any] = {
        "model": "encoder",
        "corpus": "corpus.jsonl",
        "output": "runs/rounds",
        "training": {"dev": "dev.tsv"},
    }
    names = {"encoder", "corpus.jsonl", "dev.tsv"}
    if job == "refresh":
        values |= {"train": "train.tsv", "queries": "dev.tsv"}
        names |= {"train.tsv"}
    config = make_config(
        PipelineConfig, {"state": "runs/state.json", "steps": [{"job": job, "config": values}]}
    )
    (step,) = _prepare(config)
    assert {item.name for item in step.inputs} == names
    before = step.origin({}).key
    Path("dev.tsv").write_text(Path("dev.tsv").read_text() * 2)
    assert _prepare(config)[0].origin({}).key != before
    assert module.STATE_NAME == "pipeline.json"
    assert module.SUMMARY_NAME in content._SUMMARIES


def test_the_lineage_of_each_output(work: Work) -> None:
    """Which steps, configs and contents it came from, by keys that name them."""
    work.run()
    state = json.loads(Path("runs/state.json").read_text())
    records, lineage = state["steps"], state["lineage"]
    assert len(lineage) == len(JOBS)
    embeddings = lineage[records["runs/embeddings"]["key"]]
    assert embeddings["job"] == ENCODE
    assert embeddings["writes"] == "runs/embeddings"
    assert embeddings["settings"] == {
        "encoder": "encoder",
        "input": {"path": "corpus.jsonl"},
        "output": "runs/embeddings",
    }
    assert {key: item["name"] for key, item in embeddings["inputs"].items()} == {
        "encoder": "encoder",
        "input.path": "corpus.jsonl",
    }
    assert embeddings["made_by"] == []
    *_, served = pipeline_status(work.config())["steps"]
    assert next(origin["job"] for origin in served["lineage"].values()) == RELOAD
    assert {origin["job"] for origin in served["lineage"].values()} == set(JOBS) - {GC}
    corpus = embeddings["inputs"]["input.path"]["content"]
    Path("corpus.jsonl").write_text(rows(range(21)))
    work.run()
    state = json.loads(Path("runs/state.json").read_text())
    again = state["lineage"][state["steps"]["runs/embeddings"]["key"]]
    assert again["inputs"]["input.path"]["content"] != corpus
    assert len(state["lineage"]) == len(JOBS), "no more than what there is came from"


def test_how_each_step_stands(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    """Without running, writing or locking anything."""
    stands = pipeline_status(work.config())
    assert [step["state"] for step in stands["steps"]] == ["missing"] * 6
    assert stands["steps"][0]["why"] == "it did not run before"
    assert not Path("runs").exists()
    work.run()
    stands = pipeline_status(work.config())
    assert stands["running_by"] is None
    assert [step["state"] for step in stands["steps"]] == ["finished"] * 6
    assert [step["why"] for step in stands["steps"]] == [None] * 6
    assert [step["output"] for step in stands["steps"]] == [
        "runs/embeddings",
        *["runs/index"] * 3,
        None,
        None,
    ]
    assert all(
        re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", step["when"]) for step in stands["steps"]
    )
    assert all(step["seconds"] >= 0 for step in stands["steps"])
    Path("fresh.jsonl").write_text(rows(range(26)))
    shutil.rmtree("runs/embeddings")
    Path("runs/embeddings").mkdir()
    changed = pipeline_status(work.config())["steps"]
    assert [(step["state"], step["why"]) for step in changed[:3]] == [
        ("missing", "its output is gone, or not whole"),
        ("changed", "what it reads is made anew"),
        ("changed", "what it reads is made anew"),
    ]
    Path("corpus.jsonl").unlink()
    gone = pipeline_status(work.config())["steps"][0]
    assert gone["state"] == "missing"
    assert "no file or folder at 'corpus.jsonl'" in gone["why"]
    # As the command shows it.
    Path("pipeline.json").write_text(work.config().model_dump_json())
    assert main(["pipeline", "--config", "pipeline.json", "--status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [step["state"] for step in shown["steps"]] == ["missing"] + ["changed"] * 5
    table = find_reference(COMMANDS["pipeline"].render or "")(shown)
    assert "lineage" not in table
    assert "what it reads is made anew" in " ".join(table.split())


def test_a_state_of_before_whose_input_is_gone_is_shown(work: Work) -> None:
    """--status ended with the message that the input is missing, and showed no step."""
    config = make_config(
        PipelineConfig, {"state": "runs/state.json", "steps": [vars(work.config().steps[0])]}
    )
    (step,) = _prepare(config)
    Path("runs/embeddings").mkdir(parents=True)
    Path("runs/embeddings/job.json").write_text("{}")
    Path("runs/state.json").write_text(json.dumps({step.former_keys[0]: {}}))
    Path("corpus.jsonl").unlink()
    (stands,) = pipeline_status(config)["steps"]
    assert stands["state"] == "missing"
    with pytest.raises(InputError, match=r"step 1 encode: no file or folder at 'corpus\.jsonl'"):
        run_pipeline(config)


def test_a_foreign_output_is_told_and_nothing_of_it_is_taken(work: Work) -> None:
    Path("runs/embeddings").mkdir(parents=True)
    Path("runs/embeddings/notes.txt").write_text("mine")
    first = pipeline_status(work.config())["steps"][0]
    assert first["state"] == "changed"
    assert "holds files of something else" in first["why"]


def test_two_pipelines_on_one_state_are_refused(work: Work) -> None:
    """Both ran, and each wrote over what the other had written down."""
    Path("runs").mkdir()
    with writer_lease(Location.of("runs/.state.json.lock"), owner="a pipeline (process 7 on host)"):
        with pytest.raises(
            InputError, match=r"'runs/state\.json' is being written by another pipeline: .*process 7 on host"
        ):
            run_pipeline(work.config())
        assert work.ran == []
        assert pipeline_status(work.config())["running_by"] == "a pipeline (process 7 on host)"
    assert run_pipeline(work.config())["steps"]


def test_a_step_that_runs_now_is_shown_as_running(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = {COMMANDS[RELOAD].run: lambda config: seen.append(pipeline_status(work.config())) or {}}
    from raytower.pipeline import job as module

    before = module.find_reference
    monkeypatch.setattr(module, "find_reference", lambda name: real.get(name) or before(name))
    run_pipeline(work.config())
    ((*_, last),) = [stands["steps"] for stands in seen]
    assert last["state"] == "running"
    assert last["when"] is not None
    assert "a pipeline (process" in seen[0]["running_by"]
    assert pipeline_status(work.config())["steps"][-1]["state"] == "finished"


def test_a_step_that_was_killed_is_not_shown_as_running_beside_another(work: Work) -> None:
    """As a run that is at an earlier step would be."""
    run_pipeline(work.config())
    state = Path("runs/state.json")
    values = json.loads(state.read_text())
    slot = next(name for name in values["steps"] if name.startswith("serve reload"))
    values["steps"][slot] |= {"finished": False, "error": None}
    values["steps"]["runs/embeddings"]["key"] = "another"
    state.write_text(json.dumps(values))
    assert pipeline_status(work.config())["steps"][-1]["state"] == "missing", "nobody holds the state"
    work.fail_in = ENCODE
    with pytest.raises(RaytowerError):
        run_pipeline(work.config())
    with writer_lease(Location.of("runs/.state.json.lock"), owner="another"):
        assert [step["state"] for step in pipeline_status(work.config())["steps"]][-1] == "missing"


def test_a_state_of_before_lineage_gains_it_without_a_run(work: Work) -> None:
    work.run()
    state = Path("runs/state.json")
    values = json.loads(state.read_text())
    gained = ("when", "seconds", "error")
    records = {
        name: {key: value for key, value in record.items() if key not in gained}
        for name, record in values["steps"].items()
    }
    state.write_text(json.dumps({"format_version": 2, "steps": records}))
    assert work.run() == []
    assert json.loads(state.read_text())["lineage"] == values["lineage"]


def test_every_command_is_a_step_or_the_guide_says_why_not() -> None:
    guide = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    steps, others = (
        re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", guide, re.DOTALL)
        for title in ("Which commands are steps", "Which are not, and why")
    )
    assert steps is not None
    assert others is not None
    named = [
        set(re.findall(r"^\| `([a-z -]+)` \|", found.group(1), re.MULTILINE)) for found in (steps, others)
    ]
    assert named[0] == STEP_JOBS.keys()
    assert named[1] == COMMANDS.keys() - STEP_JOBS.keys()
