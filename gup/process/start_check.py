"""What can't work as it is set: told in the log at a start and by `gup config check`; it refuses nothing."""

import os
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path

from gup.config import Cache, Settings
from gup.units import bytes_in_words, format_rate, format_size, time_in_words

_OWN = frozenset({"content", "partial", "index", "reports", "run"})
_OTHERS = frozenset({"lost+found", ".snapshot"})
"""Of the file system, where the cache directory is its root."""
_MOST_NAMED = 3
_DAY_SECONDS = 86400
_MOST_AHEAD_SECONDS = 300.0
"""Clocks that differ by more spoil ages, expiries and reports."""
_EXERCISED_BYTES = 1_000_000_000
_SHARE = 0.5
"""A WAN that has carried so much, and never more than this share of wan.rate, carries no more."""


def doubts(settings: Settings, now: float) -> list[str]:
    """What can be told without a service: of proxies, the cache directory, its disk, this machine's clock."""
    disk, directory = _of_disk(settings.cache), _of_directory(settings.cache.directory)
    return [*_of_proxies(settings), *disk, *directory, *_of_clock(settings, now)]


def _of_proxies(settings: Settings) -> Iterator[str]:
    allowed = [ip_network(network) for network in settings.clients.allow]
    for proxies in map(ip_network, settings.listen.proxy_protocol):
        like = [own for own in allowed if own.version == proxies.version]
        if not any(proxies.subnet_of(own) for own in like):  # type: ignore[arg-type]
            yield (
                f"listen.proxy_protocol: {proxies} is not in clients.allow: health checks of a proxy there "
                "are refused; add it"
            )


def _of_disk(cache: Cache) -> Iterator[str]:
    place = next(folder for folder in (cache.directory, *cache.directory.parents) if folder.is_dir())
    figures = os.statvfs(place)
    size, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
    if cache.min_free >= size:
        yield (
            f"cache.min_free is {format_size(cache.min_free)}, and the file system of {cache.directory} has "
            f"{bytes_in_words(size)} in all: nothing can be stored; lower it"
        )
    elif cache.min_free >= free and not any(cache.directory.glob("content/*")):
        yield (
            f"cache.min_free is {format_size(cache.min_free)}, and {bytes_in_words(free)} are free at "
            f"{cache.directory}: nothing is stored until there is more; free disk space, or lower it"
        )


def _of_directory(directory: Path) -> Iterator[str]:
    foreign = sorted({path.name for path in directory.glob("*")} - _OWN - _OTHERS)
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        yield (
            f"cache.directory: {directory} holds files that are not gup's ({', '.join(foreign[:_MOST_NAMED])}"
            f"{more}): they are neither counted nor removed; give gup a directory of its own"
        )


def _of_clock(settings: Settings, now: float) -> Iterator[str]:
    """A clock behind files that were written by it was put back, or was never set."""
    for path in (Path(__file__), settings.cache.directory / "run" / "shared"):
        if path.exists() and now < path.stat().st_mtime - _DAY_SECONDS:
            day = time.strftime("%Y-%m-%d", time.localtime(now))
            written = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
            yield f"this machine's clock shows {day}, and {path} was written on {written}: set the clock"
            return


def of_clocks(ahead: Mapping[str, float]) -> Iterator[str]:
    """By how many seconds this machine's clock is ahead of that of each upstream that has answered."""
    if ahead and all(abs(seconds) > _MOST_AHEAD_SECONDS for seconds in ahead.values()):
        name, seconds = min(ahead.items(), key=lambda row: abs(row[1]))
        where = "ahead of" if seconds > 0 else "behind"
        difference = time_in_words(60 * round(abs(seconds) / 60))
        yield (
            f"this machine's clock is {difference} {where} that of {name}: ages and reports "
            "go wrong; set the clock (NTP)"
        )


def of_rate(limit: int, fastest: int, received_bytes: int) -> Iterator[str]:
    """`fastest`: the most bytes per second that were measured while so many came over the WAN."""
    if limit and received_bytes >= _EXERCISED_BYTES and fastest < _SHARE * limit:
        yield (
            f"wan.rate is {format_rate(limit)}, and the most that was measured {bytes_in_words(fastest)}/s: "
            "a rate above the link's leaves nothing for other traffic; set it to the link's rate or less"
        )
