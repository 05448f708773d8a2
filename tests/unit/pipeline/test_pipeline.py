"""Which steps of a pipeline run again. Jobs run in this process; training writes a model of weights by its identity."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from safetensors.torch import load_file, save_file

from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, make_config
from raytower.errors import FormatError, InputError
from raytower.index.build import build_index
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.content import content_of, may_hold
from raytower.pipeline.graph import waits
from raytower.pipeline.job import (
    _PIPELINES_OF,
    INPUT_KEYS,
    STEP_JOBS,
    _prepare,
    plan_pipeline,
    run_pipeline,
)
from raytower.storage import Location, put_aside
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import finished_run, run_identity, run_key
from tests.support.data_files import beir_folder
from tests.support.doc_pages import ROOT
from tests.support.encoding_here import encode_here
from tests.support.index_cases import HERE
from tests.support.tiny_models import build_tiny_encoder
from tests.support.tiny_training import write_pairs

TRAIN, ENCODE, BUILD, MINE, EVALUATE = JOBS = (
    "train-retriever",
    "encode",
    "index build",
    "mine",
    "evaluate",
)
OUTPUTS = ("encoder", "embeddings", "index", "mined.tsv", "report")


class Killed(BaseException):
    """As if the process had ended."""


def train(config: TrainRetrieverConfig) -> dict[str, Any]:
    """As `fit`, with weights drawn by the identity in place of trained ones."""
    identity = run_identity(config, RetrieverTask.survey(config))
    if (done := finished_run(config, identity)) is not None:
        return done
    output = build_tiny_encoder(Path(config.output), seed=int(run_key(identity)[:7], 16))
    figures = {"steps": 1}
    info = json.loads((output / "raytower.json").read_text())
    (output / "raytower.json").write_text(json.dumps({**info, "run": identity, "figures": figures}))
    return figures


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dummy_encoder_dir: Path) -> Work:
    return Work(tmp_path, monkeypatch, dummy_encoder_dir)


class Work:
    """A folder with the files of a pipeline of five steps, and which jobs were called."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, encoder: Path) -> None:
        patch.chdir(folder)
        shutil.copytree(encoder, "start")
        write_pairs(Path("train.tsv"), 16)
        write_pairs(Path("dev.tsv"), 8)
        write_pairs(Path("queries.tsv"), 8)
        Path("corpus.txt").write_text(
            "".join(f"{letter * 5} is {n}\n" for n in range(4) for letter in "abcdefgh")
        )
        self.ran: list[str] = []
        self.kill_in: str | None = None
        """A job that is killed after it has written."""
        jobs: dict[str, Callable[[Any], dict[str, Any]]] = {
            TRAIN: train,
            ENCODE: encode_here,
            BUILD: lambda config: build_index(config, HERE),
            MINE: find_reference(COMMANDS[MINE].run),
            EVALUATE: find_reference(COMMANDS[EVALUATE].run),
        }
        real = {COMMANDS[job].run: self._counted(job, run) for job, run in jobs.items()}
        patch.setattr(
            "raytower.pipeline.job.find_reference", lambda name: real.get(name) or find_reference(name)
        )

    def _counted(self, job: str, run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        def counted(config: Any) -> dict[str, Any]:
            self.ran.append(job)
            figures = run(config)
            if self.kill_in == job:
                self.kill_in = None
                raise Killed
            return figures

        return counted

    def config(self, change: dict[str, dict[str, Any]] | None = None) -> PipelineConfig:
        configs: dict[str, dict[str, Any]] = {
            TRAIN: {"model": "start", "train": "train.tsv", "output": "runs/encoder", "batch_size": 8},
            ENCODE: {"encoder": "runs/encoder", "input": "corpus.txt", "output": "runs/embeddings"},
            BUILD: {"embeddings": "runs/embeddings", "output": "runs/index", "kind": "flat"},
            MINE: {
                "encoder": "runs/encoder",
                "index": "runs/index",
                "input": "dev.tsv",
                "output": "runs/mined.tsv",
            },
            EVALUATE: {
                "encoder": "runs/encoder",
                "index": "runs/index",
                "queries": "queries.tsv",
                "output": "runs/report",
            },
        }
        configs[MINE]["recall_k"] = 8
        configs[TRAIN]["workers"] = {"num": 1}
        steps = [{"job": job, "config": {**configs[job], **(change or {}).get(job, {})}} for job in JOBS]
        return make_config(PipelineConfig, {"state": "runs/state.json", "steps": steps})

    def run(self, **change: dict[str, Any]) -> list[str]:
        """The jobs that ran. The plan has named them before, and those that read what was then made anew alike."""
        config = self.config({job.replace("_", " "): values for job, values in change.items()})
        planned = [step["job"] for step in plan_pipeline(config)["steps"] if not step["skipped"]]
        self.ran.clear()
        steps = run_pipeline(config)["steps"]
        ran = [step["job"] for step in steps if not step["skipped"]]
        assert planned[:1] == ran[:1]
        assert set(planned) >= set(ran)
        assert list(dict.fromkeys(self.ran)) == ran
        return ran


def test_only_what_a_change_concerns_runs_again(work: Work) -> None:
    assert work.run() == list(JOBS)
    assert work.run() == []
    report = json.loads(Path("runs/report/report.json").read_text())
    write_pairs(Path("queries.tsv"), 6)
    assert work.run() == [EVALUATE]
    assert json.loads(Path("runs/report/report.json").read_text()) != report
    assert work.run(mine={"num_negatives": 2}) == [MINE]
    assert work.run(mine={"num_negatives": 2}, index_build={"kind": "hnsw"}) == [BUILD, MINE, EVALUATE]
    assert work.run(mine={"num_negatives": 2}, index_build={"kind": "hnsw"}) == []
    corpus = Path("corpus.txt")
    corpus.write_text(corpus.read_text() + "one more\n")
    assert work.run() == [ENCODE, BUILD, MINE, EVALUATE]
    assert work.run() == []


def test_a_training_file_that_was_doubled_and_other_epochs_train_again(work: Work) -> None:
    """The first was skipped; the second ended with "output exists and was made by another config"."""
    work.run()
    first = weights()
    pairs = Path("train.tsv")
    pairs.write_text(pairs.read_text() * 2)
    assert work.run() == list(JOBS)
    second = weights()
    more = {"train-retriever": {"epochs": 2}}
    assert work.run(**more) == list(JOBS)
    assert work.run(**more) == []
    assert len({first, second, weights()}) == 3
    # Nothing that was made is lost: what was replaced lies beside it.
    assert Path("runs/.encoder.former-1/model.safetensors").read_bytes() == first
    assert Path("runs/.encoder.former-2/model.safetensors").read_bytes() == second
    assert (Path("runs") / ".embeddings.former-2" / "manifest.json").is_file()
    # Back again: the model of one epoch is not taken for finished because it was once.
    assert work.run() == list(JOBS)
    assert weights() == second


def weights(folder: str = "runs/encoder") -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_keys_that_change_no_result_run_nothing(work: Work) -> None:
    work.run()
    free = {
        "train-retriever": {"log_every_steps": 1, "workers": {"num": 4}},
        "encode": {"workers": {"num": 3}},
        "index_build": {"workers": {"num_cpus": 3}},
        "mine": {"workers": {"num": 3}},
    }
    assert work.run(**free) == []
    assert work.run(index_build={"workers": {"num": 3}}) == [BUILD, MINE, EVALUATE], "into as many shards"
    work.run()
    assert work.run(**{"train-retriever": {"epochs": 1}}) == [], "the default, written down"


def test_an_output_that_is_gone_is_made_again_and_nothing_else_where_it_is_the_same(work: Work) -> None:
    work.run()
    before = weights()
    for job, output in zip(JOBS, OUTPUTS, strict=True):
        place = Path("runs") / output
        if place.is_file():
            place.write_bytes(b"")
        else:
            shutil.rmtree(place)
            place.mkdir()
        assert work.run() == [job]
        assert work.run() == []
    assert weights() == before
    shutil.rmtree("runs/encoder")
    Path("runs/mined.tsv").unlink()
    assert work.run() == [TRAIN, MINE]


def test_an_output_that_is_not_whole_is_made_again(work: Work) -> None:
    work.run()
    before = weights()
    # raytower.json alone would say "finished; nothing to do".
    Path("runs/encoder/model.safetensors").unlink()
    assert work.run() == [TRAIN]
    assert weights() == before
    next(Path("runs/embeddings").glob("*.parquet")).unlink()
    assert work.run() == [ENCODE]
    assert work.run() == []


def test_a_pipeline_that_is_killed_again_and_again_comes_to_its_end(work: Work) -> None:
    for change in ({}, {TRAIN: {"epochs": 2}}):
        for number, job in enumerate(JOBS):
            work.ran.clear()
            work.kill_in = job
            with pytest.raises(Killed):
                run_pipeline(work.config(change))
            assert set(work.ran) == set(JOBS[max(number - 1, 0) : number + 1]), (
                "what was recorded does not run again"
            )
        assert work.run(**change) == [EVALUATE]
        assert work.run(**change) == []


def test_what_a_killed_step_left_makes_room_for_another_config(work: Work) -> None:
    work.kill_in = ENCODE
    with pytest.raises(Killed):
        run_pipeline(work.config())
    assert work.run(encode={"max_length": 16}) == list(JOBS[1:])


@pytest.mark.parametrize("output", OUTPUTS)
def test_foreign_outputs_are_refused_before_anything_runs(work: Work, output: str) -> None:
    place = Path("runs") / output
    place.parent.mkdir()
    notes = place if place.suffix else place / "notes.txt"
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("mine")
    for call in (plan_pipeline, run_pipeline):
        with pytest.raises(InputError, match=rf"step \d [a-z -]+: output 'runs/{output}'"):
            call(work.config())
    assert work.ran == []
    assert notes.read_text() == "mine"


def test_a_foreign_folder_in_place_of_an_output_is_never_moved(work: Work) -> None:
    work.run()
    shutil.rmtree("runs/encoder")
    Path("runs/encoder").mkdir()
    Path("runs/encoder/notes.txt").write_text("mine")
    with pytest.raises(
        InputError, match="step 1 train-retriever: output 'runs/encoder' holds files of something else"
    ):
        work.run(**{"train-retriever": {"epochs": 2}})
    assert Path("runs/encoder/notes.txt").read_text() == "mine"


def test_a_model_of_another_run_is_never_moved(work: Work) -> None:
    """A model that somebody trained there by hand."""
    config = work.config().steps[0].config
    train(make_config(TrainRetrieverConfig, {**config, "epochs": 3}))
    before = weights()
    with pytest.raises(InputError, match="made by another config"):
        run_pipeline(work.config())
    assert weights() == before


def test_an_output_that_something_else_has_changed_is_refused(work: Work) -> None:
    work.run()
    file = Path("runs/encoder/model.safetensors")
    save_file({name: tensor + 1.0 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        InputError, match="step 1 train-retriever: output 'runs/encoder' is not as the step left it"
    ):
        run_pipeline(work.config())


def test_steps_out_of_order_are_refused(work: Work) -> None:
    config = work.config()
    backwards = make_config(
        PipelineConfig, {"state": "s", "steps": [vars(step) for step in config.steps[::-1]]}
    )
    with pytest.raises(
        InputError, match=r"step 1 evaluate reads index 'runs/index', which step 3 index build writes"
    ):
        plan_pipeline(backwards)
    twice = work.config({ENCODE: {"output": "runs/encoder/embeddings"}})
    with pytest.raises(InputError, match="step 1 train-retriever and step 2 encode write to"):
        plan_pipeline(twice)


def test_a_set_whose_rows_have_changed_trains_again(work: Work) -> None:
    write_pairs(Path("more.tsv"), 16)
    change = {"train-retriever": {"train": {"sets": {"first": "train.tsv", "more": {"path": "more.tsv"}}}}}
    assert work.run(**change) == list(JOBS)
    assert work.run(**change) == []
    write_pairs(Path("more.tsv"), 24)
    assert work.run(**change)[0] == TRAIN
    Path("more.tsv").unlink()
    with pytest.raises(InputError, match=r"step 1 train-retriever: no file or folder at 'more\.tsv'"):
        plan_pipeline(work.config(change))


def test_a_missing_input_is_named_with_its_step(work: Work) -> None:
    work.run()
    Path("train.tsv").unlink()
    with pytest.raises(InputError, match=r"step 1 train-retriever: no file or folder at 'train\.tsv'"):
        plan_pipeline(work.config())


def test_the_names_of_classes_are_no_file(work: Work) -> None:
    """`labels` names a file in a classifier's config, and two classes in a reranker's."""
    config = {
        "model": "start",
        "train": "train.tsv",
        "output": "runs/reranker",
        "objective": "pointwise_cross_entropy",
        "labels": ["no", "yes"],
    }
    steps = [{"job": "train-reranker", "config": config}]
    plan = plan_pipeline(make_config(PipelineConfig, {"state": "runs/state.json", "steps": steps}))
    assert [step["skipped"] for step in plan["steps"]] == [False]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"format_version": 4}',
        '{"precious": 1}',
        '{"format_version": 3}',
        '{"format_version": 3, "steps": []}',
        '{"format_version": 3, "steps": {"runs/encoder": {}}}',
        '{"format_version": 3, "steps": {"runs/encoder": {"key": "k", "finished": true, "new": 1}}}',
    ],
)
def test_a_state_that_cannot_be_read_is_refused_and_left_as_it_is(work: Work, content: str) -> None:
    """A JSON file of something else was taken for a state of before, and written over."""
    Path("runs").mkdir()
    Path("runs/state.json").write_text(content)
    with pytest.raises(FormatError, match=r"no state of a pipeline|is damaged, or was changed by hand"):
        run_pipeline(work.config())
    assert Path("runs/state.json").read_text() == content


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("runs/mined.tsv", "lies where step 4 mine writes"),
        ("runs/index/state.json", "lies where step 3 index build writes"),
        ("./runs/../runs/report", "lies where step 5 evaluate writes"),
        ("runs/mined.tsv/state.json", "lies where step 4 mine writes"),
    ],
)
def test_a_state_among_the_outputs_is_refused(work: Work, state: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_pipeline(work.config().model_copy(update={"state": state}))
    assert not Path("runs").exists()


@pytest.mark.parametrize(("path", "output"), [("data", "data/mined.tsv"), ("data/*.tsv", "data/mined.tsv")])
def test_a_step_whose_input_would_hold_a_later_output_is_refused(work: Work, path: str, output: str) -> None:
    """The first run read it not, and the next one did: steps that never were finished, and rows read twice."""
    Path("data").mkdir()
    shutil.copy("train.tsv", "data/pairs.tsv")
    change: dict[str, dict[str, Any]] = {TRAIN: {"train": path}, MINE: {"output": output}}
    with pytest.raises(
        InputError, match=rf"step 1 train-retriever reads .* step 4 mine writes '{output}' there"
    ):
        run_pipeline(work.config(change))
    with pytest.raises(InputError, match=r"state 'data/state\.tsv' lies in train\.path"):
        run_pipeline(work.config({TRAIN: {"train": path}}).model_copy(update={"state": "data/state.tsv"}))
    change[MINE]["output"] = "data/mined/now.tsv"
    assert path == "data" or plan_pipeline(work.config(change))
    change |= {MINE: {}, ENCODE: {"output": "data/embeddings"}, BUILD: {"embeddings": "data/embeddings"}}
    assert plan_pipeline(work.config(change)), "embeddings are no data"


def test_a_file_of_suspects_is_an_output_too() -> None:
    """Beside others a step that read them did not wait for the step that writes them."""
    folder: dict[str, Any] = {
        "encoder": "start",
        "index": "runs/index",
        "input": "texts.tsv",
        "mode": "votes",
    }
    suspects = {**folder, "labelled": True, "output": "runs/labels.tsv", "suspects": "runs/suspects.tsv"}
    steps: list[dict[str, Any]] = [
        {"job": "classify", "config": suspects},
        {"job": "classify", "config": {**folder, "input": "runs/suspects.tsv", "output": "runs/again.tsv"}},
    ]
    writer, reader = _prepare(make_config(PipelineConfig, {"state": "s", "steps": steps}))
    assert reader.makers == {1}
    assert waits([writer.access, reader.access], may_hold) == [frozenset(), frozenset({0})]
    steps[1]["config"]["output"] = "runs/suspects.tsv"
    with pytest.raises(InputError, match=r"write to 'runs/suspects\.tsv' and 'runs/suspects\.tsv'"):
        _prepare(make_config(PipelineConfig, {"state": "s", "steps": steps}))


def test_every_key_that_names_something_to_read_counts() -> None:
    """A key that is added later is to be looked at here: does it name an input, or not?"""
    no_inputs = {
        "output",
        "log_dir",
        "label_field",
        "suspects",
        "report",
        "plots",
        "positive",
        "input.id_field",
        "input.split",
        "queries.split",
    }
    no_inputs |= {"query", "filter"}
    no_inputs |= {f"columns.{kind}" for kind in ("title", "question", "category", "document")}
    no_inputs |= {"id_separator", "generate.prompt_zh", "generate.prompt_en"}
    no_inputs |= {"apart_from.id_field", "apart_from.split", "apart_from.text_fields"}
    no_inputs |= {
        "train.split",
        "dev.split",
        "target.queries.split",
        "input.text_fields",
        "indexed",
        "query_prefix",
        "document_prefix",
        "prefix",
        "dev.metric",
        "dev.chosen_by",
        "instruction_format",
        *("wandb.project", "wandb.entity", "wandb.dir", "mlflow.experiment", "mlflow.tracking_uri"),
    }
    no_inputs |= {"workers.resources", "workers.label_selector"}
    # Of `serve reload`, and of what changes an index.
    no_inputs |= {"url", "key_env", "collection", "index_version", "ids", "values"}
    found: set[str] = set()
    for job in STEP_JOBS.keys() - _PIPELINES_OF:  # those count by what their own steps read
        found |= text_keys(find_reference(COMMANDS[job].config))
    assert found - no_inputs == INPUT_KEYS.keys() - {"compare"}, "which is a list of names"


def test_a_split_that_is_not_read_and_a_file_of_a_label(work: Work) -> None:
    """Of a BEIR folder a step's content is that of its split; of paths by label that of each file."""
    folder = beir_folder(Path("set"))
    steps = {
        "train-retriever": {"model": "start", "train": "set", "output": "runs/a"},
        "train-classifier": {
            "model": "start",
            "train": {"paths": {"x": "x.txt", "y": "y.txt"}},
            "output": "runs/b",
        },
        "evaluate": {"encoder": "start", "index": "runs/index", "queries": "set"},
    }
    for name in ("x.txt", "y.txt"):
        Path(name).write_text("text\n")
    config = make_config(
        PipelineConfig,
        {
            "state": "runs/state.json",
            "steps": [{"job": job, "config": values} for job, values in steps.items()],
        },
    )

    def contents() -> list[list[str]]:
        return [
            [
                content_of(item.kind, item.name, item.rows, item.records)
                for item in step.inputs
                if item.kind == "rows"
            ]
            for step in _prepare(config)
        ]

    seen = [contents()]
    assert list(map(len, seen[0])) == [1, 2, 1]
    for path in (folder / "qrels" / "dev.tsv", folder / "README.txt"):
        path.write_text("words")
        assert contents() == seen[0]
    for path in (folder / "qrels" / "train.tsv", folder / "qrels" / "test.tsv", Path("y.txt")):
        path.write_text(path.read_text() + "\n")
        seen.append(contents())
    assert [[a == b for a, b in zip(*two, strict=True)] for two in pairwise(seen)] == [
        [False, True, True],
        [True, True, False],
        [True, False, True],
    ]


def test_each_set_of_a_training_reads_its_split(work: Work) -> None:
    folder = beir_folder(Path("set"))
    shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels" / "dev.tsv")
    train = {"split": "dev", "sets": {"x": "set", "y": {"path": "set", "split": "test"}}}
    dev = {"split": "test", "sets": {"x": {"path": "set", "corpus": "set"}}}
    values = {"model": "start", "train": train, "dev": dev, "output": "runs/a"}
    steps = [{"job": "train-retriever", "config": values}]
    config = make_config(PipelineConfig, {"state": "runs/state.json", "steps": steps})

    def contents() -> dict[str, str]:
        (step,) = _prepare(config)
        return {
            item.key: content_of(item.kind, item.name, item.rows, item.records)
            for item in step.inputs
            if item.kind == "rows"
        }

    changed = []
    for split in ("train", "dev", "test"):
        before = contents()
        path = folder / "qrels" / f"{split}.tsv"
        path.write_text(path.read_text() + "\n")
        changed.append([key for key, content in contents().items() if content != before[key]])
    assert list(before) == [
        "train.sets.x.path",
        "train.sets.y.path",
        "dev.sets.x.path",
        "dev.sets.x.corpus",
    ]
    assert changed == [[], ["train.sets.x.path"], ["train.sets.y.path", "dev.sets.x.path"]]


def text_keys(config: type[Config]) -> set[str]:
    """Dotted names of the fields that hold any text."""
    found: set[str] = set()
    for name, field in config.model_fields.items():
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Config):
                found |= {f"{name}.{inner}" for inner in text_keys(kind)}
            elif kind is str or get_args(kind) == (str, str):
                found.add(name)
    return found


