"""Prefetching: where a site's clients come from, what is fetched and when, the queue, operators' orders."""

import asyncio
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gup.config import Settings
from gup.content.catalog import Label
from gup.content.key import ContentKey, Folder, Kind, Variant, delta_step, named
from gup.content.routes import Route, path_of
from gup.control.prefetch import (
    LANES,
    MAX_REVISIONS,
    Outcome,
    Prefetcher,
    PrefetchQueue,
    QueuedFetch,
    Revisions,
)
from gup.errors import Problem
from gup.metrics import MAX_STREAMS

MONIKER = "{535CB6A4-441F-4E8A-A897-804CD859100E}"
STREAM = ("any", "any", MONIKER)
OLD, OLD_2, OLD_3, A, B, C = "260101001", "260101002", "260101003", "260110001", "260111001", "260112001"
DAY = 86400.0


def delta(old: str, new: str, folder: str | None = None) -> ContentKey:
    return ContentKey(*STREAM, folder or old, f"xdelta{old}_To_{new}.dax")


def full(revision: str) -> ContentKey:
    return ContentKey(*STREAM, revision, "full.zip")


def stored(value: Any) -> Any:
    """What comes back of it after a restart."""
    return json.loads(json.dumps(value))


# --- what the traffic tells


class Traffic(Revisions):
    def sees(self, key: ContentKey, now: float = 0.0, moniker: str = "") -> bool:
        return self.learn((key.version, key.language, key.stream), named(key), now, moniker)

    def paths(self, now: float = 0.0, most: int = 8) -> tuple[str, ...]:
        return self.announced(STREAM, now, within_seconds=7 * DAY, most=most).paths

    def wanted(self, now: float = 0.0, most: int = 8) -> tuple[str, list[str]]:
        newest = self.announced(STREAM, now, within_seconds=7 * DAY, most=most).revision
        steps = [delta_step(path.rpartition("/")[2]) for path in self.paths(now, most)]
        return newest, [step.from_revision for step in steps]


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


def test_the_first_that_names_a_revision_announces_it_to_all_others(traffic):
    for number, old in enumerate((OLD, OLD_2, OLD_3)):
        assert traffic.sees(delta(old, A), number)
    assert traffic.wanted() == (A, [])  # who asked has what it wants
    assert traffic.sees(delta(OLD_2, B), 10.0)
    assert traffic.wanted(10.0) == (B, [A, OLD_3, OLD])
    assert traffic.wanted(10.0, most=2) == (B, [A, OLD_3])
    assert not traffic.sees(delta(OLD_2, B), 11.0)
    assert not traffic.sees(delta(OLD, B), 12.0)
    assert traffic.wanted(12.0) == (B, [A, OLD_3])


def test_a_full_announces_too_and_those_who_took_it_are_at_its_revision(traffic):
    assert traffic.sees(full(A), 0.0)
    assert traffic.sees(full(B), 1.0)
    assert traffic.wanted(1.0) == (B, [A])


def test_an_older_revision_announces_nothing_and_only_what_was_named_lately_counts(traffic):
    traffic.sees(delta(OLD, B), 0.0)
    assert traffic.sees(delta(OLD_2, A), 1.0)  # revisions that were not known: look again
    for now in (1.0, 7 * DAY + 0.5):
        assert traffic.wanted(now) == (B, [A, OLD_2])
    assert traffic.wanted(8 * DAY) == (B, [])


def test_what_a_clock_named_that_was_ahead_is_not_named_lately(traffic):
    traffic.sees(delta(OLD, A), 40 * DAY)
    traffic.sees(full(B), 0.0)
    traffic.sees(delta(OLD_2, B), 1.0)
    assert traffic.wanted(1.0) == (B, [])
    traffic.sees(delta(OLD, A), 2.0)
    assert traffic.wanted(2.0) == (B, [A, OLD])


