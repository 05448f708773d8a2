"""`raytower submit` before anything starts: its arguments, what is uploaded, what a cluster lacks. No Ray runs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import SimpleNamespace
from typing import Any

import pytest

from raytower.cli import main
from raytower.cli.keys import keys_of
from raytower.cluster import dashboard as dashboard_module
from raytower.cluster import submit as submit_module
from raytower.cluster import upload as upload_module
from raytower.cluster.arguments import own_arguments
from raytower.cluster.config import SubmitConfig
from raytower.cluster.dashboard import (
    Dashboard,
    RunningJob,
    find_token,
    other_versions,
    refuse_second_job,
)
from raytower.cluster.jobs import JOBS, check_job, driver_work, written_by
from raytower.cluster.paths import _USES, NamedPath, lacking_paths, named_paths, named_variables
from raytower.cluster.resources import Demand, DriverWork, NodeType, demands, driver_cpus, undecided, unmet
from raytower.cluster.there import _SCRIPT, There, read_answer
from raytower.cluster.upload import ConfigFile, Upload, entrypoint, pack, plan_upload, runtime_environment
from raytower.commands import COMMANDS, find_reference
from raytower.config import make_config
from raytower.errors import InputError
from raytower.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[3]
ENCODE = ["--encoder", "s3://b/encoder", "--input", "s3://b/corpus/", "--output", "s3://b/embeddings"]


class TestJobs:
    def test_every_file_of_jobs_is_a_job_that_can_be_submitted(self) -> None:
        files = set()
        for path in (ROOT / "jobs").glob("*.py"):
            match = re.search(r'run_command\("([^"]+)"', path.read_text(encoding="utf-8"))
            assert match is not None
            files.add(match[1])
        assert files == set(JOBS)

    def test_another_command_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InputError, match=r"job is 'encod', .* did you mean 'encode'\? There are adapt, "):
            check_job("encod")
        with pytest.raises(InputError, match=r"job is 'zzz', which cannot be submitted; there are adapt, "):
            check_job("zzz")

    def test_jobs_whose_own_process_computes_are_jobs(self) -> None:
        work = {name: driver_work(name) for name in JOBS}
        assert {name for name in JOBS if work[name] == "alone"} == {"export", "tune-classify", "tune-fusion"}
        assert {name for name in JOBS if work[name] == "beside workers"} >= {"evaluate", "pipeline"}
        assert {work[name] for name in ("encode", "mine", "classify")} == {"none"}

    @pytest.mark.parametrize(
        ("name", "values", "output"),
        [
            ("encode", {"output": "s3://b/e", "index": None}, "s3://b/e"),
            ("index add", {"index": "s3://b/i"}, "s3://b/i"),
            ("evaluate", {"index": "s3://b/i", "output": None}, None),
            ("pipeline", {"state": "s3://b/p.json", "steps": []}, "s3://b/p.json"),
        ],
    )
    def test_what_a_job_writes(self, name: str, values: dict[str, Any], output: str | None) -> None:
        assert written_by(name, values) == output


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "own"),
        [
            (
                ["encode", "--address", "http://h:1", "--config", "c.yaml", "--output", "o"],
                [
                    "--job=encode",
                    "--address=http://h:1",
                    "--arguments",
                    ["--config", "c.yaml", "--output", "o"],
                ],
            ),
            (
                ["index", "sync", "s3://b/i", "s3://b/c", "--shared=/mnt"],
                ["--job=index sync", "--shared=/mnt", "--arguments", ["s3://b/i", "s3://b/c"]],
            ),
            (
                ["index", "build", "--workers.num", "4", "--detach", "--replace", "--dry-run"],
                [
                    "--job=index build",
                    "--detach",
                    "--dry-run",
                    "--arguments",
                    ["--workers.num", "4", "--replace"],
                ],
            ),
            (
                ["encode", "--driver-cpus", "4", "--no-detach"],
                ["--job=encode", "--driver-cpus=4", "--no-detach"],
            ),
            (["search", "i", "--query", "-h"], ["--job=search", "--arguments", ["i", "--query", "-h"]]),
            (["encode", "-h"], ["--job=encode", "--help"]),
            (["encode", "--detach", "yes", "--json"], ["--job=encode", "--detach=yes", "--json"]),
            (["--follow", "encode-1a", "--address=h:1"], ["--follow=encode-1a", "--address=h:1"]),
            (["evaluate", "--env", "A", "--env", "B"], ["--job=evaluate", "--env=A", "--env=B"]),
            ([], []),
        ],
        ids=str,
    )
    def test_own_keys_and_those_of_the_job_are_parted(self, given: list[str], own: list[Any]) -> None:
        *rest, last = own or [None]
        expected = [*rest[:-1], f"--arguments={json.dumps(last)}"] if isinstance(last, list) else own
        assert own_arguments(given) == expected

    def test_no_job_has_a_key_of_submit(self) -> None:
        own = {key.path for key in keys_of(SubmitConfig)}
        for name in JOBS:
            others = {key.path for key in keys_of(find_reference(COMMANDS[name].config))}
            assert not own & others, name

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([], "job is null; name one as on the command line"),
            (["encode", "--follow", "x"], "follow is 'x' and 'encode' is given too"),
            (["--follow", "x", "--detach"], "follow is 'x' and 'detach' is given too"),
            (["encod", *ENCODE, "--address", "h:1"], "did you mean 'encode'?"),
            (["encode", "--encodr", "e", "--address", "h:1"], "nearest known key is 'encoder'"),
            (["encode", *ENCODE], "address is null and RAY_API_SERVER_ADDRESS unset"),
            (["encode", *ENCODE, "--address", "ray://h:10001"], "it must be that of the dashboard"),
            (["encode", *ENCODE, "--address", "http://[::1"], "it must be that of the dashboard"),
            (["encode", *ENCODE, "--address", "h:dashboard"], "it must be that of the dashboard"),
            (["encode", *ENCODE, "--env", "NO_SUCH_1"], "env names NO_SUCH_1, which is not set here"),
            (["encode", "--input", "a.tsv", "--config", "/no/such.yaml"], "/no/such.yaml': cannot be read"),
        ],
        ids=str,
    )
    def test_what_cannot_be_meant_is_refused(
        self,
        given: list[str],
        message: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        monkeypatch.setattr(
            submit_module, "plan_upload", lambda *_: Upload(root=None, files={}, config_file=None)
        )
        assert main(["submit", *given]) == 2
        assert message in capsys.readouterr().err


# Keys of jobs that take texts and name neither files nor folders.
NO_PATHS = {
    *("split", "id_field", "text_fields", "prefix", "query_prefix", "document_prefix", "instruction_format"),
    *(
        "metric",
        "metrics",
        "label_field",
        "positive",
        "query",
        "filter",
        "values",
        "ids",
        "indexed",
        "host",
        "name",
    ),
    *(
        "route_prefix",
        "page_title",
        "url",
        "collection",
        "collections",
        "key_env",
        "admin_key_env",
        "api_key_env",
    ),
    *(
        "allowed_hosts",
        "cors_origins",
        "title",
        "question",
        "category",
        "document",
        "id_separator",
        "prompt_zh",
    ),
    *("prompt_en", "target_modules", "project", "entity", "experiment", "tracking_uri", "chosen_by", "sets"),
    *("keep_checkpoints", "class_weights", "sentry_dsn", "service_name", "otlp_endpoint"),
    *("training", "encoding", "indexing", "mining", "pairs", "weights", "job", "config", "steps"),
    *("resources", "label_selector"),
}


def test_every_text_of_a_job_s_config_is_known_to_be_a_path_or_none() -> None:
    unknown = {
        f"{name}: {key.path}"
        for name in JOBS
        for key in keys_of(find_reference(COMMANDS[name].config))
        if re.search(r"\bTEXT\b|JSON", key.kind) and key.name not in NO_PATHS | _USES.keys()
    }
    assert unknown == set()


class TestPaths:
    def test_they_are_found_in_sections_and_steps(self) -> None:
        values = {
            "steps": [{"job": "encode", "config": {"input": {"path": "/d/c.tsv"}, "output": "s3://b/e"}}],
            "state": "/d/p.json",
            "train": {"paths": {"sports": "/d/s.txt"}, "labels": ["a", "b"]},
            "access_log": {"path": "-"},
            "compare": ["/r/1", "/r/2"],
            "metric": "recall@10",
        }
        assert [(path.key, path.value, path.use) for path in named_paths(values)] == [
            ("steps.0.config.input.path", "/d/c.tsv", "reads"),
            ("steps.0.config.output", "s3://b/e", "writes"),
            ("state", "/d/p.json", "writes"),
            ("train.paths.sports", "/d/s.txt", "reads"),
            ("compare.0", "/r/1", "reads"),
            ("compare.1", "/r/2", "reads"),
        ]

    def test_an_index_is_written_by_the_jobs_that_change_it(self) -> None:
        (read,), (written,) = named_paths({"index": "/i"}), named_paths({"index": "/i"}, changes_index=True)
        assert (read.use, written.use) == ("reads", "writes")

    @pytest.mark.parametrize(
        ("path", "options", "problem"),
        [
            (NamedPath("output", "s3://b/e", "writes"), {}, None),
            (NamedPath("output", "/data/e", "writes"), {}, "by --shared /data that this folder is mounted"),
            (NamedPath("output", "file:///data/e", "writes"), {}, "a path of one machine"),
            (NamedPath("output", "/data/e", "writes"), {"num_nodes": 1}, None),
            (NamedPath("output", "/data/e", "writes"), {"shared": ["/data/"]}, None),
            (NamedPath("output", "/data", "writes"), {"shared": ["/data"]}, None),
            (NamedPath("output", "/database/e", "writes"), {"shared": ["/data"]}, "a path of one machine"),
            (NamedPath("output", "/data/../e", "writes"), {"shared": ["/data"]}, "a path of one machine"),
            (NamedPath("output", "runs/e", "writes"), {"num_nodes": 1}, "it would lie in the uploaded copy"),
            (
                NamedPath("input.path", "data/c.tsv", "reads"),
                {"num_nodes": 1},
                "not among the uploaded files",
            ),
            (NamedPath("input.path", "few/c.tsv", "reads"), {}, None),
            (NamedPath("input.path", "./few/", "reads"), {}, None),
            (NamedPath("input.path", "few/*.tsv", "reads"), {}, None),
            (NamedPath("input.path", "fe", "reads"), {}, "not among the uploaded files"),
            (NamedPath("encoder", "intfloat/multilingual-e5-small", "model"), {}, None),
            (NamedPath("encoder", "runs/e", "model"), {"exists_here": {"runs/e"}}, "not among the uploaded"),
            (NamedPath("encoder", "~/e", "model"), {}, "a path of one machine"),
        ],
        ids=lambda value: str(getattr(value, "value", value)),
    )
    def test_what_a_node_would_not_find_is_refused(
        self, path: NamedPath, options: dict[str, Any], problem: str | None
    ) -> None:
        settings: dict[str, Any] = {"shared": [], "num_nodes": 3, "exists_here": set(), **options}
        found = lacking_paths([path], uploaded=["few/c.tsv", "jobs/encode_corpus.py"], **settings)
        if problem is None:
            assert found == []
        else:
            (message,) = found
            assert message.startswith(f"{path.key} is {path.value!r}")
            assert problem in message


class TestResources:
    @pytest.mark.parametrize(
        ("asked", "work", "cpus", "expected"),
        [
            (None, "none", [16], 0),
            (None, "alone", [16, 4], 8),
            (None, "alone", [4], 3),
            (None, "alone", [2], 1),
            (None, "alone", [1], 1),
            (None, "alone", [0.5], 0.5),
            (None, "alone", [], 8),
            (None, "beside workers", [16, 1], 1),
            (None, "beside workers", [3], 1),
            (None, "beside workers", [2], 0.1),
            (None, "beside workers", [], 1),
            (2.0, "alone", [16], 2),
            (0.0, "beside workers", [16], 0),
        ],
    )
    def test_cpus_of_a_job_s_own_process(
        self, asked: float | None, work: DriverWork, cpus: list[float], expected: float
    ) -> None:
        assert driver_cpus(asked, work, [{"CPU": number} for number in cpus]) == expected

    @pytest.mark.parametrize(
        ("values", "any_node", "trains", "expected"),
        [
            ({"workers": {"num": 4, "num_cpus": 2, "num_gpus": 0}}, True, False, [({"CPU": 2}, 1)]),
            ({"workers": {"num": 4, "num_cpus": 2, "num_gpus": 1}}, True, True, [({"CPU": 2, "GPU": 1}, 4)]),
            (
                {"workers": {"num": 4, "min": 2, "num_cpus": 2, "num_gpus": None}},
                True,
                True,
                [({"CPU": 2}, 2)],
            ),
            ({"workers": {"num": None, "num_cpus": None, "num_gpus": None}}, True, False, []),
            ({"workers": {"num": 4, "num_cpus": None, "num_gpus": None}}, False, False, [({"CPU": 1}, 1)]),
            ({"training": {"workers": {"num": 2, "num_gpus": 1}}}, True, False, [({"GPU": 1}, 1)]),
            ({"workers": {"num": 1, "resources": {"license": 2}}}, True, False, [({"license": 2}, 1)]),
            (
                {
                    **{
                        "layout": "split",
                        "replicas": 3,
                        "num_cpus": 2,
                        "num_gpus": None,
                        "autoscaling": None,
                    },
                    **{"rerank_replicas": 1, "rerank_num_cpus": 4, "rerank_num_gpus": 1},
                    **{"shard_replicas": 1, "shard_num_cpus": 1},
                },
                True,
                False,
                [({"CPU": 2}, 3), ({"CPU": 4, "GPU": 1}, 1)],
            ),
        ],
    )
    def test_what_a_config_asks_for(
        self,
        values: dict[str, Any],
        any_node: bool,
        trains: bool,
        expected: list[tuple[dict[str, float], int]],
    ) -> None:
        assert [(demand.bundle, demand.together) for demand in demands(values, any_node, trains)] == expected

    def test_every_job_s_example_can_be_asked(self) -> None:
        for name in JOBS:
            values = make_config(find_reference(COMMANDS[name].config), EXAMPLES[name].values)
            demands(values.model_dump(mode="json"), False, name.startswith("train-"))

    def test_a_number_of_workers_that_nodes_decide(self) -> None:
        assert undecided({"workers": {"num": None}})
        assert not undecided({"workers": {"num": 2}})
        assert not undecided({})

    @pytest.mark.parametrize(
        ("bundle", "together", "fits"),
        [
            ({"CPU": 4}, 1, True),
            ({"CPU": 4}, 2, True),
            ({"CPU": 4}, 3, False),
            ({"CPU": 4.5}, 1, False),
            ({"CPU": 0.1}, 80, True),
            ({"GPU": 1}, 1, False),
            ({"CPU": 1, "memory": 2**40}, 1, False),
        ],
    )
    def test_room_on_the_nodes_that_are_there(
        self, bundle: dict[str, float], together: int, fits: bool
    ) -> None:
        nodes = [{"CPU": 4.0, "memory": 2.0**34}, {"CPU": 4.0}, {}]
        problems = unmet([Demand(key="workers", bundle=bundle, together=together)], nodes, ())
        assert (problems == []) == fits

    def test_machines_that_may_come_count(self) -> None:
        gpus = Demand(key="workers", bundle={"CPU": 2, "GPU": 1}, together=9)
        gpu_worker = NodeType(name="gpu_worker", resources={"CPU": 48, "GPU": 4}, most=2)
        (message,) = unmet([gpus], [{"CPU": 16}], [gpu_worker])
        assert message == (
            "workers asks for 9 processes at once, each with 2 CPUs and 1 GPU, and there is room for 8; the cluster "
            "has 1 node with 16 CPUs, and with demand may come gpu_worker (48 CPUs, 4 GPUs): ask for less, or start "
            "nodes that have it"
        )
        more = NodeType(name="gpu_worker", resources={"CPU": 48, "GPU": 4}, most=3)
        assert unmet([gpus], [{"CPU": 16}], [more]) == []

    def test_what_no_node_has_is_said_with_what_there_is(self) -> None:
        one = Demand(key="driver_memory", bundle={"memory": 64 * 2**30})
        (message,) = unmet([one], [{"CPU": 2, "memory": 2**33}, {"CPU": 2, "memory": 2**33}, {}], ())
        assert message == (
            "driver_memory asks for 64 GiB of memory in one process; the cluster has 2 nodes with 2 CPUs, 8 GiB of "
            "memory; 1 node with nothing for workers, and none comes with demand: ask for less, or start nodes that "
            "have it"
        )


class TestVariables:
    def test_keys_that_name_one_are_found(self) -> None:
        values = {"security": {"key_env": "KEY", "admin_key_env": None}, "steps": [{"x_variable": "Y"}]}
        assert named_variables(values) == [("security.key_env", "KEY"), ("steps.0.x_variable", "Y")]

    def test_the_file_gives_a_process_its_values(self, tmp_path: Path) -> None:
        file = tmp_path / "environment.json"
        file.write_text(json.dumps({"A_SECRET": "schlüssel"}), encoding="utf-8")
        code = "import os, sys; print(os.environ['A_SECRET'] == 'schl\\u00fcssel', sys.argv[1:]); sys.exit(7)"
        done = subprocess.run(
            [sys.executable, "-m", "raytower.cluster.environment", "-c", code, "x y"],
            env={"PYTHONPATH": str(ROOT / "platform"), "RAYTOWER_ENVIRONMENT_FILE": str(file)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (7, "True ['x y']\n"), done.stderr

    def test_it_imports_nothing_that_is_heavy(self) -> None:
        code = "import sys, raytower.cluster.environment; print(len({'yaml', 'pydantic', 'ray'} & set(sys.modules)))"
        environment = {"PYTHONPATH": str(ROOT / "platform")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == "0\n", done.stderr


class TestToken:
    @pytest.mark.parametrize(
        ("environment", "file", "value", "source"),
        [
            ({"RAY_AUTH_TOKEN": "aa"}, "bb", "aa", "RAY_AUTH_TOKEN"),
            ({"RAY_AUTH_TOKEN_PATH": "PLACE"}, "bb\n", "bb", "PLACE"),
            ({"RAY_AUTH_TOKEN": "aa", "RAY_AUTH_MODE": "disabled"}, "bb", None, None),
            ({"RAY_AUTH_TOKEN_PATH": "PLACE", "RAY_AUTH_MODE": "token"}, "", None, None),
        ],
    )
    def test_it_is_looked_for_where_ray_looks(
        self, environment: dict[str, str], file: str, value: str | None, source: str | None, tmp_path: Path
    ) -> None:
        place = tmp_path / "token"
        place.write_text(file)
        given = {name: text.replace("PLACE", str(place)) for name, text in environment.items()}
        token = find_token(given)
        if value is None:
            assert token is None
        else:
            assert token is not None
            assert (token.value, token.source) == (value, str(source).replace("PLACE", str(place)))
            assert value not in repr(token)

    def test_the_home_s_is_the_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_token({}) is None
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("cc")
        found = find_token({})
        assert found is not None
        assert found.value == "cc"

    @pytest.mark.parametrize(
        "content", [b"aa\n# mine\n", b"aa bb", b"\xff\xfe\x00a", "schlüssel".encode(), b"a\x07"]
    )
    def test_what_is_no_token_is_refused_and_not_shown(self, content: bytes, tmp_path: Path) -> None:
        """Two lines were told to be an address where no dashboard answers; other bytes ended with a traceback."""
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(
            InputError, match=rf"^{tmp_path}/token holds no token: one is a single word"
        ) as raised:
            find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
        assert "aa" not in str(raised.value)

    @pytest.mark.parametrize(
        ("mode", "is_said"), [(0o644, True), (0o640, True), (0o600, False), (0o400, False)]
    )
    def test_it_is_said_that_others_may_read_it(
        self, mode: int, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "token").write_text("aa")
        (tmp_path / "token").chmod(mode)
        assert find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}) is not None
        said = capsys.readouterr().err
        assert (f"others may read {tmp_path}/token (mode {mode:o})" in said) == is_said
        assert "aa" not in said.replace(str(tmp_path), "")

    def test_an_address_with_a_password_is_refused_and_not_shown(self) -> None:
        with pytest.raises(InputError, match=r"address holds a name or a password") as raised:
            Dashboard.at("http://me:s3cret@127.0.0.1:8265")
        assert "s3cret" not in str(raised.value)

    def test_a_named_file_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"RAY_AUTH_TOKEN_PATH names '.*none', which cannot be read"):
            find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_versions_must_be_the_same() -> None:
    assert other_versions("2.60.0", "3.11.9", "2.60.0", "3.11.2") == []
    ray, python = other_versions("2.59.0", "3.12.1", "2.60.0", "3.11.2")
    assert ray.startswith("the cluster runs Ray 2.59.0, and this is Ray 2.60.0; both must be the same")
    assert "pip install 'ray[data,default]==2.59.0'" in ray
    assert python.startswith(
        "the cluster runs Python 3.12.1, and this is Python 3.11.2; both must be the same"
    )


@pytest.mark.parametrize("output", ["s3://b/e", "s3://b/e/", "/data/e", "/data/./e"])
def test_a_second_job_on_an_output_is_refused(output: str) -> None:
    running = [
        RunningJob(id="encode-1", job="encode", output="s3://b/e/"),
        RunningJob(id="encode-2", job="encode", output="/data/e"),
        RunningJob(id="serve-3", job="serve", output=None),
    ]
    name = "encode-1" if output.startswith("s3") else "encode-2"
    with pytest.raises(
        InputError, match=rf"is being written by job {name} \(encode\).*--follow {name}.*stop"
    ):
        refuse_second_job(output, running, "http://h:8265")
    refuse_second_job("s3://b/other", running, "http://h:8265")
    refuse_second_job(None, running, "http://h:8265")


class TestUpload:
    def test_a_checkout_takes_less_than_a_mebibyte(self, tmp_path: Path) -> None:
        upload = plan_upload(None, 64 * 2**20)
        assert {
            "jobs/encode_corpus.py",
            "platform/raytower/data/rows.py",
            "pyproject.toml",
        } <= upload.files.keys()
        left_out = ("tests/", "docs/", "benchmarks/", ".git/", "data/", "runs/")
        assert not [name for name in upload.files if name.startswith(left_out) or "__pycache__" in name]
        assert pack(upload, {}, tmp_path / "a.tar.xz") < 2**20
        pack(upload, {}, tmp_path / "b.tar.xz")
        assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes(), (
            "uploaded once, then known"
        )

    def test_secrets_of_a_checkout_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All that git does not ignore went along, for every user of a node to read."""
        shutil.copy(ROOT / ".rayignore", tmp_path)
        named = (
            "jobs/encode_corpus.py",
            "platform/raytower/__init__.py",
            "platform/raytower/data/rows.py",
            "own.tsv",
        )
        secret = (".env", ".aws/credentials", "deploy/.env", "s3.env", "jobs/.netrc", "platform/key.pem")
        for name in (*named, *secret):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
        monkeypatch.setattr(
            upload_module.raytower, "__file__", str(tmp_path / "platform" / "raytower" / "__init__.py")
        )
        assert set(plan_upload(None, 2**20).files) == set(named)

    def test_an_installed_package_travels_as_platform(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "site-packages" / "raytower"
        (package / "cli" / "__pycache__").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "cli" / "__init__.py").write_text("")
        (package / "cli" / "__pycache__" / "x.pyc").write_bytes(b"0")
        monkeypatch.setattr(upload_module.raytower, "__file__", str(package / "__init__.py"))
        upload = plan_upload(ConfigFile(name="c.yaml", content=b""), 2**20)
        assert list(upload.files) == ["platform/raytower/__init__.py", "platform/raytower/cli/__init__.py"]
        assert entrypoint("index build", upload, ["--replace"], False) == [
            *(
                "python",
                "-m",
                "raytower.cli",
                "index",
                "build",
                "--config",
                ".submitted/config/c.yaml",
                "--replace",
            )
        ]

    def test_too_much_is_refused_with_the_largest_entries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError) as raised:
            upload_module._refuse_large(
                {"big/a/1.bin": 700, "big/a/2.bin": 300, "corpus.tsv": 900, "jobs/x.py": 1}, 1000
            )
        said = str(raised.value)
        assert said.startswith(
            "max_upload is 1,000 bytes, and the files that would travel with the job have 1,901: "
        )
        assert (
            "the largest are big/a (1,000 bytes), corpus.tsv (900 bytes), jobs/x.py (1 bytes); name" in said
        )
        upload_module._refuse_large({"a": 1000}, 1000)

    def test_what_is_packed(self, tmp_path: Path) -> None:
        config = ConfigFile(name="mine.yaml", content=b"encoder: s3://b/e\n")
        (tmp_path / "run.sh").write_text("#!/bin/sh\n")
        (tmp_path / "run.sh").chmod(0o755)
        upload = Upload(root=tmp_path, files={"jobs/run.sh": tmp_path / "run.sh"}, config_file=config)
        pack(upload, {"KEY": "geheim"}, tmp_path / "u.tar.xz")
        with tarfile.open(tmp_path / "u.tar.xz") as packed:
            modes = {member.name: member.mode for member in packed.getmembers()}
            variables = packed.extractfile(".submitted/environment.json")
            assert variables is not None
            assert json.loads(variables.read()) == {"KEY": "geheim"}
        assert modes == {
            "jobs/run.sh": 0o755,
            ".submitted/config/mine.yaml": 0o600,
            ".submitted/environment.json": 0o600,
        }
        assert entrypoint("encode", upload, [], True) == [
            *("python", "-m", "raytower.cluster.environment", "-m", "raytower.cli", "encode"),
            *("--config", ".submitted/config/mine.yaml"),
        ]

    def test_the_runtime_environment_names_a_file_and_no_value(self, tmp_path: Path) -> None:
        plain = runtime_environment(tmp_path / "u.tar.xz", False, 0.1)
        assert plain["env_vars"] == {
            "PYTHONPATH": "platform",
            "RAY_JOB_STOP_WAIT_TIME_S": "10",
            "RAYTOWER_DRIVER_CPUS": "0.1",
        }
        assert "worker_process_setup_hook" not in plain
        secret = runtime_environment(tmp_path / "u.tar.xz", True, 0)
        assert secret["worker_process_setup_hook"] == "raytower.cluster.environment.take"
        assert secret["env_vars"]["RAYTOWER_ENVIRONMENT_FILE"] == ".submitted/environment.json"  # type: ignore[index]


