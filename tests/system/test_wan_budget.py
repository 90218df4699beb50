"""The WAN's budget through real processes: exact over kills, held back in order, kept over reloads."""

import contextlib
import os
import signal
from datetime import UTC, datetime, timedelta
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
from harness.clients import assert_problem, fetch
from harness.commands import on
from harness.content import BIG, CONTENT_INFO, DELTA, INDEX, content_path, noise, zip_of
from harness.faults import WallClock
from harness.processes import until
from harness.upstreams import Answer, Gate

LENGTH = 3_000_000
HALF = LENGTH // 2
BODY = zip_of("budget", LENGTH)
OTHER_FULL = content_path("full.zip", revision="260803001")
OTHER_DELTA = content_path("xdelta260802001_To_260803001.dax", revision="260802001")
THIRD_DELTA = content_path("xdelta260803001_To_260804001.dax", revision="260803001")
FILES = {
    BIG: zip_of("first", 500_000),
    OTHER_FULL: zip_of("other", 300_000),
    DELTA: noise("delta", 200_000),
    OTHER_DELTA: noise("other delta", 250_000),
    THIRD_DELTA: noise("third delta", 1000),
    INDEX: CONTENT_INFO,
}


def budget_of(gup):
    code, found = gup.api("/api/v1/budget")
    assert code == 200, found
    return found


def used(gup):
    return budget_of(gup)["used_bytes"]


def set_to(size, **more):
    return {"wan.budget": {"bytes": size, **more}}


def wait_used(gup, wanted):
    until(lambda: used(gup) == wanted, f"{wanted} bytes are used")


def test_what_is_used_is_known_to_the_byte_after_a_kill_of_everything(serve):
    gate = Gate()
    gup, upstream = serve({BIG: (Answer(BODY, etag='"a"', gates=((HALF, gate),)), BODY)}, **set_to("1GB"))
    gup.begin(BIG)
    gate.wait_reached()
    wait_used(gup, HALF)
    gup.kill()
    gup.start()
    assert used(gup) >= HALF  # its fill may go on already
    gup.serves(BIG, BODY)
    assert used(gup) == upstream.body_bytes(BIG)


@pytest.mark.long
def test_what_is_used_is_exact_whoever_is_killed_in_a_fill(serve):
    gates = [Gate(), Gate(), Gate()]
    at = (HALF, HALF + 400_000, HALF + 800_000)
    answers = [
        Answer(BODY, etag='"a"', gates=((place, gate),)) for place, gate in zip(at, gates, strict=True)
    ]
    gup, upstream = serve(
        {BIG: (*answers, Answer(BODY, etag='"a"'))}, each={"read_timeout": "1m"}, **set_to("1GB")
    )
    connection = gup.connect()
    connection.send(f"GET {BIG} HTTP/1.1\r\nHost: gup\r\n\r\n".encode())
    gates[0].wait_reached()
    wait_used(gup, upstream.body_bytes(BIG))
    gup.kill_worker(gup.leader_of(upstream, BIG))
    connection.close()
    client = gup.connect()
    client.send(f"GET {BIG} HTTP/1.1\r\nHost: gup\r\n\r\n".encode())
    gates[1].wait_reached()
    wait_used(gup, upstream.body_bytes(BIG))
    os.kill(gup.status()["pid"], signal.SIGKILL)  # the controller

    def alone():
        with contextlib.suppress(OSError):
            return used(gup) == upstream.body_bytes(BIG)
        return False

    until(alone, "another controller knows what was used")
    gup.kill()  # the supervisor with all
    gup.start()
    assert used(gup) == upstream.body_bytes(BIG)
    client = gup.connect()
    client.send(f"GET {BIG} HTTP/1.1\r\nHost: gup\r\n\r\n".encode())
    gates[2].wait_reached()
    wait_used(gup, upstream.body_bytes(BIG))
    gup.kill()
    gup.start()
    gup.serves(BIG, BODY)
    wait_used(gup, upstream.body_bytes(BIG))
    assert upstream.body_bytes(BIG) >= LENGTH
    assert sum(budget_of(gup)["by_kind"].values()) == upstream.body_bytes(BIG)
    assert gup.stop() == 0
    gup.start()
    assert used(gup) == upstream.body_bytes(BIG) == gup.metric("gup_wan_budget_used_bytes")