def test_what_upstream_does_not_have_announces_nothing_but_tells_where_a_client_is(traffic):
    traffic.refused(STREAM, named(delta("260101009", "999999999")), 0.0)
    assert list(traffic.streams) == []
    traffic.sees(delta(OLD, A), 0.0)
    traffic.refused(STREAM, named(delta(OLD_2, "999999999")), 0.0)
    traffic.refused(STREAM, named(delta(OLD_3, A)), 0.0)  # not there: not tried
    assert traffic.wanted() == (A, [OLD_2])
    traffic.sees(full(B), 1.0)
    assert set(traffic.wanted(1.0)[1]) == {OLD, OLD_2, OLD_3, A}


@pytest.mark.parametrize(("folder", "under"), [(OLD, A), (A, B)])
def test_the_path_has_the_folder_and_the_spelling_of_the_traffic(traffic, folder, under):
    spelled = "%7B535cb6a4-441f-4e8a-a897-804cd859100e%7D"
    traffic.sees(delta(OLD, A, folder), 0.0, spelled)
    traffic.sees(full(B), 1.0)
    assert traffic.paths(1.0, most=1) == (f"/content/{spelled}/{under}/xdelta{A}_To_{B}.dax",)


def test_without_a_delta_in_the_traffic_the_folder_is_that_of_other_streams(traffic):
    traffic.sees(full(A), 0.0)
    traffic.sees(full(B), 1.0)
    assert traffic.paths(1.0)[0].split("/")[3] == A
    traffic.sees(ContentKey("any", "any", "{B}", A, f"xdelta{OLD}_To_{A}.dax"), 2.0)
    assert traffic.paths(2.0)[0].split("/")[3] == B
    assert [str(folder) for folder in Folder] == ["from", "to"], "the names are stored"


def test_what_is_remembered_is_bounded(traffic):
    for number in range(1000):
        traffic.sees(full(f"26010{number:04}"), float(number))
        traffic.learn(("any", "any", str(number)), named(full(OLD)), 0.0)
        traffic.sees(full(f"26010{number:04}"), float(number))
    assert len(list(traffic.streams)) == 50
    assert len(traffic.wanted(1000.0, most=10_000)[1]) == MAX_REVISIONS - 1


def test_what_was_learned_is_kept_over_a_restart_and_what_was_learned_since_stays(traffic):
    traffic.sees(delta(OLD, A, A), 5.0, "%7Ba%7D")
    traffic.sees(delta(OLD_2, A, A), 6.0)
    (note,), after = stored(traffic.to_json()), Traffic()
    after.sees(full(B), 7.0)
    pairs = {**note, "seen": list(note["seen"].items())}  # as earlier releases stored it
    after.restore([pairs, None, {"stream": 3}, *({**note, "seen": odd} for odd in ([[OLD_3], 7], 7))])
    assert after.wanted(7.0) == (B, [A, OLD_2, OLD])
    assert after.paths(7.0, most=1) == (f"/content/%7Ba%7D/{B}/xdelta{A}_To_{B}.dax",)
    again = Traffic()
    again.restore(stored(after.to_json()))
    again.restore("nonsense")
    assert again.to_json() == after.to_json()


# --- the queue


def row(number: int = 1, *, by="traffic", kind=Kind.DELTA, new=A) -> QueuedFetch:
    key = delta(f"2601{number:05}", new)
    return QueuedFetch(key=key, path=path_of(key), kind=kind, by=by, asked_at=float(number))


def queue_of(*rows: QueuedFetch) -> PrefetchQueue:
    queue = PrefetchQueue()
    assert all(queue.add(one) for one in rows)
    return queue


def ended(queue: PrefetchQueue, one: QueuedFetch, outcome: Outcome, detail: str = "") -> None:
    queue.move(one, Outcome.FETCHING, 1.0)
    queue.move(one, outcome, 2.0, detail)


