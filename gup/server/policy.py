"""The policy of one worker: which variant of the content a client gets, and whether it may have it.

A decision holds for one set of settings and catalogues. The policy epoch is raised when either changes:
requests that come later are decided by the new ones, which are first read in a thread.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from gup import config
from gup.cache.catalog_cache import read_kept
from gup.content.catalog import Catalogues
from gup.content.routes import LIVEUPDATE_STREAM, Route
from gup.content.rules import Rulebook, problem
from gup.content.variant_choice import Choice, Choices
from gup.errors import Problem
from gup.metrics import Counters
from gup.server.request import Request

log = logging.getLogger("gup.rules")

_FIRST_READING_SECONDS = 15.0
"""From a worker's start or a reload: no request waits longer for catalogues that were never read."""
_PATIENCE_SECONDS = 5.0
"""How long one request waits for them."""
_POLL_SECONDS = 0.02
_MOST_REPORTED = 1000


class Policy:
    """`choices` are replaced by `_load` alone, and `on_change` is called then."""

    def __init__(
        self,
        settings: config.Settings,
        run: Path,
        counters: Counters,
        executor: Executor,
        epoch: Callable[[], int],
        tell: Callable[[Mapping[str, object]], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`run` is the store's folder of that name. Blocks: to be called before the first request."""
        self._settings = settings
        self._run = run
        self._counters = counters
        self._executor = executor
        self._epoch = epoch
        self._tell = tell
        self._on_change = on_change
        self._clock = clock
        self._loading: asyncio.Task[None] | None = None
        self._reported: set[tuple[str, ...]] = set()
        self._wait_until = clock() + _FIRST_READING_SECONDS
        self._seen = epoch()
        self.choices, self._complete = self._made(settings)

    def apply(self, settings: config.Settings) -> None:
        """Decide by reloaded settings from now on."""
        self._settings = settings
        self._seen = -1
        self._wait_until = self._clock() + _FIRST_READING_SECONDS

    # --- what is in force

    @property
    def ready(self) -> bool:
        """Whether a decision can be made at once."""
        return self._seen == self._epoch() and (self._complete or self._clock() >= self._wait_until)

    async def until_ready(self) -> None:
        """Load what has changed; at the start, wait until a catalogue was read.

        A client patch must not pass because it is not known yet to be one.
        """
        patience = self._clock() + _PATIENCE_SECONDS
        while not self.ready:
            if self._seen != self._epoch():
                await self._load_once()
            elif self._clock() >= patience:
                return
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def _load_once(self) -> None:
        """One load for all requests that wait for it; it goes on when the first of them is cancelled."""
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        try:
            seen, settings = self._epoch(), self._settings
            loop = asyncio.get_running_loop()
            choices, complete = await loop.run_in_executor(self._executor, self._made, settings)
            if settings is self._settings:
                self.choices, self._complete, self._seen = choices, complete, seen
                self._reported.clear()
                self._on_change()
        finally:
            self._loading = None

    def _made(self, settings: config.Settings) -> tuple[Choices, bool]:
        """The choices under these settings, and whether it was tried to read every manager's catalogue."""
        book = Rulebook(settings)
        kept = read_kept(self._run)
        rows = {name: one.rows for name, one in kept.items() if one.rows is not None}
        catalogues = Catalogues(rows, settings.upstream, book.types)
        reads = settings.catalog.file is not None or settings.catalog.refresh > 0
        names = {upstream.name for upstream in settings.upstream if upstream.kind != "liveupdate"}
        return Choices(book, catalogues, settings.upstream), not reads or names <= set(kept)

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    def lists(self, upstream: str, moniker: str) -> bool:
        """Whether an upstream's catalogue lists a moniker."""
        return self.choices.catalogues.listed(upstream, moniker) is not None

    # --- deciding

    @property
    def vary(self) -> str | None:
        """The request's fields that a choice may depend on, as a Vary field names them."""
        return self.choices.book.identities.vary

    def choose(self, request: Request, route: Route) -> Choice:
        """What the client of `request` gets; called once a request. Problem when it may not have it.

        Where a rule refuses it, or would, that is counted.
        """
        if not self.choices.any_source and route.stream != LIVEUPDATE_STREAM:
            raise Problem("no-upstream", "no upstream is configured for content")
        choice = self.choices.choose(route.stream, request.header)
        if choice.unlisted and self._first((route.stream,)):
            self._tell({"type": "unlisted", "moniker": route.stream})
        if not choice.decision.allowed:
            self._count(choice, route)
        if choice.refused:
            raise problem(choice.decision, self.choices.book.liveupdate_url)
        return choice

    def _count(self, choice: Choice, route: Route) -> None:
        decision, book = choice.decision, self.choices.book
        assert decision.rule is not None
        self._counters.add("gup_rule_refusals_total", rule=str(decision.rule), mode=book.mode)
        client = decision.client
        if self._first((route.stream, decision.rule, str(client.version), str(client.language))):
            verb = "refused" if choice.refused else "would be refused"
            log.info("%s %s by the rule %s: %s", route.upstream_path, verb, decision.rule, decision.because)

    def _first(self, what: tuple[str, ...]) -> bool:
        """Whether this happens for the first time under these choices. Bounded, so some are not reported."""
        if what in self._reported or len(self._reported) >= _MOST_REPORTED:
            return False
        self._reported.add(what)
        return True
