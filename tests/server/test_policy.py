"""How often the rules are asked, counted in a whole data plane on one loop."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from harness.caches import Worker
from harness.content import zip_of
from harness.upstreams import Answer, ScriptedUpstream

from gup.cache.catalog_cache import Kept, write_kept
from gup.content.catalog import parse_catalog
from gup.content.client_identity import Identities
from gup.content.rules import Rulebook
from gup.content.variant_choice import Choices
from gup.server.policy import Policy

PATCH = "{11111111-1111-1111-1111-111111111111}"
VIRUS = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
FRENCH = {"GUP-Client-Version": "14.3 RU2", "GUP-Client-Language": "French"}
ENGLISH = {"GUP-Client-Version": "14.3 RU3", "GUP-Client-Language": "English"}
TABLES = [{"version": "14.3 RU2", "language": "French"}, {"version": "14.3 RU3", "language": "English"}]
ASKED = ((Choices, "choose"), (Choices, "choose_for"), (Rulebook, "decide"), (Identities, "read"))


def path(moniker: str) -> str:
    return f"/content/{moniker}/260801001/full.zip"


def body(moniker: str, language: str) -> bytes:
    return zip_of(f"{moniker} {language}", 2000)


@dataclass
class Plane:
    """A data plane, who asks it, and how often the rules were asked since the count was last cleared."""

    worker: Worker
    policy: Policy
    address: tuple[str, int]
    calls: Counter
    epoch: list[int]

    async def warm(self, moniker: str, headers: dict[str, str]) -> None:
        """Ask until nobody has to think about it."""
        async with asyncio.timeout(20):
            self.calls["choose"] = 1
            while self.calls:
                self.calls.clear()
                await self.get(moniker, headers)

    async def get(
        self, moniker: str, headers: dict[str, str], times: int = 1, *, differ: bool = False
    ) -> set[bytes]:
        """The bodies that so many requests got; with `differ` no two heads are the same."""
        reader, writer = await asyncio.open_connection(*self.address)
        got = set()
        for number in range(times):
            more = headers | ({"User-Agent": f"client {number} {time.monotonic_ns()}"} if differ else {})
            lines = [f"GET {path(moniker)} HTTP/1.1", "Host: gup", *(f"{n}: {t}" for n, t in more.items())]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            got.add(await reader.readexactly(length))
        writer.close()
        await writer.wait_closed()
        return got


@pytest.fixture
async def plane(serving, monkeypatch) -> AsyncIterator[Plane]:
    calls: Counter = Counter()
    for owner, name in ASKED:
        real = getattr(owner, name)

        def counted(*arguments, real=real, name=name):
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, counted)
    with ScriptedUpstream() as french, ScriptedUpstream() as english:
        for upstream, language in ((french, "French"), (english, "English")):
            upstream.answer(path(PATCH), Answer(body(PATCH, language), etag=f'"{language}"'))
            upstream.answer(path(VIRUS), Answer(body(VIRUS, "all"), etag='"all"'))
        rules = {"tables": TABLES, "catalog": {"refresh": "0"}, "prepare": catalogue}
        async with serving([french.url, english.url], **rules) as made:
            yield Plane(made.worker, made.policy, made.address, calls, made.epoch)


def catalogue(worker) -> None:
    kept = {}
    for number, table in enumerate(TABLES):
        lines = (
            f"{PATCH}: SEP Client Patch Win64 {table['version']} - Patch - {table['language']}\n"
            f"{VIRUS}: SEPC Virus Definitions Win32 12.1 RU6 - X - SymAllLanguages\n"
        )
        kept[f"u{number}"] = Kept("a test", parse_catalog(lines.encode()))
    write_kept(worker.dependencies.store.run, kept)


async def test_the_hot_cache_never_asks_the_rules(plane):
    """Where no rule applies none is asked; where one does, the same bytes ask no second time."""
    for headers in ({}, FRENCH, ENGLISH):
        await plane.warm(VIRUS, headers)
        await plane.warm(PATCH, headers)
    for headers in ({}, FRENCH, ENGLISH):
        assert await plane.get(VIRUS, headers, 40) == {body(VIRUS, "all")}
        assert await plane.get(VIRUS, headers, 40, differ=True) == {body(VIRUS, "all")}
        wanted = "English" if headers is ENGLISH else "French"
        assert await plane.get(PATCH, headers, 40) == {body(PATCH, wanted)}
    assert plane.calls == {}
    assert await plane.get(PATCH, ENGLISH, 40, differ=True) == {body(PATCH, "English")}
    assert plane.calls == {"choose": 40, "choose_for": 40, "read": 40}, "and what was decided is remembered"


async def test_a_policy_that_changed_is_decided_anew_at_once(plane):
    await plane.warm(PATCH, FRENCH)
    assert await plane.get(PATCH, FRENCH) == {body(PATCH, "French")}
    lines = f"{PATCH}: SEP Client Patch Win64 14.3 RU2 - Patch - German\n".encode()
    write_kept(plane.worker.dependencies.store.run, {"u0": Kept("a test", parse_catalog(lines))})
    plane.epoch[0] += 1
    (refused,) = await plane.get(PATCH, FRENCH)
    assert b'"rule": "language"' in refused
    assert await plane.get(PATCH, ENGLISH) == {body(PATCH, "English")}, "of whom no catalogue is known now"
