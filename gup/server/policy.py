"""The policy of one worker: which variant of the content a client gets, and whether it may have it.

A decision holds for one set of settings and catalogues. The policy epoch is raised when either changes: later
requests are decided by the new ones, which are first read in a thread.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable

from gup import config
from gup.cache.canary import Canary, Waiting, read_known
from gup.cache.catalog_cache import read_kept
from gup.cache.inflight import FillDependencies
from gup.cache.revision_holds import RevisionHolds, in_its_place, read_holds, revision_of
from gup.content.catalog import Catalogues
from gup.content.key import ABSENT
from gup.content.routes import LIVEUPDATE_STREAM, Route
from gup.content.rules import Rulebook, problem
from gup.content.variant_choice import Choice, Choices
from gup.errors import Problem
from gup.server.request import Request
from gup.upstream.exchange import gup_names

log = logging.getLogger("gup.rules")

_FIRST_READING_SECONDS = 15.0  # after a start or reload; then requests no longer wait for catalogues
_PATIENCE_SECONDS = 5.0  # time limit for one request's wait for them
_POLL_SECONDS = 0.02
_MOST_REPORTED = 1000
_REDIRECTED_TIMES = 3  # each client to one package: it may come back for what it does not get for ever
_MOST_REDIRECTED = 10_000
_TOLD_AGAIN_SECONDS = 10.0
_WITHOUT_RULES = (ABSENT, LIVEUPDATE_STREAM)
"""Files outside of streams, such as catalogues, and LiveUpdate's are for every client."""


