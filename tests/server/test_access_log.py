"""Lines of the access log, counters of requests, and what the controller is told about clients."""

import json
import logging
from types import SimpleNamespace

import pytest
from harness.private import private_counters

from gup.client_names import ClientNames
from gup.config import Settings
from gup.content.client_identity import NOTHING, Stated
from gup.content.key import Kind
from gup.log import ACCESS
from gup.server.access_log import AccessLog
from gup.server.ranges import Span
from gup.server.request import Request
from gup.server.response import Response

KEY = "any/any/{535CB6A4-441F-4E8A-A897-804CD859100E}/260801001/full.zip"
NOW = 1_785_585_600.0


def settings(**sections):
    return Settings.model_validate(sections)


@pytest.fixture
def counters():
    return private_counters()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, ACCESS)
    return lambda: [record for record in caplog.records if record.name == ACCESS]


def log_with(counters, access="all", addresses="full", **log):
    own = settings(log={"access": access, **log}, reports={"addresses": addresses})
    return AccessLog(own, counters, ClientNames(addresses, b"k" * 32), lambda: 100.0)


def take(log, peer, client=NOTHING):
    """A client takes a whole body."""
    log.end(peer, answer(client=client), 100, complete=True)


def told(log, **more):
    """The rows that the controller gets, and the events they came in."""
    events = []

    def tell(event):
        events.append(json.loads(json.dumps(event)))
        return True

    log.each_second(lambda _event: None, tell, NOW, **more)
    assert all(event["type"] == "taken" and event["at"] == NOW for event in events)
    return sorted((row for event in events for row in event["rows"]), key=str), events


def answer(start=0, stop=100, length=100, **more):
    """A response with bytes `start` to `stop` of a body; without a body when `stop` is 0."""
    body = SimpleNamespace(head=SimpleNamespace(length=length)) if stop else None
    facts = {"result": "hit", "key": KEY, "kind": Kind.FULL, "status": 200} | more
    return Response(head=b"", segments=(Span(start, stop),) if stop else (), body=body, **facts)


@pytest.mark.parametrize(
    ("response", "sent", "complete", "what"),
    [
        (answer(), 100, True, 1),
        (answer(), 60, False, [0, 60, 100]),
        (answer(start=60, status=206), 40, True, [60, 100, 100]),
        (answer(stop=1 << 62, length=None), 70, True, 1),  # its length was never known, and it is all here
        (answer(stop=1 << 62, length=None), 70, False, 0),
        (answer(stop=100, length=100), 0, False, 0),
        (answer(status=304, stop=0), 0, True, 0),
        (answer(result="error", status=502, stop=0, problem="upstream-unreachable"), 0, True, 0),
        (answer(result="refused", status=403, stop=0, problem="rule-refused"), 0, True, None),
        (answer(request=Request("HEAD", b"/x", 1, (), True), stop=0), 0, True, None),
        (answer(key=None), 0, True, None),
    ],
)
def test_what_the_controller_is_told(counters, response, sent, complete, what):
    log = log_with(counters, "off")
    log.end("10.0.0.1", response, sent, complete=complete)
    rows, _ = told(log)
    assert rows == ([] if what is None else [["10.0.0.1", KEY, "", "", what]])
    assert told(log) == ([], [])


def test_the_same_take_is_told_once_and_in_events_of_few_rows(counters):
    log = log_with(counters, "off")
    for number in range(450):
        for _ in range(3):
            take(log, f"10.0.{number // 250}.{number % 250}")
    rows, events = told(log)
    assert len(rows) == 450
    assert [len(event["rows"]) for event in events] == [200, 200, 50]


def test_what_finds_the_queue_full_is_told_later(counters):
    log = log_with(counters, "off")
    for number in range(250):
        take(log, f"10.0.0.{number}")
    log.each_second(lambda _event: None, lambda _event: False, NOW)
    for number in range(250):
        take(log, f"10.0.1.{number}")
    rows, _ = told(log)
    assert len(rows) == 500
    assert counters.get("gup_events_lost_total") == 0


