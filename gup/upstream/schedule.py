"""Which WAN rate holds at a moment: the schedule's table, looked up; reads no clock itself."""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from gup.config import Settings, Wan, WanSchedule

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def rate_at(wan: Wan, local: datetime) -> int:
    """Bytes per second in force at `local`, the site's own wall-clock time; 0 is unlimited.

    The first row that holds decides, else the rate without a schedule. Wall-clock time is what people mean:
    on the day that clocks change, 08:00 is when the site's clocks show it.
    """
    for row in wan.schedule:
        if _holds(row, local):
            return row.rate
    return wan.rate


def _holds(row: WanSchedule, local: datetime) -> bool:
    minute = f"{local.hour:02}:{local.minute:02}"
    today = _DAYS[local.weekday()] in row.days
    if row.from_ < row.to:
        return today and row.from_ <= minute < row.to
    yesterday = _DAYS[(local - timedelta(days=1)).weekday()] in row.days
    return (today and minute >= row.from_) or (yesterday and minute < row.to)


def site_time(settings: Settings, unix_seconds: float) -> datetime:
    """The site's wall-clock time at `unix_seconds`: of `site.time_zone`, else of the machine."""
    zone = ZoneInfo(settings.site.time_zone) if settings.site.time_zone else None
    return datetime.fromtimestamp(unix_seconds, zone)
