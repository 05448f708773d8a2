"""cluster.yaml comes up: what Ray launches by it on a stand-in for EC2, its own commands, and the README's job."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import ROOT, free_port, wait_until_ok

pytestmark = pytest.mark.processes

REMOTE_HOME = "/home/ubuntu"


def ray_config() -> dict[str, Any]:
    """cluster.yaml as Ray completes it: the commands of all nodes stand before those of the head and the workers."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(
        yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    )
    validate_config(config)
    return config


def setup_commands(config: dict[str, Any], kind: str) -> list[str]:
    if kind == config["head_node_type"]:
        return list(config["head_setup_commands"])
    own = config["available_node_types"][kind].get("worker_setup_commands")
    return list(config["worker_setup_commands"] if own is None else own)


def mount_files(config: dict[str, Any], user_home: Path, home: Path) -> None:
    """What `ray up` copies to a node, with `home` for the node's home directory."""
    for remote, local in config["file_mounts"].items():
        source = user_home / local[2:] if local.startswith("~/") else ROOT / local
        target = home / Path(remote).relative_to(REMOTE_HOME)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*config["rsync_exclude"]))
        else:
            shutil.copy2(source, target)


def readme_lines(start: str) -> list[str]:
    """The README's shell lines that begin with `start`, continued ones joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def user_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of somebody who followed the README up to `ray up`."""
    home = tmp_path_factory.mktemp("user")
    (line,) = readme_lines("raytower cluster init")
    environment = clean_environment(home, PYTHONPATH=str(ROOT / "platform"))
    subprocess.run(["bash", "-c", line], env=environment, check=True, timeout=120)
    return home


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """Nothing of this process but the folder of its Python on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", **more}


class TestDescription:
    def test_nodes_come_and_go_and_the_head_gets_no_task(self) -> None:
        config = ray_config()
        types = config["available_node_types"]
        head = types.pop(config["head_node_type"])
        assert head["resources"] == {"CPU": 0}
        assert head["max_workers"] == 0
        assert {kind["min_workers"] for kind in types.values()} == {0}
        assert any("GPU" in kind["resources"] for kind in types.values())
        assert any("GPU" not in kind["resources"] and kind["max_workers"] > 1 for kind in types.values())

    def test_what_ray_launches_on_ec2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ray's own bootstrap and launch, against moto: a key that EC2 does not know fails there too."""
        import boto3
        from moto import mock_aws
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes an SSH key below it
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        with mock_aws():
            config = ray_config()
            iam = boto3.client("iam", region_name=config["provider"]["region"])
            for name in ("raytower-head", "raytower-worker"):
                iam.create_instance_profile(InstanceProfileName=name)
            launched = bootstrap_aws(config)
            provider = AWSNodeProvider(launched["provider"], launched["cluster_name"])
            for kind, spec in launched["available_node_types"].items():
                provider.create_node(spec["node_config"], {"ray-user-node-type": kind}, 1)
            ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
            instances = [
                instance
                for group in ec2.describe_instances()["Reservations"]
                for instance in group["Instances"]
            ]
            volumes = ec2.describe_volumes()["Volumes"]

        profiles, spot = {}, set()
        for instance in instances:
            (kind,) = [tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type"]
            profiles[kind] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
            assert {"Key": "project", "Value": "raytower"} in instance["Tags"]
            if instance.get("InstanceLifecycle") == "spot":
                spot.add(kind)
            # Ray's own default is an image of Ubuntu 18.04.
            assert "ubuntu" in instance["ImageId"]
            assert "24.04" in instance["ImageId"]
            options = instance["MetadataOptions"]
            assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1)
        workers = ("cpu_worker", "memory_worker", "gpu_worker", "gpu_encoder")
        assert profiles == {"head": "raytower-head", **dict.fromkeys(workers, "raytower-worker")}
        assert spot == {"cpu_worker", "gpu_encoder"}, "where a job goes on, and nowhere else"
        assert all({"Key": "project", "Value": "raytower"} in volume["Tags"] for volume in volumes)
        assert [volume["Encrypted"] for volume in volumes] == [True] * len(instances)

    def test_every_node_installs_what_it_is_for(self, user_home: Path, tmp_path: Path) -> None:
        """pip runs as printed, but for what it would fetch: the mounted files are enough, the extras exist."""
        config = ray_config()
        mount_files(config, user_home, tmp_path)
        (tmp_path / "env").symlink_to(sys.prefix)
        extras = {}
        for kind in config["available_node_types"]:
            install = setup_commands(config, kind)[-1]
            (extras[kind],) = re.findall(r'"\.\[([\w,]+)\]"$', install)
            offline = install.replace("--build-constraint constraints.txt", "--no-build-isolation --no-index")
            command = f"{offline} --dry-run --no-deps"
            done = subprocess.run(
                ["bash", "-c", command],
                env=clean_environment(tmp_path),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(known) >= {"cpu", "gpu", "all", "aws"}
        assert extras == {
            "head": "cpu,all,aws",
            **dict.fromkeys(("cpu_worker", "memory_worker"), "cpu,all"),
            **dict.fromkeys(("gpu_worker", "gpu_encoder"), "gpu,all"),
        }

    def test_the_token_is_the_users_own_and_nobody_else_reads_it(self, user_home: Path) -> None:
        token = user_home / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) >= 32
        mounts = ray_config()["file_mounts"]
        assert mounts[f"{REMOTE_HOME}/.ray/auth_token"] == "~/.ray/auth_token"