def test_a_flood_is_bounded_and_what_is_lost_is_counted(counters):
    log = log_with(counters, "off")
    for n in range(60_000):
        take(log, f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    rows, events = told(log)
    assert (len(rows), len(events)) == (2000, 10)
    assert counters.get("gup_events_lost_total") == 51
    rest, _ = told(log, everything=True)
    assert len(rest) == 48_000


def test_lines_of_all_requests(counters, lines):
    log = log_with(counters)
    response = answer(result="miss", client=Stated("14.3 RU2", "fr"), began=97.5, first_byte=98.0)
    log.end("::ffff:10.0.0.1", response, 60, complete=False)
    (line,) = lines()
    assert (line.client, line.key, line.result, line.status) == ("10.0.0.1", KEY, "miss", 200)
    assert (line.bytes, line.complete) == (60, False)
    assert (line.first_byte_seconds, line.seconds) == (0.5, 2.5)
    assert (line.version, line.language, line.one_in, line.target) == ("14.3 RU2", "fr", None, None)


def test_hits_are_sampled_and_a_flood_of_refusals_is_not_one_of_lines(counters, lines):
    log = log_with(counters, "sampled", access_sample=50)
    for _ in range(101):
        log.begin("10.0.0.1", answer())
        take(log, "10.0.0.1")
    assert [line.one_in for line in lines()] == [50, 50, 50]
    for _ in range(250):
        refused = {"key": None, "result": "refused", "status": 404, "problem": "not-content"}
        asked = Request("GET", b"/x", 1, (), True)
        log.end("10.0.0.1", answer(**refused, request=asked), 0, complete=True)
    assert len(lines()) == 103
    told(log)
    assert (lines()[-1].getMessage(), lines()[-1].lines) == ("requests left out", 150)
    log.end("10.0.0.1", answer(result="miss"), 100, complete=True)
    assert lines()[-1].result == "miss"


def test_without_addresses_nobody_is_named(counters, lines):
    log = log_with(counters, addresses="off")
    log.end("10.0.0.1", answer(), 100, complete=True)
    assert lines()[0].client is None
    assert told(log) == ([], [])
    take(log, "10.0.0.1")
    events = []
    log.each_second(events.append, lambda _event: True, NOW)
    (name,) = [event["clients"] for event in events if event["type"] == "used"]
    assert [one[:2] for one in name] == ["h-"]  # to be counted
    assert "10.0.0.1" not in json.dumps(events)


def test_a_reload_changes_how_clients_are_called(counters):
    log = log_with(counters, "off")
    take(log, "10.0.0.1")
    log.each_second(lambda _event: None, lambda _event: False, NOW)  # waits under its address
    log.apply(settings(reports={"addresses": "hashed"}))
    take(log, "10.0.0.2")
    rows, _ = told(log)
    assert [row[0][:2] for row in rows] == ["h-"]


def test_what_is_used_missed_and_taken_is_told_once_a_second(counters):
    log = log_with(counters, "off")
    log.connected.add("10.0.0.1")
    for stored in (True, True, False):
        log.begin("10.0.0.1", answer(stored=stored))
    log.begin("10.0.0.1", answer(kind=None, stop=0, result="error", status=502, problem="upstream-timeout"))
    events = []
    log.each_second(events.append, lambda _event: True, NOW)
    assert [json.loads(json.dumps(event)) for event in events] == [
        {"type": "used", "at": NOW, "uses": [[KEY, 2]], "asked": [[KEY, 1, 1]]}
        | {"fulls": [["10.0.0.1", KEY, 3]], "clients": ["10.0.0.1"]}
    ]
    log.each_second(events.append, lambda _event: True, NOW)
    assert len(events) == 1
    assert counters.get("gup_requests_total", result="hit", code="200") == 3
    assert counters.get("gup_requests_total", result="error", code="502") == 1
