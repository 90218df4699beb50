"""The table of alarms: each row found where it should be and not elsewhere; when one begins and ends."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from gup.control.alarms import ALARMS, MAX_OF_A_TYPE, AlarmBoard, AlarmCollector, AlarmType
from gup.control.eviction import DiskUsage
from gup.control.state import Rejection
from gup.control.traffic import Storm, Unmet

NOW = 1_000_000.0
STREAM, OTHER = ("v", "l", "X"), ("v", "l", "Y")
WELL = {
    "upstreams": {"a": ("up", "was refused"), "b": ("up", "")},
    "size": 990,
    "free": 100,
    "gained": {},
    "refusals": {},
    "unstored": None,
    "storms": (),
    "unmet": {STREAM: Unmet("260102001", 0.0, 5000.0), OTHER: Unmet("260102001", 0.0, 1.0)},
    "failures": (),
    "rejections": (),
    "catalogues": {"a": ""},
    "wan_used": 94,
    "config_ok": True,
    "last_seen": 999_000.0,
    "addresses": "full",
    "cluster": (),
    "unsent": (),
    "sick": 0,
    "clients": 100,
}


class Collector(AlarmCollector):
    """Over a control state in which everything is well but what is given."""

    def __init__(self, **given):
        known = SimpleNamespace(**WELL | given)
        self.counts, self.disk = known.gained, DiskUsage((), known.free, known.size)
        dependencies = SimpleNamespace(
            upstream_states=lambda: {name: (state, None) for name, (state, _) in known.upstreams.items()},
            catalogues=lambda: {name: {"problem": problem} for name, problem in known.catalogues.items()},
            wan_rate=lambda: 100,
            fills_waiting=lambda: 3,
            config_ok=lambda: known.config_ok,
            cluster=SimpleNamespace(findings=lambda: known.cluster),
        )
        settings = SimpleNamespace(
            upstream=[SimpleNamespace(name=name) for name in known.upstreams],
            cache=SimpleNamespace(max_size=1000, min_free=100),
            reports=SimpleNamespace(addresses=known.addresses),
            alarms=SimpleNamespace(sick_share=5),
        )
        state = SimpleNamespace(
            dependencies=dependencies,
            settings=settings,
            clock=lambda: NOW,
            upstream_errors={name: (0.0, error) for name, (_, error) in known.upstreams.items() if error},
            rejections=lambda: known.rejections,
            failures=[
                SimpleNamespace(problem=problem, at=at, detail=text) for problem, at, text in known.failures
            ],
            refusals=SimpleNamespace(
                rows={what: SimpleNamespace(detail=text) for what, text in known.refusals.items()}
            ),
            unstored=known.unstored,
            evictor=SimpleNamespace(recent_evicted=0),
            index=SimpleNamespace(rows=SimpleNamespace(newest_held=lambda: {STREAM: "260102001"})),
            traffic=SimpleNamespace(storms=lambda: known.storms, unmet=lambda: known.unmet),
            label=lambda stream: ("Definitions", stream[2]),
            history=SimpleNamespace(wan=SimpleNamespace(bytes_per_second=lambda: known.wan_used)),
            clients=SimpleNamespace(
                newest=lambda _n: [("c", known.last_seen)], counts=lambda _now: {"7d": 5}
            ),
            malformed_events=0,
            doctor=SimpleNamespace(
                found=SimpleNamespace(
                    sick=known.sick, clients=known.clients, counts={"behind": 4, "no-delta": 0, "refused": 2}
                )
            ),
            notifications=SimpleNamespace(problems=lambda: known.unsent),
        )
        super().__init__(state)

    def gained(self, what, _counts=None, **_more):
        return self.counts.get(what, 0)


def found(**given):
    collector = Collector(**given)
    return list(collector.find(collector.disk))


STORM = Storm(("v", "l", "{A}"), 9.0, 40, 3, 7, ("10.0.0.1", "10.0.0.2"), 4_000_000_000, 100_000_000, 200_000)
DOWN_A, UP_B = ("down", "refused"), ("up", "")
STORMY = (
    "7 clients (10.0.0.1, 10.0.0.2 and 5 more) requested 40 full packages of Definitions {A}, against 3 "
    "deltas, within 20 minutes: 4.0 GB over the LAN, 100 MB over the WAN; as deltas of 200 kB on average "
    "it would be 8.0 MB over the LAN"
)
FULL = "v/l/{A}/26/full.zip"
TOO_LARGE = "any/any/a/-/full.zip: it takes more than cache.max_size"
OVERDUE = (
    "clients have requested 260103001 of Definitions X for 16 min 40 s, but it can't be fetched; the newest "
    "here is 260102001"
)
UNSURE = "upstream-unsure-end"
OF_A_CLUSTER = (
    "name-taken",
    "engine-away",
    "member-unreachable",
    "member-unlike",
    "orders-unknown",
    "row-forged",
)
# fmt: off
SICK: list[tuple[str, dict, str, str]] = [
    ("upstream-down", {"upstreams": {"a": DOWN_A, "b": UP_B}}, "a", "a is down; others are asked (refused)"),
    ("no-upstream", {"upstreams": {"a": DOWN_A, "b": ("down", "")}}, "",
     "no upstream answers (a, b): only stored content is served (refused)"),
    ("upstream-doubtful", {"upstreams": {"a": ("doubtful", "was reset")}}, "a",
     "a accepts connections but its requests fail (was reset)"),
    ("bad-content", {"rejections": (Rejection(FULL, "a", "does not end like a ZIP file", 9.0),)}, FULL,
     f"a has no usable {FULL}: does not end like a ZIP file"),
    ("disk-refuses", {"refusals": {"content": "No space"}}, "content", "the disk refuses content: No space"),
    ("not-stored", {"unstored": (NOW - 599, TOO_LARGE)}, "",
     f"content is passed through and not stored: {TOO_LARGE}"),
    ("disk-short", {"free": 99}, "",
     "99 B are free on the cache's disk, less than the 100 B of cache.min_free"),
    ("cache-short", {"gained": {"evicted": 4}}, "",
     "the cache is full (1.0 kB), and 4 entries used within the last day were evicted"),
    ("damage", {"gained": {"gup_integrity_failures_total": 2}}, "",
     "damage was found in the store 2 times within the last hour"),
    ("full-storm", {"storms": (STORM,)}, "v/l/{A}", STORMY),
    ("reload-failed", {"config_ok": False}, "",
     "the last reload failed: the old settings are in force"),
    ("workers-restarting", {"gained": {"gup_worker_restarts_total": 2}}, "",
     "worker processes died 2 times within 10 minutes and were replaced"),
    ("stale-stream", {"unmet": {STREAM: Unmet("260103001", 999_000.0, 999_900.0)}}, "Definitions X",
     OVERDUE),
    ("stale-catalogue", {"catalogues": {"a": "a answered 404"}}, "a",
     "the catalogue of a can't be read: a answered 404"),
    ("unsure-end", {"failures": ((UNSURE, NOW - 601, "old"), (UNSURE, NOW, "a sent 5 bytes"))}, "",
     "a sent 5 bytes"),
    *((name, {"cluster": [(name, "b", "something")]}, "b", "something") for name in OF_A_CLUSTER),
    ("wan-full", {"wan_used": 96}, "", "the WAN is full (100 B/s), and 3 fills wait"),
    ("clients-silent", {"last_seen": NOW - 90_000}, "",
     "no client has sent a request for 1 d 1 h; 5 did within the last week"),
    ("clients-sick", {"sick": 6}, "",
     "something seems to be wrong with 6 of 100 clients: behind 4, refused 2"),
    ("alarms-unsent", {"unsent": [("webhook", "it answered 500")]}, "webhook", "it answered 500"),
    ("events-lost", {"gained": {"gup_events_lost_total": 4, "malformed": 5}}, "",
     "9 messages from workers were lost within 10 minutes: figures of use are too low"),
]
# fmt: on


def test_a_service_that_is_well_has_no_alarm():
    assert found() == []
    assert found(sick=3, clients=3) == found(sick=4, clients=1000) == found(sick=49, clients=1000) == []
    assert found(upstreams={}, unmet={}, unstored=(NOW - 601, TOO_LARGE)) == []


@pytest.mark.parametrize(("name", "changed", "subject", "text"), SICK, ids=[row[0] for row in SICK])
def test_each_alarm_is_found_where_it_should_be(name, changed, subject, text):
    assert found(**changed) == [(name, subject, text)]


def test_every_row_is_tried_and_says_what_to_do():
    assert sorted(type_.name for type_ in ALARMS) == sorted(row[0] for row in SICK)
    assert all(type_.what_to_do.endswith(".") for type_ in ALARMS)
    assert [type_.severity for type_ in ALARMS if type_.name in ("no-upstream", "disk-refuses")] == [
        "critical"
    ] * 2


def test_the_page_on_alarms_lists_each_with_its_severity():
    page = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text()
    listed = re.findall(r"^\| `([a-z-]+)` \| (warning|critical) \|", page, re.MULTILINE)
    assert dict(listed) == {type_.name: type_.severity for type_ in ALARMS}


def test_a_storm_without_addresses_or_deltas_is_told_too():
    storm = STORM._replace(clients=0, addresses=(), delta_bytes=0)
    [(_, _, text)] = found(storms=(storm,))
    assert text == (
        "clients requested 40 full packages of Definitions {A}, against 3 deltas, within 20 minutes: "
        "4.0 GB over the LAN, 100 MB over the WAN"
    )
    [(_, _, text)] = found(storms=(STORM,), addresses="off")
    assert "10.0.0.1" not in text


def test_counts_are_those_of_the_window():
    totals, now = {'gup_x{a="1"}': 5, "gup_x": 1, "gup_y": 9}, [0.0]
    state = SimpleNamespace(dependencies=SimpleNamespace(totals=lambda: totals))
    collector = AlarmCollector(state, lambda: now[0])
    assert collector.gained("gup_x") == 0
    totals["gup_x"] += 3
    assert collector.gained("gup_x") == 3
    now[0] = 300.0
    assert collector.gained("gup_x") == 3
    now[0] = 900.0
    assert collector.gained("gup_x") == 0


def test_a_restored_alarm_is_the_same_if_it_is_found_again_and_ends_some_time_later_if_not():
    kind, before = AlarmType("damage", "warning", 5.0, 10.0, "Do."), AlarmBoard()
    before.look([("damage", "x", "1 damaged"), ("damage", "y", "1 damaged")], NOW, 0.0)
    known = before.look([], NOW, 0.0)
    alarms = AlarmBoard([kind])
    alarms.restore([*known, known[0].model_copy(update={"name": "of another version"})], 100.0)
    shown = alarms.look([("damage", "x", "2 damaged")], NOW + 9, 100.0)
    assert [(alarm.id, alarm.since, alarm.text) for alarm in shown] == [
        (known[0].id, NOW, "2 damaged"),
        (known[1].id, NOW, "1 damaged"),
    ]
    assert len(alarms.look([("damage", "x", "2 damaged")], NOW, 139.9)) == 2
    assert [alarm.id for alarm in alarms.look([("damage", "x", "2 damaged")], NOW, 140.0)] == [known[0].id]


DAMAGED, MORE = [("damage", "x", "1 damaged")], [("damage", "x", "3 damaged")]
LOOKS = [  # what is due, the clock, the texts of those that stand
    (DAMAGED, 0.0, []),
    (DAMAGED, 4.9, []),
    ([], 5.0, []),
    (DAMAGED, 6.0, []),  # it began anew
    (DAMAGED, 10.9, []),
    (DAMAGED, 11.0, ["1 damaged"]),
    (MORE, 12.0, ["3 damaged"]),
    ([], 21.9, ["3 damaged"]),
    (DAMAGED, 22.0, ["1 damaged"]),  # it is back before it was calm for long enough: the same alarm
    ([], 31.9, ["1 damaged"]),
    ([], 32.0, []),
]


def test_an_alarm_begins_when_it_has_stood_and_ends_when_it_was_calm(caplog):
    alarms = AlarmBoard([AlarmType("damage", "warning", 5.0, 10.0, "Do.")])
    for due, clock, wanted in LOOKS:
        standing = alarms.look(due, NOW + clock, clock)
        assert [alarm.text for alarm in standing] == wanted, clock
        for alarm in standing:
            assert (alarm.name, alarm.severity, alarm.since) == ("damage", "warning", NOW + 11)
            assert (alarm.subject, alarm.what_to_do) == ("x", "Do.")
    assert [record.message for record in caplog.records] == [
        "alarm damage: 1 damaged",
        "alarm damage is over, after 21 s: 1 damaged",
    ]


def test_many_subjects_are_bounded():
    alarms = AlarmBoard([AlarmType("many", "warning", 0.0, 15.0, "Do.")])
    due = [("many", str(number), "bad") for number in range(1000)]
    assert len(alarms.look(due, NOW, 0.0)) == MAX_OF_A_TYPE
