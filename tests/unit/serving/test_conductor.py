"""The two-phase swap: plain cases, and any order of reports, losses, newcomers, refusals and restarts."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raytower.errors import RaytowerError
from raytower.serving.conductor import Conductor, Phase, Refusal, Report, Served, State, Wanted
from raytower.serving.generation import Generation, ModelEntry


def generation(version: str, collection: str = "default") -> Generation:
    return Generation(
        collection=collection,
        index="/index",
        index_version=version,
        manifest_sha256=version,
        encoder=ModelEntry(uri="encoder", fingerprint="f"),
    )


def served(version: str) -> Served:
    return Served(generation=generation(version))


class Member:
    """A process that does what it is told, when the test lets it."""

    def __init__(self, name: str, role: str = "ingress") -> None:
        self.name = name
        self.role = role
        self.state = State()
        self.prepared: set[str] = set()
        self.refused: dict[str, Refusal] = {}
        self.wanted: Wanted | None = None

    def report(self) -> Report:
        return Report(
            member=self.name,
            role=self.role,
            state=self.state,
            prepared=frozenset(self.prepared),
            refused=self.refused,
        )

    def poll(self, conductor: Conductor, now: float) -> None:
        wanted = conductor.poll(self.report(), now)
        self.wanted = wanted
        if wanted.keep is not None:
            self.prepared &= wanted.keep
        self.refused = {id: item for id, item in self.refused.items() if item.attempt == wanted.attempt}
        self.activate()

    def prepare(self) -> None:
        assert self.wanted is not None
        self.prepared |= {item.id for item in self.wanted.prepare} - self.refused.keys()
        self.activate()

    def refuse(self, id: str) -> None:
        assert self.wanted is not None
        self.refused[id] = Refusal(attempt=self.wanted.attempt, reason="the index is damaged")

    def activate(self) -> None:
        wanted = self.wanted
        if wanted is None or wanted.state.epoch <= self.state.epoch:
            return
        if {item.generation.id for item in wanted.state.active.values()} <= self.prepared:
            self.state = wanted.state

    @property
    def version(self) -> str | None:
        found = self.state.active.get("default")
        return found.generation.index_version if found else None


def started(*members: Member) -> Conductor:
    """All members serve version 1."""
    conductor = Conductor(roles=frozenset({"ingress"}))
    conductor.start({"default": served("1")})
    for member in members:
        member.poll(conductor, 0)
        member.prepare()
        member.poll(conductor, 0)
        assert member.version == "1"
    return conductor


def test_all_members_prepare_before_one_activates() -> None:
    one, two = Member("one"), Member("two", "reranker")
    conductor = started(one, two)
    swap = conductor.begin({"default": served("2")}, 1, 1000)
    one.poll(conductor, 1)
    one.prepare()
    one.poll(conductor, 1)
    assert one.version == "1"
    two.poll(conductor, 1)
    two.prepare()
    assert swap.phase is Phase.PREPARING
    two.poll(conductor, 1)
    assert (one.version, two.version, swap.phase) == ("1", "2", Phase.ACTIVATING)
    one.poll(conductor, 1)
    assert one.version == "2"
    two.poll(conductor, 1)
    one.poll(conductor, 1)
    assert swap.phase is Phase.DONE
    assert conductor.state.epoch == 1000


def test_one_refusal_leaves_all_on_what_they_serve_and_names_the_member() -> None:
    one, two = Member("one"), Member("two")
    conductor = started(one, two)
    swap = conductor.begin({"default": served("2")}, 1, 1000)
    for member in (one, two):
        member.poll(conductor, 1)
    one.prepare()
    two.refuse(generation("2").id)
    one.poll(conductor, 1)
    two.poll(conductor, 1)
    assert (swap.phase, swap.member, swap.reason) == (Phase.REFUSED, "ingress two", "the index is damaged")
    one.poll(conductor, 1)
    assert (one.version, two.version) == ("1", "1")
    assert one.prepared == {generation("1").id}, "what was prepared in vain is dropped"


def test_a_refusal_of_an_earlier_swap_does_not_count_in_the_next() -> None:
    one = Member("one")
    conductor = started(one)
    first = conductor.begin({"default": served("2")}, 1, 1000)
    one.poll(conductor, 1)
    one.refuse(generation("2").id)
    stale = one.report()
    one.poll(conductor, 1)
    assert first.phase is Phase.REFUSED
    second = conductor.begin({"default": served("2")}, 2, 2000)
    conductor.poll(stale, 2)
    assert second.phase is Phase.PREPARING
    one.poll(conductor, 2)
    one.prepare()
    one.poll(conductor, 2)
    one.poll(conductor, 2)
    assert (second.phase, one.version) == (Phase.DONE, "2")


def test_a_lost_member_is_not_waited_for_and_catches_up_when_it_returns() -> None:
    one, two = Member("one"), Member("two")
    conductor = started(one, two)
    swap = conductor.begin({"default": served("2")}, 1, 1000)
    one.poll(conductor, 1)
    one.prepare()
    one.poll(conductor, 2)
    assert swap.phase is Phase.PREPARING
    one.poll(conductor, 5.5)
    assert swap.phase is Phase.ACTIVATING
    two.poll(conductor, 6)
    assert two.version == "1"
    two.prepare()
    assert two.version == "2"


def test_without_a_member_of_a_needed_role_a_swap_waits_and_is_refused_in_the_end() -> None:
    one = Member("one")
    conductor = started(one)
    conductor.tick(6)  # five seconds after its last word it counts as lost
    swap = conductor.begin({"default": served("2")}, 6, 1000)
    conductor.tick(605)
    assert swap.phase is Phase.PREPARING
    conductor.tick(607)
    assert swap.phase is Phase.REFUSED
    assert swap.reason == "not prepared within 600 s: ingress"


def test_a_newcomer_serves_what_all_serve_before_it_prepares_what_comes() -> None:
    one, late = Member("one"), Member("late")
    conductor = started(one)
    swap = conductor.begin({"default": served("2")}, 1, 1000)
    late.poll(conductor, 1)
    assert late.wanted is not None
    assert [item.index_version for item in late.wanted.prepare] == ["1", "2"]
    one.poll(conductor, 1)
    one.prepare()
    one.poll(conductor, 1)
    assert swap.phase is Phase.PREPARING, "the newcomer is waited for"
    late.prepare()
    assert late.version == "1"
    late.poll(conductor, 1)
    assert late.version == "2"


def test_a_restarted_conductor_takes_up_the_latest_state_that_a_member_serves() -> None:
    one, two = Member("one"), Member("two")
    conductor = started(one, two)
    conductor.begin({"default": served("2")}, 1, 1000)
    for member in (one, two):
        member.poll(conductor, 1)
        member.prepare()
        member.poll(conductor, 1)
    assert (one.version, two.version) == ("1", "2")
    again = Conductor(roles=frozenset({"ingress"}))
    one.poll(again, 0)
    two.poll(again, 0)
    again.start({"default": served("9")})
    one.poll(again, 0)
    assert (one.version, two.version) == ("2", "2")
    previous = again.previous("default")
    assert previous is not None
    assert previous.generation.index_version == "1", "and with it what a rollback returns to"


def test_a_member_with_a_later_state_ends_the_swap_of_a_conductor_that_did_not_know_it() -> None:
    one = Member("one")
    conductor = started(one)
    swap = conductor.begin({"default": served("2")}, 1, 1000)
    other = Member("other")
    other.state = State(epoch=5000, active={"default": served("7")})
    other.poll(conductor, 1)
    assert swap.phase is Phase.REFUSED
    one.poll(conductor, 1)
    one.prepare()
    assert one.version == "7"


def test_rollback_goes_back_step_by_step() -> None:
    one = Member("one")
    conductor = started(one)

    def swap(target: Served, at: int, is_rollback: bool = False) -> None:
        conductor.begin({"default": target}, at, 1000 * at, is_rollback=is_rollback)
        one.poll(conductor, at)
        one.prepare()
        one.poll(conductor, at)
        one.poll(conductor, at)

    swap(served("2"), 1)
    swap(served("3"), 2)
    for at, expected in ((3, "2"), (4, "1")):
        previous = conductor.previous("default")
        assert previous is not None
        swap(previous, at, is_rollback=True)
        assert one.version == expected
    assert conductor.previous("default") is None


def test_what_requests_under_way_may_name_is_kept_for_a_while() -> None:
    one = Member("one")
    conductor = started(one)
    conductor.begin({"default": served("2")}, 1, 1000)
    one.poll(conductor, 1)
    one.prepare()
    one.poll(conductor, 1)
    assert one.prepared == {generation("1").id, generation("2").id}
    conductor.tick(65)
    assert generation("1").id in conductor.wanted().keep
    one.poll(conductor, 67)
    assert one.prepared == {generation("2").id}


def test_one_swap_at_a_time_and_none_before_the_start_or_while_draining() -> None:
    conductor = Conductor(roles=frozenset({"ingress"}))
    with pytest.raises(RaytowerError, match="starting"):
        conductor.begin({"default": served("2")}, 1, 1000)
    conductor.start({"default": served("1")})
    conductor.begin({"default": served("2")}, 1, 1000)
    with pytest.raises(RaytowerError, match="swap 1000 is preparing"):
        conductor.begin({"default": served("3")}, 1, 1001)
    other = started(Member("one"))
    other.drain()
    assert other.wanted().draining
    with pytest.raises(RaytowerError, match="stopping"):
        other.begin({"default": served("2")}, 1, 1000)


class AnyOrder(RuleBasedStateMachine):
    """Members poll, prepare, refuse, vanish, return and join, and the conductor restarts, in any order.

    Held: a new state is decided only when every live member has reported all of it prepared; a member serves only what
    it has prepared; a refused swap changes nothing; and all agree once things are quiet.
    """

    @initialize(num_members=st.integers(1, 3))
    def begin(self, num_members: int) -> None:
        self.now = 0.0
        self.wall_ms = 1000
        self.num_versions = 1
        self.members = [Member(f"m{number}") for number in range(num_members)]
        self.silent: set[str] = set()
        self.conductor = Conductor(roles=frozenset({"ingress"}))
        self.conductor.start({"default": served("1")})

    def ask(self, member: Member) -> None:
        before = self.conductor.state
        reports = {report.member: report for report in self.conductor.members()}
        sent = member.report()
        member.poll(self.conductor, self.now)
        after = self.conductor.state
        if after.epoch > before.epoch and after.epoch != sent.state.epoch:
            new = {item.generation.id for item in after.active.values()}
            old = {item.generation.id for item in before.active.values()}
            live = [report.member for report in self.conductor.members()]
            for name in live:
                told = sent if name == member.name else reports[name]
                assert new - old <= told.prepared

    @rule(number=st.integers(0, 5))
    def poll(self, number: int) -> None:
        member = self.members[number % len(self.members)]
        if member.name not in self.silent:
            self.ask(member)

    @rule(number=st.integers(0, 5))
    def prepare(self, number: int) -> None:
        member = self.members[number % len(self.members)]
        if member.wanted is not None:
            member.prepare()

    @rule(number=st.integers(0, 5))
    def refuse(self, number: int) -> None:
        member = self.members[number % len(self.members)]
        swap = self.conductor.swap
        if member.wanted is not None and swap is not None and swap.phase is Phase.PREPARING:
            for target in swap.change.values():
                if target.generation.id not in member.prepared:
                    member.refuse(target.generation.id)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.wall_ms += int(seconds * 1000) + 1

    @rule(number=st.integers(0, 5))
    def vanish_or_return(self, number: int) -> None:
        self.silent ^= {self.members[number % len(self.members)].name}

    @precondition(lambda self: len(self.members) < 5)
    @rule()
    def join(self) -> None:
        self.members.append(Member(f"m{len(self.members)}"))

    @rule()
    def restart(self) -> None:
        """It hears what the members serve before it starts anything."""
        self.conductor = Conductor(roles=frozenset({"ingress"}))
        for member in self.members:
            self.ask(member)
        self.conductor.start({"default": served("1")})

    @rule()
    def swap(self) -> None:
        before = self.conductor.state
        if self.conductor.swap is None or self.conductor.swap.has_ended:
            self.num_versions += 1
            self.conductor.tick(self.now)
            reports = self.conductor.members()
            self.conductor.begin({"default": served(str(self.num_versions))}, self.now, self.wall_ms)
            assert reports == self.conductor.members()
            assert self.conductor.state == before, "nothing is decided before anybody has prepared it"

    @invariant()
    def a_member_serves_only_what_it_holds(self) -> None:
        for member in getattr(self, "members", ()):
            assert {item.generation.id for item in member.state.active.values()} <= member.prepared

    @invariant()
    def a_refused_swap_changes_nothing(self) -> None:
        swap = getattr(self, "conductor", None) and self.conductor.swap
        if swap and swap.phase is Phase.REFUSED:
            refused = {item.generation.id for item in swap.change.values()}
            assert not refused & {item.generation.id for item in self.conductor.state.active.values()}

    def teardown(self) -> None:
        if not hasattr(self, "members"):
            return
        self.silent.clear()
        for _ in range(6):
            self.now += 0.5
            for member in self.members:
                self.ask(member)
                member.prepare()
        assert {member.state.epoch for member in self.members} == {self.conductor.state.epoch}
        assert len({member.version for member in self.members}) == 1


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
