"""Alarm messages: what begins and ends is queued for the webhook and for the command until it is accepted.

Each receiver has a queue of its own. Messages about one alarm are sent in order; one that fails is tried
again with growing pauses, and does not hold up those about other alarms. Alarms and queues are kept in
`run/alarms.json`, written before a message is first sent: after a restart the same messages have the same
ids, so that receivers can recognise one that arrives twice.
"""

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from math import inf
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

import gup
from gup.config import Alarms
from gup.control.api.schemas import Alarm, TestMessage
from gup.control.dependencies import ControlDependencies
from gup.control.receivers import NotAcceptedError, Webhook, run_command
from gup.control.threads import to_its_end
from gup.errors import quoted
from gup.files import FileError, read_file, replace_file
from gup.jsonmodel import InvalidError, Time, parse, read
from gup.metrics import RECEIVERS
from gup.units import time_in_words

_log = logging.getLogger("gup.control.alarms")
_FILE = "alarms.json"
_MAX_FILE_BYTES = 16 << 20
MAX_QUEUED = 1000
"""Messages that wait for one receiver."""
GIVE_UP_SECONDS = 3 * 86400.0
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 900.0
_JITTER = 0.25


class Message(BaseModel):
    """An alarm that began or ended, as it was then."""

    alarm: Alarm
    state: Literal["raised", "cleared", "test"]
    at: Time
    queued_at: Time
    tries: int = Field(default=0, exclude=True)
    next: float = Field(default=0.0, exclude=True)
    """When it may be tried, by the monotonic clock."""

    @property
    def id(self) -> str:
        return f"{self.alarm.id}-{self.state}"

    def content(self, site: str) -> bytes:
        alarm = self.alarm
        return json.dumps(
            {
                "type": f"alarm.{self.state}",
                "timestamp": _iso(self.at),
                "data": {
                    "id": alarm.id,
                    "alarm": alarm.name,
                    "subject": alarm.subject,
                    "severity": alarm.severity,
                    "state": self.state,
                    "site": site,
                    "since": _iso(alarm.since),
                    "text": alarm.text,
                    "what_to_do": alarm.what_to_do,
                    "gup_version": gup.__version__,
                },
            },
            ensure_ascii=False,
        ).encode("utf-8", "replace")

    def variables(self, site: str) -> dict[str, str]:
        """For the command. Their names do not begin with GUP_: those are settings."""
        alarm = self.alarm
        found = {
            "ID": alarm.id,
            "NAME": alarm.name,
            "SUBJECT": alarm.subject,
            "SEVERITY": alarm.severity,
            "STATE": self.state,
            "SITE": site,
            "TEXT": alarm.text,
        }
        return {f"ALARM_{name}": quoted(value) for name, value in found.items()}


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def retry_seconds(tries: int, chance: Callable[[], float] = random.random) -> float:
    """The pause after so many failures: doubled each time, and different for each site."""
    pause = min(FIRST_RETRY_SECONDS * 2.0 ** min(tries - 1, 30), LAST_RETRY_SECONDS)
    return pause * (1 - _JITTER + 2 * _JITTER * chance())


