"""What became of each injection, as a line and as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.campaign.plan import KINDS, SENSIBLE, Injection


@dataclass(frozen=True)
class Outcome:
    """One injection. `faults` says what is not as it must be; without any it is whole."""

    injection: Injection
    done: str
    """What was done, or why it could not be."""
    starts: int
    """How often the job was started until it was done."""
    seconds: float
    faults: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return not self.faults

    def line(self) -> str:
        kept = "went on by itself" if self.starts == 1 else f"whole after {self.starts} starts"
        said = kept if self.is_whole else f"NOT WHOLE: {'; '.join(self.faults)}"
        at = f"at {self.injection.moment:.0%}"
        return f"{self.injection.name} {at}: {self.done}; {said} ({self.seconds:.0f} s)"


def table(outcomes: Sequence[Outcome]) -> str:
    """Kinds by jobs: of so many injections so many were whole, and of these so many without another start."""
    jobs = [job for job in SENSIBLE if any(item.injection.job == job for item in outcomes)]
    rows = [["fault", *jobs], ["---"] * (len(jobs) + 1)]
    for kind, words in KINDS.items():
        of_kind = [item for item in outcomes if item.injection.kind == kind]
        if of_kind:
            rows.append([words, *(_cell([i for i in of_kind if i.injection.job == job]) for job in jobs)])
    whole = sum(item.is_whole for item in outcomes)
    kinds = len({item.injection.kind for item in outcomes})
    head = (
        f"{whole} of {len(outcomes)} injections of {kinds} kinds ended with the undisturbed run's output. "
        "A cell is: whole / injections (of the whole ones, without another start)."
    )
    return "\n".join([head, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return ""
    whole = [item for item in outcomes if item.is_whole]
    return f"{len(whole)} / {len(outcomes)} ({sum(item.starts == 1 for item in whole)})"