class TestHead:
    def ask(self, *names: str, environment: Mapping[str, str] | None = None) -> There:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps(names)],
            env={"PATH": "/usr/bin:/bin", **(environment or {})},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return read_answer(json.loads(done.stdout.removeprefix("raytower-answer ")))

    def test_it_says_which_variables_are_set(self) -> None:
        found = self.ask("SET", "EMPTY", "NONE", environment={"SET": "x", "EMPTY": ""})
        assert found.unset == ("EMPTY", "NONE")

    def test_it_finds_the_machines_that_may_come(self, tmp_path: Path) -> None:
        script, config = tmp_path / "monitor.py", tmp_path / "scaling.yaml"
        script.write_text("input()")
        config.write_text(
            "max_workers: 5\navailable_node_types:\n  small: {resources: {CPU: 2}, max_workers: 3}\n"
            "  any: {resources: {CPU: 8, GPU: 1}}\n"
        )
        command = [
            sys.executable,
            str(script),
            "--gcs-address=10.0.0.1:6379",
            f"--autoscaling-config={config}",
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as monitor:
            found = self.ask(environment={"RAY_ADDRESS": "10.0.0.1:6379"})
            another = self.ask(environment={"RAY_ADDRESS": "10.0.0.2:6379"})
            monitor.communicate("\n")
        assert found.types == (
            NodeType(name="small", resources={"CPU": 2}, most=3),
            NodeType(name="any", resources={"CPU": 8, "GPU": 1}, most=5),
        )
        assert another.types == ()

    def test_a_head_that_is_being_started_is_none_of_a_process_without_one(self, tmp_path: Path) -> None:
        """`ray start --autoscaling-config=…` names no address."""
        script, config = tmp_path / "start.py", tmp_path / "scaling.yaml"
        script.write_text("input()")
        config.write_text("max_workers: 5\navailable_node_types: {small: {resources: {CPU: 2}}}\n")
        command = [sys.executable, str(script), f"--autoscaling-config={config}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as start:
            found = self.ask()
            start.communicate("\n")
        assert found.types == ()

    def test_on_kubernetes_it_cannot_know(self) -> None:
        assert self.ask(environment={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).types is None


class StandIn:
    """Answers as a dashboard does; `status` in place of all answers, where it is set."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.leads_to: str | None = None
        self.answers: dict[str, Any] = {
            "/api/version": {"version": "4", "ray_version": version("ray")},
            "/api/v0/cluster_metadata": {"data": {"pythonVersion": python_version()}},
            "/api/v0/nodes": {"data": {"result": {"result": [alive({"CPU": 4.0, "memory": 2.0**34})] * 2}}},
            "/api/jobs/": [],
        }
        self.asked: list[tuple[str, str | None]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                stand_in.asked.append((path, self.headers.get("Authorization")))
                answer = stand_in.answers.get(path, {})
                self.send_response(stand_in.status or 200)
                if stand_in.leads_to is not None:
                    self.send_header("Location", stand_in.leads_to)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def set_nodes(self, *resources: dict[str, float]) -> None:
        rows = [alive(each) for each in resources] + [{"state": "DEAD", "resources_total": {"GPU": 8}}]
        self.answers["/api/v0/nodes"] = {"data": {"result": {"result": rows}}}


def alive(resources: dict[str, float]) -> dict[str, Any]:
    return {"state": "ALIVE", "resources_total": resources}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    # What Ray would take of a checkout is another test's.
    files = {"jobs/encode_corpus.py": ROOT / "jobs" / "encode_corpus.py"}
    monkeypatch.setattr(
        submit_module, "plan_upload", lambda file, most: Upload(root=ROOT, files=files, config_file=file)
    )
    made = StandIn()
    with serving(made):
        yield made


@contextmanager
def serving(stand_in: StandIn) -> Iterator[None]:
    thread = threading.Thread(target=stand_in.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        stand_in.server.shutdown()
        thread.join()
        stand_in.server.server_close()


class TestRefusals:
    """What the command says, with exit code 2, before anything starts."""

    def refused(self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], *given: str) -> str:
        assert main(["submit", *given, "--address", stand_in.address]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    def test_an_address_where_nobody_answers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["submit", "--follow", "x", "--address", "127.0.0.1:9"]) == 2
        said = capsys.readouterr().err
        assert "address is 'http://127.0.0.1:9', and no dashboard answers there within 10 s (" in said
        assert "refused" in said

    def test_an_address_that_keeps_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket

        monkeypatch.setattr(dashboard_module, "_ANSWER_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            there = Dashboard(address=f"http://127.0.0.1:{silent.getsockname()[1]}", token=None)
            with pytest.raises(InputError, match=r"no dashboard answers there within 0.2 s \(timed out\)"):
                there.check_versions()

    def test_what_is_no_dashboard(self, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        stand_in.answers["/api/version"] = b"<html>"
        assert "what answers there is no dashboard of Ray" in self.refused(
            stand_in, capsys, "encode", *ENCODE
        )
        stand_in.answers["/api/version"] = {"version": "1"}
        assert "its version has no ray_version" in self.refused(stand_in, capsys, "encode", *ENCODE)
        stand_in.status = 404
        assert "answers /api/version with status 404" in self.refused(stand_in, capsys, "encode", *ENCODE)

    @pytest.mark.parametrize("status", [401, 403])
    def test_no_token_and_another_token(
        self,
        status: int,
        stand_in: StandIn,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        stand_in.status = status
        said = self.refused(stand_in, capsys, "encode", *ENCODE)
        assert "asks for a token, and there is none here: put the cluster's into ~/.ray/auth_token" in said
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0123abc")
        said = self.refused(stand_in, capsys, "encode", *ENCODE)
        assert "refuses the token of RAY_AUTH_TOKEN: it is another cluster's, or has expired" in said
        assert "0123abc" not in said
        assert stand_in.asked == [("/api/version", None), ("/api/version", "Bearer 0123abc")]

    def test_a_token_goes_nowhere_else(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was sent on to where an answer led, and to the proxy that the environment names for all addresses."""
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0123abc")
        elsewhere = StandIn()
        with serving(elsewhere):
            monkeypatch.setenv("http_proxy", elsewhere.address)
            monkeypatch.setenv("no_proxy", "")
            stand_in.status, stand_in.leads_to = 302, f"{elsewhere.address}/api/version"
            said = self.refused(stand_in, capsys, "encode", *ENCODE)
        assert f"it sends on to '{elsewhere.address}/api/version', where no token is sent" in said
        assert elsewhere.asked == []

    def test_other_versions(self, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        stand_in.answers["/api/version"] = {"ray_version": "1.2.3"}
        stand_in.answers["/api/v0/cluster_metadata"] = {"data": {"pythonVersion": "3.8.1"}}
        said = self.refused(stand_in, capsys, "encode", *ENCODE)
        assert "the cluster runs Ray 1.2.3, and this is Ray" in said
        assert "the cluster runs Python 3.8.1, and this is Python" in said

    def test_paths_of_one_machine(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config = tmp_path / "c.yaml"
        config.write_text("encoder: /m/encoder\ninput: {path: data/corpus.tsv}\noutput: /m/out\n")
        said = self.refused(stand_in, capsys, "encode", "--config", str(config))
        assert [line.split(",")[0] for line in said.splitlines()] == [
            "raytower: encoder is '/m/encoder'",
            "input.path is 'data/corpus.tsv'",
            "output is '/m/out'",
        ]
        # A head that runs no tasks has them run on machines that come.
        stand_in.set_nodes({"memory": 2.0**33})
        assert "may lie on 2" in self.refused(stand_in, capsys, "encode", "--config", str(config))
        stand_in.set_nodes({"CPU": 4.0})
        said = self.refused(stand_in, capsys, "encode", "--config", str(config))
        assert said.count("\n") == 1, "one machine sees its own paths"

    def test_steps_of_a_pipeline_are_looked_into(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config = tmp_path / "p.yaml"
        step = {"job": "index build", "config": {"embeddings": "s3://b/e", "output": "/m/index"}}
        config.write_text(json.dumps({"state": "s3://b/p.json", "steps": [step]}))
        said = self.refused(stand_in, capsys, "pipeline", "--config", str(config))
        assert "steps.0.config.output is '/m/index', a path of one machine" in said

    def test_what_no_node_has(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(submit_module, "_client", lambda _: None)
        monkeypatch.setattr(submit_module, "ask_head", lambda *_: There(unset=(), types=()))
        said = self.refused(
            stand_in, capsys, "encode", *ENCODE, "--workers.num_gpus", "1", "--workers.num", "2"
        )
        assert "workers asks for 1 GPU in one process; the cluster has 2 nodes with 4 CPUs" in said
        said = self.refused(stand_in, capsys, "encode", *ENCODE, "--driver-memory", "64GiB")
        assert "driver_memory asks for 64 GiB of memory in one process" in said
        stand_in.set_nodes({"memory": 2.0**33})
        said = self.refused(stand_in, capsys, "encode", *ENCODE)
        assert "workers.num is null, and the cluster has no node with CPUs now" in said

    def test_a_variable_that_is_set_nowhere(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[str]] = []

        def ask_head(_: object, names: list[str]) -> There:
            asked.append(names)
            return There(unset=tuple(names), types=())

        monkeypatch.setattr(submit_module, "_client", lambda _: None)
        monkeypatch.setattr(submit_module, "ask_head", ask_head)
        monkeypatch.delenv("SEARCH_KEY", raising=False)
        given = ("serve", "--index", "s3://b/i", "--security.key_env", "SEARCH_KEY")
        said = self.refused(stand_in, capsys, *given)
        assert (
            "security.key_env is 'SEARCH_KEY', an environment variable that is set neither here nor on"
            in said
        )
        assert asked == [["SEARCH_KEY"]]

    def test_a_second_job_on_the_output(self, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
        job = {
            "submission_id": "encode-9",
            "status": "RUNNING",
            "metadata": {"raytower": "encode", "raytower_output": "s3://b/embeddings/"},
        }
        stand_in.answers["/api/jobs/"] = [{"submission_id": None, "status": "RUNNING", "metadata": {}}, job]
        assert "is being written by job encode-9 (encode)" in self.refused(
            stand_in, capsys, "encode", *ENCODE
        )
        job["status"] = "STOPPED"
        assert main(["submit", "encode", *ENCODE, "--address", stand_in.address, "--dry-run"]) == 0

    def test_flags_of_submit_among_the_job_s(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = json.dumps([*ENCODE, "--dry-run"])
        said = self.refused(stand_in, capsys, "encode", f"--arguments={given}")
        assert "arguments hold --dry-run, --json or --help, which are those of submit" in said


class FakeClient:
    """In place of Ray's client: a job that ended with `code`, and errors where they are wanted."""

    def __init__(self, code: int | None = None, fails_in: str | None = None) -> None:
        self.code, self.fails_in = code, fails_in

    def submit_job(self, **_: object) -> str:
        if self.fails_in == "submit":
            raise RuntimeError("Request failed with status code 500:\nTraceback")
        return "encode-1"

    def get_job_info(self, job: str) -> Any:
        status = SimpleNamespace(value="FAILED", is_terminal=lambda: True)
        return SimpleNamespace(metadata={}, status=status, driver_exit_code=self.code, message="gone")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        if self.fails_in == "stop":
            raise KeyboardInterrupt
        yield "a line\n"

    def stop_job(self, job: str) -> None:
        raise RuntimeError("Connection aborted")


class TestEnds:
    """How the command ends where the job or the cluster does not do as it should."""

    def run(self, stand_in: StandIn, patch: pytest.MonkeyPatch, client: FakeClient, *given: str) -> int:
        patch.setattr(submit_module, "_client", lambda _: client)
        return main(["submit", *given, "--address", stand_in.address])

    @pytest.mark.parametrize(("code", "expected"), [(3, 3), (-9, 137), (None, 1), (0, 1)])
    def test_by_the_job_s_exit_code_or_its_signal(
        self, code: int | None, expected: int, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(stand_in, monkeypatch, FakeClient(code), "encode", *ENCODE) == expected

    @pytest.mark.parametrize(
        ("fails_in", "message"),
        [
            (
                "submit",
                "did not take the job: Request failed with status code 500: Traceback; `ray job list` says",
            ),
            ("stop", "could not be stopped: Connection aborted; the job goes on: `raytower submit --address"),
        ],
    )
    def test_a_cluster_that_fails_is_said_without_a_traceback(
        self,
        fails_in: str,
        message: str,
        stand_in: StandIn,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        assert self.run(stand_in, monkeypatch, FakeClient(fails_in=fails_in), "encode", *ENCODE) == 1
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raytower: ")]
        assert message in said

    def test_following_a_job_that_nobody_knows(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It said that the job goes on."""
        stand_in.answers["/api/jobs/"] = [{"submission_id": "encode-1"}, {"submission_id": None}]
        assert self.run(stand_in, monkeypatch, FakeClient(3), "--follow", "encode-1") == 3
        assert self.run(stand_in, monkeypatch, FakeClient(3), "--follow", "../encode-2?") == 2
        said = capsys.readouterr().err
        assert "follow is '../encode-2?', and the cluster at" in said
        assert "goes on" not in said


class TestPlan:
    def test_it_says_what_would_be_done_and_no_value_of_a_variable(
        self,
        stand_in: StandIn,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setenv("SEARCH_KEY", "a value of its own")
        monkeypatch.setenv("HF_TOKEN", "another value")
        config = tmp_path / "serve.yaml"
        config.write_text("index: s3://b/i\nsecurity: {key_env: SEARCH_KEY}\n")
        given = ["serve", "--config", str(config), "--env", "HF_TOKEN", "--port", "8001"]
        assert main(["submit", *given, "--address", stand_in.address, "--dry-run"]) == 0
        out = capsys.readouterr().out
        plan = json.loads(out.splitlines()[-1])["plan"]
        assert plan["entrypoint"] == (
            "python -m raytower.cluster.environment -m raytower.cli serve --config .submitted/config/serve.yaml "
            "--port 8001"
        )
        assert plan["variables"] == ["HF_TOKEN", "SEARCH_KEY"]
        assert (plan["job"], plan["nodes"], plan["output"]) == ("serve", 2, None)
        assert plan["driver"] == {"CPU": 0, "memory": 0}
        assert 0 < plan["upload_bytes"] < 10_000
        assert "value" not in out

    def test_a_config_from_a_pipe_travels(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`--config <(…)` was read twice, and the second time it was empty: the job ran with defaults."""
        packed: list[Upload] = []
        monkeypatch.setattr(submit_module, "pack", lambda upload, *_: packed.append(upload) or 1)
        content = b"encoder: s3://b/e\ninput: s3://b/c/\noutput: s3://b/out\n"
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        given = [
            "submit",
            "encode",
            "--config",
            f"/dev/fd/{reader}",
            "--address",
            stand_in.address,
            "--dry-run",
        ]
        assert main(given) == 0
        os.close(reader)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]["output"] == "s3://b/out"
        (upload,) = packed
        assert upload.config_file == ConfigFile(name=str(reader), content=content)

    def test_a_job_that_computes_gets_cpus_of_a_node(
        self, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
    ) -> None:
        queries = ["--index", "s3://b/i", "--queries", "s3://b/q.tsv", "--encoder", "s3://b/e"]
        for job, cpus in (("tune-fusion", 3), ("evaluate", 1)):
            given = [job, *queries, *(["--output", "s3://b/r"] if job == "evaluate" else [])]
            assert main(["submit", *given, "--address", stand_in.address, "--dry-run"]) == 0
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]["driver"]["CPU"] == cpus
