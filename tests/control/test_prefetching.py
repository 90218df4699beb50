"""The prefetcher: what it fetches and when, what it makes of failures, what may be ordered."""

import asyncio
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gup.config import Settings
from gup.content.catalog import Label
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route
from gup.control.prefetch import LANES, Outcome, Prefetcher
from gup.errors import Problem

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
STREAM = ("any", "any", MONIKER)
OLD, A, B, C = "260101001", "260110001", "260111001", "260112001"


def delta(old: str, new: str) -> ContentKey:
    return ContentKey(*STREAM, old, f"xdelta{old}_To_{new}.dax")


def path(key: ContentKey) -> str:
    return f"/content/{key.stream}/{key.revision}/{key.file}"


@dataclass
class Site:
    """A prefetcher, and what is around it; `fetched` is what it asked for, `ends` what that came to."""

    settings: Settings
    type: str | None = "virus_definitions"
    idle: bool = True
    for_all: bool = False
    now: float = 1000.0
    held: set[str] = field(default_factory=set)
    ends: dict[str, bool | Problem] = field(default_factory=dict)
    fetched: list[tuple[str, Variant]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    busy: int = 0
    most_busy: int = 0

    def __post_init__(self) -> None:
        dependencies: Any = SimpleNamespace(
            settings=lambda: self.settings,
            fetch_ahead=self.fetch,
            link_idle=lambda: self.idle,
            label_of=lambda _stream, _file: Label("", "", "", self.type) if self.type else None,
            places=self.places,
        )
        index: Any = SimpleNamespace(rows=self.held, notes=self.notes)
        self.prefetcher = Prefetcher(dependencies, index, lambda: self.now)

    def places(self, _stream: str) -> list[tuple[Variant, Variant]]:
        """Content that is for all languages of a version is stored under that."""
        own = [Variant(u.version, u.language) for u in self.settings.upstream]
        return [(one, Variant(one.version, "any") if self.for_all else one) for one in own]

    async def fetch(self, route: Route, variant: Variant) -> bool:
        self.fetched.append((route.file, variant))
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        await asyncio.sleep(0)
        self.busy -= 1
        end = self.ends.get(route.file, True)
        if isinstance(end, Problem):
            raise end.again()
        return end

    def set(self, **sections: dict) -> None:
        self.settings = settings(**sections)

    def outcomes(self) -> dict[str, Outcome]:
        return {wish.key.file: wish.outcome for wish in self.prefetcher.queue.rows.values()}

    async def settle(self) -> dict[str, Outcome]:
        """Run both lanes until nothing is due."""
        lanes = [asyncio.create_task(self.prefetcher.run(lane)) for lane in range(len(LANES))]
        kinds = LANES[0] | LANES[1]
        async with asyncio.timeout(5):
            while self.busy or self.prefetcher.queue.due(kinds, self.now) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        return self.outcomes()


def settings(**sections: dict) -> Settings:
    upstream = sections.pop("upstream", [{"url": "http://manager:8014"}])
    return Settings.model_validate({"upstream": upstream, **sections})


@pytest.fixture
def site() -> Site:
    return Site(settings())


def ask(site: Site, *keys: ContentKey) -> None:
    for key in keys:
        site.prefetcher.asked(key, path(key))


async def test_deltas_from_the_sites_revisions_are_fetched_once(site):
    ask(site, delta(OLD, A), delta("260101002", A), delta("260101003", A))
    assert site.outcomes() == {}
    site.held.add(delta("260101003", B).text)
    site.ends[delta("260101002", B).file] = Problem("upstream-not-found", "404")
    ask(site, delta(OLD, B))
    assert await site.settle() == {
        delta(A, B).file: Outcome.STORED,
        delta("260101002", B).file: Outcome.ABSENT,
    }
    ask(site, delta(OLD, B), delta("260101004", B))
    await site.prefetcher.look_over()
    await site.settle()
    assert len(site.fetched) == 2
    assert site.fetched[0][1] == Variant()


async def test_nothing_is_fetched_while_clients_fills_need_the_link(site):
    ask(site, delta(OLD, A))
    site.idle = False
    ask(site, delta("260101002", B))
    lane = asyncio.create_task(site.prefetcher.run(0))
    await asyncio.sleep(0.05)
    assert site.fetched == []
    assert set(site.outcomes().values()) == {Outcome.QUEUED}
    site.idle = True
    async with asyncio.timeout(5):
        while Outcome.QUEUED in site.outcomes().values():  # noqa: ASYNC110 - the outcome is no event
            await asyncio.sleep(0.01)
    lane.cancel()
    await asyncio.gather(lane, return_exceptions=True)
    assert len(site.fetched) == 2


async def test_one_after_the_other_in_each_lane(site):
    for number in range(1, 8):
        ask(site, delta(f"26010100{number}", A))
    ask(site, delta("260101001", B))
    site.prefetcher.order(f"/content/{MONIKER}/{B}/full.zip", None, None)
    assert len(await site.settle()) == 8
    assert site.most_busy <= 2


@pytest.mark.parametrize(
    ("type_", "sections", "why"),
    [
        ("client_patches", {}, "client patches are fetched when a client asks for them"),
        ("client_patches", {"prefetch": {"unlisted": "fetch"}}, "client patches are fetched when a"),
        (None, {}, "no catalogue lists it"),
        ("virus_definitions", {"rules": {"content_types": ["ips_signatures"]}}, "rules.content_types has no"),
        (None, {"prefetch": {"unlisted": "fetch"}}, None),
        ("other", {}, None),
        ("virus_definitions", {"prefetch": {"enabled": False}}, ""),
        ("virus_definitions", {"prefetch": {"max": 0}}, ""),
    ],
)
async def test_what_is_left_out(site, type_, sections, why):
    site.type = type_
    site.set(**sections)
    ask(site, delta(OLD, A), delta("260101002", B))
    outcomes = await site.settle()
    assert bool(outcomes) == (why is None)
    told = list(site.prefetcher.left_out.values())
    assert len(told) == bool(why)
    assert all(text.startswith(why) for text in told)


async def test_what_was_left_out_is_looked_at_again(site):
    site.type = None
    ask(site, delta(OLD, A), delta("260101002", B))
    site.type = "virus_definitions"
    await site.prefetcher.look_over()
    assert len(await site.settle()) == 2
    assert site.prefetcher.left_out == {}


async def test_a_setting_that_is_turned_off_stops_what_waits_but_not_an_operator(site):
    ask(site, delta(OLD, A), delta("260101002", B))
    site.prefetcher.order(path(delta(A, B)), None, None)
    site.set(prefetch={"enabled": False})
    assert await site.settle() == {delta(OLD, B).file: Outcome.SUPERSEDED, delta(A, B).file: Outcome.STORED}


async def test_failures_that_may_pass_are_tried_again_later(site):
    key = delta(OLD, B)
    site.ends[key.file] = Problem("upstream-unreachable", "nobody there")
    site.prefetcher.order(path(key), None, None)
    tries = 0
    while (await site.settle())[key.file] is Outcome.QUEUED:
        tries += 1
        assert len(site.fetched) == tries
        await site.settle()
        assert len(site.fetched) == tries  # not before its time
        site.now += 3600
    assert tries == 3
    assert site.outcomes()[key.file] is Outcome.FAILED
    [wish] = site.prefetcher.queue.rows.values()
    assert (wish.detail, wish.ended_at) == ("nobody there", site.now)


async def test_a_newer_revision_makes_what_waits_needless(site):
    ask(site, delta(OLD, A), delta("260101002", B))
    ask(site, delta("260101002", C))
    outcomes = await site.settle()
    assert {file for file, outcome in outcomes.items() if outcome is Outcome.SUPERSEDED} == {
        delta(OLD, B).file,
        delta(A, B).file,
    }
    assert {file for file, outcome in outcomes.items() if outcome is Outcome.STORED} == {
        delta(old, C).file for old in (OLD, A, B)
    }


async def test_an_operator_may_order_anything_that_is_content(site):
    [wish] = site.prefetcher.order(f"/content/%7B{MONIKER[1:-1].lower()}%7D/{B}/full.zip", None, None)
    assert (wish.key.text, wish.by) == (f"any/any/{MONIKER}/{B}/full.zip", "operator")
    [again] = site.prefetcher.order(f"/content/{MONIKER}/{B}/full.zip", None, None)
    assert again is wish
    site.ends["full.zip"] = False
    assert await site.settle() == {"full.zip": Outcome.PRESENT}
    [third] = site.prefetcher.order(f"/content/{MONIKER}/{B}/full.zip", None, None)
    assert third.pending
    assert len(site.prefetcher.order("/content/{X}", None, None)) == 1, "an index file"


async def test_an_order_is_for_each_variant_that_fits(site):
    french = {"version": "14.3 RU2", "language": "French"}
    english = {"version": "14.3 RU3", "language": "English"}
    site.set(upstream=[{"url": "http://a:1", **french}, {"url": "http://b:1", **english}])
    target = path(delta(OLD, B))
    assert [w.key.language for w in site.prefetcher.order(target, None, None)] == ["French", "English"]
    assert [w.key.language for w in site.prefetcher.order(target, None, "french")] == ["French"]
    assert [w.key.language for w in site.prefetcher.order(target, "14.3 RU3", None)] == ["English"]
    site.for_all = True
    assert [w.key.variant for w in site.prefetcher.order(target, None, None)] == [
        Variant("14.3 RU2", "any"),
        Variant("14.3 RU3", "any"),
    ]
    with pytest.raises(ValueError, match=r"no upstream has '14.3 RU3' and 'French'; there is '14.3 RU2' and"):
        site.prefetcher.order(target, "14.3 RU3", "French")


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/secars", "none of the content"),
        ("content/x", "neither a path nor an http URL"),
        ("http://manager:8014/content/ContentInfo.txt", "begin it with /content/, without the server"),
        ("/content/../etc/passwd", "begins with a dot"),
    ],
)
def test_orders_that_make_no_sense_are_explained(site, target, why):
    with pytest.raises(ValueError, match=why):
        site.prefetcher.order(target, None, None)


async def test_it_is_kept_over_a_restart(site):
    ask(site, delta(OLD, A), delta("260101002", B))
    await site.settle()
    site.prefetcher.save()
    assert sorted(site.notes) == ["revisions", "wishes"]
    saved = json.loads(json.dumps(site.notes))
    site.notes.clear()
    ask(site, delta("260101002", B))
    site.prefetcher.save()
    assert site.notes == {}, "nothing new: nothing written"
    after = Site(settings(), notes=saved)
    after.prefetcher.restore()
    ask(after, delta("260101002", B))
    await after.settle()
    assert after.fetched == []
    ask(after, delta("260101002", C))
    await after.settle()
    assert {file for file, _ in after.fetched} == {delta(old, C).file for old in (OLD, A, B)}