class Policy:
    """Only `_load` replaces `choices`, and then calls `on_change`."""

    def __init__(
        self, dependencies: FillDependencies, epoch: Callable[[], int], on_change: Callable[[], None]
    ) -> None:
        """Blocks: to be called before the first request."""
        self._dependencies = dependencies
        self._epoch = epoch
        self._on_change = on_change
        self._loading: asyncio.Task[None] | None = None
        self._reported: set[tuple[str, ...]] = set()
        self._told: dict[tuple[str, str], float] = {}
        """When the controller was told of a stream's new revision, monotonic seconds."""
        self._redirected = Counter[tuple[str, str]]()  # by client and path
        self.apply()
        self._seen = epoch()
        self.choices, self._complete, self._holds, self._canary = self._made(dependencies.settings)

    def apply(self) -> None:
        self._seen = -1
        self._wait_until = time.monotonic() + _FIRST_READING_SECONDS

    # --- what is in force

    def is_ready(self, route: Route) -> bool:
        """Whether `route` can be decided at once. Not every route needs catalogues."""
        known = self._complete or route.stream in _WITHOUT_RULES
        return self._seen == self._epoch() and (known or time.monotonic() >= self._wait_until)

    async def until_ready(self, route: Route) -> None:
        patience = time.monotonic() + _PATIENCE_SECONDS
        while not self.is_ready(route):
            if self._seen != self._epoch():
                # One load for all requests that wait for it; it continues when the first of them is
                # cancelled.
                if self._loading is None:
                    self._loading = asyncio.create_task(self._load())
                await asyncio.shield(self._loading)
            elif time.monotonic() >= patience:
                return
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def _load(self) -> None:
        try:
            seen, settings = self._epoch(), self._dependencies.settings
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._dependencies.executor, self._made, settings)
            if settings is self._dependencies.settings:
                self.choices, self._complete, self._holds, self._canary = made
                self._seen = seen
                self._reported.clear()
                self._on_change()
        finally:
            self._loading = None

    def _made(self, settings: config.Settings) -> tuple[Choices, bool, RevisionHolds, Canary]:
        """The choices, whether every manager's catalogue was tried, what is on hold and what is new."""
        book = Rulebook(settings)
        run = self._dependencies.store.run
        kept = read_kept(run)
        rows = {name: one.rows for name, one in kept.items() if one.rows is not None}
        catalogues = Catalogues(rows, settings.upstream, book.types)
        reads = settings.catalog.file is not None or settings.catalog.refresh > 0
        names = {upstream.name for upstream in settings.upstream if upstream.kind != "liveupdate"}
        complete = not reads or names <= set(kept)
        canary = Canary(settings.rules, read_known(run))
        return Choices(book, catalogues, settings.upstream), complete, RevisionHolds(read_holds(run)), canary

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    # --- deciding

    def choose(self, request: Request, route: Route) -> Choice:
        """Called once a request. Problem when its client may not have the content.

        Counts each refusal, enforced or not.
        """
        choices, book = self.choices, self.choices.book
        if not choices.any_source and route.stream != LIVEUPDATE_STREAM:
            raise Problem("no-upstream", "no upstream is configured for content")
        choice = choices.choose(route.stream, request.header)
        decision = choice.decision
        if choice.unlisted and self._first(route.stream):
            self._dependencies.tell({"type": "unlisted", "moniker": route.stream})
        if not decision.allowed:
            assert decision.rule is not None
            self._dependencies.counters.add(
                "gup_rule_refusals_total", rule=str(decision.rule), mode=book.mode
            )
            client = decision.client
            if self._first(route.stream, decision.rule, str(client.version), str(client.language)):
                verb = "refused" if choice.refused else "would be refused"
                log.info(
                    "%s %s by the rule %s: %s", route.upstream_path, verb, decision.rule, decision.because
                )
        if choice.refused:
            raise problem(decision, book.liveupdate_url)
        if self._holds or self._canary:
            self._keep_back(request, route, choice)
        return choice

    def is_kept_back(self, route: Route, choice: Choice) -> bool:
        """Whether it depends on the client's address who may have it."""
        if not (self._holds or self._canary):
            return False
        return self._holds.on(route) is not None or self._waiting(route, choice) is not None

    def _waiting(self, route: Route, choice: Choice) -> Waiting | None:
        now = self._dependencies.wall_clock()
        return self._canary.of(route.stream, revision_of(route), choice.decision.type, now)

    def _keep_back(self, request: Request, route: Route, choice: Choice) -> None:
        """Problem when the body is on hold for this client, whatever `rules.mode` is, or others go first."""
        rule, problem, enforced = "hold", self._holds.refusal(route, request.client), True
        if problem is None and (waiting := self._waiting(route, choice)) is not None:
            if waiting.opens_at is None:
                self._tell_of_new(route, choice, waiting.revision)
            if not self._canary.is_first(request.client):
                problem = self._canary.problem(route, waiting, self._dependencies.wall_clock())
                rule, enforced = "canary", self._canary.is_enforced
        if problem is None:
            return
        mode = "enforce" if enforced else "report"
        self._dependencies.counters.add("gup_rule_refusals_total", rule=rule, mode=mode)
        if self._first(route.stream, route.revision, route.file, rule):
            verb = "refused" if enforced else "would be refused"
            log.info("%s %s: %s", route.upstream_path, verb, problem.detail)
        if enforced:
            raise self._redirection(request, problem) or problem

    def _tell_of_new(self, route: Route, choice: Choice, revision: str) -> None:
        """Again after a while: upstream may not have had it then."""
        now, name = time.monotonic(), (route.stream, revision)
        if now - self._told.get(name, -math.inf) >= _TOLD_AGAIN_SECONDS:
            if len(self._told) >= _MOST_REPORTED:
                self._told.clear()
            self._told[name] = now
            key = route.key(choice.asked).text
            self._dependencies.tell({"type": "new", "key": key, "path": route.upstream_path})

    def _redirection(self, request: Request, problem: Problem) -> Problem | None:
        """To the package that the client may have. Not for a part of another body, nor for another gup, which
        would store it under the wrong name; and not for ever, since it may be what the client has.
        """
        found = in_its_place(problem)
        if found is None or request.header("range") is not None or gup_names(request.header("via")):
            return None
        whom = request.client, found.headers[0][1]
        if self._redirected[whom] >= _REDIRECTED_TIMES:
            return None
        if len(self._redirected) >= _MOST_REDIRECTED:
            self._redirected.clear()
        self._redirected[whom] += request.method == "GET"
        return found

    def _first(self, *what: str) -> bool:
        """Whether this happens for the first time under these choices. Bounded, so some are not reported."""
        if what in self._reported or len(self._reported) >= _MOST_REPORTED:
            return False
        self._reported.add(what)
        return True
