"""A short form of the campaign of faults, and that its plan holds what it must: see tests/faults/campaign."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign.plan import KINDS, SENSIBLE, Injection, draw, pairs
from tests.faults.campaign.report import Outcome, table
from tests.support.processes import clean_environment


class TestPlan:
    def test_forty_injections_are_of_all_kinds_and_jobs(self) -> None:
        drawn = draw(0, 40)
        assert len(drawn) == 40
        assert {item.kind for item in drawn} == set(KINDS)
        assert {item.job for item in drawn} == set(SENSIBLE)
        assert len({(item.job, item.kind) for item in drawn}) == 40, (
            "no pair comes twice before all have come"
        )

    def test_a_seed_says_it_all(self) -> None:
        assert draw(7, 60) == draw(7, 60)
        assert draw(7, 60) != draw(8, 60)

    def test_a_pair_that_comes_again_is_done_in_another_way(self) -> None:
        assert [item.way for item in draw(3, 3, ["replica/serving"])] == [0, 1, 2]
        assert len({item.moment for item in draw(3, 3, ["driver/mining"])}) == 3

    def test_only_what_is_named(self) -> None:
        assert pairs(["driver/mining", "replica"]) == [("mining", "driver"), ("serving", "replica")]
        assert {job for job, _ in pairs(["mining"])} == {"mining"}
        with pytest.raises(ValueError, match="replica/mining: neither KIND/JOB nor KIND nor JOB"):
            pairs(["replica/mining"])


def test_the_table_counts_what_is_whole() -> None:
    once = Outcome(Injection("mining", "driver", 0.5, 0), "SIGKILL", 2, 3.0)
    hung = Outcome(Injection("mining", "s3", 0.5, 0), "away", 1, 240.0, ("hang",))
    assert once.line() == "driver/mining at 50%: SIGKILL; whole after 2 starts (3 s)"
    assert hung.line() == "s3/mining at 50%: away; NOT WHOLE: hang (240 s)"
    said = table([once, hung, once])
    assert said.startswith("2 of 3 injections of 2 kinds")
    assert f"| {KINDS['driver']} | 2 / 2 (0) |" in said
    assert f"| {KINDS['s3']} | 0 / 1 (0) |" in said


@pytest.mark.processes
def test_a_few_faults_lose_nothing(tmp_path: Path) -> None:
    """The whole campaign takes half an hour: `python -m tests.faults.campaign`."""
    few = ["driver/mining", "s3/mining", "disk/evaluating", "stall/evaluating"]
    # Seed 7 draws the ways that take seconds: a store that fails now and then, and a stall that is forgiven.
    drawn = ["--seed", "7", "--injections", str(len(few)), "--only", *few]
    command = [sys.executable, "-m", "tests.faults.campaign", *drawn]
    ended = subprocess.run(
        command, env=clean_environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=1500
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-5000:]
    assert "4 of 4 injections of 4 kinds" in ended.stdout
