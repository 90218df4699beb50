"""The client doctor beside a real service: clients in trouble, sound ones, the alarm, and what is shown."""

import csv
import io
import time

import pytest
from harness.clients import fetch
from harness.commands import command
from harness.content import INDEX, MONIKER, noise, zip_of
from harness.faults import WallClock
from harness.processes import until
from harness.upstreams import Answer

CATALOGUE = f"{MONIKER}: SEPC Virus Definitions Win64 14.3 - MicroDefs - SymAllLanguages\r\n".encode()
UNLISTED = "/content/{0C2A4E6D-1111-4222-8333-444455556666}/260101001/full.zip"
DAY = 86400


def ask(gup, client, path, **headers):
    return fetch(gup.data, path, headers, source=client).status


def report(gup):
    status, found = gup.api("/api/v1/report/sick")
    assert status == 200, found
    return found


@pytest.mark.long
def test_refused_clients_ring_an_alarm_and_are_shown_everywhere(serve):
    settings = {"rules": {"unlisted": "refuse"}, "catalog": {"refresh": "1h"}}
    gup, _ = serve({INDEX: Answer(CATALOGUE)}, workers=2, **settings)
    until(lambda: ask(gup, "127.0.0.1", UNLISTED) == 403, "the catalogue is read")
    for number in range(2, 8):
        for _ in range(5):
            assert ask(gup, f"127.0.0.{number}", UNLISTED) == 403
    found = until(lambda: (one := report(gup))["sick"] >= 6 and one, "they are found")
    row = next(row for row in found["rows"] if row["address"] == "127.0.0.2")
    assert (row["finding"], row["what"], row["times"]) == ("refused", "unlisted", 5)
    assert "gup rules explain" in row["what_to_do"]
    until(
        lambda: (
            f"refused {report(gup)['sick']}"
            in "".join(
                one["text"] for one in gup.api("/api/v1/alarms")[1]["alarms"] if one["name"] == "clients-sick"
            )
        ),
        "the alarm tells how many",
    )
    assert gup.metric("gup_clients_sick", finding="refused") >= found["sick"]
    told = command("report", "clients", "--sick", "--admin", gup.admin_url)
    assert (told.returncode, "127.0.0.2" in told.stdout, "refused: " in told.stdout) == (0, True, True), told
    told = command("report", "clients", "--sick", "--csv", "--admin", gup.admin_url)
    assert len(list(csv.DictReader(io.StringIO(told.stdout)))) == found["sick"]
    page = fetch(gup.admin, "/").body.decode()
    assert "Something seems to be wrong with" in page
    gup.kill()
    gup.start()
    assert report(gup)["sick"] == found["sick"], "they survive a power cut"


def test_three_sick_clients_of_three_ring_no_alarm_and_off_says_so(serve):
    settings = {"rules": {"unlisted": "refuse"}, "catalog": {"refresh": "1h"}}
    gup, _ = serve({INDEX: Answer(CATALOGUE)}, workers=1, reports={"addresses": "hashed"}, **settings)
    until(lambda: ask(gup, "127.0.0.1", UNLISTED) == 403, "the catalogue is read")
    for number in range(1, 4):
        for _ in range(5):
            ask(gup, f"127.0.0.{number}", UNLISTED)
    found = until(lambda: (one := report(gup))["sick"] == 3 and one, "they are found")
    assert all(row["address"].startswith("h-") for row in found["rows"])
    until(lambda: gup.metric("gup_clients_sick", finding="refused") == 3, "they are counted")
    assert [one for one in gup.api("/api/v1/alarms")[1]["alarms"] if one["name"] == "clients-sick"] == []
    gup.rewrite(settings | {"reports": {"addresses": "off"}})
    found = until(lambda: (one := report(gup))["addresses"] == "off" and one, "it is off")
    assert (found["rows"], found["sick"], "reports.addresses is off" in found["note"]) == ([], 0, True)
    told = command("report", "clients", "--sick", "--admin", gup.admin_url)
    assert "reports.addresses is off" in told.stdout
    assert "gup_clients_sick{" not in gup.metrics().text