def test_nothing_is_removed_where_storage_cannot_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Location, "is_local", property(lambda place: False))
    with pytest.raises(InputError, match=r"model' was made by .* cannot rename it .* remove it"):
        put_aside(str(tmp_path / "model"))
    assert (tmp_path / "model").is_dir()


def test_a_comparison_is_made_anew_where_what_it_compares_has_changed(tmp_path: Path) -> None:
    """It read nothing that counted: it was skipped after its runs had changed, and where its output was gone."""
    (tmp_path / "q.trec").write_text("q1 0 a 1\nq2 0 b 1\nq3 0 c 1\n")

    def write_run(name: str, first: str) -> None:
        lines = [
            f"{query} Q0 {document} {rank} {9 - rank} t\n"
            for query, right in (("q1", "a"), ("q2", "b"), ("q3", "c"))
            for rank, document in enumerate((right, "x") if first == "right" else ("x", right), start=1)
        ]
        (tmp_path / name).write_text("".join(lines))

    write_run("A.run", "wrong")
    write_run("B.run", "right")
    path = {
        name: str(tmp_path / name) for name in ("A.run", "B.run", "q.trec", "a", "b", "both", "state.json")
    }
    steps = [
        {"job": "evaluate", "config": {"run": path["A.run"], "queries": path["q.trec"], "output": path["a"]}},
        {"job": "evaluate", "config": {"run": path["B.run"], "queries": path["q.trec"], "output": path["b"]}},
        {"job": "evaluate", "config": {"compare": [path["a"], path["b"]], "output": path["both"]}},
    ]
    config = make_config(PipelineConfig, {"state": path["state.json"], "steps": steps})

    def ran() -> list[bool]:
        return [not step["skipped"] for step in run_pipeline(config)["steps"]]

    assert ran() == [True, True, True]
    assert ran() == [False, False, False]
    write_run("B.run", "wrong")
    assert ran() == [False, True, True]
    assert (
        json.loads((tmp_path / "both" / "comparison.json").read_text())["comparisons"][0]["difference"] == 0
    )
    shutil.rmtree(tmp_path / "both")
    assert ran() == [False, False, True]
    early = {"state": str(tmp_path / "s2"), "steps": [steps[2], *steps[:2]]}
    with pytest.raises(InputError, match="step 1"):
        plan_pipeline(make_config(PipelineConfig, early))


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/*/*.yaml")), ids=lambda path: path.stem)
def test_configs_of_the_results_are_valid(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines that the results tell people to copy: keys, and the order of what is written and read."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "steps" in values:
        steps = _prepare(make_config(PipelineConfig, values))
        assert [step.job for step in steps] == [step["job"] for step in values["steps"]]
    else:
        named = re.match(r"# raytower ([a-z]+(?:-[a-z]+| build)?)[:,]", path.read_text(encoding="utf-8"))
        assert named is not None
        make_config(find_reference(COMMANDS[named[1]].config), values, source=path.name)