class Outbox(BaseModel):
    """One receiver's queue, and the alarms that it was told of, or will be, as begun and not as ended.

    Pure: the caller sends what is due and says what came of it.
    """

    told: dict[str, Alarm] = {}
    queue: Annotated[list[Message], Field(max_length=MAX_QUEUED)] = []
    failures: int = Field(default=0, exclude=True)
    """Failed tries since the last message that was accepted."""
    paused_until: float = Field(default=0.0, exclude=True)

    def look(self, standing: Iterable[Alarm], now: float) -> int | None:
        """Queue what began and ended; None if nothing did, else how many messages were dropped for it."""
        present = {alarm.id: alarm for alarm in standing}
        begun = [alarm.model_copy() for at, alarm in present.items() if at not in self.told]
        over = [at for at in self.told if at not in present]
        if not begun and not over:
            return None
        self.queue += [
            Message(alarm=self.told.pop(at), state="cleared", at=now, queued_at=now) for at in over
        ]
        self.queue += [Message(alarm=one, state="raised", at=one.since, queued_at=now) for one in begun]
        self.told |= {alarm.id: alarm for alarm in begun}
        before = len(self.queue)
        while len(self.queue) > MAX_QUEUED:
            self._drop()
        return before - len(self.queue)

    def _drop(self) -> None:
        """The oldest alarm that began and ended while it waited; if there is none, the oldest message."""
        ended = {message.alarm.id for message in self.queue if message.state == "cleared"}
        gone = next((m.alarm.id for m in self.queue if m.state == "raised" and m.alarm.id in ended), None)
        if gone is None:
            del self.queue[0]
        else:
            self.queue = [message for message in self.queue if message.alarm.id != gone]

    def due(self, clock: float) -> Message | None:
        """The message to send now: the first of its alarm, and of these one that was tried least.

        Else one that always fails would take each turn, as its own pause may be shorter than the receiver's.
        """
        if clock < self.paused_until:
            return None
        held, ready = set[str](), list[Message]()
        for message in self.queue:
            if message.alarm.id not in held and message.next <= clock:
                ready.append(message)
            held.add(message.alarm.id)
        return min(ready, key=lambda message: message.tries, default=None)

    def accepted(self, message: Message) -> None:
        self.failures, self.paused_until = 0, 0.0
        self._remove(message)

    def failed(self, message: Message, clock: float, after_seconds: float = 0.0) -> None:
        """The receiver is left alone for a while, this message for a while of its own."""
        self.failures += 1
        message.tries += 1
        message.next = clock + retry_seconds(message.tries)
        self.paused_until = clock + max(retry_seconds(self.failures), after_seconds)

    def expire(self, now: float) -> int:
        """Give up messages that are too old; how many."""
        old = [message for message in self.queue if now - message.queued_at > GIVE_UP_SECONDS]
        for message in old:
            self._remove(message)
        return len(old)

    def _remove(self, message: Message) -> None:
        self.queue = [other for other in self.queue if other is not message]


class _Kept(BaseModel):
    """The content of the file."""

    standing: list[Alarm] = []
    outboxes: dict[str, Outbox] = {}


_KEPT = TypeAdapter(_Kept)