@dataclass(frozen=True)
class Cluster:
    """A head and a worker on this machine. Ray unpacks what a job uploads below `session`."""

    dashboard: str
    session: Path
    user_home: Path

    def run(
        self, command: list[str], *, cwd: Path, home: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`command` as the README's reader runs it, or somebody else with another `home` or `environment`."""
        (export,) = readme_lines("export RAY_AUTH_MODE")
        name, _, mode = export.split("#")[0].removeprefix("export ").strip().partition("=")
        settings = clean_environment(home or self.user_home) | {name: mode} | environment
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cluster(user_home: Path) -> Iterator[Cluster]:
    """Started by the file's own commands, in clean homes; the ports differ, and what only the cloud has is left out."""
    # Short, because the names of Ray's sockets lie below it and may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="rt"))
    gcs_port, dashboard_port = free_port(), free_port()
    head_options = (
        f"--temp-dir={folder}/s --dashboard-port={dashboard_port} --ray-client-server-port={free_port()}"
    )
    try:
        with (
            started_node("head", user_home, folder, gcs_port, head_options),
            started_node("cpu_worker", user_home, folder, gcs_port, ""),
        ):
            yield Cluster(f"http://127.0.0.1:{dashboard_port}", folder / "s", user_home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_node(kind: str, user_home: Path, folder: Path, gcs_port: int, options: str) -> Iterator[None]:
    """A node of `kind`, set up and started in the order Ray has: files, setup commands, start commands."""
    config = ray_config()
    home = folder / kind
    mount_files(config, user_home, home)
    environment = clean_environment(home, RAY_HEAD_IP="127.0.0.1")
    environment["PATH"] = (
        "/usr/bin:/bin"  # as on a fresh image: Ray is found by what the setup commands leave
    )
    environment["RAY_OVERRIDE_RESOURCES"] = json.dumps(config["available_node_types"][kind]["resources"])
    (home / "env").symlink_to(sys.prefix)  # stands for apt, venv and pip
    for command in setup_commands(config, kind):
        if "sudo " not in command and "pip install" not in command:
            subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)

    side = "head" if kind == config["head_node_type"] else "worker"
    # `ray stop` ends every Ray of the machine.
    (start,) = [c for c in config[f"{side}_start_ray_commands"] if not c.endswith("ray stop")]
    start = start.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    start = start.replace("6379", str(gcs_port)).replace("8076", str(free_port()))
    agent_port = free_port()
    start += f" {options} --block --node-ip-address=127.0.0.1 --dashboard-agent-listen-port={agent_port}"
    start += " --min-worker-port=0 --max-worker-port=0"
    log = folder / f"{kind}.log"
    with log.open("wb") as output:
        node = subprocess.Popen(
            ["bash", "-c", start], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        token = (home / ".ray" / "auth_token").read_text()
        wait_until_ok(f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz", node, log, token)
        yield
    finally:
        # A head drains for half a minute before it ends by itself; nothing here needs that.
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


# Both nodes have this machine's address, so their homes tell them apart.
WHERE_THINGS_RUN = """
import pathlib, ray
ray.init()
task = ray.remote(lambda: pathlib.Path.home().name).remote()
print("driver:", pathlib.Path.home().name, "task:", ray.get(task), "nodes:", len(ray.nodes()))
"""


class TestComesUp:
    @pytest.mark.parametrize(
        ("options", "driver"), [((), "head"), (("--entrypoint-num-cpus=8",), "cpu_worker")]
    )
    def test_a_job_with_the_token_runs(
        self, cluster: Cluster, tmp_path: Path, options: tuple[str, ...], driver: str
    ) -> None:
        command = ["ray", "job", "submit", "--address", cluster.dashboard, *options, "--", "python", "-c"]
        done = cluster.run([*command, WHERE_THINGS_RUN], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"driver: {driver} task: cpu_worker nodes: 2" in done.stdout

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
            ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        ],
        ids=["no token", "another token"],
    )
    def test_nobody_else_submits_one(
        self, cluster: Cluster, tmp_path: Path, environment: dict[str, str], message: str
    ) -> None:
        command = ["ray", "job", "submit", "--address", cluster.dashboard, "--", "touch", f"{tmp_path}/ran"]
        done = cluster.run(command, cwd=tmp_path, home=tmp_path, **environment)
        assert done.returncode != 0
        assert message in done.stderr
        assert not (tmp_path / "ran").exists()

    def test_the_line_of_the_readme_runs_as_printed(
        self, cluster: Cluster, minilm_dir: Path, tmp_path: Path
    ) -> None:
        checkout = tmp_path / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "runs"))
        for name in ("data", "runs"):  # where the README's examples put texts and results
            (checkout / name).mkdir()
            (checkout / name / "corpus.tsv").write_bytes(b"x" * 2**24)
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        (corpus / "texts.txt").write_text("first text\nsecond text\n", encoding="utf-8")

        (line,) = readme_lines("raytower submit")
        for printed, meant in {
            "http://127.0.0.1:8265": cluster.dashboard,
            "s3://bucket/corpus/": f"{corpus}/",
            "s3://bucket/encoder": str(minilm_dir),
            "s3://bucket/embeddings": str(tmp_path / "embeddings"),
        }.items():
            assert printed in line
            line = line.replace(printed, meant)
        # Where all nodes are one machine, its folders are shared.
        line += f" --shared {tmp_path} --shared {minilm_dir}"
        done = cluster.run(shlex.split(line), cwd=checkout, PYTHONPATH=f"{checkout}/platform")

        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / "embeddings" / "manifest.json").read_text())["rows"] == 2
        (upload,) = cluster.session.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
        assert (upload / "platform" / "raytower" / "data" / "rows.py").is_file()
        assert {"data", "runs", "tests", "docs", "benchmarks"}.isdisjoint(os.listdir(upload))
        assert sum(path.stat().st_size for path in upload.rglob("*")) < 4 * 2**20
