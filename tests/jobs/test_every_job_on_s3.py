"""Every job that reads or writes files, on S3: a server that is busy now and then, and credentials of the environment.

Each job runs on `s3://bucket/…` and on a local folder with the same files, by the command line in this process, and has
to leave the same rows. Nothing that is written, shown or passed to a process may hold the secret key or the token.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from raytower.cli import main
from raytower.index.reader import Index
from raytower.storage import Location
from tests.support.encoding_here import no_ray
from tests.support.index_cases import HERE
from tests.support.processes import ROOT, clean_environment
from tests.support.real_server import serving
from tests.support.s3_server import CACHE, BusyFront, S3Server, busy_front, s3_server
from tests.support.tiny_training import answer, question
from tests.unit.index.test_convert import write_format_2

# It mostly waits for a server, which is a process of its own.
pytestmark = pytest.mark.processes

SECRET, TOKEN = f"s3cret{secrets.token_hex(12)}", f"t0ken{secrets.token_hex(12)}"
BUCKET = "s3://bucket"
DOCUMENTS = 24
# Titles and texts of the data have few letters.
SHORT = {"min_query_letters": 1, "min_document_letters": 1}
# Figures that differ between two runs of one job have these in their names.
_OF_ONE_RUN = ("second", "share", "bytes", "timings")


@dataclass
class World:
    """The same files in a bucket and in a folder, and all that was shown so far."""

    server: S3Server
    front: BusyFront
    local: str
    said: list[str] = field(default_factory=list)

    def run(self, job: str, **keys: Any) -> dict[str, Any]:
        """Run a job on the bucket: `{at}` in a value is the bucket. Returns its figures."""
        return self._run(BUCKET, job, keys)

    def run_both(self, job: str, **keys: Any) -> dict[str, Any]:
        """Run a job on the bucket and on the folder; both have to tell the same. Returns the figures of the first."""
        told = [self._run(at, job, keys) for at in (BUCKET, self.local)]
        here, there = (json.dumps(_of_every_run(figures), sort_keys=True) for figures in reversed(told))
        # Where a place is told with its endpoint and region.
        there = re.sub(rf'({BUCKET}[^"?]*)\?[^"]*', r"\1", there)
        assert there.replace(BUCKET, "{at}") == here.replace(self.local, "{at}")
        return told[0]

    def same_file(self, name: str) -> bytes:
        """The content of a file that both have to have alike."""
        content = self.server.read("bucket", name)
        assert content == (Path(self.local) / name).read_bytes()
        return content

    def _run(self, at: str, job: str, keys: dict[str, Any]) -> dict[str, Any]:
        arguments = [*job.split(), "--json"]
        for name, value in keys.items():
            text = value if isinstance(value, str) else json.dumps(value)
            arguments += [f"--{name.replace('__', '.')}", text.replace("{at}", at)]
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
        self.said += [out.getvalue(), err.getvalue(), " ".join(arguments)]
        assert code == 0, err.getvalue()
        figures: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
        return figures


def _of_every_run(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _of_every_run(each)
            for name, each in value.items()
            if not any(word in name for word in _OF_ONE_RUN)
        }
    return [_of_every_run(each) for each in value] if isinstance(value, list) else value


def write_data(folder: Path) -> None:
    rows = [
        {"id": f"d{n}", "title": f"part {n}", "text": answer(n), "label": f"kind {n % 3}", "price": n}
        for n in range(DOCUMENTS)
    ]
    more = [{**row, "id": f"more {row['id']}", "text": f"{row['text']} more"} for row in rows[:5]]
    lines = {
        "corpus.jsonl": [json.dumps(row) for row in rows],
        "more.jsonl": [json.dumps(row) for row in more],
        "fresh.jsonl": [json.dumps(row) for row in rows[4:]],
        "pairs.tsv": [f"{question(n)}\t{answer(n)}" for n in range(16)],
        "queries.txt": [question(n) for n in range(8)],
        "labelled.tsv": [f"{question(n)}\tkind {n % 3}" for n in range(18)],
        "scored.tsv": ["query\ttitle\tlabel", *(f"{question(n)}\t{answer(n)}\t{n % 2}" for n in range(8))],
        "gone.txt": ["d1", "d2"],
    }
    folder.mkdir(parents=True)
    for name, content in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path, dummy_reranker_dir: Path
) -> Iterator[World]:
    local = tmp_path_factory.mktemp("local") / "files"
    write_data(local / "data")
    shutil.copytree(dummy_encoder_dir, local / "encoder")
    shutil.copytree(dummy_reranker_dir, local / "reranker")
    write_format_2(local / "old", "flat")
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as server,
        busy_front(server, every=23) as front,
        pytest.MonkeyPatch.context() as patch,
        no_ray(),
    ):
        for file in (path for path in local.rglob("*") if path.is_file()):
            server.put("bucket", str(file.relative_to(local)), file.read_bytes())
        patch.setenv("AWS_ENDPOINT_URL", f"http://{front.address}")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_SESSION_TOKEN", TOKEN)
        for module in ("build", "compact", "convert"):
            patch.setattr(f"raytower.index.{module}.on_ray", lambda *_: HERE)
        world = World(server, front, str(local))
        world.run_both(
            "encode", encoder="{at}/encoder", input="{at}/data/corpus.jsonl", output="{at}/embeddings"
        )
        world.run_both("index build", embeddings="{at}/embeddings", output="{at}/index", kind="flat")
        yield world


class TestJobs:
    def test_encode_goes_on_where_it_was(self, world: World) -> None:
        keys = {"encoder": "{at}/encoder", "input": "{at}/data/more.jsonl", "output": "{at}/more"}
        assert world.run_both("encode", **keys)["rows"] == 5
        assert world.run_both("encode", **keys)["files_encoded"] == 0

    def test_an_index_is_built_and_proved(self, world: World) -> None:
        assert world.run_both("index verify", index="{at}/index", encoder="{at}/encoder")["verified"] is True
        assert Index.open(f"{BUCKET}/index").num_rows == DOCUMENTS

    def test_add_delete_set_sync_compact_gc_list_and_rollback(self, world: World) -> None:
        world.run_both("encode", encoder="{at}/encoder", input="{at}/data/more.jsonl", output="{at}/five")
        world.run_both("index build", embeddings="{at}/embeddings", output="{at}/changed", kind="flat")
        index = {"index": "{at}/changed"}
        assert world.run_both("index add", **index, embeddings="{at}/five")["rows"] == DOCUMENTS + 5
        assert world.run_both("index delete", **index, input="{at}/data/gone.txt")["deleted"] == 2
        assert world.run_both("index set", **index, values={"price": 7}, filter={"label": "kind 1"})[
            "changed"
        ]
        synced = world.run_both("index sync", **index, input="{at}/data/fresh.jsonl", encoder="{at}/encoder")
        assert (synced["added"], synced["deleted"]) == (0, 5 + 2)
        assert world.run_both("index compact", **index)["compacted"] is True
        assert len(world.run_both("index list", **index)["versions"]) == 6
        assert world.run_both("index rollback", **index, to="000002")["version"] == "000007"
        assert world.run("index gc", **index, keep=1, unfinished="true")["freed_bytes"] > 0
        assert world.run("index verify", **index)["rows"] == DOCUMENTS + 5

    def test_convert(self, world: World) -> None:
        assert world.run_both("index convert", index="{at}/old", remove_old="true")["rows"] == 157
        assert not world.server.keys("bucket", "old/CURRENT")

    def test_search_of_a_file_and_rerank(self, world: World) -> None:
        recall = {"index": "{at}/index", "encoder": "{at}/encoder", "input": "{at}/data/queries.txt", "k": 5}
        world.run_both("search", **recall, output="{at}/hits.jsonl")
        assert len(world.same_file("hits.jsonl").splitlines()) == 8 * 5
        ranked = {"reranker": "{at}/reranker", "input": "{at}/hits.jsonl", "output": "{at}/ranked.parquet"}
        world.run_both("rerank", **ranked)
        world.same_file("ranked.parquet")

    def test_mine(self, world: World) -> None:
        keys = {
            "encoder": "{at}/encoder",
            "index": "{at}/index",
            "input": "{at}/data/pairs.tsv",
            "recall_k": 8,
        }
        world.run_both("mine", **keys, output="{at}/mined.tsv")
        assert len(world.same_file("mined.tsv").splitlines()) > 16

    def test_evaluate(self, world: World) -> None:
        keys = {"encoder": "{at}/encoder", "index": "{at}/index", "queries": "{at}/data/pairs.tsv"}
        world.run_both("evaluate", **keys, output="{at}/report")
        world.same_file("report/run.trec")
        assert world.server.read("bucket", "report/report.html")

    def test_classify_and_its_tuning(self, world: World) -> None:
        keys = {"encoder": "{at}/encoder", "index": "{at}/index", "input": "{at}/data/labelled.tsv"}
        keys |= {"mode": "votes"}
        world.run_both("tune-classify", **keys, output="{at}/votes.json", calibration="none", folds=2)
        world.same_file("votes.json")
        world.run_both(
            "classify", **keys, tuned="{at}/votes.json", output="{at}/labels.tsv", report="{at}/page.html"
        )
        assert len(world.same_file("labels.tsv").splitlines()) >= 18

    def test_similarity(self, world: World) -> None:
        keys = {"encoder": "{at}/encoder", "input": "{at}/data/scored.tsv", "output": "{at}/scores.tsv"}
        world.run_both("similarity", **keys)
        world.same_file("scores.tsv")

    def test_pairs(self, world: World) -> None:
        keys = {"input": "{at}/data/corpus.jsonl", "output": "{at}/made.jsonl", "rules": '["title"]'}
        world.run_both("pairs", **keys, file_type="jsonl", **SHORT)
        assert world.same_file("made.jsonl")

    def test_tune_fusion_stores_its_weight(self, world: World) -> None:
        world.run_both("index build", embeddings="{at}/embeddings", output="{at}/tuned", kind="flat")
        keys = {"encoder": "{at}/encoder", "index": "{at}/tuned", "queries": "{at}/data/pairs.tsv"}
        assert world.run_both("tune-fusion", **keys)["index_version"] == "000002"

    def test_export(self, world: World) -> None:
        pytest.importorskip("onnxruntime")
        world.run("export", encoder="{at}/encoder", output="{at}/exported")
        assert "exported/onnx/model.onnx" in world.server.keys("bucket", "exported")
        assert world.run("embed", encoder="{at}/exported", text="one", engine="onnx")["vectors"]

    def test_a_pipeline_whose_state_lies_there_too(self, world: World, tmp_path: Path) -> None:
        steps = [
            (
                "pairs",
                {
                    "input": "{at}/data/corpus.jsonl",
                    "output": "{at}/run/pairs.tsv",
                    "rules": ["title"],
                    **SHORT,
                },
            ),
            (
                "encode",
                {"encoder": "{at}/encoder", "input": "{at}/data/corpus.jsonl", "output": "{at}/run/e"},
            ),
            ("index build", {"embeddings": "{at}/run/e", "output": "{at}/run/index", "kind": "flat"}),
            (
                "index sync",
                {"index": "{at}/run/index", "input": "{at}/data/fresh.jsonl", "encoder": "{at}/encoder"},
            ),
            ("index compact", {"index": "{at}/run/index"}),
            (
                "evaluate",
                {"index": "{at}/run/index", "queries": "{at}/data/pairs.tsv", "output": "{at}/run/report"},
            ),
        ]
        config = {
            "state": "{at}/run/state.json",
            "steps": [{"job": job, "config": values} for job, values in steps],
        }
        file = tmp_path / "pipeline.json"
        file.write_text(json.dumps(config).replace("{at}", BUCKET))
        ran = [not step["skipped"] for step in world.run("pipeline", config=str(file))["steps"]]
        assert ran == [True] * 6
        stands = world.run("pipeline", config=str(file), status="true")
        assert [step["state"] for step in stands["steps"]] == ["finished"] * 6
        assert stands["running_by"] is None
        assert not any(not step["skipped"] for step in world.run("pipeline", config=str(file))["steps"])
        state = json.loads(world.server.read("bucket", "run/state.json"))
        assert len(state["lineage"]) == 6

    def test_an_index_is_served_and_a_newer_version_after_it(self, world: World) -> None:
        world.run("index build", embeddings="{at}/embeddings", output="{at}/served", kind="flat")
        with serving(index=f"{BUCKET}/served", encoder=f"{BUCKET}/encoder") as url:

            def first() -> str:
                asked = {"query": answer(3), "k": 1}
                answered = httpx.post(f"{url}/v1/search", json=asked, timeout=60).json()
                return str(answered["results"][0][0]["id"])

            found = first()
            world.run("index delete", index="{at}/served", ids=json.dumps([found]))
            moved = world.run("serve reload", url=url, index="{at}/served")
            assert (moved["changed"], moved["index_version"]) == (True, "000002")
            assert first() != found


@pytest.mark.slow  # a Ray of its own whose every process is looked at for minutes
def test_a_pipeline_with_a_training_on_workers_of_ray(world: World, tmp_path: Path) -> None:
    """A process of its own with a Ray of its own; its processes and Ray's logs are looked at while it runs."""
    at, workers = f"{BUCKET}/ray", {"num": 1, "num_cpus": 0.5}
    data = f"{BUCKET}/data"
    steps = [
        (
            "train-retriever",
            {"model": f"{BUCKET}/encoder", "train": f"{data}/pairs.tsv", "output": f"{at}/encoder"},
        ),
        (
            "encode",
            {"encoder": f"{at}/encoder", "input": f"{data}/corpus.jsonl", "output": f"{at}/embeddings"},
        ),
        ("index build", {"embeddings": f"{at}/embeddings", "output": f"{at}/index", "kind": "flat"}),
        ("evaluate", {"index": f"{at}/index", "queries": f"{data}/pairs.tsv", "output": f"{at}/report"}),
    ]
    training = {"batch_size": 8, "max_length": 32, "dtype": "float32", "epochs": 1}
    steps[0][1].update(training)  # type: ignore[arg-type]
    for _, values in steps[:3]:
        values["workers"] = workers  # type: ignore[assignment]
    config = {"state": f"{at}/state.json", "steps": [{"job": job, "config": values} for job, values in steps]}
    (tmp_path / "pipeline.json").write_text(json.dumps(config))
    short = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))  # Ray's sockets need a short path
    environment = clean_environment(RAY_TMPDIR=str(short), PYTHONPATH=f"{ROOT / 'platform'}")
    command = [sys.executable, "-m", "raytower.cli", "pipeline", "--config", str(tmp_path / "pipeline.json")]
    log = tmp_path / "log.txt"
    seen_arguments, seen_files = 0, 0
    try:
        with open(log, "wb") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 400
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            for each in psutil.Process(process.pid).children(recursive=True):
                try:
                    tells_nothing(" ".join(each.cmdline()).encode(), "the arguments of a process")
                    seen_arguments += 1
                except psutil.Error:
                    continue
            for file in short.rglob("*.*"):
                try:
                    tells_nothing(file.read_bytes(), str(file))
                    seen_files += 1
                except OSError:  # a socket, or gone
                    continue
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.kill()
        shutil.rmtree(short, ignore_errors=True)
    assert process.returncode == 0, log.read_text()
    assert seen_arguments > 5
    assert seen_files > 5
    world.said.append(log.read_text())
    assert "ray/encoder/raytower.json" in world.server.keys("bucket", "ray/encoder")
    assert json.loads(world.server.read("bucket", "ray/report/report.json"))


