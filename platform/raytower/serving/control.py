"""The conductor at work: members and operators reach it here, in this process or through a Serve handle. No Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from raytower.errors import InputError, RaytowerError
from raytower.serving.conductor import Conductor, Phase, Refusal, Report, Served, State, Wanted
from raytower.serving.config import CollectionConfig
from raytower.serving.generation import Generation

_LOGGER = logging.getLogger("raytower.serving")
# Members report at least so often; it is well below the silence after which one counts as lost.
HEARTBEAT_S = 1.0
# A conductor that was restarted hears its members for so long before it says what is served.
ADOPT_S = 1.5
# Looked at so often: members that are lost, swaps that take too long.
_TICK_S = 0.25
# A conductor that has not answered by then is asked again.
_ANSWER_S = 5.0
# (collection, its settings, index version or None) → what is to be served. It blocks.
Resolve = Callable[[str, Mapping[str, Any], str | None], Awaitable[Served]]
# An index → its newest version. It blocks, and is quick.
Newest = Callable[[str], str | None]
NONE = "none"
"""What a change says in place of a model to serve without one."""
# What a change may name beside a collection's own settings.
_VERSION = "index_version"
_COLLECTION = "collection"


class Control(Protocol):
    """What operators ask of a server, behind the admin routes. Answers are JSON objects.

    Raises InputError (an unknown collection or key, a generation that cannot be served), SwapRefusedError (a member
    refused: it is named, and nothing has changed) and RaytowerError (another swap is under way).
    """

    async def status(self) -> dict[str, Any]:
        """What each collection serves and could return to, the members, and the swap that was last."""

    async def reload(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a collection by changed settings: `collection`, `index_version`, and any key of `CollectionConfig`.

        Keys that are not named stay as they are served. The index moves to `index_version`; without one it moves to its
        newest (also said as `newest`), unless other keys are named and `index` is not.
        """

    async def rollback(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Serve what a `collection` served before."""


class SwapRefusedError(RaytowerError):
    """A member cannot serve a new generation; all serve what they served."""


class Conducting:
    """One conductor on one event loop. It implements `Control`.

    Args:
        origin: names the config that the members were started by; reports of members of another are not counted.
        roles: as the conductor's.
        resolve: makes a generation of settings.
        newest: the newest version of an index.
        watch_s: seconds between looks for newer index versions; None does not look.
    """

    def __init__(
        self,
        origin: str,
        roles: Sequence[str],
        resolve: Resolve,
        newest: Newest,
        *,
        watch_s: float | None = None,
        linger_s: float = 65.0,
        prepare_timeout_s: float = 600.0,
        adopt_s: float = ADOPT_S,
    ) -> None:
        self._origin = origin
        self._conductor = Conductor(
            roles=frozenset(roles), linger_s=linger_s, prepare_timeout_s=prepare_timeout_s
        )
        self._resolve = resolve
        self._newest = newest
        self._watch_s = watch_s
        self._adopt_s = adopt_s
        self._changed = asyncio.Condition()
        self._changing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, active: Mapping[str, Served]) -> None:
        """Serve `active`, unless members say within a moment that they serve something already."""
        self._tasks.append(asyncio.create_task(self._tick()))
        await asyncio.sleep(self._adopt_s)
        self._conductor.start(active)
        await self._tell()
        if self._watch_s is not None:
            # What was published since `active` was resolved is new; a conductor that was restarted cannot tell.
            has_begun = self._conductor.state.epoch == 1
            seen = {name: _version_of(item) for name, item in active.items()} if has_begun else {}
            self._tasks.append(asyncio.create_task(self._watch(self._watch_s, seen)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # --- for members ------------------------------------------------------------------------------------------

    async def poll(self, origin: str, report: Report, wait_s: float = 0.0) -> Wanted:
        """Take a report; answer once something has changed since the member's last answer, or after `wait_s`."""
        if origin != self._origin:
            await asyncio.sleep(wait_s)  # it asks again at once
            return Wanted(serial=-1)
        wanted = self._conductor.poll(report, time.monotonic())
        await self._tell()
        if wanted.serial == report.heard and wait_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s), self._changed:
                    await self._changed.wait_for(lambda: self._conductor.wanted().serial != report.heard)
        return self._conductor.wanted()

    async def drain(self) -> None:
        """Have all members refuse new requests."""
        self._conductor.drain()
        await self._tell()

    # --- for operators ----------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        conductor = self._conductor
        swap = conductor.swap
        return {
            "epoch": conductor.state.epoch,
            "draining": conductor.draining,
            "collections": {
                name: {
                    **_described(item.generation),
                    "settings": item.settings,
                    "history": [_described(old.generation) for old in conductor.state.history.get(name, ())],
                }
                for name, item in self._active.items()
            },
            "members": [
                {
                    "member": report.member,
                    "role": report.role,
                    "epoch": report.state.epoch,
                    "active": {name: item.generation.id for name, item in report.state.active.items()},
                    "prepared": sorted(report.prepared),
                    "refused": {id: refusal.reason for id, refusal in report.refused.items()},
                }
                for report in conductor.members()
            ],
            "swap": swap
            and {
                "number": swap.number,
                "phase": swap.phase.value,
                "change": {name: item.generation.id for name, item in swap.change.items()},
                "reason": swap.reason,
                "member": swap.member,
            },
        }

    async def reload(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        changes = {key: None if value == NONE else value for key, value in wanted.items()}
        version = changes.pop(_VERSION, None)
        name = self._name(changes.pop(_COLLECTION, None))
        unknown = changes.keys() - CollectionConfig.model_fields.keys()
        if unknown:
            known = ", ".join((_COLLECTION, _VERSION, *CollectionConfig.model_fields))
            raise InputError(f"{', '.join(sorted(unknown))}: nothing that can be reloaded; known are {known}")
        served = self._active[name]
        if version is None and changes and "index" not in changes:
            version = served.generation.index_version
        # Of a section, such as hybrid, what is not named stays too.
        sections = {
            name: {**old, **value}
            for name, value in changes.items()
            if isinstance(value, Mapping) and isinstance(old := served.settings.get(name), Mapping)
        }
        settings = {**served.settings, **changes, **sections}
        return await self._swap(
            name, await self._resolve(name, settings, None if version == "newest" else version)
        )

    async def rollback(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        name = self._name(wanted.get(_COLLECTION))
        previous = self._conductor.previous(name)
        if previous is None:
            raise InputError(f"collection {name!r} has served nothing else before, so it cannot go back")
        return await self._swap(name, previous, is_rollback=True)

    async def move_to(self, active: Mapping[str, Served]) -> None:
        """Serve what a repeated deployment of the same config has resolved."""
        for name, target in active.items():
            await self._swap(name, target)

    # --- inside -----------------------------------------------------------------------------------------------

    @property
    def _active(self) -> dict[str, Served]:
        return self._conductor.state.active

    def _name(self, collection: Any) -> str:
        if not self._active:
            raise RaytowerError("the server is starting; try again")
        if collection is None:
            return next(iter(self._active))
        if collection not in self._active:
            raise InputError(f"there is no collection {collection!r}; there are {', '.join(self._active)}")
        return str(collection)

    async def _swap(self, name: str, target: Served, *, is_rollback: bool = False) -> dict[str, Any]:
        if self._changing.locked():
            raise RaytowerError("another change is under way; try again when it has ended")
        async with self._changing:
            before = self._active[name]
            if before.generation == target.generation and not is_rollback:
                return {"collection": name, "changed": False, **_described(before.generation)}
            swap = self._conductor.begin(
                {name: target}, time.monotonic(), int(time.time() * 1000), is_rollback=is_rollback
            )
            await self._tell()
            async with self._changed:
                await self._changed.wait_for(lambda: swap.has_ended)
        if swap.phase is Phase.REFUSED:
            by = f"{swap.member}: " if swap.member else ""
            raise SwapRefusedError(
                f"nothing has changed, {name!r} still serves {before.generation.id}: {by}{swap.reason}"
            )
        return {
            "collection": name,
            "changed": True,
            **_described(target.generation),
            "before": before.generation.id,
        }

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._conductor.tick(time.monotonic())
            await self._tell()

    async def _watch(self, seconds: float, seen: dict[str, tuple[str, str]]) -> None:
        """Serve each version that is published from now on; what was refused or rolled back from is not tried again.

        Only a new version is resolved: that may load models.

        Args:
            seen: by collection the index and the version that were looked at last.
        """
        while True:
            for name, item in list(self._active.items()):
                try:
                    index = item.generation.index
                    newest = await asyncio.to_thread(self._newest, index)
                    before, before_version = seen.get(name, ("", ""))
                    if newest is None or (before == index and newest == before_version):
                        continue
                    if before == index:
                        await self._move_on(name, item, newest)
                    seen[name] = (index, newest)
                except Exception as error:
                    _LOGGER.warning("collection %s stays as it is, and is looked at again: %s", name, error)
            await asyncio.sleep(seconds)

    async def _move_on(self, name: str, item: Served, version: str) -> None:
        """Serve another version. One that cannot be served is logged. Raises RaytowerError where it was not tried."""
        try:
            await self._swap(name, await self._resolve(name, item.settings, version))
            _LOGGER.warning("collection %s serves index version %s", name, version)
        except (InputError, SwapRefusedError) as error:
            _LOGGER.warning("collection %s stays as it is: %s", name, error)


def _version_of(item: Served) -> tuple[str, str]:
    return item.generation.index, item.generation.index_version


def _described(generation: Generation) -> dict[str, Any]:
    """What a status says of a generation."""
    return {
        "generation": generation.id,
        "index": generation.index,
        "index_version": generation.index_version,
        "encoder": generation.encoder.uri,
        "reranker": generation.reranker and generation.reranker.uri,
        "classifier": generation.classifier and generation.classifier.uri,
        "fusion_weight": generation.fusion and generation.fusion.weight,
        "modes": list(generation.modes),
        "hybrid": {"fusion": generation.hybrid.way, "weight": generation.hybrid.weight},
    }


# --- a member's side ------------------------------------------------------------------------------------------


class Holder(Protocol):
    """What a member holds generations in, such as `SearchEngine`."""

    async def prepare(self, generation: Generation) -> None:
        """Load it and answer a query with it. Raises what loading raises."""

    def held(self) -> frozenset[str]:
        """Ids of what could be activated, and of what is."""

    def activate(self, generation_id: str) -> None:
        """Serve it from the next request on."""

    def drop(self, generation_id: str) -> None:
        """Let go of it, as soon as requests on it have ended."""


Poll = Callable[[Report, float], Awaitable[Wanted]]


class Member:
    """Does what the conductor wants of one process, until it is closed.

    Args:
        name: the member's name, unlike every other's.
        role: what it holds.
        holder: where generations are held.
        poll: asks the conductor. What it raises is logged, and asked again.
    """

    def __init__(self, name: str, role: str, holder: Holder, poll: Poll) -> None:
        self._name = name
        self._role = role
        self._holder = holder
        self._poll = poll
        self._state = State()
        self._refused: dict[str, Refusal] = {}
        self._heard = -1
        self._preparing: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._first_error: str | None = None
        self._loop: asyncio.Task[None] | None = None
        self.draining = False

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def ready(self) -> None:
        """Until everything that is to be served is served here.

        Raises:
            RaytowerError: it cannot be: what loading it raised.
        """
        await self._ready.wait()
        if self._first_error is not None:
            raise RaytowerError(self._first_error)

    async def close(self) -> None:
        for task in (self._loop, self._preparing):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def report(self) -> Report:
        return Report(
            member=self._name,
            role=self._role,
            state=self._state,
            prepared=self._holder.held(),
            refused=self._refused,
            heard=self._heard,
        )

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                wait_s = 0.0 if self._preparing else HEARTBEAT_S
                async with asyncio.timeout(wait_s + _ANSWER_S):
                    wanted = await self._poll(self.report(), wait_s)
                failures = 0
                self._follow(wanted)
                if self._preparing is not None:
                    await asyncio.wait({self._preparing}, timeout=HEARTBEAT_S / 2)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                failures += 1
                if failures == 10:
                    _LOGGER.warning("the conductor does not answer: %s: %s", type(error).__name__, error)
                await asyncio.sleep(min(0.1 * failures, HEARTBEAT_S))

    def _follow(self, wanted: Wanted) -> None:
        self._heard = wanted.serial
        self.draining = wanted.draining
        if self._preparing is not None and self._preparing.done():
            self._preparing = None
        self._refused = {id: item for id, item in self._refused.items() if item.attempt == wanted.attempt}
        self._activate(wanted)
        if wanted.keep is not None:
            served = {item.generation.id for item in self._state.active.values()}
            for id in self._holder.held() - wanted.keep - served:
                self._holder.drop(id)
        held = self._holder.held()
        missing = [item for item in wanted.prepare if item.id not in held and item.id not in self._refused]
        if missing and self._preparing is None:
            self._preparing = asyncio.create_task(self._prepare(missing[0], wanted))

    def _activate(self, wanted: Wanted) -> None:
        ids = [item.generation.id for item in wanted.state.active.values()]
        if wanted.state.epoch > self._state.epoch and set(ids) <= self._holder.held():
            for id in ids:
                self._holder.activate(id)
            self._state = wanted.state
            self._heard = -1  # so that the conductor hears of it at once
            self._ready.set()

    async def _prepare(self, generation: Generation, wanted: Wanted) -> None:
        try:
            await self._holder.prepare(generation)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, RaytowerError) else f"{type(error).__name__}: {error}"
            _LOGGER.warning("generation %s is refused: %s", generation.id, reason)
            self._refused[generation.id] = Refusal(attempt=wanted.attempt, reason=reason)
            if not self._state.epoch and generation.id in {
                item.generation.id for item in wanted.state.active.values()
            }:
                self._first_error = reason
                self._ready.set()
