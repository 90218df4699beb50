"""What is told of answers: to the log, and to the controller."""

import json
import logging

import pytest

from gup.addresses import Names, is_name, read_key
from gup.config import Settings
from gup.content.client_identity import NOTHING, Declarations, Stated
from gup.log import ACCESS
from gup.metrics import Counters
from gup.server.accounts import Account, Accounts
from gup.server.tally import Tally

KEY = "any/any/{535CB6A4-441F-4E8A-A897-804CD859100E}/260801001/full.zip"
NOW = 1_785_585_600.0


def settings(**sections):
    return Settings.model_validate(sections)


@pytest.fixture
def tally():
    return Tally(Counters.private())


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, ACCESS)
    return lambda: [record for record in caplog.records if record.name == ACCESS]


def accounts_of(tally, access="all", addresses="full", **log):
    own = settings(log={"access": access, **log}, reports={"addresses": addresses})
    return Accounts(own, tally, Names(addresses, b"k" * 32), lambda: 100.0)


def told(accounts, **more):
    """The rows that the controller gets, and the events they came in."""
    events = []

    def tell(event):
        events.append(json.loads(json.dumps(event)))
        return True

    accounts.each_second(tell, NOW, **more)
    assert all(event["type"] == "taken" and event["at"] == NOW for event in events)
    return sorted((row for event in events for row in event["rows"]), key=str), events


def answer(**more):
    return Account(
        **{"method": "GET", "result": "hit", "status": 200, "key": KEY, "stop": 100, "length": 100} | more
    )


@pytest.mark.parametrize(
    ("account", "sent", "complete", "what"),
    [
        (answer(), 100, True, 1),
        (answer(), 60, False, [0, 60, 100]),
        (answer(start=60, status=206), 40, True, [60, 100, 100]),
        (answer(stop=1 << 62, length=None), 70, True, 1),  # its length was never known, and it is all here
        (answer(stop=1 << 62, length=None), 70, False, 0),
        (answer(stop=100, length=100), 0, False, 0),
        (answer(status=304, stop=0, length=-1), 0, True, 0),
        (answer(result="error", status=502, stop=0, length=-1, problem="upstream-unreachable"), 0, True, 0),
        (answer(result="refused", status=403, stop=0, length=-1, problem="rule-refused"), 0, True, None),
        (answer(method="HEAD", stop=0, length=-1), 0, True, None),
        (answer(key=None), 0, True, None),
    ],
)
def test_what_the_controller_is_told(tally, account, sent, complete, what):
    accounts = accounts_of(tally, "off")
    accounts.end("10.0.0.1", account, sent, complete=complete)
    rows, _ = told(accounts)
    assert rows == ([] if what is None else [["10.0.0.1", KEY, "", "", what]])
    assert told(accounts) == ([], [])


def test_the_same_take_is_told_once_and_in_events_of_few_rows(tally):
    accounts = accounts_of(tally, "off")
    for number in range(450):
        for _ in range(3):
            accounts.takes.add((f"10.0.{number // 250}.{number % 250}", KEY, NOTHING))
    rows, events = told(accounts)
    assert len(rows) == 450
    assert [len(event["rows"]) for event in events] == [200, 200, 50]


def test_what_finds_the_queue_full_is_told_later(tally):
    accounts = accounts_of(tally, "off")
    accounts.takes |= {(f"10.0.0.{number}", KEY, NOTHING) for number in range(250)}
    accounts.each_second(lambda _event: False, NOW)
    accounts.takes |= {(f"10.0.1.{number}", KEY, NOTHING) for number in range(250)}
    rows, _ = told(accounts)
    assert len(rows) == 500
    assert tally.counters.get("gup_events_lost_total") == 0


