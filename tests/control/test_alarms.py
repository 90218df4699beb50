"""The table of alarms: each row found where it should be and not elsewhere; when one begins and ends."""

import logging
from dataclasses import replace

import pytest

from gup.control.alarms import (
    ALARMS,
    MAX_OF_A_TYPE,
    AlarmBoard,
    AlarmType,
    Missed,
    Rejection,
    Snapshot,
    UpstreamHealth,
)
from gup.control.traffic import Storm

WELL = Snapshot(
    now=1_000_000.0,
    upstreams=(UpstreamHealth("a", up=True, last_error="was refused"), UpstreamHealth("b", up=True)),
    size_bytes=990,
    limit_bytes=1000,
    free_bytes=100,
    min_free_bytes=100,
    missed=(Missed("X", "260102001", "260102001", 0.0, 5000.0), Missed("Y", "260102001", None, 0.0, 1.0)),
    wan_limit=100,
    wan_used=94,
    fills_waiting=3,
    clients_week=5,
    client_last_seen=999_000.0,
)
STORM = Storm(("v", "l", "{A}"), 9.0, 40, 3, 7, ("10.0.0.1", "10.0.0.2"), 4_000_000_000, 100_000_000, 200_000)
DOWN_A, DOWN_B = UpstreamHealth("a", up=False, last_error="refused"), UpstreamHealth("b", up=False)
STORMY = (
    "7 clients (10.0.0.1, 10.0.0.2 and 5 more) asked for 40 full packages of Definitions, against 3 deltas, "
    "within 20 minutes: 4.0 GB over the LAN, 100 MB over the WAN; as deltas of 200 kB on average it would be "
    "8.0 MB over the LAN"
)
FULL = "v/l/{A}/26/full.zip"
DOUBTFUL = UpstreamHealth("a", up=True, last_error="was reset", doubtful=True)
OVERDUE = Missed("X", "260103001", "260102001", 999_000.0, 999_900.0)
# fmt: off
SICK: list[tuple[str, dict, str, str]] = [
    ("upstream-down", {"upstreams": (DOWN_A, UpstreamHealth("b", up=True))}, "a",
     "a is down; others are asked (refused)"),
    ("no-upstream", {"upstreams": (DOWN_A, DOWN_B)}, "",
     "no upstream answers (a, b): only what is stored can be served (refused)"),
    ("upstream-doubtful", {"upstreams": (DOUBTFUL,)}, "a",
     "a takes connections but fails to answer (was reset)"),
    ("bad-content", {"rejections": (Rejection(FULL, "a", "does not end as a ZIP file does", 9.0),)}, FULL,
     f"a has no usable {FULL}: does not end as a ZIP file does"),
    ("disk-refuses", {"refusals": {"content": "No space"}}, "content", "the disk takes no content: No space"),
    ("not-stored", {"unstored": "any/any/a/-/full.zip: it takes more than cache.max_size"}, "",
     "content is passed through and not stored: any/any/a/-/full.zip: it takes more than cache.max_size"),
    ("disk-short", {"free_bytes": 99}, "",
     "99 B are free on the cache's disk, less than the 100 B of cache.min_free"),
    ("cache-short", {"recent_evicted_lately": 4}, "",
     "the cache is full (1.0 kB), and 4 entries that were used within a day had to go"),
    ("damage", {"damage": 2}, "", "damage was found in the store 2 times within the last hour"),
    ("full-storm", {"storms": (("Definitions", STORM),)}, "v/l/{A}", STORMY),
    ("reload-failed", {"config_ok": False}, "",
     "the settings could not be read again: those before are in force"),
    ("workers-restarting", {"restarts_lately": 2}, "",
     "worker processes died 2 times within 10 minutes and were replaced"),
    ("stale-stream", {"missed": (OVERDUE,)}, "X",
     "clients have asked for 260103001 of X for 16 min 40 s in vain; the newest here is 260102001"),
    ("stale-catalogue", {"catalogues": {"a": "a answered 404"}}, "a",
     "the catalogue of a can't be read: a answered 404"),
    ("unsure-end", {"unsure_ends": ("a sent 5 bytes",)}, "", "a sent 5 bytes"),
    ("wan-full", {"wan_used": 96}, "", "the WAN is full (100 B/s), and 3 fills wait for their turn"),
    ("clients-silent", {"client_last_seen": 1_000_000.0 - 90_000}, "",
     "no client has asked for 1 d 1 h, where 5 did within the last week"),
    ("events-lost", {"lost_events_lately": 9}, "",
     "9 messages from workers were lost within 10 minutes: figures of use are too low"),
]
# fmt: on


