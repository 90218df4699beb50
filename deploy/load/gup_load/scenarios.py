"""The scenarios: what the clients of a site ask gup for, as users of locust.

Each client does its work once and ends; a run ends with its last client. A client that ends while others are
still being started would be replaced by locust, so each waits for everyone first or last.
"""

import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from itertools import count
from random import Random
from typing import ClassVar
from urllib.parse import urlsplit

import gevent
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from gup.demo.content import ALL_LANGUAGES, Catalogue, PublishedFile, PublishedStream
from gup.demo.machine import TRY_AGAIN, Client, Transfer, WrongBodyError
from gup.errors import GupError
from gup_load.connection import PIECE_BYTES, Connection
from gup_load.course import BODY, CLIENT, FAILED, RESPONSE, course_of

ATTEMPTS = 8
"""Failed requests for one file after which a client gives up."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 3.0
_CLIENTS_A_WORKER = 5_000
_POLLS = 3
_HAS_INDEX = 0.8
"""Share of clients that come in the morning with an index file that has not changed since."""
_HAS_OTHER_COPY = 0.1
_OTHER_COPY = '"of another copy"'


class GivenUpError(GupError):
    """A client did not get what it wanted."""


class StatusError(GupError):
    """A status that a client can't use."""


class BrokenOffError(GupError):
    """The connection ended before the body."""


class Machine(User):
    """A client of the site: its requests, and what is counted of them."""

    abstract = True
    at_once: ClassVar[bool] = False
    """Whether all clients begin when everyone is there."""
    publishes: ClassVar[int] = 0
    """Streams that get a new revision when all clients have started."""
    _numbers: ClassVar = count()

    @classmethod
    def lacks(cls, catalogue: Catalogue) -> str | None:
        """Why the scenario can't be run with this catalogue."""
        return None if catalogue.streams else "the catalogue is empty: nothing is published yet"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.course = course_of(environment)
        worker = getattr(environment.runner, "worker_index", 0)
        number = next(self._numbers) + worker * _CLIENTS_A_WORKER
        seed = self.course.options.seed
        self.chance = Random(f"{seed}/{type(self).__name__}/{number}")  # noqa: S311 - repeatable by design
        self.client = Client(number, self.chance)
        self.connection = self._connection()
        self.begin = time.perf_counter()
        self.end: float | None = None
        """When the client had what it wanted, if it did more after that."""

    def _connection(self, hops: int = 0) -> Connection:
        """From a loopback address of the client's own if gup is here, another one after each hop."""
        host = str(self.host)
        local = (urlsplit(host).hostname or "").startswith("127.")
        return Connection(host, self.client.address.replace("127.1.", f"127.{1 + hops}.") if local else None)

    @task
    def live(self) -> None:
        problem: Exception | None = None
        try:
            self.prepare()
            self.course.ready += 1
            self.work()
        except Exception as error:  # noqa: BLE001 - a mistake here is a failure too; locust would begin again
            problem = error
        self._count(CLIENT, type(self).__name__, self.begin, 0, problem, end=self.end)
        self.connection.close()
        self.course.everyone.wait()
        raise StopUser

    def wait_for_everyone(self) -> None:
        """Until all clients have started; the client's time begins then."""
        self.course.everyone.wait()
        self.begin = time.perf_counter()

    def prepare(self) -> None:
        """What the client does before all are there."""

    def work(self) -> None:
        raise NotImplementedError

    # --- requests

    def ask_index(self) -> None:
        """Ask for the index file, on the condition that it has changed since the client last got it."""
        client, index = self.client, self.course.catalogue.content_info
        transfer = self.fetch(index, client.content_info_etag)
        client.content_info_etag = transfer.etag or client.content_info_etag
        self.course.index_etag = client.content_info_etag

    def update(self) -> None:
        """Bring the client up to date, in an order of its own."""
        streams = [stream for stream in self.course.catalogue.streams if self.client.takes(stream)]
        self.chance.shuffle(streams)
        for stream in streams:
            if file := self.client.wants(stream):
                self.fetch(file)
                self.client.held[stream.moniker] = stream.newest

    def fetch(self, file: PublishedFile, held_etag: str | None = None, cuts: Sequence[int] = ()) -> Transfer:
        """The whole file, compared; GivenUpError else. The client breaks off at each of `cuts`, and resumes
        from another address.
        """
        transfer, begin, failures = Transfer(file, held_etag), time.perf_counter(), 0
        waiting_cuts = list(cuts)
        while failures < ATTEMPTS:
            response = self._ask(transfer)
            if response is not None and response.status == 304:
                response.close()
                return transfer
            try:
                if response is not None and self._receive(transfer, response, waiting_cuts):
                    self._count(BODY, file.path, begin, file.length)
                    return transfer
                if response is not None:  # the client broke off
                    self.connection.close()
                    self.connection = self._connection(len(cuts) - len(waiting_cuts))
                    if self.chance.random() < _HAS_OTHER_COPY:
                        transfer.etag = _OTHER_COPY
                    gevent.sleep(self.chance.uniform(0.02, 0.2))
                    continue
            except WrongBodyError as error:
                self._count(BODY, file.path, begin, 0, error)
                raise GivenUpError("a body was wrong") from error
            except (OSError, HTTPException, BrokenOffError) as error:
                self._count(BODY, file.path, begin, 0, error)
                self.connection.close()
            failures += 1
            gevent.sleep(min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**failures))
        raise GivenUpError(f"{ATTEMPTS} attempts failed")

    def _ask(self, transfer: Transfer) -> HTTPResponse | None:
        """One request, counted; None when it failed, and another may help."""
        begin, kind = time.perf_counter(), transfer.file.kind
        fields = {
            "User-Agent": self.client.user_agent,
            "Accept-Encoding": "identity",
        } | transfer.request_fields()
        try:
            response = self.connection.get(transfer.file.path, fields)
            if response.status in (200, 206):
                response.peek()  # the first byte of the body, not that of the head
        except (OSError, HTTPException) as error:
            self._count(RESPONSE, f"{kind} {FAILED}", begin, 0, error)
            self.connection.close()
            return None
        status = response.status
        if status in (200, 206) or (status == 304 and "If-None-Match" in fields):
            self._count(RESPONSE, f"{kind} {status}", begin)
            return response
        response.read()
        self._count(RESPONSE, f"{kind} {FAILED}", begin, 0, StatusError(f"status {status}"))
        if status not in TRY_AGAIN:
            raise GivenUpError(f"status {status}")
        return None

    def _receive(self, transfer: Transfer, response: HTTPResponse, cuts: list[int]) -> bool:
        """The body, compared at its end; False when the client broke off."""
        if response.status == 206 and transfer.etag == _OTHER_COPY:
            raise WrongBodyError("the rest of this copy, for a client that has the beginning of another one")
        fields = response.headers
        transfer.begin(response.status, fields.get("Content-Range"), fields.get("ETag"))
        end_bytes = transfer.received_bytes + int(fields.get("Content-Length", 0))
        while piece := response.read1(PIECE_BYTES):
            transfer.add(piece)
            gevent.sleep(0)  # a body that is here already would keep all other clients from their turn
            if cuts and cuts[0] <= transfer.received_bytes < transfer.file.length:
                del cuts[0]
                return False
        if transfer.received_bytes < end_bytes:
            raise BrokenOffError("the connection ended before the body")
        response.close()
        transfer.check()
        return True

    def _count(
        self,
        what: str,
        name: str,
        begin: float,
        length: int = 0,
        problem: Exception | None = None,
        *,
        end: float | None = None,
    ) -> None:
        self.environment.events.request.fire(
            request_type=what,
            name=name,
            response_time=((end or time.perf_counter()) - begin) * 1000,
            response_length=length,
            exception=problem,
            context={},
        )


