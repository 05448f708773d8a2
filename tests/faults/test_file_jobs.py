"""A job from file to file that is killed goes on where it was, and ends with the same output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from raytower.annotation.classify import classify
from raytower.annotation.config import ClassifyConfig, MineConfig
from raytower.annotation.mine import mine
from raytower.config import make_config
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate
from raytower.ranked.search import search_one_or_many
from raytower.retrieval.config import SearchConfig
from tests.support.killed_jobs import kill_once
from tests.support.processes import clean_environment
from tests.support.served_index import write_version

pytestmark = pytest.mark.processes
NUM_QUERIES = 8 * 1024
NUM_ROWS = 4 * 8192


def test_a_search_that_is_killed_goes_on(
    dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    (tmp_path / "q.txt").write_text("".join(f"query {number} in the sun\n" for number in range(NUM_QUERIES)))
    values = {"index": str(tmp_path / "index"), "input": str(tmp_path / "q.txt"), "k": 2}
    search_one_or_many(make_config(SearchConfig, {**values, "output": str(tmp_path / "whole.tsv")}))
    output, parts = tmp_path / "a.tsv", tmp_path / ".a.tsv.parts"
    given = ["--index", values["index"], "--input", values["input"], "--k", "2", "--output", str(output)]
    kill_once(
        lambda: (parts / "part-00000001.json").exists(),
        [sys.executable, "-m", "raytower.cli", "search", *map(str, given)],
        clean_environment(),
        tmp_path / "first.log",
    )
    kept = len(list(parts.glob("part-*.json")))
    assert 2 <= kept < 8
    assert not output.exists()
    (parts / ".part-00000007.0123.tmp").write_bytes(b"query\tand then nothing")
    capsys.readouterr()
    result = search_one_or_many(make_config(SearchConfig, {**values, "output": str(output)}))
    assert f"{kept} of 8 parts of {output} are finished already" in capsys.readouterr().err
    assert result["queries"] == NUM_QUERIES

    def scores(path: Path) -> list[float]:
        return [float(line.rpartition("\t")[2]) for line in path.read_text().splitlines()]

    # Threads of another process may round the last digit otherwise.
    assert scores(output) == pytest.approx(scores(tmp_path / "whole.tsv"), abs=2e-6)
    assert not parts.exists()


@pytest.mark.parametrize("job", ["mine", "classify"])
def test_rows_that_are_annotated_are_kept(
    job: str, dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    (tmp_path / "rows.tsv").write_text("".join(f"row {number}\tsun {number}\n" for number in range(NUM_ROWS)))
    values = {"encoder": dummy_encoder_dir, "index": tmp_path / "index", "input": tmp_path / "rows.tsv"}
    own = {"recall_k": 3} if job == "mine" else {"mode": "votes", "label_field": "number", "k": 2}
    given = {name: str(value) for name, value in {**values, **own}.items()}
    output, parts = tmp_path / "a.tsv", tmp_path / ".a.tsv.parts"
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    kill_once(
        lambda: (parts / "part-00000001.json").exists(),
        [sys.executable, "-m", "raytower.cli", job, *arguments, "--output", str(output)],
        clean_environment(),
        tmp_path / "first.log",
    )
    kept = len(list(parts.glob("part-*.json")))
    assert 2 <= kept < 4
    assert not output.exists()
    results, written = [], []
    for place in (output, tmp_path / "whole.tsv"):
        config = {**given, "output": str(place)}
        capsys.readouterr()
        if job == "mine":
            results.append(mine(make_config(MineConfig, config)))
        else:
            results.append(classify(make_config(ClassifyConfig, config)))
        assert (f"{kept} of 4 parts" in capsys.readouterr().err) == (place == output)
        # Without the scores: threads of another process may round the last digit otherwise.
        written.append([line.split("\t")[:2] for line in place.read_text().splitlines()])
    assert written[0] == written[1]
    assert len(written[0]) > NUM_ROWS
    assert not parts.exists()
    counts = results[0].keys() - {"seconds", "output", "coverage", "reliability", "ece", "intervals"}
    assert {name: results[0][name] for name in counts} == {name: results[1][name] for name in counts}


def test_an_evaluation_that_is_killed_goes_on(
    dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_version(tmp_path / "index", "000001", dummy_encoder_dir)
    queries = "".join(f"query {number} in the sun\tsun {number % 10}\n" for number in range(NUM_QUERIES))
    (tmp_path / "q.tsv").write_text(queries)
    given = {"index": str(tmp_path / "index"), "queries": str(tmp_path / "q.tsv")}
    output = tmp_path / "report"
    parts = output / ".run.trec.parts"
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    kill_once(
        lambda: (parts / "part-00000001.json").exists(),
        [sys.executable, "-m", "raytower.cli", "evaluate", *arguments, "--output", str(output)],
        clean_environment(),
        tmp_path / "first.log",
    )
    kept = len(list(parts.glob("part-*.json")))
    assert 2 <= kept < 8
    assert not (output / "run.trec").exists()
    capsys.readouterr()
    result = evaluate(make_config(EvaluateConfig, {**given, "output": str(output)}))
    assert f"{kept} of 8 parts" in capsys.readouterr().err
    whole = evaluate(make_config(EvaluateConfig, {**given, "output": str(tmp_path / "whole")}))
    assert not parts.exists()
    assert result["queries"] == whole["queries"] == NUM_QUERIES
    for name in ("recall@1", "recall@10", "mrr@10", "ndcg@10"):
        # Threads of another process may round the last digit otherwise, and so part two that are equal.
        assert result[name] == pytest.approx(whole[name], abs=1e-3)
    per_query = [
        [json.loads(line)["query_id"] for line in (folder / "per_query.jsonl").read_text().splitlines()]
        for folder in (output, tmp_path / "whole")
    ]
    assert per_query[0] == per_query[1]
