"""The WAN's schedule: days, hours, midnight, and the days on which clocks change."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from gup.config import Settings
from gup.upstream.bandwidth import rate_at, site_time

WORKDAYS = ["mon", "tue", "wed", "thu", "fri"]
OFFICE, NIGHT, ELSE = 1_000_000, 50_000_000, 8_000_000
SETTINGS = Settings.model_validate(
    {
        "wan": {
            "rate": "8MB/s",
            "schedule": [
                {"days": WORKDAYS, "from": "08:00", "to": "18:00", "rate": "1MB/s"},
                {"days": ["fri", "sun"], "from": "22:00", "to": "06:00", "rate": "50MB/s"},
            ],
        },
        "site": {"time_zone": "Europe/Paris"},
    }
)


@pytest.mark.parametrize(
    ("moment", "rate"),
    [
        ("2026-11-23 07:59", ELSE),  # a Monday
        ("2026-11-23 08:00", OFFICE),
        ("2026-11-23 17:59", OFFICE),
        ("2026-11-23 18:00", ELSE),
        ("2026-11-23 05:59", NIGHT),  # Sunday's night
        ("2026-11-23 06:00", ELSE),
        ("2026-11-27 22:00", NIGHT),  # Friday's
        ("2026-11-28 05:59", NIGHT),
        ("2026-11-28 22:00", ELSE),  # Saturday has none
        ("2026-11-24 05:00", ELSE),
    ],
)
def test_the_rate_of_a_moment(moment, rate):
    assert rate_at(SETTINGS.wan, datetime.fromisoformat(moment)) == rate


@pytest.mark.parametrize(
    ("day", "utc_hour"), [("2026-03-27", 7), ("2026-03-30", 6), ("2026-10-23", 6), ("2026-10-26", 7)]
)
def test_eight_o_clock_is_what_the_sites_clocks_show(day, utc_hour):
    """The Friday before and the Monday after the change, in spring and in autumn."""
    eight = datetime.fromisoformat(f"{day} {utc_hour:02}:00").replace(tzinfo=ZoneInfo("UTC")).timestamp()
    assert rate_at(SETTINGS.wan, site_time(SETTINGS, eight)) == OFFICE
    assert rate_at(SETTINGS.wan, site_time(SETTINGS, eight - 1)) == ELSE


def test_without_a_zone_it_is_the_machines_time():
    settings = Settings()
    assert site_time(settings, 1.0e9) == datetime.fromtimestamp(1.0e9)  # noqa: DTZ006 - that is the point