def test_requests_that_were_refused_for_the_rate_were_made_again(world: World) -> None:
    """By each of the three clients: pyarrow's, obstore's and Lance's."""
    refused, answered = world.front.refused, set(world.front.answered)
    assert len(refused) > 30
    assert [line for line in refused if line not in answered] == []
    clients = {line.split(" ", 2)[2].split("/")[0] for line in refused}
    assert len(clients) >= 2, clients
    assert world.front.tokens == {TOKEN}


def test_neither_key_nor_token_is_written_anywhere(world: World) -> None:
    """Neither in a log or an argument, nor in a manifest, report or state, nor in what lies in the cache."""
    assert len(world.said) > 60
    for text in world.said:
        tells_nothing(text.encode(), "what was shown")
    keys = world.server.keys("bucket")
    assert len(keys) > 60
    for key in keys:
        tells_nothing(world.server.read("bucket", key), key)
    for folder in (Path(world.local), CACHE, Location.of(world.local).parent.local_path):
        for file in (path for path in folder.rglob("*") if path.is_file()):
            tells_nothing(file.read_bytes(), str(file))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET


def tells_nothing(content: bytes, where: str) -> None:
    for what, word in (("the secret key", SECRET), ("the session token", TOKEN)):
        assert word.encode() not in content, f"{where} holds {what}"
