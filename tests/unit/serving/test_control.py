"""The conductor at work over members in this process, without Ray: reload, rollback, refusals, watching, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from raytower.errors import InputError, RaytowerError
from raytower.serving.conductor import Report, Served, Wanted
from raytower.serving.control import Conducting, Member, SwapRefusedError
from raytower.serving.generation import Generation, ModelEntry


class Holder:
    """Holds generations as an engine does; some cannot be loaded."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.ids: set[str] = set()
        self.served: list[str] = []
        self.versions: dict[str, str] = {}

    async def prepare(self, generation: Generation) -> None:
        await asyncio.sleep(0)
        if generation.index_version == self.refused:
            raise InputError(f"version {generation.index_version} is damaged")
        self.ids.add(generation.id)
        self.versions[generation.id] = generation.index_version

    def held(self) -> frozenset[str]:
        return frozenset(self.ids)

    def activate(self, generation_id: str) -> None:
        assert generation_id in self.ids
        self.served.append(self.versions[generation_id])

    def drop(self, generation_id: str) -> None:
        self.ids.remove(generation_id)


class Published:
    """An index with a newest version, resolved as a server would."""

    def __init__(self) -> None:
        self.newest = "1"
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.looks = 0

    def look(self, index: str) -> str:
        self.looks += 1
        return self.newest

    async def resolve(self, collection: str, settings: Mapping[str, Any], version: str | None) -> Served:
        self.asked.append((dict(settings), version))
        generation = Generation(
            collection=collection,
            index="/index",
            index_version=version or self.newest,
            manifest_sha256="",
            encoder=ModelEntry(uri=str(settings.get("encoder")), fingerprint=""),
        )
        return Served(generation=generation, settings=dict(settings))


class Server:
    """A conductor and members over it."""

    def __init__(self, *holders: Holder, **settings: Any) -> None:
        self.published = Published()
        self.conducting = Conducting(
            "here", ["ingress"], self.published.resolve, self.published.look, adopt_s=0.02, **settings
        )
        self.holders = holders
        self.members = [self.member(f"m{number}", holder) for number, holder in enumerate(holders)]

    def member(self, name: str, holder: Holder) -> Member:
        async def poll(report: Report, wait_s: float) -> Wanted:
            return await self.conducting.poll("here", report, wait_s)

        return Member(name, "ingress", holder, poll)

    async def start(self) -> None:
        for member in self.members:
            member.start()
        await self.conducting.start({"default": await self.published.resolve("default", {}, None)})
        for member in self.members:
            await member.ready()

    async def close(self) -> None:
        for member in self.members:
            await member.close()
        await self.conducting.close()


def run(server: Callable[[], Server], work: Callable[[Server], Awaitable[None]]) -> None:
    async def whole() -> None:
        running = server()
        try:
            await asyncio.wait_for(running.start(), 20)
            await asyncio.wait_for(work(running), 20)
        finally:
            await running.close()

    asyncio.run(whole())


def test_a_reload_moves_every_member_and_rollback_brings_them_back() -> None:
    async def work(server: Server) -> None:
        server.published.newest = "2"
        answer = await server.conducting.reload({})
        assert (answer["changed"], answer["index_version"]) == (True, "2")
        assert [holder.served for holder in server.holders] == [["1", "2"], ["1", "2"]]
        assert (await server.conducting.reload({}))["changed"] is False
        answer = await server.conducting.rollback({})
        assert answer["index_version"] == "1"
        assert [holder.served for holder in server.holders] == [["1", "2", "1"]] * 2
        with pytest.raises(InputError, match="cannot go back"):
            await server.conducting.rollback({"collection": "default"})
        with pytest.raises(InputError, match="no collection 'other'; there are default"):
            await server.conducting.rollback({"collection": "other"})

    run(lambda: Server(Holder(), Holder()), work)


def test_keys_that_are_not_named_stay_and_so_does_the_version() -> None:
    async def work(server: Server) -> None:
        server.published.newest = "2"
        answer = await server.conducting.reload({"encoder": "other"})
        assert (answer["encoder"], answer["index_version"]) == ("other", "1")
        answer = await server.conducting.reload({"index_version": "newest"})
        assert (answer["encoder"], answer["index_version"]) == ("other", "2")
        answer = await server.conducting.reload({"index": "/elsewhere", "index_version": "7"})
        assert server.published.asked[-1] == ({"encoder": "other", "index": "/elsewhere"}, "7")
        await server.conducting.reload({"encoder": "none"})
        assert server.published.asked[-1][0]["encoder"] is None
        with pytest.raises(InputError, match="nothing that can be reloaded; known are collection"):
            await server.conducting.reload({"encodr": "x"})

    run(lambda: Server(Holder()), work)