class Notifications:
    """The outboxes of the present receivers. Before `open` nothing but tests is sent."""

    def __init__(
        self,
        dependencies: ControlDependencies,
        clock: Callable[[], float],
        on_written: Callable[[str | None], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_written` is called after each write of the file with the error, None for success."""
        self._dependencies = dependencies
        self._path = dependencies.store.run / _FILE
        self._clock = clock
        self._monotonic = monotonic
        self._on_written = on_written
        self._standing: list[Alarm] = []
        self._outboxes: dict[str, Outbox] = {}
        self._webhook: Webhook | None = None
        self._lack = ""
        """Why there is no webhook although one is set."""
        self._trouble: dict[str, tuple[float, str]] = {}
        """Since when a receiver accepts nothing, and why."""
        self._saving = asyncio.Lock()
        self._unsaved = self._sent = False
        """Whether something must be written before the next message is sent; whether one was sent since."""

    async def open(self) -> list[Alarm]:
        """Take up what was kept, and return the alarms that stood then. Damaged: nothing was kept."""
        kept = _Kept()
        try:
            text = await asyncio.to_thread(read_file, self._path, _MAX_FILE_BYTES + 1)
            kept = read(_KEPT, parse(text, _FILE, _MAX_FILE_BYTES), _FILE)
        except FileError:
            pass  # at the first start there is none
        except InvalidError as error:
            _log.warning("alarm messages that waited are lost: %s", error)
        self._standing, self._outboxes = kept.standing, kept.outboxes
        await self.apply(self._dependencies.settings().alarms)
        return [alarm.model_copy() for alarm in kept.standing]

    async def apply(self, alarms: Alarms) -> None:
        """Use these settings. A receiver that has gone loses its queue; a present one is tried at once."""
        wanted = {"webhook": alarms.webhook is not None, "command": bool(alarms.command)}
        if wanted["webhook"]:
            try:
                self._webhook, self._lack = await asyncio.to_thread(Webhook.read, alarms), ""
            except FileError as error:
                self._webhook, self._lack = None, str(error)
        for to in RECEIVERS:
            if not wanted[to]:
                self._unsaved |= self._outboxes.pop(to, None) is not None
                self._trouble.pop(to, None)
                continue
            outbox = self._outboxes.setdefault(to, Outbox())
            outbox.failures, outbox.paused_until = 0, 0.0
            for message in outbox.queue:
                message.next = 0.0

    # --- what the alarm collector and the pages ask for

    async def look(self, alarms: list[Alarm]) -> None:
        """Queue what has changed since the last look. Nobody is told that it does not listen itself."""
        now = self._clock()
        self._unsaved |= [alarm.id for alarm in alarms] != [alarm.id for alarm in self._standing]
        self._standing = [alarm.model_copy() for alarm in alarms]
        for to, outbox in self._outboxes.items():
            about_others = (a for a in alarms if (a.name, a.subject) != ("alarms-unsent", to))
            dropped = outbox.look(about_others, now)
            expired = outbox.expire(now)
            self._unsaved |= dropped is not None or expired > 0
            if lost := (dropped or 0) + expired:
                self._count(to, "dropped", lost)
                _log.warning("%d alarm messages were given up that %s did not accept", lost, _SETTING[to])
        await self._save(all_=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Receivers that accept nothing, each with a sentence."""
        for to, (since, why) in self._trouble.items():
            waiting, ago = len(self._outboxes[to].queue), time_in_words(max(0.0, self._clock() - since))
            yield to, f"{_SETTING[to]} has accepted no message for {ago}, {waiting} wait: {why}"

    def waiting(self) -> Mapping[str, int]:
        return {to: len(outbox.queue) for to, outbox in self._outboxes.items()}

    async def test(self) -> list[TestMessage]:
        """Send each receiver a test message now, past its queue."""
        if not self._outboxes:  # not opened yet
            await self.apply(self._dependencies.settings().alarms)
        now = self._clock()
        alarm = Alarm(
            id=uuid.uuid4().hex,
            name="test",
            severity="warning",
            since=now,
            subject="",
            text="this is a test, sent by `gup alarms test`",
            what_to_do="Nothing is wrong.",
        )
        message = Message(alarm=alarm, state="test", at=now, queued_at=now)

        async def tried(to: str) -> TestMessage:
            try:
                return TestMessage(to=to, accepted=True, detail=await self._deliver(to, message))
            except NotAcceptedError as error:
                return TestMessage(to=to, accepted=False, detail=str(error))

        return await asyncio.gather(*map(tried, self._outboxes))

    # --- sending

    async def send(self, to: str) -> None:
        """Send what is due; a periodic job for each receiver."""
        while (outbox := self._outboxes.get(to)) and (message := outbox.due(self._monotonic())):
            await self._save()
            try:
                written = await self._deliver(to, message)
            except NotAcceptedError as error:
                if self._outboxes.get(to) is not outbox:
                    return  # a reload has removed the receiver
                self._count(to, "failed")
                outbox.failed(message, self._monotonic(), inf if error.gone else error.after_seconds)
                if to not in self._trouble:
                    days = round(GIVE_UP_SECONDS / 86400)
                    words = "alarm messages are not accepted, and tried again for %d days: %s"
                    _log.warning(words, days, error)
                self._trouble[to] = self._trouble.get(to, (self._clock(), ""))[0], str(error)
                continue
            self._count(to, "accepted")
            outbox.accepted(message)
            if written:
                _log.info("alarms.command wrote: %s", written)
            if self._trouble.pop(to, None):
                _log.warning("alarm messages are accepted again by %s", _SETTING[to])
            self._sent = True

    async def close(self) -> None:
        await self._save(all_=True)

    async def _deliver(self, to: str, message: Message) -> str:
        settings = self._dependencies.settings()
        body, alarms = message.content(settings.site.name), settings.alarms
        if to == "command":
            variables = message.variables(settings.site.name)
            return await run_command(alarms.command, body, variables, alarms.command_timeout)
        if self._webhook is None:
            raise NotAcceptedError(self._lack)
        return await self._webhook.send(message.id, body, self._clock())

    def _count(self, to: str, outcome: str, count: int = 1) -> None:
        self._dependencies.counters.add("gup_alarm_messages_total", count, to=to, outcome=outcome)

    async def _save(self, *, all_: bool = False) -> None:
        """Write what must be written; `all_`: also that messages were sent. Refused by the disk, it is tried
        again at the next call.
        """
        async with self._saving:
            if not self._unsaved and not (all_ and self._sent):
                return
            self._unsaved = self._sent = False
            kept = _Kept(standing=self._standing, outboxes=self._outboxes)
            try:
                await to_its_end(replace_file, self._path, kept.model_dump_json().encode("utf-8", "replace"))
            except OSError as error:
                self._unsaved = True
                self._on_written(error.strerror or str(error))
            else:
                self._on_written(None)


_SETTING = {to: f"alarms.{to}" for to in RECEIVERS}
