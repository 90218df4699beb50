"""Events: reports of workers to the controller, as datagrams of JSON.

Events may be lost (a full queue) or doubled: reconciling must be able to correct everything that depends on
them. They are checked like any input, since any process that may write to the socket may send anything.
"""

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    StrictBool,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from gup.client_names import is_name
from gup.content.catalog import normal_moniker
from gup.content.key import ContentKey, Kind
from gup.content.routes import leads_to
from gup.errors import PROBLEMS, quoted
from gup.jsonmodel import Count, InvalidError, Time, parse, plain_text, shown
from gup.phases import MARK_LENGTH, MOST_MARKS, REQUEST_PHASES

MAX_DATAGRAM_BYTES = 256 * 1024
_MAX_ROWS = 10_000
_MAX_KEY = 5 * 241
_MAX_STATED = 64

_parsed_key = lru_cache(maxsize=4096)(ContentKey.parse)


def _key(value: object) -> ContentKey:
    if isinstance(value, ContentKey):
        return value
    if not isinstance(value, str) or len(value) > _MAX_KEY:
        raise InvalidError(f"a key must be a text of at most {_MAX_KEY} characters, not {shown(value)}")
    return _parsed_key(value)


def _normal(moniker: str) -> str:
    normal = normal_moniker(moniker)
    if normal is None:
        raise ValueError(f"not a moniker: {shown(moniker)}")
    return normal


def _that(is_right: Callable[[Any], object], what: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(f"not {what}: {shown(value)}")
        return value

    return AfterValidator(check)


def _leads(path: str, info: ValidationInfo) -> str:
    if "key" in info.data and not leads_to(path, info.data["key"]):
        raise ValueError(f"it does not lead to {info.data['key'].text[:200]}: {shown(path)}")
    return path


def _cut(most: int) -> BeforeValidator:
    return BeforeValidator(lambda v: plain_text(v[:most], most) if isinstance(v, str) else v)


Key = Annotated[ContentKey, PlainValidator(_key), PlainSerializer(lambda key: key.text)]
Moment = Annotated[Time, Field(ge=0)]
Name = Annotated[str, Strict(), Field(max_length=200)]
Client = Annotated[Name, _that(is_name, "a client")]
Stated = Annotated[str, Strict(), _cut(_MAX_STATED)]
"""Text that clients state may be of any length and content."""
Moniker = Annotated[Name, AfterValidator(_normal)]
Path = Annotated[str, Strict(), AfterValidator(_leads)]
"""The path that upstream is asked for the body called `key`, an earlier member."""
PathIfAny = Annotated[str, Strict(), AfterValidator(lambda path, info: path and _leads(path, info))]
Detail = Annotated[str, Strict(), _cut(MAX_DATAGRAM_BYTES), AfterValidator(quoted)]


class Use(NamedTuple):
    """How often a key was requested since the last event, and the body bytes sent, 0 when unknown."""

    key: Key
    times: Count
    sent_bytes: Count = 0


class Ask(NamedTuple):
    """How often a body that was not stored was requested; first after so many of the event's uses."""

    key: Key
    times: Count
    after: Count = 0


class FullRequests(NamedTuple):
    """How often a client requested one full package."""

    client: Client
    key: Key
    times: Count


class Refused(NamedTuple):
    """How often a delivery rule refused a client, the stream that it asked for, and what it states."""

    client: Client
    rule: Stated
    stream: Stated
    version: Stated
    language: Stated
    times: Count


class Part(NamedTuple):
    """A part of a body: where it begins and ends, and the body's length."""

    start: Count
    stop: Count
    length: Count


class Take(NamedTuple):
    """What a client was sent of a body: a part, 1 for all, 0 for nothing; and what it states."""

    client: Client
    key: Key
    version: Stated
    language: Stated
    sent: (
        Annotated[Part, _that(lambda part: part.start < part.stop <= part.length, "a part of a body")]
        | Annotated[int, Strict(), Field(ge=0, le=1)]
    )


class Group(NamedTuple):
    """How often clients that state the same were sent something of a stream."""

    stream: Name
    version: Stated
    language: Stated
    times: Count


def _rows(row: Any) -> Any:
    """Rows of an event, up to the limit; reading ends at the first wrong one."""
    return Annotated[tuple[row, ...], FailFast(), Field(max_length=_MAX_ROWS)]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)


Interval = tuple[Moment, Moment | None]
"""From when to when, in monotonic seconds; None: it still lasts."""
Phases = Annotated[dict[Name, Moment], _that(frozenset(REQUEST_PHASES).issuperset, "phases")]
_Mark = Annotated[tuple[Moment, ...], Field(min_length=MARK_LENGTH, max_length=MARK_LENGTH)]


class Timed(_Event):
    """What took how long: see gup.phases. `began` and the marks are monotonic."""

    began: Moment = 0.0
    seconds: Moment = 0.0
    phases: Phases = Field(default_factory=dict)
    queued: Interval | None = None
    held: Interval | None = None
    marks: Annotated[tuple[_Mark, ...], Field(max_length=MOST_MARKS + 4)] = ()


class Committed(Timed):
    """A body is in the store. `replaced` says that there was an older generation; `path` as in Begun, "" if
    no client asked. `upstream` gave its end; the times, the `resumes` and the bytes `received` over the
    WAN are those of its fill, if it is known.
    """

    type: Literal["committed"] = "committed"
    key: Key
    length: Count
    kind: Kind
    replaced: StrictBool = False
    path: PathIfAny = ""
    upstream: Stated = ""
    resumes: Count = 0
    received: Count | None = None


