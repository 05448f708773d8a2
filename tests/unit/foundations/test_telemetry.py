"""What a job tells Ray about telemetry and logs; tests/jobs/test_runtime.py shows that Ray goes by it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from raytower.errors import RaytowerError
from tests.support.processes import ROOT

SETTINGS = ("RAY_USAGE_STATS_ENABLED", "RAY_DATA_LOG_LEVEL")


class TestSettings:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in (*SETTINGS, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            monkeypatch.setenv(name, "")  # so that what is set below is taken back
            monkeypatch.delenv(name)
        before = logging.getLogger("ray.data").level
        yield
        logging.getLogger("ray.data").setLevel(before)

    def test_the_users_own_stand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from raytower import runtime

        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "DEBUG")
        runtime._make_quiet()
        assert [os.environ[name] for name in SETTINGS] == ["1", "DEBUG"]
        assert logging.getLogger("ray.data").level == logging.DEBUG

    @pytest.mark.parametrize(
        ("job", "told"),
        [
            (None, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING"}),
            ({"metadata": {}}, {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING"}),
            (
                {"runtime_env": {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}}},
                {"RAY_DATA_LOG_LEVEL": "WARNING"},
            ),
        ],
        ids=["no job", "a job without an environment", "a job that sets one itself"],
    )
    def test_a_job_that_sets_one_is_not_told_twice(
        self, job: Any, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray refuses to start where a variable is set by the job and by its driver."""
        from raytower import runtime

        runtime._make_quiet()
        if job is not None:
            monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        assert runtime._environment_in_cluster() == {"env_vars": told}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "Ray did not start: The current node timed out; run the command again"),
        (
            "10.0.0.1:6379",
            "the Ray at 10.0.0.1:6379 (RAY_ADDRESS) cannot be joined: The current node timed out; run",
        ),
    ],
)
def test_a_ray_that_does_not_start_is_said_in_one_line(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytower import runtime

    def time_out(**_: Any) -> None:
        raise Exception("The current node\ntimed out")  # as Ray raises it

    monkeypatch.setattr(runtime.ray, "init", time_out)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RaytowerError) as raised:
        runtime._init()
    assert str(raised.value).startswith(message)


def test_ray_starts_in_one_place() -> None:
    """What the tests above show of `ensure_ray` holds for every job."""
    places = (ROOT / "platform").rglob("*.py"), (ROOT / "jobs").rglob("*.py")
    starting = [
        path.name
        for folder in places
        for path in folder
        if re.search(r"\bray\.init\(", path.read_text(encoding="utf-8"))
    ]
    assert starting == ["runtime.py"]