def found(snapshot: Snapshot) -> dict[str, list[tuple[str, str]]]:
    return {type_.name: list(type_.find(snapshot)) for type_ in ALARMS if list(type_.find(snapshot))}


def test_a_service_that_is_well_has_no_alarm():
    assert found(WELL) == {}
    assert found(Snapshot(now=0.0)) == {}


@pytest.mark.parametrize(("name", "changed", "subject", "text"), SICK, ids=[row[0] for row in SICK])
def test_each_alarm_is_found_where_it_should_be(name, changed, subject, text):
    assert found(replace(WELL, **changed)) == {name: [(subject, text)]}


def test_every_row_is_tried_and_says_what_to_do():
    assert sorted(type_.name for type_ in ALARMS) == sorted(row[0] for row in SICK)
    assert all(type_.what_to_do.endswith(".") for type_ in ALARMS)
    assert [type_.severity for type_ in ALARMS if type_.name in ("no-upstream", "disk-refuses")] == [
        "critical"
    ] * 2


def test_a_storm_without_addresses_or_deltas_is_told_too():
    storm = STORM._replace(clients=0, addresses=(), delta_bytes=0)
    assert found(replace(WELL, storms=(("D", storm),)))["full-storm"][0][1] == (
        "clients asked for 40 full packages of D, against 3 deltas, within 20 minutes: "
        "4.0 GB over the LAN, 100 MB over the WAN"
    )


def _damaged(snapshot: Snapshot):
    if snapshot.damage:
        yield "x", f"{snapshot.damage} damaged"


def board(after: float = 0.0, calm: float = 10.0) -> AlarmBoard:
    return AlarmBoard([AlarmType("damage", _damaged, "Do.", after=after, calm=calm)])


def test_an_alarm_begins_when_it_has_stood_and_ends_when_it_was_calm(caplog):
    sick, well, alarms = replace(WELL, damage=1), WELL, board(after=5.0, calm=10.0)
    with caplog.at_level(logging.WARNING):
        for clock in (0.0, 4.9):
            alarms.look(sick, clock)
            assert alarms.standing() == []
        alarms.look(well, 5.0)
        for clock in (6.0, 10.9):  # it began anew
            alarms.look(sick, clock)
            assert alarms.standing() == []
        alarms.look(replace(sick, now=77.0), 11.0)
        alarms.look(replace(sick, now=78.0, damage=3), 12.0)
        (standing,) = alarms.standing()
        assert standing.model_dump() == {
            "name": "damage",
            "severity": "warning",
            "since": 77.0,
            "subject": "x",
            "text": "3 damaged",
            "what_to_do": "Do.",
        }
        alarms.look(well, 21.9)
        alarms.look(sick, 22.0)  # it is back before it was calm for long enough: the same alarm
        alarms.look(well, 31.9)
        assert len(alarms.standing()) == 1
        alarms.look(well, 32.0)
        assert alarms.standing() == []
    assert [record.message for record in caplog.records] == [
        "alarm damage: 1 damaged",
        "alarm damage is over, after 21 s: 1 damaged",
    ]


def test_many_subjects_are_bounded():
    def many(_snapshot):
        yield from ((str(number), "bad") for number in range(1000))

    alarms = AlarmBoard([AlarmType("many", many, "Do.")])
    alarms.look(WELL, 0.0)
    assert len(alarms.standing()) == MAX_OF_A_TYPE
