"""deploy/kuberay as far as it can be read without a Kubernetes: schemas, security, commands, room for jobs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytower.cli.arguments import read_arguments
from raytower.commands import COMMANDS, find_reference
from raytower.config import Config, load_config, make_config
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import STEP_JOBS
from raytower.serving.config import ServeConfig
from raytower.serving.plan import render_serve_file, serve_file
from tests.support.asked import Ask, asked
from tests.support.manifests import build, containers_of, pods_of, read_objects, schema_errors
from tests.support.processes import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
SIZES = ["small", "gpu", "large"]
JOBS = sorted((KUBERAY / "jobs").glob("*.yaml"))
REGISTRY = "registry.example.org/raytower"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@cache
def built(size: str) -> list[dict[str, Any]]:
    """An overlay and the jobs that are started beside it."""
    return build(KUBERAY / "overlays" / size) + [item for path in JOBS for item in read_objects(path)]


def one(size: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in built(size) if (o["kind"], o["metadata"].get("name")) == (kind, name)]
    return found


def spec_of(item: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec of a RayCluster or a RayService."""
    spec: dict[str, Any] = item["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterConfig", spec)
    return cluster


def clusters(size: str) -> list[dict[str, Any]]:
    return [spec_of(item) for item in built(size) if item["kind"] in ("RayCluster", "RayService")]


