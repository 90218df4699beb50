"""Alarm messages without a receiver: signatures, the queue and its pauses, and what is kept on disk."""

import itertools
import json
from math import inf

import pytest

from gup.config import Alarms, signing_keys
from gup.control import notifications
from gup.control.api.schemas import Alarm
from gup.control.notifications import (
    GIVE_UP_SECONDS,
    LAST_RETRY_SECONDS,
    MAX_QUEUED,
    Message,
    Notifications,
    Outbox,
    retry_seconds,
)
from gup.control.receivers import NotAcceptedError, signatures

NOW = 1_700_000_000.25


def alarm(number: int | str, name: str = "damage", subject: str = "") -> Alarm:
    return Alarm(
        id=f"{number}",
        name=name,
        severity="warning",
        since=NOW,
        subject=subject,
        text="the bänk\ud800 is full",
        what_to_do="Do.",
    )


A, B, C = map(alarm, "ABC")


def ids(outbox: Outbox) -> list[str]:
    return [message.id for message in outbox.queue]


def test_the_signature_is_that_of_the_specification_s_example():
    keys = signing_keys("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signatures(keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    two = signing_keys("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert signatures(two, "a", 1, b"") == " ".join([signatures(keys, "a", 1, b"")] * 2)


def test_a_message_is_plain_json_whatever_its_text_is():
    told = json.loads(Message(alarm=A, state="raised", at=NOW, queued_at=NOW).content("branch-7"))
    assert (told["type"], told["timestamp"]) == ("alarm.raised", "2023-11-14T22:13:20.250Z")
    assert told["data"]["text"] == "the bänk? is full"
    assert {"id", "alarm", "severity", "state", "site", "since", "what_to_do", "gup_version"} <= set(
        told["data"]
    )


def test_what_begins_and_ends_is_queued_once():
    outbox = Outbox()
    assert outbox.look([A, B], NOW) == 0
    assert outbox.look([A, B], NOW) is None
    assert outbox.look([B, C], NOW) == 0
    assert outbox.look([], NOW) == 0
    assert ids(outbox) == ["A-raised", "B-raised", "A-cleared", "C-raised", "B-cleared", "C-cleared"]
    assert outbox.told == {}


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["its pause is the shorter", "the longer"])
def test_a_message_that_fails_holds_up_only_those_about_its_alarm(monkeypatch, own):
    chance = itertools.cycle((own, 1.0 - own))  # the message's pause, the receiver's
    monkeypatch.setattr(
        notifications, "retry_seconds", lambda tries: retry_seconds(tries, lambda: next(chance))
    )
    outbox = Outbox()
    outbox.look([A, B], NOW)
    outbox.look([], NOW)
    clock, sent = 0.0, []
    while (message := outbox.due(clock)) or outbox.queue:
        if message is None:
            clock += 0.1
        elif message.id == "A-raised" and clock < 60:
            outbox.failed(message, clock)
        else:
            sent.append(message.id)
            outbox.accepted(message)
    assert sent == ["B-raised", "B-cleared", "A-raised", "A-cleared"]


def test_pauses_grow_to_a_quarter_of_an_hour_and_are_never_the_same():
    pauses = [retry_seconds(tries, lambda: 0.5) for tries in range(1, 2000)]
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(pauses) == pauses[-1] == LAST_RETRY_SECONDS
    assert (retry_seconds(3, lambda: 0.0), retry_seconds(3, lambda: 1.0)) == (3.0, 5.0)
    outbox, clock, tried = Outbox(), 0.0, []
    outbox.look([A, B, C], NOW)
    while clock < 6 * 3600:
        if message := outbox.due(clock):
            tried.append(clock)
            outbox.failed(message, clock)
        clock += 1.0
    assert 20 < len(tried) < 50  # the receiver is asked by one message at a time
    (message,) = [each for each in outbox.queue if each.tries == max(one.tries for one in outbox.queue)][:1]
    outbox.failed(message, clock, 3000.0)
    assert outbox.due(clock + 2999.0) is None
    outbox.failed(message, clock, inf)
    assert outbox.due(1e12) is None