def test_an_operator_goes_first_then_who_came_first():
    operators = {"by": "operator"}
    queue = queue_of(row(1), row(2), row(3, **operators), row(4, kind=Kind.FULL, **operators))
    order = []
    while (one := queue.due(frozenset({Kind.DELTA}), 0.0)) is not None:
        order.append(int(one.asked_at))
        ended(queue, one, Outcome.STORED)
    assert (order, queue.pending) == ([3, 1, 2], 1)


def test_a_retry_that_a_clock_put_off_that_was_ahead_is_due():
    queue = queue_of(one := row())
    for due_at, found in ((0.0, one), (40 * DAY, one), (30.0, None)):
        one.due_at = due_at
        assert queue.due(frozenset({Kind.DELTA}), 0.0) is found


def test_a_newer_revision_takes_the_place_of_an_older_one_that_is_neither_ordered_nor_being_fetched():
    old, ordered, new, fetching = row(1), row(2, by="operator"), row(3, new=B), row(4)
    queue = queue_of(old, ordered, new, fetching)
    queue.move(fetching, Outcome.FETCHING, 1.0)
    queue.supersede(("any", "any", "{OTHER}"), B, 2.0)
    assert queue.pending == 4
    queue.supersede(STREAM, B, 2.0)
    assert (old.outcome, old.ended_at, fetching.outcome) == (Outcome.SUPERSEDED, 2.0, Outcome.FETCHING)
    assert ordered.outcome is new.outcome is Outcome.QUEUED


def test_moves_that_make_no_sense_are_our_mistake():
    queue, one = PrefetchQueue(), row()
    ended(queue, one, Outcome.PRESENT)
    with pytest.raises(AssertionError):
        queue.move(one, Outcome.FETCHING, 2.0)


def test_the_queue_is_bounded_and_forgets_what_has_ended(monkeypatch):
    monkeypatch.setattr("gup.control.prefetch.MAX_PENDING", 45)
    monkeypatch.setattr("gup.control.prefetch.MAX_QUEUED", 50)
    queue = queue_of(*map(row, range(45)))
    assert not queue.add(row(45))
    for one in list(queue.rows.values()):
        ended(queue, one, Outcome.ABSENT)
    assert all(queue.add(row(number)) for number in range(45, 70))
    assert (len(queue.rows), queue.pending) == (50, 25)


def test_the_queue_is_kept_and_what_was_being_fetched_is_tried_again():
    done, fetching, queued, newer = row(1), row(2), row(3, by="operator"), row(4)
    queue, after = queue_of(done, fetching, queued), queue_of(newer)
    ended(queue, done, Outcome.ABSENT, "404")
    queue.move(fetching, Outcome.FETCHING, 1.0)
    rows = stored(queue.to_json())
    elsewhere = {**rows[0], "path": path_of(row(5).key)}
    after.restore([*rows, {"key": "nonsense"}, 7, {**rows[0], "outcome": "unknown"}, elsewhere])
    assert {int(one.asked_at): (one.outcome, one.by) for one in after.rows.values()} == {
        1: (Outcome.ABSENT, "traffic"),
        2: (Outcome.QUEUED, "traffic"),
        3: (Outcome.QUEUED, "operator"),
        4: (Outcome.QUEUED, "traffic"),
    }
    assert next(iter(after.rows.values())).detail == "404"
    assert after.rows.get(newer.key) is newer


# --- the prefetcher


def path(key: ContentKey) -> str:
    return f"/content/{key.stream}/{key.revision}/{key.file}"


def settings(**sections: dict) -> Settings:
    return Settings.model_validate({"upstream": [{"url": "http://manager:8014"}], **sections})