@pytest.mark.long
def test_an_upgrade_in_mid_fill_keeps_the_count(serve):
    """Old and new processes count at the same time, each into its own file."""
    gate = Gate()
    bodies = {content_path("full.zip", revision=f"2609{n:02}001"): zip_of(str(n), 300_000) for n in range(10)}
    slow = Answer(BODY, gates=((HALF, gate),))
    own = {"PYTHONDONTWRITEBYTECODE": "1"}  # interpreters of its own: see test_swap
    gup, upstream = serve(
        {BIG: slow, **bodies}, env=own, each={"health_interval": "0s", "read_timeout": "2m"}, **set_to("10MB")
    )

    def sent():
        return sum(map(upstream.body_bytes, [BIG, *bodies]))

    reader, response = gup.begin(BIG, 1000)
    gate.wait_reached()
    done = on(gup, "upgrade")
    assert done.returncode == 0, done.stderr
    for path, body in bodies.items():
        gup.serves(path, body)
    until(lambda: used(gup) == sent() >= HALF + 3_000_000, "it is known what both have received")
    gate.open()
    assert reader.finish(response).body == BODY
    until(lambda: used(gup) == sent(), "it is known what both have received")
    gup.kill()
    gup.start()
    assert used(gup) == sent() >= LENGTH + 3_000_000


def test_fulls_are_held_back_first_then_deltas_and_index_files_never(serve):
    gup, upstream = serve(
        FILES, each={"health_interval": "0s"}, **set_to("1MB", background="40%", fulls="60%")
    )
    gup.serves(BIG, FILES[BIG])
    gup.serves(DELTA, FILES[DELTA])  # 70 % now
    answer = gup.get(OTHER_FULL)
    problem = assert_problem(answer, 503, "wan-budget")
    assert 1 <= int(answer.header("retry-after")) <= 900
    assert (problem["budget_bytes"], problem["used_bytes"]) == (1_000_000, 700_000)
    assert datetime.fromisoformat(problem["opens_at"]) > datetime.now(UTC)
    assert "700 kB of 1.0 MB a month" in problem["detail"]
    gup.serves(BIG, FILES[BIG])  # stored
    gup.serves(OTHER_DELTA, FILES[OTHER_DELTA])  # 95 %
    assert budget_of(gup)["held_back"] == ["background", "full"]
    big = content_path("xdelta260804001_To_260805001.dax", revision="260804001")
    upstream.answer(big, noise("last", 60_000))
    gup.serves(big, noise("last", 60_000))  # a fill that begins below 100 % is not cut
    assert_problem(gup.get(THIRD_DELTA), 503, "wan-budget")
    gup.serves(INDEX, FILES[INDEX])
    assert gup.get(OTHER_FULL, method="HEAD").status == 200  # no body crosses the WAN
    assert not upstream.requests(THIRD_DELTA)
    assert used(gup) == 1_010_000 + len(FILES[INDEX]) == sum(map(upstream.body_bytes, [*FILES, big]))
    metrics = gup.metrics()
    assert metrics("gup_wan_budget_held_back_total", **{"class": "full"}) == 1
    assert metrics("gup_wan_budget_held_back_total", **{"class": "delta"}) == 1
    assert metrics("gup_fills_total", outcome="failed") == 0
    assert metrics("gup_requests_total", result="refused", code="503") == 2
    assert gup.upstream()["state"] in ("up", "unknown")
    assert gup.status()["failures"] == []
    until(lambda: gup.alarms("budget-held"), "the alarm stands")
    assert "deltas are held back" in on(gup, "budget").stdout
    assert "1.0 MB" in on(gup, "status").stdout
    assert "Budget of the WAN" in fetch(gup.admin, "/").body.decode()
    said = gup.api(f"/api/v1/why?of={quote(OTHER_FULL)}")[1]["files"][0]["said"]
    assert any("budget holds it back" in sentence for sentence in said), said
    # What was refused may be had as soon as there is more: nothing is remembered of it.
    gup.reload(upstream=[{"name": "u0", "url": upstream.url}], **set_to("10MB"))
    until(lambda: budget_of(gup)["bytes"] == 10_000_000, "the budget is larger")
    gup.serves(OTHER_FULL, FILES[OTHER_FULL])
    gup.serves(THIRD_DELTA, FILES[THIRD_DELTA])


def test_a_budget_that_is_set_later_knows_what_was_used_before(serve):
    gup, upstream = serve(FILES, each={"health_interval": "0s"})
    gup.serves(BIG, FILES[BIG])
    assert budget_of(gup)["bytes"] is None
    upstreams = [{"name": "u0", "url": upstream.url, "health_interval": "0s"}]
    for per in ("day", "month"):
        gup.reload(upstream=upstreams, **set_to("500kB", per=per, begins=31))
        until(lambda per=per: budget_of(gup)["per"] == per and used(gup) == 500_000, "it counts from before")
        assert_problem(gup.get(OTHER_DELTA), 503, "wan-budget")
    gup.reload(upstream=upstreams)
    gup.serves(OTHER_DELTA, FILES[OTHER_DELTA])