def test_of_a_section_what_is_not_named_stays_too() -> None:
    async def work(server: Server) -> None:
        # Another encoder, since what is resolved here changes with no mode.
        first = {"mode": "hybrid", "hybrid": {"fusion": "reciprocal_ranks"}, "encoder": "other"}
        await server.conducting.reload(first)
        await server.conducting.reload({"hybrid": {"weight": 0.4}})
        hybrid = {"fusion": "reciprocal_ranks", "weight": 0.4}
        assert server.published.asked[-1][0] == {**first, "hybrid": hybrid}
        # Null takes what the index was tuned for.
        await server.conducting.reload({"hybrid": {"weight": None}})
        assert server.published.asked[-1][0]["hybrid"] == {"fusion": "reciprocal_ranks", "weight": None}

    run(lambda: Server(Holder()), work)


def test_a_refusal_names_the_member_and_nothing_changes() -> None:
    async def work(server: Server) -> None:
        server.published.newest = "2"
        with pytest.raises(SwapRefusedError, match=r"nothing has changed.*ingress m1: version 2 is damaged"):
            await server.conducting.reload({})
        status = await server.conducting.status()
        assert status["collections"]["default"]["index_version"] == "1"
        assert status["swap"]["phase"] == "refused"
        assert [holder.served for holder in server.holders] == [["1"], ["1"]]
        server.holders[1].refused = ""
        await server.conducting.reload({})
        assert [holder.served for holder in server.holders] == [["1", "2"], ["1", "2"]]

    run(lambda: Server(Holder(), Holder(refused="2")), work)


def test_two_changes_at_once_are_not_mixed() -> None:
    async def work(server: Server) -> None:
        answers = await asyncio.gather(
            server.conducting.reload({"index_version": "2"}),
            server.conducting.reload({"index_version": "3"}),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, dict) for answer in answers) == 1
        assert "another change is under way" in str(
            next(item for item in answers if isinstance(item, RaytowerError))
        )

    run(lambda: Server(Holder()), work)


async def until(found: Callable[[], bool]) -> None:
    while not found():
        await asyncio.sleep(0.01)


def test_watching_moves_to_what_is_published_and_tries_a_refused_version_once() -> None:
    async def work(server: Server) -> None:
        (holder,) = server.holders
        await until(lambda: server.published.looks > 1)
        server.published.newest = "2"
        await until(lambda: holder.served == ["1", "2"] and not server.conducting._changing.locked())
        await server.conducting.rollback({})
        server.published.newest = "3"
        await until(
            lambda: holder.served == ["1", "2", "1", "3"] and not server.conducting._changing.locked()
        )
        await server.conducting.rollback({})
        looks = server.published.looks
        await until(lambda: server.published.looks > looks + 3)
        assert holder.served[-1] == "1", "what was rolled back from does not come back by itself"
        # A look resolves nothing: that may load models, each time.
        assert [version for _, version in server.published.asked] == [None, "2", "3"]

    run(lambda: Server(Holder(), watch_s=0.03), work)


def test_watching_finds_what_was_published_while_the_server_started() -> None:
    async def work(server: Server) -> None:
        await until(lambda: server.holders[0].served == ["1", "2"])

    def starting() -> Server:
        server = Server(Holder(), watch_s=0.03)
        server.published.look = lambda index: "2"  # type: ignore[method-assign]
        server.conducting._newest = server.published.look
        return server

    run(starting, work)


def test_watching_comes_back_to_a_version_that_another_change_was_in_the_way_of() -> None:
    async def work(server: Server) -> None:
        async with server.conducting._changing:
            server.published.newest = "2"
            looks = server.published.looks
            await until(lambda: server.published.looks > looks + 2)
        await until(lambda: server.holders[0].served == ["1", "2"])

    run(lambda: Server(Holder(), watch_s=0.03), work)


def test_a_member_whose_first_generation_cannot_be_loaded_says_why() -> None:
    async def work() -> None:
        server = Server(Holder(refused="1"))
        try:
            with pytest.raises(RaytowerError, match="version 1 is damaged"):
                await asyncio.wait_for(server.start(), 20)
        finally:
            await server.close()

    asyncio.run(work())


def test_a_restarted_conductor_learns_from_its_members() -> None:
    async def work(server: Server) -> None:
        await server.conducting.reload({"index_version": "2"})
        await server.conducting.close()
        published = server.published
        server.conducting = Conducting("here", ["ingress"], published.resolve, published.look, adopt_s=1.5)
        await server.conducting.start({"default": await server.published.resolve("default", {}, "9")})
        status = await server.conducting.status()
        assert status["collections"]["default"]["index_version"] == "2"
        assert (await server.conducting.rollback({}))["index_version"] == "1"

    run(lambda: Server(Holder()), work)


def test_members_of_another_config_are_not_counted() -> None:
    async def work(server: Server) -> None:
        wanted = await server.conducting.poll("elsewhere", Report(member="x", role="ingress"))
        assert (wanted.state.epoch, wanted.prepare, wanted.keep) == (0, (), None)
        assert [item["member"] for item in (await server.conducting.status())["members"]] == ["m0"]

    run(lambda: Server(Holder()), work)


def test_draining_reaches_every_member() -> None:
    async def work(server: Server) -> None:
        assert not any(member.draining for member in server.members)
        await server.conducting.drain()
        while not all(member.draining for member in server.members):
            await asyncio.sleep(0.01)

    run(lambda: Server(Holder(), Holder()), work)
