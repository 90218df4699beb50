"""Whose content each request of one worker gets, and whether it may, by the rules in force; fetches nothing.

Decisions hold for one set of settings and catalogues. Both are told of by the policy epoch: whoever comes
after it was raised is decided by the new ones, which are read in a thread first.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from gup import config
from gup.cache.catalogue_file import read_kept
from gup.content.catalog import Catalogues
from gup.content.routes import LIVEUPDATE_STREAM, Route
from gup.content.rules import Rulebook, problem
from gup.content.variant_choice import Choice, Choices
from gup.errors import Problem
from gup.metrics import Counters
from gup.server.request import Request

log = logging.getLogger("gup.rules")

_FIRST_READING_SECONDS = 15.0
"""Counted from a worker's start or a reload: nobody waits longer for catalogues that were never read."""
_PATIENCE_SECONDS = 5.0
"""So long a single request waits for them."""
_LOOK_SECONDS = 0.02
_MOST_TOLD = 1000


class Deliveries:
    """`choices` are replaced, never changed, by `_load` alone. `on_change` is called when they were."""

    def __init__(
        self,
        settings: config.Settings,
        run: Path,
        counters: Counters,
        executor: Executor,
        policy: Callable[[], int],
        tell: Callable[[Mapping[str, object]], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`run` is the store's folder of that name. Blocks: to be made before anybody is served."""
        self._settings = settings
        self._run = run
        self._counters = counters
        self._executor = executor
        self._policy = policy
        self._tell = tell
        self._on_change = on_change
        self._clock = clock
        self._loading: asyncio.Task[None] | None = None
        self._told: set[tuple[str, ...]] = set()
        self._wait_until = clock() + _FIRST_READING_SECONDS
        self._seen = policy()
        self.choices, self._complete = self._made(settings)

    def apply(self, settings: config.Settings) -> None:
        """Reloaded settings: what is decided from now on is decided by them."""
        self._settings = settings
        self._seen = -1
        self._wait_until = self._clock() + _FIRST_READING_SECONDS

    # --- what is in force

    @property
    def ready(self) -> bool:
        """Whether a decision can be made at once."""
        return self._seen == self._policy() and (self._complete or self._clock() >= self._wait_until)

    async def until_ready(self) -> None:
        """Take in what has changed; at the very first, wait for a catalogue to be read.

        A client patch must not pass because nobody knows yet that it is one.
        """
        patience = self._clock() + _PATIENCE_SECONDS
        while not self.ready:
            if self._seen != self._policy():
                await self._load_once()
            elif self._clock() >= patience:
                return
            else:
                await asyncio.sleep(_LOOK_SECONDS)

    async def _load_once(self) -> None:
        """One reading for all who wait for it; it goes on when the one who began it leaves."""
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        try:
            seen, settings = self._policy(), self._settings
            loop = asyncio.get_running_loop()
            choices, complete = await loop.run_in_executor(self._executor, self._made, settings)
            if settings is self._settings:
                self.choices, self._complete, self._seen = choices, complete, seen
                self._told.clear()
                self._on_change()
        finally:
            self._loading = None

    def _made(self, settings: config.Settings) -> tuple[Choices, bool]:
        """The choices under these settings, and whether every manager's catalogue was read or tried."""
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

    def choose(self, request: Request, route: Route) -> Choice:
        """What the client of `request` gets. Problem when it may not have it; nothing was asked for then."""
        if not self.choices.any_source and route.stream != LIVEUPDATE_STREAM:
            raise Problem("no-upstream", "no upstream is configured for content")
        choice = self.choices.choose(route.stream, request.header)
        if choice.unlisted:
            self._look_for(route.stream)
        if choice.refused:
            self._count(choice, route)
            raise problem(choice.decision, self.choices.book.liveupdate_url)
        return choice

    def passed(self, choice: Choice, route: Route) -> None:
        """An answer was made: where a rule would have refused it, that is counted."""
        if not choice.decision.allowed:
            self._count(choice, route)

    def _count(self, choice: Choice, route: Route) -> None:
        decision, book = choice.decision, self.choices.book
        assert decision.rule is not None
        self._counters.add("gup_rule_refusals_total", rule=str(decision.rule), mode=book.mode)
        client = decision.client
        if self._first((route.stream, decision.rule, str(client.version), str(client.language))):
            verb = "refused" if choice.refused else "would be refused"
            log.info("%s %s by the rule %s: %s", route.upstream_path, verb, decision.rule, decision.because)

    def _look_for(self, moniker: str) -> None:
        if self._first((moniker,)):
            self._tell({"type": "unlisted", "moniker": moniker})

    def _first(self, what: tuple[str, ...]) -> bool:
        """Whether this happens for the first time under these choices; bounded, so some are not told of."""
        if what in self._told or len(self._told) >= _MOST_TOLD:
            return False
        self._told.add(what)
        return True