class Days:
    """A site whose clock is played over a week; a new revision each day, with a delta from the last."""

    def __init__(self, gup, upstream, clock):
        self.gup, self._upstream, self._clock = gup, upstream, clock
        self.revisions = []

    def begin(self, ago, hours=0.0):
        self._clock.set(-ago * DAY + hours * 3600)
        if hours:
            return
        at = time.time() - ago * DAY
        self.revisions.append(time.strftime("%y%m%d", time.gmtime(at)) + "001")
        self._upstream.answer(self.full(), Answer(zip_of(self.full(), 60_000), etag='"f"'))
        if len(self.revisions) > 1:
            self._upstream.answer(self.delta(), Answer(noise(self.delta(), 4000), etag='"d"'))

    def full(self, back=0):
        return f"/content/{MONIKER}/{self.revisions[-1 - back]}/full.zip"

    def delta(self):
        before, now = self.revisions[-2:]
        return f"/content/{MONIKER}/{now}/xdelta{before}_To_{now}.dax"

    def take(self, number, path, **headers):
        status = ask(self.gup, f"127.0.1.{number}", path, **headers)
        assert status in (200, 206), status

    def noted(self, revision, clients):
        """Until so many clients took it."""

        def took():
            for stream in self.gup.api("/api/v1/report/content")[1]["content"]:
                for row in stream["revisions"]:
                    if row["revision"] == revision:
                        return row["took"] >= clients
            return False

        until(took, f"{clients} clients took {revision}")


NEIGHBOURS = range(10, 18)
REPEATS, FULLS, BEHIND, RESUMES = 1, 2, 3, 5
NEW, HOLIDAY, PARALLEL, SHARED, HEADS, FINISHES, SEVERAL = 20, 21, 22, 23, 24, 25, 26


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_week_with_sick_and_sound_clients(serve, tmp_path):  # noqa: C901 - a story
    clock = WallClock(tmp_path / "clock")
    clock.set(-6 * DAY)
    shared = [f"127.0.1.{SHARED}/32"]
    gup, upstream = serve({}, workers=2, env=clock.env, clients={"shared": shared}, rules={"mode": "off"})
    days = Days(gup, upstream, clock)
    for ago in range(6, -1, -1):
        days.begin(ago)
        first = ago == 6
        for number in NEIGHBOURS:
            days.take(number, days.full() if first else days.delta())
        if first:
            for number in (REPEATS, BEHIND, HOLIDAY, SHARED):
                days.take(number, days.full())
        else:
            for number in (REPEATS, SHARED):
                days.take(number, f"/content/{MONIKER}/{days.revisions[0]}/full.zip")
            days.take(BEHIND, f"/content/{MONIKER}/{days.revisions[0]}/full.zip", Range="bytes=0-9")
        days.take(FULLS, days.full())
        days.take(SEVERAL, days.full(), **{"User-Agent": f"SEP/14.3.{ago % 2}.0"})
        if ago == 0:
            days.take(NEW, days.full())
            days.take(HOLIDAY, days.full())
            for start in range(0, 60_000, 5000):
                days.take(PARALLEL, days.full(), Range=f"bytes={start}-{start + 4999}")
            for _ in range(20):
                fetch(gup.data, days.full(), source=f"127.0.1.{HEADS}", method="HEAD")
        days.noted(days.revisions[-1], len(NEIGHBOURS) + 1)
    for hour in range(3):
        days.begin(0, hours=hour)
        for part in range(4):
            at = 1000 * (4 * hour + part)
            days.take(RESUMES, days.full(), Range=f"bytes={at}-{at + 500}")
            days.take(FINISHES, days.full(), Range=f"bytes={at}-{at + 999}")
        time.sleep(1.2)  # a worker tells once a second, at the time that it is then
    days.take(FINISHES, days.full(), Range="bytes=12000-")
    wanted = {
        (f"127.0.1.{REPEATS}", "repeated-full"),
        (f"127.0.1.{FULLS}", "no-delta"),
        (f"127.0.1.{BEHIND}", "behind"),
        (f"127.0.1.{RESUMES}", "unfinished"),
    }

    def found():
        return {(row["address"], row["finding"]) for row in report(gup)["rows"]}

    behind = {(f"127.0.1.{REPEATS}", "behind")}  # it stands at the first revision, too
    until(lambda: found() - behind == wanted, "all are found and no others")
    assert report(gup)["left_out"] == 2
    gup.kill()
    gup.start()
    assert found() - behind == wanted
