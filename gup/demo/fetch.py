"""One download by a simulated client: resumed when cut, every byte compared as it arrives; keeps no body."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum, auto

import aiohttp
import xxhash

from gup.demo.catalogue import PublishedFile
from gup.demo.figures import Figures

_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 3.0
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class Outcome(Enum):
    """How a download ended; counted in the figures already."""

    RIGHT = auto()
    WRONG = auto()
    GONE = auto()
    FAILED = auto()


@dataclass(slots=True)
class _Progress:
    """What has arrived so far; only this download's own attempts write it."""

    received_bytes: int = 0
    etag: str | None = None
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def restart(self) -> None:
        self.received_bytes = 0
        self.digest.reset()

    def take(self, piece: bytes) -> None:
        self.received_bytes += len(piece)
        self.digest.update(piece)


class Download:
    """One client's download of one published file, through `url` (scheme, host and port)."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        file: PublishedFile,
        figures: Figures,
        *,
        client: str = "",
        cut_after_bytes: int | None = None,
        held_etag: str | None = None,
    ) -> None:
        """`client` is the User-Agent. `cut_after_bytes` breaks the first connection there, to resume.

        `held_etag` is the entity tag of the copy that the client has: an unchanged file is not sent again.
        """
        self._session = session
        self._url = url + file.path
        self._file = file
        self._figures = figures
        self._headers = {"User-Agent": client} if client else {}
        self._cut_after_bytes = cut_after_bytes
        self._was_cut = False
        self._held_etag = held_etag
        self._progress = _Progress()

    @property
    def etag(self) -> str | None:
        """The entity tag of what was received, or of the copy held."""
        return self._progress.etag or self._held_etag

    async def run(self) -> Outcome:
        """Fetch it, with as many attempts as a patient client makes."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            self._was_cut = False
            try:
                outcome = await self._attempt()
                problem = "it was asked to try again"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                outcome, problem = None, f"{type(error).__name__}: {error}"
            if outcome is not None:
                return outcome
            if not self._was_cut:
                self._figures.retries += 1
                await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt))
        return self._failed(f"gave up after {_ATTEMPTS} attempts, the last one: {problem}")

    async def _attempt(self) -> Outcome | None:
        """One request; None when another one should follow."""
        begin = time.perf_counter()
        self._figures.requests += 1
        async with self._session.get(self._url, headers=self._asked(), allow_redirects=False) as response:
            seconds = time.perf_counter() - begin
            self._figures.answered(seconds, response.headers.get("Cache-Status"))
            if response.status in (200, 206):
                return await self._receive(response)
            if response.status == 304 and self._held_etag is not None:
                self._figures.not_modified += 1
                return Outcome.RIGHT
            if response.status in (404, 410):
                self._figures.gone += 1
                return Outcome.GONE
            if response.status in _TRY_AGAIN:
                return None
            return self._failed(f"status {response.status}")

    def _asked(self) -> dict[str, str]:
        """Headers for the whole, or for the rest if there is something to go on from."""
        progress = self._progress
        if progress.etag is not None and 0 < progress.received_bytes < self._file.length:
            rest = {"Range": f"bytes={progress.received_bytes}-", "If-Range": progress.etag}
            return self._headers | rest
        progress.restart()
        return self._headers | ({"If-None-Match": self._held_etag} if self._held_etag else {})

    async def _receive(self, response: aiohttp.ClientResponse) -> Outcome | None:
        progress = self._progress
        if response.status == 200:
            progress.restart()
        elif not self._continues(response):
            return self._wrong(f"a range that was not asked for: {response.headers.get('Content-Range')}")
        else:
            self._figures.resumes += 1
        progress.etag = response.headers.get("ETag")
        async for piece in response.content.iter_any():
            self._figures.received_bytes += len(piece)
            progress.take(piece)
            if self._cuts_here():
                response.close()
                return None
        return self._compare()

    def _cuts_here(self) -> bool:
        """Whether this client breaks off now: once, and never after the last byte."""
        limit, received = self._cut_after_bytes, self._progress.received_bytes
        if limit is None or not limit <= received < self._file.length:
            return False
        self._cut_after_bytes, self._was_cut = None, True
        return True

    def _continues(self, response: aiohttp.ClientResponse) -> bool:
        """RFC 9110 section 14.4: the part must be the rest of a body of the published length."""
        length = self._file.length
        expected = f"bytes {self._progress.received_bytes}-{length - 1}/{length}"
        return response.headers.get("Content-Range") == expected

    def _compare(self) -> Outcome:
        if self._progress.received_bytes != self._file.length:
            return self._wrong(f"{self._progress.received_bytes} bytes instead of {self._file.length}")
        if self._progress.digest.hexdigest() != self._file.digest:
            return self._wrong("other bytes than published")
        self._figures.downloads[self._file.kind] += 1
        return Outcome.RIGHT

    def _wrong(self, what: str) -> Outcome:
        self._figures.wrong += 1
        self._figures.complain(f"{self._file.path}: {what}")
        return Outcome.WRONG

    def _failed(self, what: str) -> Outcome:
        self._figures.failed += 1
        self._figures.complain(f"{self._file.path}: {what}")
        return Outcome.FAILED
