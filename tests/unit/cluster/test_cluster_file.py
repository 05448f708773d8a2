"""cluster.yaml and what docs/cluster.md changes in it: Ray's own schema, and room for what jobs ask."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytower.cli.arguments import read_arguments
from raytower.cluster.arguments import own_arguments
from raytower.cluster.config import SubmitConfig
from raytower.commands import COMMANDS, find_reference
from raytower.config import load_config, make_config
from tests.support.asked import Ask, asked
from tests.support.processes import ROOT

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
CHANGES = {
    change["provider"]["type"]: change
    for change in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
    if "provider" in change
}


def places(types: dict[str, Any], ask: Ask) -> int:
    return sum(
        kind["max_workers"] * ask.places(kind["resources"]["CPU"], kind["resources"].get("GPU", 0))
        for kind in types.values()
    )


@pytest.mark.parametrize("provider", ["aws", "gcp"])
class TestRoom:
    @pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_any_job_of_the_repository_fits_a_node(self, provider: str, path: Path) -> None:
        types = {**CHANGES, "aws": CLUSTER}[provider]["available_node_types"]
        (name,) = re.findall(r'run_command\("([^"]+)"', path.with_suffix(".py").read_text(encoding="utf-8"))
        for ask in asked(load_config(find_reference(COMMANDS[name].config), path)):
            assert places(types, ask) >= ask.num, ask

    def test_the_readmes_job_fits(self, provider: str) -> None:
        types = {**CHANGES, "aws": CLUSTER}[provider]["available_node_types"]
        readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
        (line,) = re.findall(r"^raytower submit (encode .*)", readme, re.MULTILINE)
        submit = read_arguments(SubmitConfig, (), own_arguments(shlex.split(line)))
        config_class = find_reference(COMMANDS["encode"].config)
        arguments = read_arguments(config_class, (), make_config(SubmitConfig, submit.overrides).arguments)
        assert arguments.config_path == "jobs/encode_corpus.yaml"
        config = load_config(config_class, ROOT / arguments.config_path, arguments.overrides)
        (ask,) = asked(config)
        assert ask.num == 16
        assert places(types, ask) >= ask.num

    def test_all_nodes_may_be_there_at_once(self, provider: str) -> None:
        types = {**CHANGES, "aws": CLUSTER}[provider]["available_node_types"]
        assert sum(kind["max_workers"] for kind in types.values()) <= CLUSTER["max_workers"]

    def test_what_the_guide_says_of_a_node_type_is_so(self, provider: str) -> None:
        types = {**CHANGES, "aws": CLUSTER}[provider]["available_node_types"]
        rows = re.findall(
            r"^\| `(\w+)` \| (\d+) CPUs(?:, (\d+) GPUs?)?[^|]*\|[^|]*\| (yes|no)", GUIDE, re.MULTILINE
        )
        assert {row[0] for row in rows} == types.keys() - {"head"}
        for name, cpus, gpus, spot in rows:
            expected = {"CPU": int(cpus), **({"GPU": int(gpus)} if gpus else {})}
            assert types[name]["resources"] == expected
            node = str(types[name]["node_config"])
            assert ("'MarketType': 'spot'" in node or "'preemptible': True" in node) == (spot == "yes")

    @pytest.mark.parametrize(
        ("words", "names"),
        [
            ("--workers.num_cpus 7 --workers.num_gpus 1", {"gpu_encoder", "gpu_worker"}),
            ("--workers.num_cpus 11 --workers.num_gpus 1", {"gpu_worker"}),
            ("--workers.num_cpus 24", {"memory_worker", "gpu_worker"}),
        ],
    )
    def test_what_the_guide_asks_for_is_on_the_machine_that_it_names(
        self, provider: str, words: str, names: set[str]
    ) -> None:
        assert words in GUIDE.replace("\n", " ")
        types = {**CHANGES, "aws": CLUSTER}[provider]["available_node_types"]
        arguments = read_arguments(find_reference(COMMANDS["encode"].config), (), words.split())
        values = {key: float(value) for key, value in arguments.overrides["workers"].items()}
        ask = Ask(num=1, cpus=values["num_cpus"], gpus=values.get("num_gpus", 0), feeding_cpus=1)
        found = {n for n, k in types.items() if ask.fits(k["resources"]["CPU"], k["resources"].get("GPU", 0))}
        assert found == names


@pytest.mark.parametrize("provider", ["gcp", "local"])
def test_ray_takes_the_changed_file(provider: str) -> None:
    """By its own schema, and with what it fills in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    changed = {**CLUSTER, **CHANGES[provider]}
    if provider == "local":
        del changed["available_node_types"], changed["head_node_type"]
    else:
        for name in ("gpu_worker", "gpu_encoder"):
            setup = CLUSTER["available_node_types"][name]["worker_setup_commands"]
            changed["available_node_types"][name]["worker_setup_commands"] = setup
    config = prepare_config(changed)
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    start = " ".join(config["head_start_ray_commands"])
    assert head["resources"].get("CPU") == 0 or "--num-cpus=0" in start, "the head gets no task"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
