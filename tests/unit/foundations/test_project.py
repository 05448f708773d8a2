"""The shape of the project itself: layers, the source root, what the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from raytower import errors
from raytower.cli import COMMANDS, find_reference
from raytower.config import Config, load_config
from raytower.pipeline.config import PipelineConfig
from raytower.pipeline.job import plan_pipeline
from tests.support import slower

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "platform" / "raytower"
# The floors of the house, lowest first. A file may import what its own folder holds and what stands on a lower floor.
FLOORS = [
    {"__init__", "collecting", "config_words", "errors", "escapes", "requirements"},
    {"collectives", "config", "ending", "metrics", "progress", "storage"},
    {"pages"},
    {"only_job", "worker_output", "workers"},
    {"runtime"},
    {"shared_storage"},
    {"data"},
    {"models"},
    {"objectives"},
    {"training"},
    {"encoding"},
    {"index"},
    {"file_jobs"},
    {"retrieval"},
    {"evaluation", "annotation"},
    {"ranked"},
    {"serving"},
    {"export"},
    {"commands", "examples"},
    {"cli", "library", "pipeline", "up"},
    {"cluster", "demo", "refresh"},
    {"adapt"},
]
RAY_FREE = [
    "models",
    "objectives",
    "retrieval",
    "ending",
    "errors",
    "escapes",
    "config",
    "config_words",
    "storage",
    "workers",
    "metrics",
    "progress",
    {"commands", "examples"},
    {"cli", "library", "pipeline", "up"},
    "commands",
    "examples",
    "cli",
]
HEAVY = ["torch", "transformers", "faiss", "ray", "lance"]
# Modules of extras that [test] leaves out, and the packages that bring them.
LEFT_OUT = {"wandb": ["wandb"], "mlflow": ["mlflow-skinny"]}


def imports_of(path: Path, *, for_types: bool = True) -> set[str]:
    """Every module that a file imports, in functions too; `for_types` counts those that only a type checker reads."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            # `from folder import module` names the module; `from module import name` names its module.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & FILES.keys() or {str(node.module)}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def test_every_file_stands_on_a_floor() -> None:
    parts = {part_of(path) for path in FILES.values()}
    assert parts == set().union(*FLOORS), "give a new folder or module its floor; take a removed one off"
    assert sum(len(floor) for floor in FLOORS) == len(parts)


def test_a_lower_floor_never_imports_a_higher_one() -> None:
    height = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    seen = 0
    for path in FILES.values():
        part = part_of(path)
        # The package's own door names, for type checkers alone, what it loads from upstairs when it is asked for it.
        for name in imports_of(path, for_types=part != "__init__") & FILES.keys():
            target = part_of(FILES[name])
            # The package itself is imported with every module of it.
            assert target == part or height[target] < height[part], f"{path} imports {name}"
            seen += 1
    assert seen > 600