def test_what_is_under_way_is_not_cut_and_joined(serve):
    gate = Gate()
    gup, _ = serve({BIG: Answer(BODY, gates=((HALF, gate),))}, **set_to("1MB"))
    first, response = gup.begin(BIG, 1000)
    gate.wait_reached()
    until(lambda: used(gup) >= 1_000_000, "more is used than there is")
    second, joined = gup.begin(BIG, 1000)
    gate.open()
    assert first.finish(response).body == BODY
    assert second.finish(joined).body == BODY


def test_what_waits_for_a_slot_is_held_back_when_those_before_it_have_used_it_up(serve):
    gate = Gate()
    gup, upstream = serve(
        {**FILES, BIG: Answer(BODY, gates=((1000, gate),))},
        each={"health_interval": "0s"},
        fill={"max": 1},
        **set_to("1MB"),
    )
    first, response = gup.begin(BIG)
    gate.wait_reached()
    waiting = gup.connect()
    waiting.send(f"GET {OTHER_FULL} HTTP/1.1\r\nHost: gup\r\n\r\n".encode())
    gup.wait_metric(1, "gup_fills_in_progress")
    until(lambda: gup.api(f"/api/v1/why?of={quote(OTHER_FULL)}")[1]["files"][0]["waiting"], "it is queued")
    gate.open()
    assert first.finish(response).body == BODY
    assert_problem(waiting.response(), 503, "wan-budget")
    assert not upstream.requests(OTHER_FULL)
    assert gup.metric("gup_fills_in_progress") == 0


def test_background_fills_wait_and_go_on_in_cheap_hours(serve):
    gup, upstream = serve(FILES, each={"health_interval": "0s"}, **set_to("1MB", background="0%"))
    code, answer = gup.api("/api/v1/prefetch", "POST", given={"path": DELTA})
    assert code == 202, answer

    def row():
        return gup.api("/api/v1/prefetch")[1]["wanted"][0]

    until(lambda: "held back" in row()["detail"], "it is held back")
    assert row()["outcome"] == "queued"
    assert gup.metric("gup_wan_budget_held_back_total", **{"class": "background"}) == 1
    assert not upstream.requests(DELTA)
    every = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    gup.reload(
        **set_to("1MB", background="0%"),
        **{"wan.budget.cheap": [{"days": every, "from": "00:00", "to": "24:00"}]},
        upstream=[{"name": "u0", "url": upstream.url, "health_interval": "0s"}],
    )
    until(lambda: row()["outcome"] == "stored", "cheap hours let it begin")
    found = budget_of(gup)
    assert (found["used_bytes"], found["cheap_bytes"], found["cheap_now"]) == (0, 200_000, True)
    assert found["background_bytes"] == 200_000


@pytest.mark.long
def test_an_outbreak_opens_definitions_and_ends_by_itself(serve):
    patch = "{11111111-2222-3333-4444-555555555555}"
    info = CONTENT_INFO + f"{patch}: SEPC Client Patch 14.3 RU2 - English\r\n".encode()
    of_patch = content_path("full.zip", moniker=patch)
    slow = [{"days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"], "from": "00:00", "to": "24:00"}]
    gup, _ = serve(
        {**FILES, INDEX: info, of_patch: zip_of("patch", 5000)},
        wan={"rate": "0"},
        catalog={"refresh": "1h"},
        **set_to("1kB"),
        **{"wan.schedule": [slow[0] | {"rate": "1MB/s"}]},
    )
    gup.serves(THIRD_DELTA, FILES[THIRD_DELTA])  # with the catalogue this is all
    until(lambda: used(gup) >= 1000, "all is used")
    assert_problem(gup.get(OTHER_FULL), 503, "wan-budget")
    assert gup.api("/api/v1/prefetch", "POST", given={"path": OTHER_DELTA})[0] == 202
    done = on(gup, "outbreak", "1h", "--reason", "worm", "--by", "ann")
    assert done.returncode == 0, done.stderr
    assert "OUTBREAK" in done.stdout
    gup.serves(OTHER_FULL, FILES[OTHER_FULL])
    assert_problem(gup.get(of_patch), 503, "wan-budget")
    gup.wait_stored(OTHER_DELTA)
    until(lambda: gup.status()["wan_rate_bytes_per_second"] is None, "the schedule's rate does not apply")
    for words in (on(gup, "status").stdout, fetch(gup.admin, "/").body.decode()):
        assert "worm" in words
        assert "ann" in words
    until(lambda: gup.alarms("outbreak"), "the alarm stands")
    assert gup.metric("gup_outbreak") == 1
    assert gup.status()["outbreak"]["reason"] == "worm"
    gup.kill()
    gup.start()
    gup.serves(BIG, FILES[BIG])  # it stands after a restart
    assert gup.api("/api/v1/outbreak", "DELETE")[1] == {"outbreak": None, "unconfirmed": []}
    assert_problem(gup.get(content_path("full.zip", revision="260901001")), 503, "wan-budget")
    assert gup.api("/api/v1/outbreak", "DELETE")[0] == 404
    assert gup.api("/api/v1/outbreak", "POST", given={"duration": "1s"})[1]["outbreak"] is not None
    until(lambda: gup.api("/api/v1/outbreak")[1]["outbreak"] is None, "it ends by itself")
    until(lambda: gup.metric("gup_bandwidth_limit_bytes_per_second", direction="upstream") == 1e6, "the rate")
    gup.wait_log("the outbreak is over")