@dataclass
class Site:
    """A prefetcher, and what is around it; `fetched` is what it asked for, `ends` what that came to."""

    settings: Settings = field(default_factory=settings)
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
            gate=SimpleNamespace(holds=lambda _class: False, outbreak=False),
            label_of=lambda _stream, _file: Label("", "", "", self.type) if self.type else None,
            places=self.places,
        )
        index: Any = SimpleNamespace(rows=self.held, notes=self.notes)
        self.prefetcher = Prefetcher(dependencies, index, lambda: self.now)
        self.order = self.prefetcher.order

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

    def ask(self, *keys: ContentKey) -> None:
        for key in keys:
            self.prefetcher.asked(key, path(key))
            self.prefetcher.look_at_news()

    def outcomes(self) -> dict[str, Outcome]:
        return {row.key.file: row.outcome for row in self.prefetcher.queue.rows.values()}

    def which(self, outcome: Outcome) -> set[str]:
        return {file for file, found in self.outcomes().items() if found is outcome}

    async def settle(self) -> dict[str, Outcome]:
        """Run both lanes until nothing is due."""
        lanes = [asyncio.create_task(self.prefetcher.run(lane)) for lane in range(len(LANES))]
        async with asyncio.timeout(5):
            while self.busy or self.prefetcher.queue.due(LANES[0] | LANES[1], self.now) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        return self.outcomes()


@pytest.fixture
def site() -> Site:
    return Site()


async def test_more_new_streams_at_once_than_are_kept(site):
    for number in range(MAX_STREAMS + 5):
        key = ContentKey("any", "any", f"{{535CB6A4-441F-4E8A-A897-{number:012d}}}", A, "full.zip")
        site.prefetcher.asked(key, path(key))
    site.prefetcher.look_at_news()
    assert len(site.prefetcher.revisions.streams) == MAX_STREAMS


async def test_nothing_is_fetched_while_clients_fills_need_the_link(site):
    site.ask(delta(OLD, A))
    site.idle = False
    site.ask(delta(OLD_2, B))
    lane = asyncio.create_task(site.prefetcher.run(0))
    await asyncio.sleep(0.05)
    assert site.fetched == []
    assert set(site.outcomes().values()) == {Outcome.QUEUED}
    site.idle = True
    async with asyncio.timeout(5):
        while site.which(Outcome.QUEUED):  # noqa: ASYNC110 - the outcome is no event
            await asyncio.sleep(0.01)
    lane.cancel()
    await asyncio.gather(lane, return_exceptions=True)
    assert len(site.fetched) == 2


async def test_one_after_the_other_in_each_lane(site):
    site.ask(*(delta(f"26010100{number}", A) for number in range(1, 8)), delta(OLD, B))
    site.order(path(full(B)), None, None)
    assert len(await site.settle()) == 8
    assert site.most_busy <= 2


UNLISTED = {"prefetch": {"unlisted": "fetch"}}


@pytest.mark.parametrize(
    ("type_", "sections", "why"),
    [
        ("client_patches", {}, "client patches are fetched when a client asks for them"),
        ("client_patches", UNLISTED, "client patches are fetched when a"),
        (None, {}, "no catalogue lists it"),
        ("virus_definitions", {"rules": {"content_types": ["ips_signatures"]}}, "rules.content_types has no"),
        (None, UNLISTED, None),
        ("other", {}, None),
        ("virus_definitions", {"prefetch": {"enabled": False}}, ""),
        ("virus_definitions", {"prefetch": {"max": 0}}, ""),
    ],
)
async def test_what_is_left_out(site, type_, sections, why):
    site.type, site.settings = type_, settings(**sections)
    site.ask(delta(OLD, A), delta(OLD_2, B))
    assert bool(await site.settle()) == (why is None)
    told = list(site.prefetcher.left_out.values())
    assert len(told) == bool(why)
    assert all(text.startswith(why) for text in told)


async def test_what_was_left_out_is_looked_at_again(site):
    site.type = None
    site.ask(delta(OLD, A), delta(OLD_2, B))
    site.type = "virus_definitions"
    await site.prefetcher.look_over()
    assert len(await site.settle()) == 2
    assert site.prefetcher.left_out == {}