def test_no_module_imports_itself_by_a_way_round() -> None:
    left = {name: imports_of(path, for_types=False) for name, path in FILES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, "these modules import each other"


def test_configs_import_no_heavy_library() -> None:
    """Help, checks of a config and a mistyped key take no second of imports."""
    configs = {command.config.partition(":")[0] for command in COMMANDS.values()}
    configs |= {name for name in FILES if name.endswith(".config")}
    light = sorted(configs)
    assert len(light) >= 13
    code = (
        f"import sys\nfor name in {light!r}:\n    __import__(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_runs_without_ray_imports_none() -> None:
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
        assert issubclass(find_reference(command.config), Config)
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
    match = re.search(r'run_command\("([^"]+)"', path.read_text(encoding="utf-8"))
    assert match is not None
    config = load_config(find_reference(COMMANDS[match.group(1)].config), path.with_suffix(".yaml"))
    if isinstance(config, PipelineConfig):
        assert plan_pipeline(config)["steps"], "the configs of its steps are checked too"


def test_the_configs_behind_published_results_are_accepted() -> None:
    paths = sorted((ROOT / "docs" / "results" / "strategies").glob("*.yaml"))
    for path in paths:
        match = re.match(r"# raytower ((?:index )?[a-z-]+)", path.read_text(encoding="utf-8"))
        assert match is not None, path
        load_config(find_reference(COMMANDS[match.group(1)].config), path)
    assert len(paths) >= 9


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
    assert (named - {"raytower"}) | {"pip"} <= pinned


def requirements(extra: str | None = None) -> set[str]:
    """Names of what is installed without extras, or of what an extra adds, extras that it names counted."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    found = set()
    for requirement in map(Requirement, lines):
        if requirement.name == "raytower":
            found |= set().union(*(requirements(inner) for inner in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def test_what_is_imported_is_declared() -> None:
    """By raytower itself, not only by something that it depends on."""
    modules = {name.partition(".")[0] for path in FILES.values() for name in imports_of(path)}
    modules -= sys.stdlib_module_names | {"raytower"}
    known = packages_distributions()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    declared = requirements().union(
        *(requirements(extra) for extra in extras if extra not in ("test", "clients-test"))
    )
    assert len(modules) >= 20
    undeclared = [
        module for module in modules if not declared & {canonicalize_name(name) for name in known[module]}
    ]
    assert undeclared == []


def test_the_install_lines_bring_what_is_missing() -> None:
    known = {**LEFT_OUT, **packages_distributions()}
    for module, (_, extra, _) in errors._EXTRAS.items():
        brought = requirements(extra)
        assert brought & {canonicalize_name(name) for name in known[module]}, module
        assert not requirements() & {canonicalize_name(name) for name in known[module]}, module
        assert f"pip install 'raytower[{extra}]'" in str(errors.missing_extra(module))


def test_all_is_everything_that_goes_together() -> None:
    for extra in ("ray", "train", "serve", "onnx", "lora"):
        assert requirements(extra) <= requirements("all")
    assert not requirements("all") & (requirements("cpu") | requirements("gpu"))
    assert requirements("all") | requirements("aws") | requirements("demo") <= requirements("test")


def test_a_missing_module_is_found_in_what_ray_wraps() -> None:
    """As on a node where an extra was left out."""
    try:
        try:
            raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")
        except ModuleNotFoundError as error:
            raise RuntimeError("a task failed") from error
    except RuntimeError as error:
        cause = errors.find_cause(error)
    assert isinstance(cause, errors.MissingExtraError)
    assert str(cause) == "peft, which lora needs, is not installed: pip install 'raytower[lora]'"
    unknown = ModuleNotFoundError("No module named 'something'", name="something")
    assert errors.find_cause(unknown) is unknown
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        errors.import_extra("no_such_module")


def test_the_forge_runs_what_there_is() -> None:
    """Its targets are the Makefile's, its Pythons those that the package says it runs on."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {found[1] for line in lines if (found := re.match(r"make (\w+)", line))}
    assert targets == {"lint", "quick", "test"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]
    ]
    pythons = [found[1] for found in named if found]
    matrices = [job["strategy"]["matrix"]["python"] for job in jobs.values() if "strategy" in job]
    assert len(matrices) == 3
    assert all(matrix == pythons for matrix in matrices)
    allowed = SpecifierSet(project["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 20) if f"3.{minor}" in allowed] == pythons


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert hook["entry"].removesuffix(" --fix") in makefile, hook["id"]


def test_what_make_quick_leaves_out_is_there() -> None:
    """A test that was renamed or removed leaves the list, so that nothing is left out by a name of before."""
    names = slower.listed(slower.LIST.read_text(encoding="utf-8"))
    assert len(names) > 100
    gone = []
    for name in sorted(names):
        file, *names_inside = name.split("::")
        path = ROOT / file
        # hypothesis gives a state machine the function `runTest`.
        if names_inside[-1] == "runTest":
            written = f"{names_inside[0]} = "
        else:
            written = f"def {names_inside[-1]}("
        if not path.is_file() or written not in path.read_text(encoding="utf-8"):
            gone.append(name)
    assert not gone, "run `make slower`, or mend tests/slower.txt"


def test_what_was_slow_is_listed_by_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slower, "LIST", tmp_path / "slower.txt")
    recorder = slower.Recorder()
    for name, when, seconds in (
        ("a.py::test_b[x]", "setup", 0.06),
        ("a.py::test_b[x]", "call", 0.06),
        ("a.py::test_b[y]", "call", 0.01),
        ("a.py::C::test_c", "call", 0.09),
        ("a.py::test_d", "call", 7.0),
    ):
        report = pytest.TestReport(name, ("a.py", 0, name), {}, "passed", None, when, duration=seconds)  # type: ignore[arg-type]
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_sessionfinish()
    assert slower.listed(slower.LIST.read_text()) == {"a.py::test_b", "a.py::test_d"}
