"""Power cuts of the whole machine, on real file systems: clones of the mounted image, taken under load.

After each cut, without an upstream: every byte that is served is right, and all that was stored for longer
than the promised time is served. Then, with the upstream, everything is served.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness.clients import fetch
from harness.content import content_path, noise, zip_of
from harness.disks import Image, make_image, shelf
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

SEED = os.environ.get("GUP_TEST_SEED", "1")
IMAGE_BYTES = 4 << 30
CUTS = 6
SURE_SECONDS = 4.0
"""What a client had whole for so long before a cut is served after it."""
INDEX = "/content/ContentInfo.txt"


@dataclass
class Site:
    """What upstream has, and when a client first had each of it whole (on the monotonic clock)."""

    upstream: ScriptedUpstream
    chance: random.Random
    bodies: dict[str, list[bytes]] = field(default_factory=dict)
    whole_at: dict[str, float] = field(default_factory=dict)
    """Of an index file: when its present version was had."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, number: int) -> str:
        """The next file: deltas of all sizes, now and then a full, and new versions of the index."""
        kind = number % 8
        if kind == 7:
            path = INDEX
            body = noise(f"index {number}", 3000 + number)
        elif kind == 3:
            path = content_path("full.zip", revision=f"{260_000_000 + number}")
            body = zip_of(f"full {number}", self.chance.randrange(1 << 20, 4 << 20))
        else:
            path = content_path(f"xdelta{260_000_000 + number}_To_{270_000_000 + number}.dax")
            body = noise(f"delta {number}", self.chance.choice((700, 4096, 60_000, 300_000, 1_200_000)))
        with self.lock:
            self.bodies.setdefault(path, []).append(body)
            self.whole_at.pop(path, None)
        self.upstream.answer(path, Answer(body, etag=f'"{number}"'))
        return path

    def right(self, path: str) -> list[bytes]:
        with self.lock:
            return list(self.bodies[path])

    def sure_before(self, moment: float) -> list[str]:
        with self.lock:
            return [path for path, at in self.whole_at.items() if at + SURE_SECONDS <= moment]


@dataclass(frozen=True)
class Cut:
    """One moment: the clone of the disk, and what had to be on it."""

    image: Image
    sure: list[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shelf(tmp_path_factory.mktemp("images")) as folder:
        yield folder


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.needs("loop", "mount", "ext4", "xfs", "btrfs")
def test_what_a_power_cut_leaves_is_served_right_and_what_was_stored_is_served(tmp_path, images, kind):
    image = make_image(images / f"{kind}.img", kind, IMAGE_BYTES)
    with ScriptedUpstream() as upstream:
        site = Site(upstream, random.Random(f"{SEED} {kind}"))
        with image.mounted(tmp_path / "disk") as disk:
            cuts = list(_cuts(site, image, disk))
        for number, cut in enumerate(cuts):
            with cut.image.mounted(tmp_path / f"after-{number}") as disk:
                _assert_right(site, disk, cut)
    assert any(cut.sure for cut in cuts)


def _settings(url: str) -> dict[str, object]:
    return {
        "upstream": [{"url": url, "health_interval": 0}],
        "cache": {
            "index_ttl": "100ms",
            "error_ttl": "20ms",
            "keep_revisions": 0,
            "min_free": "0B",
            "sync_interval": "1s",
        },
    }


def _cuts(site: Site, image: Image, disk: Path) -> Iterator[Cut]:
    """Clients fetch what is published, one thing after the other; in between the power is cut."""
    settings = _settings(site.upstream.url)
    with Gup(disk / "cache", settings=settings) as gup:
        stop = threading.Event()
        load = threading.Thread(target=_load, args=(site, gup, stop))
        load.start()
        try:
            for number in range(CUTS):
                pause = site.chance.uniform(1.0, 3.0)
                assert not stop.wait(pause), "the load ended early"
                moment = time.monotonic()
                sure = site.sure_before(moment)
                yield Cut(image.clone(f"{image.kind}-{number}.img"), sure)
        finally:
            stop.set()
            load.join()


def _load(site: Site, gup: Gup, stop: threading.Event) -> None:
    number = 0
    try:
        while not stop.is_set():
            path = site.publish(number)
            number += 1
            answer = fetch(gup.data, path)
            deadline = time.monotonic() + 10
            while answer.status != 200 or answer.body != site.bodies[path][-1]:  # an index may be stale
                assert time.monotonic() < deadline, (path, answer.status)
                answer = fetch(gup.data, path)
            with site.lock:
                site.whole_at[path] = time.monotonic()
    finally:
        stop.set()


def _assert_right(site: Site, disk: Path, cut: Cut) -> None:
    """Offline first, then with the upstream, which has the newest version of everything."""
    answers = {path: Answer(bodies[-1], etag='"last"') for path, bodies in site.bodies.items()}
    with ScriptedUpstream() as upstream:
        for path in answers:
            upstream.answer(path, Answer(b"", 503))
        with Gup(disk / "cache", settings=_settings(upstream.url)) as gup:
            for path in site.bodies:
                answer = fetch(gup.data, path)
                assert answer.status != 200 or answer.body in site.right(path), path
                if path in cut.sure:
                    assert answer.status == 200, f"{path} was stored and is lost: {answer}"
            for path, answer in answers.items():
                upstream.answer(path, answer)
            for path in site.bodies:
                until(lambda path=path: fetch(gup.data, path).body in site.right(path), f"{path} is right")
