"""What simulated clients count and measure, in bounded memory; never decides what it means."""

import math
from collections import Counter
from dataclasses import dataclass, field

from gup.content.key import Kind

MAX_COMPLAINTS = 10
"""Sentences kept about what went wrong; the counts go on."""

_SHORTEST_SECONDS = 1e-5
_STEP = 1.02
_STEPS = math.ceil(math.log(600 / _SHORTEST_SECONDS) / math.log(_STEP))


class Latencies:
    """Durations from 10 µs to 10 minutes in steps of 2 %: quantiles to within a step."""

    def __init__(self) -> None:
        self._counts = [0] * (_STEPS + 1)
        self.count = 0

    def add(self, seconds: float) -> None:
        at = math.ceil(math.log(max(seconds, _SHORTEST_SECONDS) / _SHORTEST_SECONDS) / math.log(_STEP))
        self._counts[min(at, _STEPS)] += 1
        self.count += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that `share` (0 to 1) of the durations do not exceed; None without any."""
        if not self.count:
            return None
        wanted = max(1, math.ceil(share * self.count))
        passed = 0
        for at, count in enumerate(self._counts):
            passed += count
            if passed >= wanted:
                return float(_SHORTEST_SECONDS * _STEP**at)
        raise AssertionError("the counts do not add up")


@dataclass(slots=True)
class Figures:
    """Everything that the clients of one crowd counted; they alone write it, on their event loop.

    `received_bytes` are of bodies. `wrong` are bodies that differ from what the management server published,
    `failed` are downloads given up, `gone` are files that were withdrawn before they were asked for.
    """

    requests: int = 0
    received_bytes: int = 0
    downloads: Counter[Kind] = field(default_factory=Counter)
    not_modified: int = 0
    resumes: int = 0
    retries: int = 0
    gone: int = 0
    wrong: int = 0
    failed: int = 0
    cache_status: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    time_to_first_byte: Latencies = field(default_factory=Latencies)
    hit_time_to_first_byte: Latencies = field(default_factory=Latencies)

    def complain(self, sentence: str) -> None:
        """Keep a sentence about something that went wrong, if there is room."""
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(sentence)

    def document(self) -> dict[str, object]:
        """The figures as plain values, ready for JSON; times in seconds."""
        return {
            "requests": self.requests,
            "received_bytes": self.received_bytes,
            "downloads": {kind.value: count for kind, count in sorted(self.downloads.items())},
            "not_modified": self.not_modified,
            "resumes": self.resumes,
            "retries": self.retries,
            "gone": self.gone,
            "wrong": self.wrong,
            "failed": self.failed,
            "cache_status": dict(sorted(self.cache_status.items())),
            "median_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.5),
            "p99_time_to_first_byte_seconds": self.time_to_first_byte.quantile(0.99),
            "complaints": list(self.complaints),
        }

    def answered(self, seconds: float, cache_status: str | None) -> None:
        """Count an answer that began after `seconds`, with its Cache-Status field (RFC 9211)."""
        self.time_to_first_byte.add(seconds)
        word = cache_result(cache_status)
        self.cache_status[word] += 1
        if word == "hit":
            self.hit_time_to_first_byte.add(seconds)


def cache_result(cache_status: str | None) -> str:
    """One word for an answer: hit, collapsed, miss, or none when it went through no cache."""
    words = [word.strip() for word in (cache_status or "").split(";")[1:]]
    if "collapsed" in words:
        return "collapsed"
    if "hit" in words:
        return "hit"
    return "miss" if any(word.startswith("fwd") for word in words) else "none"