def test_a_full_queue_drops_what_began_and_ended_and_then_the_oldest():
    outbox = Outbox()
    outbox.look([A], NOW)
    for number in range(MAX_QUEUED // 2):
        outbox.look([A, alarm(number)], NOW)
        outbox.look([A], NOW)
    assert len(outbox.queue) == MAX_QUEUED - 1
    assert ids(outbox)[:2] == ["A-raised", "1-raised"]
    many = Outbox()
    assert many.look(map(alarm, range(MAX_QUEUED + 5)), NOW) == 5
    assert ids(many)[0] == "5-raised"
    assert Outbox.model_validate_json(many.model_dump_json(exclude={"told", "queue"})).queue == []


def test_a_message_is_given_up_after_days():
    outbox = Outbox()
    outbox.look([A], NOW)
    assert outbox.expire(NOW + GIVE_UP_SECONDS - 1) == 0
    outbox.look([A, B], NOW + GIVE_UP_SECONDS)
    assert outbox.expire(NOW + GIVE_UP_SECONDS + 1) == 1
    assert ids(outbox) == ["B-raised"]


class Receiver:
    """Stands for the webhook: takes what comes, or fails as told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.got: list[str] = []

    async def send(self, message: str, _body: bytes, _at: float) -> str:
        if self.error is not None:
            raise self.error
        self.got.append(message)
        return ""


SET = Alarms(webhook="http://127.0.0.1:9/", webhook_secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")


@pytest.fixture
def receiver(monkeypatch):
    made = Receiver()
    monkeypatch.setattr(notifications.Webhook, "read", lambda _alarms: made)
    return made


async def opened(world, written) -> tuple[Notifications, list[Alarm]]:
    """One run of the controller. Its monotonic clock is that of `world.now`."""
    world.settings = world.settings.model_copy(update={"alarms": SET})
    made = Notifications(world.dependencies(), lambda: world.now, written.append, lambda: world.now)
    return made, await made.open()


PLAIN = [one.model_copy(update={"text": "is full"}) for one in (A, B, C)]


async def test_queue_and_alarms_survive_a_kill_at_any_moment(world, receiver):
    written: list = []
    first, stood = await opened(world, written)
    assert stood == []
    receiver.error = NotAcceptedError("it answered 500")
    await first.look(PLAIN[:2])
    await first.send("webhook")
    assert first.waiting() == {"webhook": 2}
    second, stood = await opened(world, written)
    assert stood == PLAIN[:2]
    receiver.error = None
    await second.look(PLAIN[1:2])
    await second.send("webhook")
    third, stood = await opened(world, written)  # killed before it could write that they were accepted
    await third.look(stood)
    await third.send("webhook")
    assert receiver.got == ["A-raised", "B-raised", "A-cleared"] * 2
    await third.close()
    fourth, _ = await opened(world, written)
    await fourth.send("webhook")
    assert len(receiver.got) == 6
    assert set(written) == {None}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"standing": 3}', b"\xff", b'{"standing": [{"id": 1}]}']
)
async def test_a_file_that_can_t_be_read_is_as_none(world, receiver, content, caplog):
    (world.store.run / "alarms.json").write_bytes(content)
    made, stood = await opened(world, [])
    assert stood == []
    await made.look(PLAIN[:1])
    await made.send("webhook")
    assert receiver.got == ["A-raised"]
    assert "alarm messages that waited are lost" in caplog.text


async def test_a_disk_that_refuses_is_told_and_stops_no_message(world, receiver):
    written: list = []
    made, _ = await opened(world, written)
    (world.store.run / "alarms.json.new").mkdir()
    await made.look(PLAIN[:1])
    await made.send("webhook")
    assert receiver.got == ["A-raised"]
    (world.store.run / "alarms.json.new").rmdir()
    await made.look(PLAIN[:1])
    assert set(written[:-1]) == {"Is a directory"}
    assert written[-1] is None


async def test_a_receiver_that_accepts_nothing_is_an_alarm_for_the_others(world, receiver):
    made, _ = await opened(world, [])
    receiver.error = NotAcceptedError("it answered 500")
    await made.look(PLAIN[:1])
    await made.send("webhook")
    world.now += 120
    [(subject, text)] = made.problems()
    assert subject == "webhook"
    assert text == "alarms.webhook has accepted no message for 2 min, 1 wait: it answered 500"
    await made.look([PLAIN[0], alarm("U", "alarms-unsent", "webhook").model_copy(update={"text": text})])
    assert made.waiting() == {"webhook": 1}
    receiver.error = None
    await made.send("webhook")
    assert list(made.problems()) == []