async def test_a_setting_that_is_turned_off_stops_what_waits_but_not_an_operator(site):
    site.ask(delta(OLD, A), delta(OLD_2, B))
    site.order(path(delta(A, B)), None, None)
    site.settings = settings(prefetch={"enabled": False})
    assert await site.settle() == {delta(OLD, B).file: Outcome.SUPERSEDED, delta(A, B).file: Outcome.STORED}


async def test_failures_that_may_pass_are_tried_again_later(site):
    key = delta(OLD, B)
    site.ends[key.file] = Problem("upstream-unreachable", "nobody there")
    site.order(path(key), None, None)
    tries = 0
    while (await site.settle())[key.file] is Outcome.QUEUED:
        tries += 1
        assert len(site.fetched) == tries
        await site.settle()
        assert len(site.fetched) == tries  # not before its time
        site.now += 3600
    assert tries == 3
    assert site.outcomes()[key.file] is Outcome.FAILED
    [row] = site.prefetcher.queue.rows.values()
    assert (row.detail, row.ended_at) == ("nobody there", site.now)


async def test_a_newer_revision_makes_what_waits_needless(site):
    site.ask(delta(OLD, A), delta(OLD_2, B), delta(OLD_2, C))
    await site.settle()
    assert site.which(Outcome.SUPERSEDED) == {delta(OLD, B).file, delta(A, B).file}
    assert site.which(Outcome.STORED) == {delta(old, C).file for old in (OLD, A, B)}


async def test_an_operator_may_order_anything_that_is_content(site):
    [row] = site.order(f"/content/%7B{MONIKER[1:-1].lower()}%7D/{B}/full.zip", None, None)
    assert (row.key.text, row.by) == (f"any/any/{MONIKER}/{B}/full.zip", "operator")
    assert site.order(path(full(B)), None, None) == [row]
    site.ends["full.zip"] = False
    assert await site.settle() == {"full.zip": Outcome.PRESENT}
    [third] = site.order(path(full(B)), None, None)
    assert third.pending
    assert len(site.order("/content/ContentInfo.txt", None, None)) == 1, "an index file"


async def test_an_order_is_for_each_variant_that_fits(site):
    french = {"url": "http://a:1", "version": "14.3 RU2", "language": "French"}
    english = {"url": "http://b:1", "version": "14.3 RU3", "language": "English"}
    site.settings = settings(upstream=[french, english])

    def ordered(version=None, language=None):
        return [
            f"{w.key.version}, {w.key.language}" for w in site.order(path(delta(OLD, B)), version, language)
        ]

    assert ordered() == ["14.3 RU2, French", "14.3 RU3, English"]
    assert ordered(language="french") == ["14.3 RU2, French"]
    assert ordered(version="14.3 RU3") == ["14.3 RU3, English"]
    site.for_all = True
    assert ordered() == ["14.3 RU2, any", "14.3 RU3, any"]
    with pytest.raises(ValueError, match=r"no upstream has '14.3 RU3' and 'French'; there is '14.3 RU2' and"):
        ordered("14.3 RU3", "French")


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/secars", "not content that gup serves"),
        ("content/x", "neither a path nor an http URL"),
        ("http://manager:8014/content/ContentInfo.txt", "must begin with /content/, without the server"),
        ("/content/../etc/passwd", "begins with a dot"),
    ],
)
def test_orders_that_make_no_sense_are_explained(site, target, why):
    with pytest.raises(ValueError, match=why):
        site.order(target, None, None)


async def test_what_did_not_change_is_not_written_again(site):
    site.ask(delta(OLD, A), delta(OLD_2, B))
    await site.settle()
    site.prefetcher.save()
    assert sorted(site.notes) == ["revisions", "wishes"]
    site.notes.clear()
    site.ask(delta(OLD_2, B))
    site.prefetcher.save()
    assert site.notes == {}
