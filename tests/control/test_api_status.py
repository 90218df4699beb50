"""The parts of the status: rates of fills, limits, totals; settings without their secrets."""

from control.calls import get

from gup.cache.records import FillState, Phase
from gup.cache.store import Part
from gup.config import Settings
from gup.content.key import Kind
from gup.control.api.status import fill_of, limits_of, totals_of
from gup.control.state import FillRates, numbers


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
        _, config = await get(browser, world, "/api/v1/config")
    assert "s3cret" not in str(config)
    assert config["upstream"][0]["headers"] == {"X-Key": "***"}
    assert config["upstream"][0]["proxy"] == "http://me:***@proxy:1"
    assert config["wan"]["schedule"][0]["from"] == "07:30"
    assert config["cache"]["max_size"] == 1_000_000


def test_rates_are_those_of_the_last_seconds(world):
    clock = [100.0]
    rates = FillRates(lambda: clock[0])
    state = FillState(world.key(), Kind.FULL, 1, Phase.STREAMING, None)

    def part(size_bytes: int, generation: int = 50_000_000_000) -> Part:
        return Part(world.key().id, generation, size_bytes, 0.0, True, state)

    def rate(size_bytes: int, **more: int) -> float | None:
        return rates.of([part(size_bytes, **more)], 60.0)[0]

    assert rate(1000) == 100.0  # seen once: 1000 bytes in the ten seconds since it began
    clock[0] += 1
    assert rate(6000) == 5000.0
    clock[0] += 20
    assert rate(6000) == 0.0  # it hangs
    clock[0] += 1
    assert rate(10, generation=60_000_000_000) is None  # begun anew at this moment
    fill = fill_of(part(10, 60_000_000_000), None, lambda stream: (stream[2], stream[1]))
    assert (fill.remaining_seconds, fill.began_at, fill.kind) == (None, 60.0, "full")


def test_what_is_not_limited_is_not_among_the_numbers():
    assert set(numbers(Settings())) == {"connections", "connections_per_address", "fills"}
    limited = Settings.model_validate({"clients": {"max_downloads": 3, "queue": 0}})
    assert numbers(limited)["downloads"] == 3
    assert numbers(limited)["queue"] == 0


def test_each_limit_stands_with_what_is_used_of_it():
    settings = Settings.model_validate({"clients": {"max_downloads": 3, "rate": "1MB/s"}})
    totals = {"downloads_in_progress": 2, "downloads_queued": 7}
    totals = {f"gup_client_{name}": used for name, used in totals.items()} | {"gup_fills_in_progress": 1}
    found = limits_of(settings, totals, size_bytes=5, wan_rate=0, wan_used=9)
    assert {name: limit.model_dump(exclude_unset=True) for name, limit in found.items()} == {
        "downloads": {"limit": 3, "used": 2},
        "queue": {"limit": 1000, "used": 7},
        "connections": {"limit": 20_000, "used": 0},
        "connections_per_address": {"limit": numbers(settings)["connections_per_address"]},
        "client_rate_bytes_per_second": {"limit": 1_000_000},
        "wan_rate_bytes_per_second": {"limit": None, "used": 9},
        "cache_size_bytes": {"limit": 20_000_000_000, "used": 5},
        "fills": {"limit": 8, "used": 1},
    }


def test_totals_are_added_up_and_savings_not_clipped():
    totals = totals_of(
        {
            'gup_requests_total{code="200",result="hit"}': 6,
            'gup_requests_total{code="206",result="hit"}': 1,
            'gup_requests_total{code="200",result="miss"}': 1,
            'gup_requests_total{code="403",result="refused"}': 5,
            'gup_client_sent_bytes_total{source="cache"}': 100,
            'gup_upstream_received_bytes_total{purpose="fill",upstream="m"}': 150,
            'gup_upstream_received_bytes_total{purpose="index",upstream="m"}': 50,
        }
    )
    assert totals.saved_bytes == -100
    assert totals.hit_ratio == 7 / 8
    assert (totals.requests["hit"], totals.requests_total) == (7, 13)
    assert totals_of({}).hit_ratio is None
