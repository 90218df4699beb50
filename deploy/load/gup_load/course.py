"""The course of a test: its options, what is published before and in the middle of it, its end and result.

One process alone, or the master, publishes and counts; one process alone, or each worker, has clients.
Workers have the options from the master, so they need none of their own.
"""

import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import RequestStats, StatsEntry, StatsError

from gup.demo.content import Catalogue
from gup.demo.machine import WrongBodyError
from gup.units import parse_duration
from gup_load.figures import Counters, Durations, File, Limits, Run
from gup_load.report import write_report
from gup_load.sources import NotThereError, Sources

RESPONSE, BODY, CLIENT = "GET", "BODY", "CLIENT"
"""What locust counts: responses by kind and status, whole bodies by path, clients by scenario."""
FAILED = "failed"
"""Stands for the status of a response that is an error."""

_ALL_STREAMS = 1_000_000
_READY_SECONDS = 20.0
_LOOK_SECONDS = 0.1
_LIMITS = Limits()


class Course:
    """One test in one process. Clients read `catalogue`, wait for `everyone`, count themselves `ready`."""

    def __init__(self, environment: Environment) -> None:
        assert environment.runner is not None
        assert environment.parsed_options is not None
        self._environment, self._runner = environment, environment.runner
        self._has_clients = not isinstance(self._runner, MasterRunner)
        self._counts = not isinstance(self._runner, WorkerRunner)
        self._fetches: dict[str, int] | None = None
        self._counters: Counters | None = None
        self._lengths: dict[str, int] = {}
        self._load_began_at = 0.0
        self.catalogue: Catalogue
        self.everyone = Event()
        """Set when all clients have started, and what the scenario publishes then is published."""
        self.ready = 0
        self.index_etag: str | None = None
        """Of the index file, as gup gave it to a client: what others have from the day before."""
        hooks = environment.events
        hooks.test_start.add_listener(self._begin)
        hooks.spawning_complete.add_listener(self._all_started)
        if self._counts:
            self._check()
            hooks.quitting.add_listener(self._end)

    @property
    def options(self) -> Any:
        return self._environment.parsed_options

    @property
    def _sources(self) -> Sources:
        options = self.options
        return Sources(options.manager or "", options.catalogue, options.admin or "")

    def _check(self) -> None:
        """Before anything starts: one sentence about what is missing, instead of an error for each client."""
        try:
            if not self._environment.host:
                raise NotThereError("--host is missing: it names gup, as in --host http://127.0.0.1:2967")  # noqa: TRY301
            catalogue = self._sources.published()
            self._sources.counters()
            for scenario in self._environment.user_classes:
                if lacks := scenario.lacks(catalogue):  # type: ignore[attr-defined]
                    raise NotThereError(lacks)  # noqa: TRY301
        except NotThereError as error:
            sys.stderr.write(f"load test: {error}\n")
            sys.exit(2)

    def _begin(self, **_: Any) -> None:
        """Publish new revisions of everything, so that gup has none of them; note what was counted so far."""
        self.everyone.clear()
        self.ready = 0
        self._load_began_at = time.time()
        if self._counts:
            self._sources.publish(_ALL_STREAMS)
            self._fetches, self._counters = self._sources.fetches(), self._sources.counters()
        self._read_catalogue()

    def _read_catalogue(self) -> None:
        self.catalogue = self._sources.published()
        for stream in self.catalogue.streams:
            self._lengths |= {file.path: file.length for file in stream.files}

    def _all_started(self, **_: Any) -> None:
        """Called on the master first, then on its workers: these read what it has published."""
        if self._has_clients:
            gevent.spawn(self._go)
        else:
            self._publish_in_the_middle()
            self._note_the_beginning()
        if self._counts:
            gevent.spawn(self._quit_when_all_are_done)

    def _go(self) -> None:
        with gevent.Timeout(_READY_SECONDS, exception=False):
            while self.ready < self._runner.user_count:
                gevent.sleep(_LOOK_SECONDS)
        if self._counts:
            self._publish_in_the_middle()
        self._read_catalogue()
        self._note_the_beginning()
        self.everyone.set()

    def _publish_in_the_middle(self) -> None:
        if streams := max(scenario.publishes for scenario in self._environment.user_classes):  # type: ignore[attr-defined]
            self._sources.publish(streams)
            self._read_catalogue()

    def _note_the_beginning(self) -> None:
        """Where all clients wait for everyone, there is no load before."""
        if all(scenario.at_once for scenario in self._environment.user_classes):  # type: ignore[attr-defined]
            self._load_began_at = time.time()

    def _quit_when_all_are_done(self) -> None:
        while self._runner.user_count:
            gevent.sleep(_LOOK_SECONDS)
        if self._environment.web_ui is None:
            self._runner.quit()
        else:
            self._runner.stop()

    # --- the result

    def _end(self, **_: Any) -> None:
        """Compare with the limits and write the report; the exit status is 1 if a limit was missed."""
        if not self._environment.stats.start_time:
            return
        limits = Limits(
            self.options.max_error_ratio,
            self.options.max_wrong_bodies,
            self.options.max_fetches_per_file,
            self.options.max_first_byte,
            self.options.first_byte_share,
        )
        run = self._run(limits)
        run = run.judged(limits)
        page = write_report(Path(self.options.report_dir), run)
        for verdict in run.verdicts:
            sys.stderr.write(f"{'MISSED' if verdict.missed else 'ok':7}{verdict.sentence}\n")
        for count, complaint in run.complaints:
            sys.stderr.write(f"{count:6} times {complaint}\n")
        sys.stderr.write(
            f"load test: {run.scenario} {'passed' if run.passed else 'failed'}; report: {page}\n"
        )
        self._environment.process_exit_code = 0 if run.passed else 1

    def _run(self, limits: Limits) -> Run:
        stats = self._environment.stats
        by_type: dict[str, list[StatsEntry]] = {RESPONSE: [], BODY: [], CLIENT: []}
        for (_, method), entry in sorted(stats.entries.items()):
            by_type[method].append(entry)
        right = [entry for entry in by_type[RESPONSE] if not entry.name.endswith(FAILED)]
        first_byte = _together(right, "all")
        errors = [error for error in stats.errors.values() if error.method != CLIENT]
        wrong = [error for error in errors if WrongBodyError.__name__ in _text(error)]
        finished = sum(entry.num_requests - entry.num_failures for entry in by_type[CLIENT])
        fetches, counters = self._sources.fetches(), self._sources.counters()
        if counters is not None and self._counters is not None:
            counters = counters.since(self._counters)
        bodies = {entry.name: entry.num_requests - entry.num_failures for entry in by_type[BODY]}
        return Run(
            scenario=" ".join(sorted(scenario.__name__ for scenario in self._environment.user_classes)),
            host=str(self._environment.host),
            started_at=stats.start_time or 0.0,
            seconds=max(0.001, (stats.last_request_timestamp or 0.0) - self._load_began_at),
            clients=self.options.num_users or 1,
            finished=finished,
            requests=sum(entry.num_requests for entry in by_type[RESPONSE]),
            errors=sum(error.occurrences for error in errors),
            wrong_bodies=sum(error.occurrences for error in wrong),
            received_bytes=sum(entry.total_content_length for entry in by_type[BODY]),
            first_byte_seconds=first_byte.get_response_time_percentile(limits.first_byte_share) / 1000,
            first_byte=_durations(first_byte),
            responses=tuple(map(_durations, right)),
            up_to_date=_durations(_together(by_type[CLIENT], CLIENT)),
            files=tuple(
                File(path, length, bodies.get(path, 0), _grown(path, fetches, self._fetches))
                for path, length in sorted(self._lengths.items())
            ),
            counters=counters,
            complaints=tuple(
                sorted(
                    (
                        (error.occurrences, f"{error.method} {error.name}: {_text(error)}")
                        for error in stats.errors.values()
                    ),
                    reverse=True,
                )
            ),
        )