class Usage(_Event):
    """What one worker's clients requested, once a second: `uses` of stored bodies, `asked` of others; `fulls`
    by client, `refused` by rules, `groups` where no client may be named, `clients` all that sent requests,
    `shared` those of them whose address stands for many.
    """

    type: Literal["used"] = "used"
    at: Moment
    uses: _rows(Use) = ()  # type: ignore[valid-type]
    asked: _rows(Ask) = ()  # type: ignore[valid-type]
    fulls: _rows(FullRequests) = ()  # type: ignore[valid-type]
    refused: _rows(Refused) = ()  # type: ignore[valid-type]
    groups: _rows(Group) = ()  # type: ignore[valid-type]
    clients: _rows(Client) = ()  # type: ignore[valid-type]
    shared: _rows(Client) = ()  # type: ignore[valid-type]


class Taken(_Event):
    """What one worker's clients were sent, once a second."""

    type: Literal["taken"] = "taken"
    at: Moment
    rows: _rows(Take)  # type: ignore[valid-type]


class Begun(_Event):
    """A large body that a client requested has begun to arrive; `path` is the one requested upstream."""

    type: Literal["begun"] = "begun"
    key: Key
    path: Path


class Need(_Event):
    """A worker needs room now. `refused`: the disk refused a write, whatever its figures say."""

    type: Literal["need"] = "need"
    bytes: Count
    refused: StrictBool = False


class Unstorable(_Event):
    """A body was not stored: the disk refuses, or (not `disk`) a limit of the settings does not allow it.

    `length` is the body's, if it is known.
    """

    type: Literal["unstorable"] = "unstorable"
    key: Key
    detail: Detail = ""
    disk: StrictBool = True
    length: Count | None = None


class Failed(Timed):
    """A fill failed."""

    type: Literal["failed"] = "failed"
    key: Key
    problem: Annotated[Name, _that(PROBLEMS.__contains__, "a problem")]
    detail: Detail = ""


class Ended(Timed):
    """A fill has ended otherwise, or failed for no client."""

    type: Literal["ended"] = "ended"
    key: Key


_Waits = Annotated[tuple[tuple[Moment, Moment, Moment], ...], Field(max_length=20)]
_Behind = Annotated[tuple[Client, ...], Field(max_length=20)]
_KeyIfAny = Key | Literal[""]


class SlowRequest(NamedTuple):
    """A request that took long: who asked for what, how it was answered, and where its seconds went.

    `waits` are those for fills that other processes lead, `behind` the clients that had download slots.
    """

    client: Client
    key: _KeyIfAny
    result: Name
    status: Count
    sent_bytes: Count
    complete: StrictBool
    began: Moment
    seconds: Moment
    phases: Phases
    waits: _Waits
    behind: _Behind


class Slow(_Event):
    """Slow requests of one worker that have been answered, or whose client has gone."""

    type: Literal["slow"] = "slow"
    rows: _rows(SlowRequest)  # type: ignore[valid-type]


class FillUnderWay(Timed):
    """A fill that takes long, and its present phase."""

    key: Key
    phase: Name


class RequestUnderWay(NamedTuple):
    """A request that takes long, as SlowRequest."""

    client: Client
    key: _KeyIfAny
    began: Moment
    seconds: Moment
    phases: Phases
    waits: _Waits
    behind: _Behind


class UnderWay(_Event):
    """What takes long in one process at present, once a second; in place of what it told before."""

    type: Literal["under_way"] = "under_way"
    process: Count
    fills: _rows(FillUnderWay) = ()  # type: ignore[valid-type]
    requests: _rows(RequestUnderWay) = ()  # type: ignore[valid-type]


class Rejected(_Event):
    """A body that an upstream sent can't be the requested content."""

    type: Literal["rejected"] = "rejected"
    key: Key
    upstream: Stated
    detail: Detail = ""


class UpstreamTrouble(_Event):
    """A request to an upstream, or a check of it, failed."""

    type: Literal["upstream"] = "upstream"
    name: Stated
    detail: Detail = ""


class Unlisted(_Event):
    """A client requested a moniker that no catalogue lists."""

    type: Literal["unlisted"] = "unlisted"
    moniker: Moniker


class NewRevision(_Event):
    """A client requested a file of a revision that is newer than all known ones: see gup.cache.canary."""

    type: Literal["new"] = "new"
    key: Key
    path: Path


class Ordered(_Event):
    """A member says that it knows orders which this node does not."""

    type: Literal["ordered"] = "ordered"
    member: Name


Event = (
    Committed
    | Usage
    | Taken
    | Begun
    | Need
    | Unstorable
    | Failed
    | Ended
    | Slow
    | UnderWay
    | Rejected
    | UpstreamTrouble
    | Unlisted
    | NewRevision
    | Ordered
)
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(datagram: bytes) -> Event:
    """The event in a datagram; InvalidError when it is malformed."""
    with contextlib.suppress(ValidationError):  # nearly every one is right: half the cost of what follows
        return _EVENT.validate_json(datagram)
    members = parse(datagram, "event", MAX_DATAGRAM_BYTES)
    try:
        return _EVENT.validate_python(members)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidError(f"event: {quoted(where)[:100]}: {quoted(first['msg'])[:200]}") from error
