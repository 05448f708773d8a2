"""The shape of the project itself: layers, the source root, what the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raytower.cli import COMMANDS, find_reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform" / "raytower"
FOUNDATIONS = ["ending", "errors", "config", "storage", "runtime", "metrics"]
LAYERS = ["data", "models", "objectives", "training", "encoding", "index", "evaluation", "serving"]
RAY_FREE = ["models", "objectives", "ending", "errors", "config", "storage", "metrics"]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_a_lower_step_never_imports_a_higher_one() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        for name in imports_of(path):
            target = name.split(".")[1] if name.startswith("raytower.") else ""
            if part in LAYERS and target:
                assert target in FOUNDATIONS or LAYERS.index(target) <= LAYERS.index(part), (
                    f"{path} imports {name}"
                )
                seen += 1
            if part in FOUNDATIONS and target:
                assert target in FOUNDATIONS, f"{path} imports {name}"
    assert seen > 50


def test_models_and_objectives_know_no_ray() -> None:
    for path in PACKAGE.rglob("*.py"):
        if part_of(path) in RAY_FREE:
            assert not [name for name in imports_of(path) if name.split(".")[0] == "ray"], path


@pytest.mark.processes
def test_the_forward_engine_and_the_training_step_run_where_ray_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; "
        "import raytower.models.forward, raytower.models.batch_planner, raytower.models.cross_encoder, "
        "raytower.objectives.gradient_cache, raytower.training.step, raytower.training.config, "
        "raytower.training.optimizer, raytower.training.columns, raytower.training.windows"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_source_root_is_no_package() -> None:
    """`platform/__init__.py` would shadow the standard module `platform`; even `import ray` breaks."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list((ROOT / "platform").rglob("test_*.py"))


def test_the_readme_lists_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Read these first\n(.*?)\n## ", text, re.DOTALL)
    assert section is not None
    files = re.findall(r"`([\w/.-]+\.(?:py|yaml|md))`", section.group(1))
    assert len(files) >= 5
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_command_of_the_readme_and_the_jobs_exists() -> None:
    for command in COMMANDS.values():
        assert issubclass(find_reference(command.config), object)
        assert callable(find_reference(command.run))
        assert command.plan is None or callable(find_reference(command.plan))
        assert command.render is None or callable(find_reference(command.render))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"raytower (index [a-z]+|[a-z]+(?:-[a-z]+)?) --", text):
        assert name in COMMANDS, name
    for name in re.findall(r"jobs/\w+\.(?:py|yaml)", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_every_job_has_a_config_that_its_command_accepts(path: Path) -> None:
    from raytower.config import load_config

    match = re.search(r'run_command\("([^"]+)"', path.read_text(encoding="utf-8"))
    assert match is not None
    assert load_config(find_reference(COMMANDS[match.group(1)].config), path.with_suffix(".yaml"))


def test_versions_are_pinned_once() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in constraints)
    pinned = {canonicalize_name(line.partition("==")[0]) for line in constraints}
    assert len(pinned) == len(constraints)
    assert {"torch==2.13.0", "ray==2.60.0", "faiss-cpu==1.15.1"} <= set(constraints)

    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = described["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        described["build-system"]["requires"],
    ]
    named = {canonicalize_name(Requirement(line).name) for requirements in lists for line in requirements}
    assert named | {"pip"} <= pinned