def ray_pods(size: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and template of each group's pod, the heads' among them."""
    for cluster in clusters(size):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


def amount(quantity: str) -> float:
    """A Kubernetes quantity: cores, or bytes."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi)?", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("size", SIZES)
class TestObjects:
    def test_kubernetes_and_kuberay_know_every_field(self, size: str) -> None:
        assert [f"{o['kind']}: {error}" for o in built(size) for error in schema_errors(o)] == []

    def test_kustomize_builds_the_same(self, size: str) -> None:
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            pytest.skip("kubectl is not installed")
        command = [kubectl, "kustomize", str(KUBERAY / "overlays" / size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

        def sorted_out(objects: list[dict[str, Any]]) -> list[str]:
            return sorted(json.dumps(item, sort_keys=True) for item in objects)

        ours = build(KUBERAY / "overlays" / size)
        assert sorted_out(list(yaml.safe_load_all(done.stdout))) == sorted_out(ours)

    def test_every_image_is_pinned_to_this_version_and_fits_its_machine(self, size: str) -> None:
        for item in built(size):
            for container in containers_of(item):
                kind = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
                assert container["image"] == f"{REGISTRY}:{VERSION}-{kind}"

    def test_ray_is_the_images_and_nothing_answers_without_a_token(self, size: str) -> None:
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        (ray,) = re.findall(r"^ray==(.+)$", constraints, re.MULTILINE)
        assert [(c["rayVersion"], c["authOptions"]) for c in clusters(size)] == [(ray, {"mode": "token"})] * 2

    def test_heads_get_no_task(self, size: str) -> None:
        assert {c["headGroupSpec"]["rayStartParams"]["num-cpus"] for c in clusters(size)} == {"0"}
        assert all(c["enableInTreeAutoscaling"] for c in clusters(size))

    def test_what_is_named_is_there(self, size: str) -> None:
        """Accounts, ConfigMaps, the cluster of jobs and its Secret; Secrets that people make are the README's."""
        names = {(o["kind"], o["metadata"].get("name")) for o in built(size)}
        readme = (KUBERAY / "README.md").read_text(encoding="utf-8")
        made = set(re.findall(r"create secret generic ([\w-]+)", readme)) | {"raytower"}  # the operator's own
        for item in built(size):
            assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "raytower"
            for pod in pods_of(item):
                spec = pod["spec"]
                assert ("ServiceAccount", spec["serviceAccountName"]) in names
                volumes = {volume["name"]: volume for volume in spec["volumes"]}
                for volume in volumes.values():
                    assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in names
                    assert "secret" not in volume or volume["secret"]["secretName"] in made
                for container in spec["containers"]:
                    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
                    assert {source["secretRef"]["name"] for source in container.get("envFrom", ())} <= made
                    for variable in container["env"]:
                        secret = variable.get("valueFrom", {}).get("secretKeyRef", {"name": "raytower"})
                        assert secret["name"] in made
            selector = item["spec"].get("clusterSelector") if item["kind"] == "RayJob" else None
            assert selector is None or ("RayCluster", selector["ray.io/cluster"]) in names


@pytest.mark.parametrize("size", SIZES)
class TestSecurity:
    def test_no_pod_is_root_or_may_become_it(self, size: str) -> None:
        """What the namespace's Pod Security level `restricted` asks for, and roots that cannot be written."""
        level = one(size, "Namespace", "raytower")["metadata"]["labels"]
        assert level["pod-security.kubernetes.io/enforce"] == "restricted"
        pods = [pod for item in built(size) for pod in pods_of(item)]
        assert len(pods) == 2 + (3 if size != "small" else 2) + 1 + 2 + len(JOBS)
        for pod in pods:
            spec = pod["spec"]
            own = spec["securityContext"]
            assert own["runAsNonRoot"]
            assert own["runAsUser"] == own["fsGroup"] == 10001, "the image's user"
            assert own["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
            assert all({"emptyDir", "configMap", "secret"} & volume.keys() for volume in spec["volumes"])
            for container in spec["containers"]:
                self.check_closed(container["securityContext"])
                # What Ray and the libraries of models write.
                writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
                assert writable == {"/tmp", "/home/raytower"}
        for cluster in clusters(size):
            self.check_closed(cluster["autoscalerOptions"]["securityContext"])

    @staticmethod
    def check_closed(context: dict[str, Any]) -> None:
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_only_heads_may_ask_kubernetes_for_anything(self, size: str) -> None:
        assert one(size, "ServiceAccount", "raytower-worker")["automountServiceAccountToken"] is False
        for item in built(size):
            for pod in pods_of(item):
                is_head = pod["spec"]["containers"][0]["name"] == "ray-head"
                assert pod["spec"]["serviceAccountName"] == (
                    "raytower-head" if is_head else "raytower-worker"
                )
                assert is_head or pod["spec"]["automountServiceAccountToken"] is False

    def test_no_secret_stands_in_a_file(self, size: str) -> None:
        for item in built(size):
            assert item["kind"] != "Secret"
            text = json.dumps(item)
            assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\"\s]+:[^/\"\s]+@", text)
            assert not re.search(r"(?i)aws_(secret_)?access_key", text)
            for container in containers_of(item):
                for variable in container["env"]:
                    if re.search(r"(?i)token|secret|password|key", variable["name"]):
                        assert variable.keys() == {"name", "valueFrom"}

    def test_the_network_is_closed_around_every_pod(self, size: str) -> None:
        policy = one(size, "NetworkPolicy", "raytower")["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        labels = policy["podSelector"]["matchLabels"]
        for item in built(size):
            for pod in pods_of(item):
                assert labels.items() <= pod["metadata"]["labels"].items()
        world = [rule for rule in policy["egress"] if "ipBlock" in rule["to"][0]]
        assert [rule["to"][0]["ipBlock"]["except"] for rule in world] == [["169.254.169.254/32"]]
        assert all(rule.get("from") for rule in policy["ingress"]), "nobody is let in unnamed"

    def test_ray_tells_its_makers_nothing(self, size: str) -> None:
        for item in built(size):
            for container in containers_of(item):
                assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


def configs(size: str, folder: Path) -> dict[str, Path]:
    """What pods find below /etc/raytower, in a folder of this machine."""
    for name, text in one(size, "ConfigMap", "raytower-configs")["data"].items():
        (folder / name).write_text(text, encoding="utf-8")
    return {f"/etc/raytower/{path.name}": path for path in folder.iterdir()}


def entrypoints(size: str) -> Iterator[tuple[str, list[str]]]:
    """Every command that a RayJob or a CronJob gives Ray, by the object's name."""
    for item in built(size):
        if item["kind"] == "RayJob":
            yield item["metadata"]["generateName"], shlex.split(item["spec"]["entrypoint"])
        if item["kind"] == "CronJob":
            (container,) = containers_of(item)
            assert container["command"][:4] == ["ray", "job", "submit", "--"]
            yield item["metadata"]["name"], container["command"][4:]


def read_entrypoint(words: list[str], files: dict[str, Path]) -> Config:
    """The config that a command runs with, by the parser of the command line; InputError where it would refuse."""
    assert words[0] == "raytower"
    name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else words[1]
    command = COMMANDS[name]
    config_class = find_reference(command.config)
    arguments = read_arguments(config_class, command.positions, words[1 + len(name.split()) :])
    assert arguments.config_path in files, f"{arguments.config_path} is in no pod"
    config: Config = load_config(config_class, files[str(arguments.config_path)], arguments.overrides)
    return config


@pytest.mark.parametrize("size", SIZES)
class TestJobs:
    def test_their_commands_are_raytowers_and_their_configs_are_accepted(
        self, size: str, tmp_path: Path
    ) -> None:
        files = configs(size, tmp_path)
        found = {name: read_entrypoint(words, files) for name, words in entrypoints(size)}
        assert found.keys() == {"train-", "encode-", "build-", "refresh", "compact"}
        refresh = found["refresh"]
        assert isinstance(refresh, PipelineConfig)
        for step in refresh.steps:
            assert step.job in STEP_JOBS
            make_config(find_reference(COMMANDS[step.job].config), step.config)

    def test_there_is_room_for_what_they_ask(self, size: str, tmp_path: Path) -> None:
        """Every worker fits a pod of some group, and all of them together fit the most pods that there may be."""
        files = configs(size, tmp_path)
        groups = spec_of(one(size, "RayCluster", "raytower"))["workerGroupSpecs"]
        for name, words in entrypoints(size):
            for ask in asked(read_entrypoint(words, files)):
                assert places_of(groups, ask) >= ask.num, f"{name}: {ask}"

    def test_a_build_fits_a_pod_beside_the_object_store(self, size: str, tmp_path: Path) -> None:
        files = configs(size, tmp_path)
        groups = spec_of(one(size, "RayCluster", "raytower"))["workerGroupSpecs"]
        most = max(amount(resources_of(group)["memory"]) for group in groups)
        for name in ("/etc/raytower/build.yaml", "/etc/raytower/compact.yaml"):
            target = yaml.safe_load(files[name].read_text(encoding="utf-8"))["target"]
            # Ray's object store takes 30 % of a node's memory.
            assert amount(target["memory"].replace("B", "")) <= most * 0.7

    def test_a_run_that_has_not_ended_is_not_met_by_the_next(self, size: str) -> None:
        crons = [item["spec"] for item in built(size) if item["kind"] == "CronJob"]
        assert [cron["concurrencyPolicy"] for cron in crons] == ["Forbid", "Forbid"]
        assert [cron["jobTemplate"]["spec"]["backoffLimit"] for cron in crons] == [0, 0]
        assert all(re.fullmatch(r"(\S+ ){4}\S+", cron["schedule"]) for cron in crons)


def resources_of(group: dict[str, Any]) -> dict[str, str]:
    """What Ray takes a pod of the group for: the limits of its first container."""
    limits: dict[str, str] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits


def places_of(groups: list[dict[str, Any]], ask: Ask) -> int:
    nodes = [(resources_of(group), group["maxReplicas"]) for group in groups]
    return sum(
        most * ask.places(amount(node["cpu"]), amount(node.get("nvidia.com/gpu", "0")))
        for node, most in nodes
    )


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_any_job_of_the_repository_fits_a_pod(path: Path) -> None:
    (name,) = re.findall(r'run_command\("([^"]+)"', path.with_suffix(".py").read_text(encoding="utf-8"))
    config = load_config(find_reference(COMMANDS[name].config), path)
    groups = [group for cluster in clusters("gpu") for group in cluster["workerGroupSpecs"]]
    for ask in asked(config):
        assert places_of(groups, ask) >= ask.num, ask


@pytest.mark.parametrize("size", SIZES)
class TestPods:
    def test_what_is_asked_is_what_is_allowed(self, size: str) -> None:
        """Ray takes a pod's limits for what it has; a pod that asked for less would share them with others."""
        for name, pod in ray_pods(size):
            (container,) = pod["spec"]["containers"]
            asks, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert asks["memory"] == limits["memory"]
            assert name == "head" or asks == limits
            assert float(limits["cpu"]).is_integer(), "Ray counts whole CPUs"

    def test_probes_need_no_token_and_no_program_of_the_image(self, size: str) -> None:
        open_paths = {"/api/healthz": 52365, "/-/healthz": 8000}
        for _, pod in ray_pods(size):
            (container,) = pod["spec"]["containers"]
            for probe in ("livenessProbe", "readinessProbe"):
                check = container[probe]["httpGet"]
                assert open_paths[check["path"]] == check["port"]

    def test_spot_machines_are_for_what_goes_on_where_it_was(self, size: str) -> None:
        tolerant = {
            name for name, pod in ray_pods(size) if "spot" in json.dumps(pod["spec"].get("tolerations", []))
        }
        assert tolerant == ({"cpu"} if size == "small" else {"cpu", "gpu"})


class TestServer:
    def test_it_deploys_what_serve_file_prints(self) -> None:
        config = load_config(ServeConfig, KUBERAY / "base" / "configs" / "serve.yaml")
        service = one("small", "RayService", "raytower-serve")["spec"]
        assert yaml.safe_load(service["serveConfigV2"]) == serve_file(config)
        groups = service["rayClusterConfig"]["workerGroupSpecs"]
        for ask in asked(config):
            assert places_of(groups, ask) >= ask.num

    def test_the_door_is_before_it_and_its_port_is_the_pods(self) -> None:
        (said,) = re.findall(r"^#   (RAY_SERVE_\w+)=(\S+)$", render_serve_file({}), re.MULTILINE)
        service = one("small", "RayService", "raytower-serve")["spec"]
        config = yaml.safe_load(service["serveConfigV2"])
        for pod in pods_of(service):
            (container,) = pod["spec"]["containers"]
            environment = {variable["name"]: variable["value"] for variable in container["env"]}
            assert said in environment.items()
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["serve"] == config["http_options"]["port"] == 8000

    def test_its_keys_are_a_file_of_a_secret(self) -> None:
        service = one("small", "RayService", "raytower-serve")["spec"]
        (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
        place = Path(application["args"]["security"]["keys_file"])
        for pod in pods_of(service):
            (mount,) = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "keys"]
            assert (mount["mountPath"], place.name) == (str(place.parent), "keys")
        assert f"--from-file={place.name}" in (KUBERAY / "README.md").read_text(encoding="utf-8")
