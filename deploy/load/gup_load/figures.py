"""What a run measured, and its limits: pure, without locust."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run must keep; `first_byte_share` (0 to 1) of responses begin within `first_byte_seconds`."""

    error_ratio: float = 0.0
    wrong_bodies: int = 0
    fetches_per_file: float = 1.0
    first_byte_seconds: float = 5.0
    first_byte_share: float = 0.99


@dataclass(frozen=True, slots=True)
class Durations:
    """How long `count` things took; seconds, as locust rounds them: to milliseconds, then to two digits."""

    name: str
    count: int
    median: float
    p95: float
    p99: float
    longest: float


@dataclass(frozen=True, slots=True)
class File:
    """A published file: how many clients got it whole, and how often gup fetched bytes of it.

    `fetches` is None where the management server does not count.
    """

    path: str
    length: int
    bodies: int
    fetches: int | None


@dataclass(frozen=True, slots=True)
class Counters:
    """What gup's own counters grew by. Bytes are of bodies; `filled_bytes` leave index files out."""

    sent_bytes: int
    received_bytes: int
    filled_bytes: int

    def since(self, before: "Counters") -> "Counters":
        return Counters(
            self.sent_bytes - before.sent_bytes,
            self.received_bytes - before.received_bytes,
            self.filled_bytes - before.filled_bytes,
        )

    @property
    def saved_bytes(self) -> int:
        return self.sent_bytes - self.received_bytes

    @property
    def saved_share(self) -> float:
        return self.saved_bytes / self.sent_bytes if self.sent_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit, in plain words."""

    missed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one or more scenarios. `responses` are times to the first byte, by kind and status.

    `first_byte_seconds` is that of the share that the limit names. `counters` is None without gup's control
    plane. `complaints` are errors with how often they occurred.
    """

    scenario: str
    host: str
    started_at: float
    seconds: float
    clients: int
    finished: int
    requests: int
    errors: int
    wrong_bodies: int
    received_bytes: int
    first_byte_seconds: float
    first_byte: Durations
    responses: tuple[Durations, ...]
    up_to_date: Durations
    files: tuple[File, ...]
    counters: Counters | None
    complaints: tuple[tuple[int, str], ...]
    verdicts: tuple[Verdict, ...] = ()

    def judged(self, limits: Limits) -> Self:
        return replace(self, verdicts=tuple(judge(self, limits)))

    @property
    def passed(self) -> bool:
        return not any(verdict.missed for verdict in self.verdicts)

    @property
    def throughput_bytes_per_second(self) -> float:
        return self.received_bytes / self.seconds if self.seconds else 0.0

    @property
    def longest_p99(self) -> float:
        return max((row.p99 for row in self.responses), default=0.0) or 0.001

    @property
    def used_files(self) -> tuple[File, ...]:
        """Those that somebody got or that were fetched, the most wanted first."""
        used = (file for file in self.files if file.bodies or file.fetches)
        return tuple(sorted(used, key=lambda file: (-file.bodies, file.path)))

    @property
    def fetched(self) -> tuple[File, ...]:
        """Files that were fetched from upstream meanwhile, the most often fetched first."""
        return tuple(
            sorted((file for file in self.files if file.fetches), key=lambda file: -(file.fetches or 0))
        )

    @property
    def fetches_per_file(self) -> float | None:
        """By the management server's counts, else by gup's: fetched bytes over the bytes of what clients got.

        None where neither is known, or nothing was fetched.
        """
        if fetched := self.fetched:
            return sum(file.fetches or 0 for file in fetched) / len(fetched)
        wanted_bytes = sum(file.length for file in self.files if file.bodies)
        if self.counters is None or not wanted_bytes or any(file.fetches is not None for file in self.files):
            return None
        return self.counters.filled_bytes / wanted_bytes


RUN_JSON = TypeAdapter(Run)


def judge(run: Run, limits: Limits) -> Iterator[Verdict]:
    """Each limit with what was found."""
    yield Verdict(
        run.finished < run.clients,
        f"{run.finished} of {run.clients} clients got all that they wanted; limit: all",
    )
    yield Verdict(
        not any(file.bodies for file in run.files),
        f"{sum(file.bodies for file in run.files)} packages were compared; limit: at least one",
    )
    ratio = run.errors / run.requests if run.requests else 0.0
    yield Verdict(
        ratio > limits.error_ratio,
        f"{run.errors} of {run.requests} requests failed ({ratio:.3%}); limit: {limits.error_ratio:.3%}",
    )
    yield Verdict(
        run.wrong_bodies > limits.wrong_bodies,
        f"{run.wrong_bodies} bodies were wrong; limit: {limits.wrong_bodies}",
    )
    fetches = run.fetches_per_file
    if fetches is None:
        known = any(file.fetches is not None for file in run.files)
        why = "no file was fetched" if known else "not known without --manager or --admin"
        yield Verdict(False, f"upstream fetches per file: {why}")
    else:
        worst = f" ({run.fetched[0].fetches} of {run.fetched[0].path})" if fetches > 1 and run.fetched else ""
        yield Verdict(
            round(fetches, 4) > limits.fetches_per_file,
            f"{fetches:.2f} upstream fetches per file{worst}; limit: {limits.fetches_per_file:.2f}",
        )
    yield Verdict(
        run.first_byte_seconds > limits.first_byte_seconds,
        f"{limits.first_byte_share:.0%} of responses began within {run.first_byte_seconds:g} s; "
        f"limit: {limits.first_byte_seconds:g} s",
    )
