"""Which generations are served by all processes of a server, and how they move to others together.

A process that holds models or shards is a *member*. Members ask the conductor what it wants of them. A swap has two
phases: every live member prepares the new generations; then, and only then, all are told to serve them. One refusal
leaves all on what they serve. `Conductor` is plain arithmetic over reports: it has neither a clock nor a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

from raytower.errors import RaytowerError
from raytower.serving.generation import Generation

# Generations of a collection that a rollback can return to, one after the other.
_HISTORY = 8


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Served(_Document):
    """A generation, and the settings that it was resolved from: a later change is laid over them."""

    generation: Generation
    settings: dict[str, Any] = {}


class State(_Document):
    """What all members serve. A higher `epoch` is a later state; 0 says nothing.

    Members keep the state that they serve and report it, so a conductor that was restarted learns it from them.
    """

    epoch: int = 0
    active: dict[str, Served] = {}
    """By collection."""
    history: dict[str, tuple[Served, ...]] = {}
    """What each collection served before, the latest first."""


class Refusal(_Document):
    """A member cannot serve a generation. `attempt` is the swap that it was asked in."""

    attempt: int
    reason: str


class Report(_Document):
    """What a member says of itself."""

    member: str
    role: str
    state: State = State()
    """What it serves."""
    prepared: frozenset[str] = frozenset()
    """Ids of the generations that it holds, those that it serves among them."""
    refused: dict[str, Refusal] = {}
    """By generation id."""
    heard: int = -1
    """`Wanted.serial` of the last answer."""


class Wanted(_Document):
    """What the conductor wants of every member."""

    serial: int
    """Another number says that something has changed."""
    state: State = State()
    """To be served as soon as all of its generations are prepared."""
    prepare: tuple[Generation, ...] = ()
    """To be held; what is served comes first."""
    keep: frozenset[str] | None = None
    """Ids not to be dropped: of what is to be held, and of what requests under way may still name. None drops nothing:
    a conductor that was just restarted does not know yet what has been decided."""
    attempt: int = 0
    """The number of the swap that is being prepared."""
    draining: bool = False
    """No new requests are to be taken."""


class Phase(Enum):
    PREPARING = "preparing"
    ACTIVATING = "activating"
    DONE = "done"
    REFUSED = "refused"


@dataclass
class Swap:
    """A change of what collections serve. `reason` says why it was refused, and `member` by whom."""

    number: int
    change: Mapping[str, Served]
    began: float
    is_rollback: bool = False
    phase: Phase = Phase.PREPARING
    reason: str | None = None
    member: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.phase in (Phase.DONE, Phase.REFUSED)


@dataclass
class _Member:
    report: Report
    seen: float


@dataclass
class Conductor:
    """Every method that takes `now` is told the time, in seconds on any clock that does not go backwards.

    Args:
        roles: roles of which a swap needs a live member before it goes on.
        lost_after_s: a member that says nothing for so long is not waited for.
        prepare_timeout_s: a swap that is not prepared by then is refused.
        linger_s: requests that began before a swap may need the generation before for so long.
    """

    roles: frozenset[str]
    lost_after_s: float = 5.0
    prepare_timeout_s: float = 600.0
    linger_s: float = 65.0
    state: State = field(default_factory=State)
    draining: bool = False
    swap: Swap | None = None
    _members: dict[str, _Member] = field(default_factory=dict)
    _lingering: dict[str, float] = field(default_factory=dict)
    _has_started: bool = False
    _serial: int = 0
    _num_swaps: int = 0

    # --- what members say -------------------------------------------------------------------------------------

    def poll(self, report: Report, now: float) -> Wanted:
        """Take a member's report, and answer what is wanted of it."""
        self._members[report.member] = _Member(report, now)
        if report.state.epoch > self.state.epoch:
            self._adopt(report.state)
        self.tick(now)
        return self.wanted()

    def wanted(self) -> Wanted:
        """What is wanted of every member now."""
        targets = self._targets()
        hold = {item.generation.id: item.generation for item in (*self.state.active.values(), *targets)}
        return Wanted(
            serial=self._serial,
            state=self.state,
            prepare=tuple(hold.values()),
            keep=frozenset((*hold, *self._lingering)) if self._has_started else None,
            attempt=self.swap.number if self.swap else 0,
            draining=self.draining,
        )

    # --- what operators say -----------------------------------------------------------------------------------

    def start(self, active: Mapping[str, Served]) -> None:
        """Serve `active`, unless members have reported that they serve something."""
        if self.state.epoch == 0:
            self.state = State(epoch=1, active=dict(active))
        self._has_started = True
        self._serial += 1

    def begin(
        self, change: Mapping[str, Served], now: float, wall_ms: int, *, is_rollback: bool = False
    ) -> Swap:
        """Begin a swap. `wall_ms` is the time of day in milliseconds: epochs rise over restarts of the conductor.

        Raises:
            RaytowerError: another swap is under way, or nothing is served yet.
        """
        if self.swap is not None and not self.swap.has_ended:
            raise RaytowerError(
                f"swap {self.swap.number} is {self.swap.phase.value}; try again when it has ended"
            )
        if not self._has_started or self.draining:
            raise RaytowerError(
                "the server is stopping" if self.draining else "the server is starting; try again"
            )
        self._num_swaps = max(self._num_swaps + 1, wall_ms)
        self.swap = Swap(self._num_swaps, dict(change), now, is_rollback)
        self._serial += 1
        self.tick(now)
        return self.swap

    def drain(self) -> None:
        """Have every member refuse new requests."""
        self.draining = True
        self._serial += 1

    # --- the machine ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Forget members that are lost and generations that no request names any more, and move the swap on."""
        for name in [name for name, item in self._members.items() if now - item.seen > self.lost_after_s]:
            del self._members[name]
        for id in [id for id, until in self._lingering.items() if now > until]:
            del self._lingering[id]
            self._serial += 1
        swap = self.swap
        if swap is None:
            return
        if swap.phase is Phase.PREPARING:
            self._move_on(swap, now)
        if swap.phase is Phase.ACTIVATING and all(
            item.report.state.epoch >= self.state.epoch for item in self._members.values()
        ):
            swap.phase = Phase.DONE

    def members(self) -> list[Report]:
        """The last reports of the live members, by name."""
        return [self._members[name].report for name in sorted(self._members)]

    def previous(self, collection: str) -> Served | None:
        """What a rollback of the collection returns to."""
        return next(iter(self.state.history.get(collection, ())), None)

    def _move_on(self, swap: Swap, now: float) -> None:
        for name, member in sorted(self._members.items()):
            for target in self._targets():
                refusal = member.report.refused.get(target.generation.id)
                if refusal is not None and refusal.attempt == swap.number:
                    self._refuse(swap, refusal.reason, f"{member.report.role} {name}")
                    return
        waiting = self._unprepared()
        if not waiting:
            self._activate(swap, now)
        elif now - swap.began > self.prepare_timeout_s:
            self._refuse(
                swap, f"not prepared within {self.prepare_timeout_s:g} s: {', '.join(waiting)}", waiting[0]
            )

    def _unprepared(self) -> list[str]:
        """The members, and the roles without one, for which a swap waits."""
        targets = {item.generation.id for item in self._targets()}
        late = [
            f"{member.report.role} {name}"
            for name, member in sorted(self._members.items())
            if not targets <= member.report.prepared
        ]
        return [*late, *sorted(self.roles - {member.report.role for member in self._members.values()})]

    def _activate(self, swap: Swap, now: float) -> None:
        history = dict(self.state.history)
        for name, served in swap.change.items():
            before = self.state.active.get(name)
            earlier = history.get(name, ())
            if swap.is_rollback:
                history[name] = earlier[1:]
            elif before is not None and before.generation != served.generation:
                history[name] = (before, *earlier)[:_HISTORY]
            if before is not None and before.generation != served.generation:
                self._lingering[before.generation.id] = now + self.linger_s
        active = {**self.state.active, **swap.change}
        for served in active.values():
            self._lingering.pop(served.generation.id, None)
        self.state = State(epoch=max(self.state.epoch + 1, swap.number), active=active, history=history)
        swap.phase = Phase.ACTIVATING
        self._serial += 1

    def _refuse(self, swap: Swap, reason: str, member: str | None) -> None:
        swap.phase, swap.reason, swap.member = Phase.REFUSED, reason, member
        self._serial += 1

    def _adopt(self, state: State) -> None:
        """A member serves a later state than this conductor knows: one before it, restarted since, has decided so."""
        self.state = state
        self._serial += 1
        if self.swap is not None and not self.swap.has_ended:
            self._refuse(self.swap, "members serve a later state than the conductor knew of", None)

    def _targets(self) -> list[Served]:
        if self.swap is None or self.swap.phase is not Phase.PREPARING:
            return []
        return list(self.swap.change.values())