def _grown(path: str, now: dict[str, int] | None, before: dict[str, int] | None) -> int | None:
    return None if now is None else now.get(path, 0) - (before or {}).get(path, 0)


def _text(error: StatsError) -> str:
    """As workers send it."""
    return StatsError.parse_error(error.error)


def _together(entries: Iterable[StatsEntry], name: str) -> StatsEntry:
    total = StatsEntry(RequestStats(), name, RESPONSE)
    for entry in entries:
        total.extend(entry)
    return total


def _durations(entry: StatsEntry) -> Durations:
    median, p95, p99 = (entry.get_response_time_percentile(share) / 1000 for share in (0.5, 0.95, 0.99))
    return Durations(entry.name, entry.num_requests, median, p95, p99, entry.max_response_time / 1000)


def course_of(environment: Environment) -> Course:
    course: Course = environment.course  # type: ignore[attr-defined]
    return course


@events.init.add_listener
def _attach(environment: Environment, **_: Any) -> None:
    environment.course = Course(environment)  # type: ignore[attr-defined]


# --- options


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ArgumentTypeError(f"{text!r} is no URL; it must begin with http:// or https://")
    return text.rstrip("/")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _number(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise ArgumentTypeError(f"{text!r} is not right; it must be a number from 0 to {most:g}")
        return value

    return parse


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument_group(
        "gup", "What a run is compared with, and its limits (docs/load.md)"
    ).add_argument
    add(
        "--manager",
        type=_url,
        default=None,
        metavar="URL",
        help="The simulated management server behind gup: what is published, and how often it was fetched.",
    )
    add("--catalogue", default="", metavar="FILE", help="What is published, instead of --manager.")
    add(
        "--admin",
        type=_url,
        default=None,
        metavar="URL",
        help="gup's control plane: its counters, for what was saved.",
    )
    add("--report-dir", default="build/load", metavar="DIR", help="Where report.html is written.")
    add("--seed", type=int, default=1, metavar="N", help="Another one makes other clients.")
    add(
        "--max-error-ratio",
        type=_number(1),
        default=_LIMITS.error_ratio,
        metavar="SHARE",
        help="Failed requests, of all (0 to 1; default 0).",
    )
    add(
        "--max-wrong-bodies",
        type=int,
        default=_LIMITS.wrong_bodies,
        metavar="N",
        help="Bodies that differ from what was published (default 0).",
    )
    add(
        "--max-fetches-per-file",
        type=_number(1e6),
        default=_LIMITS.fetches_per_file,
        metavar="N",
        help="Upstream fetches of a file, on average of those that were fetched (default 1.00).",
    )
    add(
        "--max-first-byte",
        type=_seconds,
        default=_LIMITS.first_byte_seconds,
        metavar="DURATION",
        help="Within which a response must begin (default 5s), for ...",
    )
    add(
        "--first-byte-share",
        type=_number(1),
        default=_LIMITS.first_byte_share,
        metavar="SHARE",
        help="... so many of them (0 to 1; default 0.99).",
    )