class Morning(Machine):
    """A branch's morning: machines are switched on one after the other. Each asks for the index file, which
    most have; most need deltas, some fulls. They ask again, and meanwhile one stream has a new revision.
    """

    publishes = 1

    def work(self) -> None:
        if self.chance.random() < _HAS_INDEX:
            self.client.content_info_etag = self.course.index_etag
        for _ in range(_POLLS):
            self.ask_index()
            self.update()
            self.end = self.end or time.perf_counter()
            gevent.sleep(self.chance.uniform(0.5, 1.5))
        self.course.everyone.wait()
        self.ask_index()
        self.update()


def _patches(catalogue: Catalogue) -> list[PublishedStream]:
    """Client packages: those of one version and language each."""
    return [stream for stream in catalogue.streams if stream.language != ALL_LANGUAGES]


class PatchDay(Machine):
    """Patch day: every client needs the package of its language, at once."""

    at_once = True

    @classmethod
    def lacks(cls, catalogue: Catalogue) -> str | None:
        if _patches(catalogue):
            return None
        return (
            "PatchDay needs client packages, and the catalogue has none: `gup simulate manager --products 9`"
        )

    def work(self) -> None:
        patches = _patches(self.course.catalogue)
        offered = {stream.language for stream in patches}
        language = (
            self.client.language if self.client.language in offered else self.chance.choice(sorted(offered))
        )
        self.wait_for_everyone()
        self.ask_index()
        for stream in patches:
            if stream.language == language:
                self.fetch(stream.full)


class Storm(Machine):
    """A storm of full packages: all clients ask for the same big file at once."""

    at_once = True

    def work(self) -> None:
        self.wait_for_everyone()
        self.fetch(
            max((stream.full for stream in self.course.catalogue.streams), key=lambda file: file.length)
        )


class Roaming(Machine):
    """Roaming clients: they break off, and resume by range from another address. One in ten comes back with
    the tag of another copy, and must get the whole file.
    """

    def work(self) -> None:
        self.ask_index()
        for stream in self.chance.sample(
            self.course.catalogue.streams, k=min(2, len(self.course.catalogue.streams))
        ):
            length = stream.full.length
            cuts = sorted(
                round(length * self.chance.uniform(0.05, 0.9)) for _ in range(self.chance.randint(1, 3))
            )
            self.fetch(stream.full, cuts=cuts)


class Revision(Machine):
    """A new revision for all clients at once: all are up to date, it is published, and all ask for it."""

    at_once = True
    publishes = 1

    def prepare(self) -> None:
        self.ask_index()
        self.client.declined.clear()
        self.client.held = {stream.moniker: stream.newest for stream in self.course.catalogue.streams}

    def work(self) -> None:
        before = self.course.catalogue
        self.wait_for_everyone()
        if self.course.catalogue.serial == before.serial:  # nobody could publish: it is the last one
            stream = before.streams[0]
            self.client.held[stream.moniker] = stream.revisions[-2] if len(stream.revisions) > 1 else "none"
        self.ask_index()
        self.update()
