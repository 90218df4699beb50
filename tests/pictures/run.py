"""The pictures in docs/images: a real gup, a month played with its clock put ahead, a real Chromium."""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.services import owned_by, running
from harness.browser import browser
from harness.clients import Swarm, fetch
from harness.content import noise, zip_of
from harness.faults import WallClock
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate, ScriptedUpstream

DAY, HOUR, MINUTE = 86400, 3600, 60
MOST_BYTES = 200_000
STREAMS = (
    ("{535CB6A4-441F-4E8A-A897-804CD859100E}", "SEPC Virus Definitions Win32 14.3 RU2", "SymAllLanguages"),
    ("{07B590B3-9282-482F-BBAA-6D515D385869}", "SEPC Virus Definitions Win64 14.3 RU2", "SymAllLanguages"),
    ("{B6DC6C8F-46FA-40C7-A806-B669BE1D2D19}", "SEPC Submission Control Data 14.3 RU2", "SymAllLanguages"),
    ("{D6AEBC07-D833-485F-9723-6C908D37F806}", "SEPC Behavior And Security Heuristics", "SymAllLanguages"),
    ("{55DE35DC-862A-44C9-8A2B-3EF451665D0A}", "SEPC Network Threat Signatures 14.3 RU2", "SymAllLanguages"),
    ("{925C2CD4-B1C7-572B-8318-5F0C51759FAC}", "SEPC Client Patch Win64 14.3 RU2", "French"),
)
CLIENTS = [f"127.0.{number // 200 + 1}.{number % 200 + 10}" for number in range(60)]


class Site:
    """The upstream, gup and sixty clients; `now` is what gup's clock shows."""

    def __init__(self, upstream: ScriptedUpstream, gup: Gup, clock: WallClock, seed: int) -> None:
        self._upstream = upstream
        self._gup = gup
        self._clock = clock
        self._random = random.Random(seed)
        self._revisions: list[str] = []
        self._has: dict[tuple[str, str], str] = {}
        self._pool = ThreadPoolExecutor(8)

    def close(self) -> None:
        self._pool.shutdown()

    def publish(self, at: float, turn: int) -> None:
        """A new revision of each stream, with the delta from the one before."""
        revision = time.strftime("%y%m%d", time.localtime(at)) + f"{turn:03}"
        for moniker, _, _ in STREAMS:
            folder = f"/content/{moniker}/{revision}"
            size = self._random.randrange(2_000_000, 4_000_000)
            self._upstream.answer(f"{folder}/full.zip", Answer(zip_of(folder, size)))
            if self._revisions:
                step = f"xdelta{self._revisions[-1]}_To_{revision}.dax"
                size = self._random.randrange(100_000, 400_000)
                self._upstream.answer(f"{folder}/{step}", Answer(noise(folder + step, size)))
        self._revisions.append(revision)

    def play(self, ago: float, clients: Sequence[str]) -> None:
        """So long ago these clients bring themselves up to date."""
        self._clock.set(-ago)
        wanted = [(client, moniker) for client in clients for moniker, _, _ in STREAMS]
        self._random.shuffle(wanted)
        list(self._pool.map(lambda one: self._update(*one), wanted))
        self._gup.api("/api/v1/history")
        self._gup.api("/api/v1/savings?days=1")  # so that this day's books are closed before the next

    def _update(self, client: str, moniker: str) -> None:
        newest = self._revisions[-1]
        has, self._has[client, moniker] = self._has.get((client, moniker)), newest
        if has == newest:
            return
        one_behind = len(self._revisions) > 1 and has == self._revisions[-2]
        file = f"xdelta{has}_To_{newest}.dax" if one_behind else "full.zip"
        path = f"/content/{moniker}/{newest}/{file}"
        answer = fetch(self._gup.data, path, {"User-Agent": "SEP/14.3.4615.2000"}, source=client)
        assert (answer.status, answer.complete) == (200, True), (answer.status, file)


