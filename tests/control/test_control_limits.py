"""Limits as they are shown."""

from gup.config import Settings
from gup.control.api.schemas import Ceiling, Limit
from gup.control.api.status import limits_of
from gup.control.state import numbers


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
    assert found.client_rate_bytes_per_second == Ceiling(limit=1_000_000)
    assert found.wan_rate_bytes_per_second == Limit(limit=None, used=9)
    assert found.cache_size_bytes == Limit(limit=20_000_000_000, used=5)
    assert found.fills == Limit(limit=8, used=1)
    assert found.connections == Limit(limit=20_000, used=0)