@pytest.mark.long
def test_a_period_turns_at_midnight_and_a_clock_that_was_ahead_loses_nothing(serve, tmp_path):
    clock, zone = WallClock(tmp_path / "clock"), ZoneInfo("Pacific/Auckland")
    tomorrow = datetime.now(zone).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    gup, _ = serve(
        FILES,
        each={"health_interval": "0s"},
        env=clock.env,
        site={"time_zone": "Pacific/Auckland"},
        **set_to("300kB", per="day"),
    )
    gup.serves(BIG, FILES[BIG])
    problem = assert_problem(gup.get(OTHER_FULL), 503, "wan-budget")
    opens_at = datetime.fromisoformat(problem["opens_at"])
    assert opens_at == tomorrow
    assert int(gup.get(OTHER_FULL).header("retry-after")) <= 900
    assert used(gup) == 500_000
    left = tomorrow.timestamp() - datetime.now(zone).timestamp()
    clock.set(left - 600)
    assert used(gup) == 500_000
    clock.set(left + 5)
    until(lambda: used(gup) == 0, "another period")
    gup.serves(OTHER_FULL, FILES[OTHER_FULL])
    clock.set(0)
    assert used(gup) == 800_000  # of today, and of a day to come
    assert_problem(gup.get(OTHER_DELTA), 503, "wan-budget")
    gup.kill()
    gup.start()
    assert used(gup) == 800_000


def test_a_client_that_joins_a_background_fill_gets_it_though_background_is_held_back(serve):
    gate = Gate()
    body = noise("delta", 200_000)
    answers = {DELTA: Answer(body, gates=((100_000, gate),)), BIG: FILES[BIG]}
    gup, _ = serve(answers, each={"health_interval": "0s"}, **set_to("1MB", background="40%"))
    assert gup.api("/api/v1/prefetch", "POST", given={"path": DELTA})[0] == 202
    gate.wait_reached()
    gup.serves(BIG, FILES[BIG])  # beyond the share of background fills
    reader, response = gup.begin(DELTA, 1000)
    gate.open()
    assert reader.finish(response).body == body


def test_a_delta_of_client_patches_is_held_back_as_fulls_are(serve):
    patch = "{11111111-2222-3333-4444-555555555555}"
    info = CONTENT_INFO + f"{patch}: SEPC Client Patch 14.3 RU2 - English\r\n".encode()
    of_patch = content_path("xdelta260801001_To_260802001.dax", moniker=patch)
    gup, _ = serve(
        {**FILES, INDEX: info, of_patch: noise("p", 900)}, catalog={"refresh": "1h"}, **set_to("550kB")
    )
    gup.serves(BIG, FILES[BIG])  # 91 %
    until(lambda: all(row["catalogue"] for row in gup.status()["upstreams"]), "the catalogue is read")
    assert_problem(gup.get(of_patch), 503, "wan-budget")
    gup.serves(THIRD_DELTA, FILES[THIRD_DELTA])


def test_an_outbreak_begins_and_ends(serve):
    gup, _ = serve(FILES, each={"health_interval": "0s"}, **set_to("1kB"))
    gup.serves(THIRD_DELTA, FILES[THIRD_DELTA])
    assert_problem(gup.get(OTHER_FULL), 503, "wan-budget")
    code, found = gup.api("/api/v1/outbreak", "POST", given={"duration": "1h", "by": "ann", "reason": "worm"})
    assert (code, found["outbreak"]["by"], found["unconfirmed"]) == (200, "ann", [])
    gup.serves(OTHER_FULL, FILES[OTHER_FULL])
    assert gup.metric("gup_outbreak") == 1
    assert gup.api("/api/v1/outbreak", "DELETE")[1] == {"outbreak": None, "unconfirmed": []}
    assert_problem(gup.get(BIG), 503, "wan-budget")
    assert gup.api("/api/v1/outbreak", "DELETE")[0] == 404


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"duration": "0s"},
        {"duration": "8d"},
        {"duration": "4 weeks"},
        {"duration": "1h", "reason": "x" * 501},
    ],
)
def test_a_wrong_outbreak_is_refused(shared, given):
    gup, _ = shared
    assert gup.api("/api/v1/outbreak", "POST", given=given)[0] == 400
    assert gup.api("/api/v1/outbreak")[1] == {"outbreak": None}