def month(site: Site, chance: random.Random) -> None:
    """Four weeks by the day, a day by five minutes, an hour by the minute."""
    now = time.time()
    for day in range(29, 1, -1):
        ago = day * DAY - chance.randrange(2 * HOUR)
        weekend = time.localtime(now - ago).tm_wday > 4
        if not weekend or day == 29:
            site.publish(now - ago, 1)
        site.play(ago, chance.sample(CLIENTS, 8 if weekend else chance.randrange(30, 50)))
    for turn, part in enumerate(range(12 * 24 - 1, 12, -1)):
        ago = part * 5 * MINUTE
        if part in (210, 135, 60):
            site.publish(now - ago, turn)
        busy = 7 <= time.localtime(now - ago).tm_hour < 19
        site.play(ago, chance.sample(CLIENTS, chance.randrange(6) if busy else chance.choice([0, 0, 0, 1])))
    for minute in range(59, 0, -1):
        if minute in (44, 12):
            site.publish(now - minute * MINUTE, 200 - minute)
        site.play(minute * MINUTE, chance.sample(CLIENTS, max(0, round(chance.gauss(3, 2)))))
    site.play(0, chance.sample(CLIENTS, 12))


def take(url: str, folder: Path) -> None:
    with browser() as page:
        for name, width, height, theme in (
            ("page-light", 1280, 1310, "light"),
            ("page-dark", 1280, 1310, "dark"),
            ("page-phone", 390, 1180, "light"),
        ):
            page.look(width=width, height=height, theme=theme)
            page.open(url)
            until(lambda: page.run("return document.querySelectorAll('.plot canvas').length") == 3, "charts")
            until(lambda: page.run("return document.getElementById('live').textContent") == "live", "live")
            time.sleep(1.5)  # the legends tell the newest figures after a turn of the charts
            page.picture(folder / f"{name}.png", height=height)
            size = (folder / f"{name}.png").stat().st_size
            assert size <= MOST_BYTES, f"{name}.png has {size} bytes"


def take_site(folder: Path, out: Path) -> None:
    """The beginning of one gup's page, of three that are one cache: one has just stopped."""
    names = ("gup-1", "gup-2", "gup-3")
    with running(folder) as site, browser() as page:
        for name in names:
            site.start(name, settings={"wan": {"rate": "8MB/s"}, "site": {"name": name}})
        until(site.all_ask_all, "all ask all", 30)
        made = {
            path: body for name in names for path, body in owned_by(name, 4, 2_000_000, names=names).items()
        }
        for path, body in made.items():
            site.upstream.answer(path, Answer(body, etag='"a"'))
            for gup in site.nodes.values():
                assert gup.get(path).body == body
        sent = sum(3 * len(body) for body in made.values())
        until(lambda: site.seen_by("gup-1")["sums"]["sent_bytes"] == sent, "all figures are told", 30)
        first, stopped, _ = site.nodes.values()
        stopped.stop()
        until(lambda: site.seen_by("gup-1")["gone"], "it has stopped", 30)
        page.look(width=1280)
        page.open(first.admin_url + "/")
        until(lambda: page.run("return document.getElementById('live').textContent") == "live", "live")
        page.picture(out / "page-site.png", height=570)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "images")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="stay up until Enter is pressed")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gup-pictures-") as folder:
        take_site(Path(folder), arguments.out)
    with tempfile.TemporaryDirectory(prefix="gup-pictures-") as folder, ScriptedUpstream() as upstream:
        clock = WallClock(Path(folder, "clock"))
        clock.set(-30 * DAY)
        lines = [
            f"{moniker}: {product} - Defs.CurDefs - {language}" for moniker, product, language in STREAMS
        ]
        upstream.answer("/content/ContentInfo.txt", Answer("\r\n".join(lines).encode()))
        settings = {
            "upstream": [{"name": "head-office", "url": upstream.url}],
            "wan": {"rate": "8MB/s"},
            "cache": {"max_size": "2GB", "min_free": "0B"},
            "site": {"name": "lyon-2"},
            "log": {"access": "off"},
            "catalog": {"refresh": "1h"},
        }
        with Gup(Path(folder, "cache"), settings=settings, env=clock.env) as gup, Swarm(gup.data) as swarm:
            site = Site(upstream, gup, clock, arguments.seed)
            month(site, random.Random(arguments.seed))
            gate = Gate()
            slow = f"/content/{STREAMS[1][0]}/{time.strftime('%y%m%d')}250/full.zip"
            upstream.answer(slow, Answer(zip_of("slow", 30_000_000), gates=((20_000_000, gate),)))
            swarm.add(9, slow)
            until(lambda: gup.status()["fill_waiters"] == 9, "nine wait")
            url = f"http://{gup.admin[0]}:{gup.admin[1]}/"
            take(url, arguments.out)
            if arguments.keep:
                input(f"{url} until Enter ")
            gate.open()
            site.close()


if __name__ == "__main__":
    main()
