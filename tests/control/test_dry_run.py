"""A dry run: waits at another rate, peaks, limits of clients, rules; settings that are wrong."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from gup.config import Settings, parse
from gup.control.dry_run import dry_run, known_part
from gup.control.stats import demand_files
from gup.control.stats.demand_files import KEYS, ROWS, Line, Op

MB, DAY = 10**6, 86400
NOW = 1_800_000_000.0 // 3600 * 3600
FULL = "any/any/{{A{:05d}}}/260101001/full.zip"


def settings(**sections) -> Settings:
    return Settings.model_validate({"site": {"time_zone": "UTC"}, **sections})


@pytest.fixture
def record(tmp_path):
    """Writes lines for bodies of 10 MB: after so many seconds, which key, how it was asked for."""

    def write(*asked, **more):
        path = tmp_path / "00000001-1800000000.demand"
        keys = [(n, FULL.format(n), "full", 10 * MB, 0) for n in range(100)]
        lines = [Line(NOW, 0.0, 0, 0, 0, 0, 0, [])]
        for seconds, key, op in asked:
            line = {"downloads": 0, "queued": 0, "of_address": 0, "received_bytes": 0} | more
            lines.append(Line(NOW + seconds, 10.0, sent_bytes=0, rows=[key, int(op), 1], **line))
        path.touch()
        demand_files.append(path, [(KEYS, keys), (ROWS, lines)], 0)
        return tmp_path

    return write


def tried(folder, since=0.0, **sections):
    return dry_run(folder, {"tried": settings(**sections)}, since)["settings"]["tried"]


def test_fetches_wait_for_the_wan_in_their_order(record):
    folder = record(*((0, key, Op.USE) for key in range(10)))
    fast = tried(folder, wan={"rate": "0"})
    assert (fast["wan_bytes"], fast["longest_wait_seconds"], fast["late_fetches"]) == (100 * MB, 0.0, 0)
    slow = tried(folder, wan={"rate": "1MB/s"}, fill={"queue_timeout": "35s"})
    assert slow["longest_wait_seconds"] == 100.0  # the tenth, until its last byte
    assert slow["late_fetches"] == 6  # those before which 40 MB or more wait
    assert slow["peak_minute_bytes_per_second"] == 100 * MB // 60
    assert slow["peak_hour_bytes_per_second"] == 100 * MB // 3600


def test_what_has_been_carried_waits_no_longer(record):
    folder = record((0, 1, Op.USE), (5, 2, Op.USE), (100, 3, Op.USE))
    assert tried(folder, wan={"rate": "1MB/s"})["longest_wait_seconds"] == 15.0
    assert tried(folder, wan={"rate": "1MB/s"})["busy_seconds"] == pytest.approx(20.0)


def test_hours_of_another_rate_count(record):
    at = datetime.fromtimestamp(NOW, UTC)
    hours = {"days": [f"{at:%a}".lower()], "from": f"{at:%H:%M}", "to": f"{at + timedelta(hours=1):%H:%M}"}
    wan = {"rate": "1MB/s", "schedule": [{**hours, "rate": "2MB/s"}]}
    folder = record(*((0, key, Op.USE) for key in range(10)), (3700, 50, Op.USE))
    found = tried(folder, wan=wan)
    assert found["longest_wait_seconds"] == 50.0


def test_background_fetches_let_clients_pass(record):
    folder = record(*((0, key, Op.PREFETCH) for key in range(10)), (1, 20, Op.USE))
    found = tried(folder, wan={"rate": "1MB/s"})
    assert (found["longest_wait_seconds"], found["wan_bytes"]) == (10.0, 110 * MB)


def test_only_the_days_asked_for_are_counted_and_earlier_ones_fill_the_store(record):
    folder = record((0, 1, Op.USE), (1000, 1, Op.USE), (1001, 2, Op.USE))
    found = tried(folder, since=NOW + 500)
    assert (found["wan_bytes"], found["fetches"], found["hit_ratio"]) == (10 * MB, 1, 0.5)


def test_limits_of_clients_are_compared_with_what_was_at_once(record):
    folder = record((10, 1, Op.USE), (20, 1, Op.USE), downloads=30, queued=5, of_address=4)
    limits = {"max_downloads": 20, "queue": 10, "max_downloads_per_address": 3}
    found = tried(folder, clients=limits)
    assert (found["queued_seconds"], found["refused_seconds"], found["address_exceeded"]) == (20.0, 20.0, 2)
    assert tried(folder, clients={"max_downloads": 40})["queued_seconds"] == 0.0
    assert tried(folder)["address_exceeded"] == 0


def test_the_budget_holds_back_as_the_service_does_and_another_day_begins_anew(record):
    asked = [(0, key, Op.USE) for key in range(10)] + [(1, 30, Op.PREFETCH), (DAY, 40, Op.USE)]
    folder = record(*asked)
    budget = {"bytes": 60 * MB, "per": "day", "background": 0.5, "fulls": 0.8}
    found = tried(folder, wan={"rate": "0", "budget": budget})
    assert found["wan_bytes"] == 60 * MB  # five until 80 % are used, one of another day
    assert found["held_back"] == {"full": 5, "background": 1}
    assert found["held_back_at"] == NOW
    assert tried(folder, wan={"rate": "0"})["held_back"] == {}
    free = {"days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"], "from": "00:00", "to": "24:00"}
    assert tried(folder, wan={"rate": "0", "budget": budget | {"cheap": [free]}})["held_back"] == {}


def test_a_smaller_store_beside_the_present_one(record):
    folder = record(*((n, n % 3, Op.USE) for n in range(30)))
    sizes = {"present": 100 * MB, "tried": 20 * MB}
    every = {name: settings(cache={"max_size": size}) for name, size in sizes.items()}
    found = dry_run(folder, every, 0.0)["settings"]
    assert (found["present"]["wan_bytes"], found["tried"]["wan_bytes"]) == (30 * MB, 300 * MB)


def test_what_is_sent_for_a_dry_run_has_no_secret():
    upstream = {"url": "http://manager:8014", "headers": {"X-Key": "hush"}, "proxy": "http://u:hush@p:1"}
    alarms = {
        "webhook": "https://hooks/x?hush",
        "webhook_secret": "whsec_" + "aHVzaGh1c2hodXNoaHVzaGh1c2hodXNo",
    }
    part = known_part(settings(upstream=[upstream], alarms=alarms, wan={"rate": "3MB/s"}))
    assert "hush" not in json.dumps(part)
    assert "whsec" not in json.dumps(part)
    again, problems = parse(part)
    assert problems == []
    assert again.wan.rate == 3 * MB


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("wan = 3", "wan: 3 is not right: must be a table with keys, such as [wan]"),
        ("= 3", "the settings are not TOML: Invalid statement (at line 1, column 1)"),
        ({"cache": {"max_sise": 1}}, "cache.max_sise: unknown key; did you mean max_size?"),
        (
            {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]},
            "no table of settings: tables and lists may be nested",
        ),
    ],
)
def test_wrong_settings_are_told_as_by_the_check(given, problem):
    found, problems = parse(given)
    assert found is None
    assert problems[0].startswith(problem)