def test_a_flood_is_bounded_and_what_is_lost_is_counted(tally):
    accounts = accounts_of(tally, "off")
    accounts.takes |= {(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", KEY, NOTHING) for n in range(60_000)}
    rows, events = told(accounts)
    assert (len(rows), len(events)) == (2000, 10)
    assert tally.counters.get("gup_events_lost_total") == 51
    rest, _ = told(accounts, all_of_it=True)
    assert len(rest) == 48_000


def test_lines_of_all_requests(tally, lines):
    accounts = accounts_of(tally)
    account = answer(result="miss", stated=Stated("14.3 RU2", "fr"), began=97.5, first_byte=98.0)
    accounts.end("::ffff:10.0.0.1", account, 60, complete=False)
    (line,) = lines()
    found = {name: getattr(line, name) for name in ("client", "key", "result", "status", "bytes", "complete")}
    assert found == {
        "client": "10.0.0.1",
        "key": KEY,
        "result": "miss",
        "status": 200,
        "bytes": 60,
        "complete": False,
    }
    assert (line.first_byte_seconds, line.seconds) == (0.5, 2.5)
    assert (line.version, line.language, line.one_in, line.target) == ("14.3 RU2", "fr", None, None)


def test_hits_are_sampled_and_a_flood_of_refusals_is_not_one_of_lines(tally, lines):
    accounts = accounts_of(tally, "sampled", access_sample=50)
    for _ in range(101):
        tally.request("hit", 200)
        accounts.end("10.0.0.1", answer(), 100, complete=True)
    assert [line.one_in for line in lines()] == [50, 50, 50]
    for _ in range(250):
        refused = answer(key=None, result="refused", status=404, problem="not-content", target="/x")
        accounts.end("10.0.0.1", refused, 0, complete=True)
    assert len(lines()) == 103
    told(accounts)
    assert (lines()[-1].getMessage(), lines()[-1].lines) == ("requests left out", 150)
    accounts.end("10.0.0.1", answer(result="miss"), 100, complete=True)
    assert lines()[-1].result == "miss"


def test_without_addresses_nobody_is_named(tally, lines):
    accounts = accounts_of(tally, addresses="off")
    accounts.end("10.0.0.1", answer(), 100, complete=True)
    assert lines()[0].client is None
    assert told(accounts) == ([], [])
    assert tally.clients == {"10.0.0.1"}  # to be counted
    events = []
    tally.take_news(events.append, NOW, accounts.names.of)
    assert "10.0.0.1" not in json.dumps(events)


def test_a_reload_changes_how_clients_are_called(tally):
    accounts = accounts_of(tally, "off")
    accounts.takes.add(("10.0.0.1", KEY, NOTHING))
    accounts.each_second(lambda _event: False, NOW)  # waits under its address
    accounts.apply(settings(reports={"addresses": "hashed"}))
    accounts.takes.add(("10.0.0.2", KEY, NOTHING))
    rows, _ = told(accounts)
    assert [row[0][:2] for row in rows] == ["h-"]


# --- names


def test_one_key_for_all_processes(tmp_path):
    key = read_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    one, other = Names("hashed", key), Names("hashed", b"o" * 32)
    assert one.of("10.0.0.1") == one.of("::ffff:10.0.0.1") == Names("hashed", key).of("10.0.0.1")
    assert one.of("10.0.0.1") != other.of("10.0.0.1")
    assert is_name(one.of("10.0.0.1"))


def test_a_key_that_cannot_be_kept_or_read(tmp_path, caplog):
    (tmp_path / "key").write_text("no key")
    assert len(read_key(tmp_path / "key")) == 32
    assert len(read_key(tmp_path / "none" / "key")) == 32
    assert caplog.text.count("can't be kept") == 2


@pytest.mark.parametrize(
    ("name", "good"),
    [("10.0.0.1", True), ("fe80::1", True), ("h-0123456789abcdef", True), ("h-xyz", False), ("<b>", False)],
)
def test_names(name, good):
    assert is_name(name) is good


# --- what clients state


@pytest.mark.parametrize(
    ("headers", "version", "language"),
    [
        ({}, "", ""),
        ({"user-agent": "SEP/14.3.4615.2000 (Windows)"}, "14.3.4615.2000", ""),
        ({"gup-client-version": "14.3 RU2", "user-agent": "SEP/1.0"}, "14.3 RU2", ""),
        ({"gup-client-version": "nonsense", "user-agent": "SEP/14.3.4615.2000"}, "14.3.4615.2000", ""),
        ({"gup-client-version": "nonsense"}, "nonsense", ""),
        ({"gup-client-language": " French "}, "", "French"),
        ({"gup-client-version": "\x85\t1" + "2" * 100}, "1" + "2" * 63, ""),
    ],
)
def test_what_clients_state(headers, version, language):
    declarations = Declarations(settings().rules)
    stated = declarations.of(tuple(headers.items()))
    assert (stated.version, stated.language) == (version, language)
    assert declarations.of((*headers.items(), ("accept", "*/*"))) is stated
