"""The status and its parts: fills with their rate, upstreams, limits, settings without secrets."""

import pytest

from gup.cache.records import FillState, Phase
from gup.cache.store import Part
from gup.config import Settings
from gup.content.key import Kind
from gup.control.api.schemas import Limit
from gup.control.api.status import began_at, fill_of, limits_of
from gup.control.state import FillRates, numbers

pytestmark = pytest.mark.usefixtures("no_blocking_call")


async def told(browser, world, path):
    async with browser.get(world.url + path) as answer:
        assert answer.status == 200
        return await answer.json()


async def test_fills_and_upstreams_are_those_of_the_status(world, browser):
    key = world.key("260101009")
    world.begin_part(key, b"z" * 250, 1000)
    assert world.claims.try_claim(key.claim_offset)
    async with world.running():
        status = await told(browser, world, "/api/v1/status")
        fills = await told(browser, world, "/api/v1/fills")
        upstreams = await told(browser, world, "/api/v1/upstreams")
    assert [fill["key"] for fill in fills["fills"]] == [fill["key"] for fill in status["fills"]] == [key.text]
    assert (fills["waiters"], upstreams["upstreams"]) == (0, status["upstreams"])


async def test_settings_are_shown_without_their_secrets(world, browser):
    upstream = {
        "url": "http://manager:8014",
        "headers": {"X-Key": "s3cret"},
        "proxy": "http://me:s3cret@proxy:1",
    }
    schedule = [{"days": ["mon"], "from": "07:30", "to": "18:00", "rate": "1MB/s"}]
    world.settings = Settings.model_validate(
        world.settings.model_dump(by_alias=True) | {"upstream": [upstream], "wan": {"schedule": schedule}}
    )
    async with world.running():
        config = await told(browser, world, "/api/v1/config")
    assert "s3cret" not in str(config)
    assert config["upstream"][0]["headers"] == {"X-Key": "***"}
    assert config["upstream"][0]["proxy"] == "http://me:***@proxy:1"
    assert config["wan"]["schedule"][0]["from"] == "07:30"
    assert config["cache"]["max_size"] == 1_000_000


def test_rates_are_those_of_the_last_seconds(world):
    clock = [100.0]
    rates = FillRates(lambda: clock[0])
    state = FillState(world.key(), Kind.FULL, 1, Phase.STREAMING, None)

    def part(size_bytes: int, generation: int = 50_000_000) -> Part:
        return Part(world.key().id, generation, size_bytes, 0.0, True, state)

    def rate(size_bytes: int, **more: int) -> float | None:
        found = part(size_bytes, **more)
        rates.see([found])
        return rates.rate(found, 60.0 - began_at(found))

    assert rate(1000) == 100.0  # seen once: 1000 bytes in the ten seconds since it began
    clock[0] += 1
    assert rate(6000) == 5000.0
    clock[0] += 20
    assert rate(6000) == 0.0  # it hangs
    clock[0] += 1
    assert rate(10, generation=60_000_000) is None  # begun anew at this moment
    fill = fill_of(part(10, 60_000_000), None, lambda stream: (stream[2], stream[1]))
    assert (fill.remaining_seconds, fill.began_at, fill.kind) == (None, 60.0, "full")


def test_what_is_not_limited_is_not_among_the_numbers():
    assert set(numbers(Settings())) == {"connections", "connections_per_address", "fills"}
    limited = Settings.model_validate({"clients": {"max_downloads": 3, "queue": 0}})
    assert numbers(limited)["downloads"] == 3
    assert numbers(limited)["queue"] == 0


def test_each_limit_stands_with_what_is_used_of_it():
    settings = Settings.model_validate({"clients": {"max_downloads": 3, "rate": "1MB/s"}})
    totals = {
        "gup_client_downloads_in_progress": 2,
        "gup_client_downloads_queued": 7,
        "gup_fills_in_progress": 1,
    }
    found = limits_of(settings, totals, size_bytes=5, wan_rate=0, wan_used=9)
    assert found.downloads == Limit(limit=3, used=2)
    assert found.queue == Limit(limit=1000, used=7)
    assert found.client_rate_bytes_per_second == Limit(limit=1_000_000)
    assert found.wan_rate_bytes_per_second == Limit(limit=None, used=9)
    assert found.cache_size_bytes == Limit(limit=20_000_000_000, used=5)
    assert found.fills == Limit(limit=8, used=1)
    assert found.connections == Limit(limit=20_000, used=0)
