"""Operators' commands: prefetch content, apply limits, verify the store, reload the settings."""

import os
import re
from itertools import islice
from typing import Annotated, Literal

from aiohttp import web
from pydantic import AfterValidator, Field, model_validator

from gup.content.catalog import Label, Stream
from gup.control.api import schemas
from gup.control.api.endpoint import JSON, Count, Endpoint, Request
from gup.control.api.entries import same
from gup.control.prefetch import NotThereError, QueuedFetch
from gup.control.state import ControlState

_LETTER = r"[A-Za-z0-9_{}$!&'()*+,;=:@~-]|%7[BbDd]|%2[0-46-9A-Da-d]"
_NAME = rf"(?:{_LETTER})(?:{_LETTER}|\.){{0,230}}"
_PATH = f"^(?:/{_NAME}){{1,8}}$"


def _path(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError("must be a path such as /content/{MONIKER}/260101001/full.zip")
    return text


class Order(Request):
    """What to prefetch: a path, or the newest full packages of a product.

    Without version and language: for each that an upstream has, or that the product is known in.
    """

    path: Annotated[str, AfterValidator(_path)] | None = Field(
        None,
        description="Such as /content/{MONIKER}/260101001/full.zip.",
        json_schema_extra={"pattern": _PATH},
    )
    product: str | None = Field(None, min_length=1, max_length=200, description="As lists show it.")
    version: str | None = Field(None, max_length=64, description="As an upstream's setting has it.")
    language: str | None = Field(None, max_length=64, description="As an upstream's setting has it.")

    @model_validator(mode="after")
    def _is_one(self) -> "Order":
        if (self.path is None) == (self.product is None):
            raise ValueError("give either path or product")
        return self


class Queue(Request):
    """Which part of the queue."""

    limit: Count = Field(100, description="How many at most.")


class Verify(Request):
    """Whether to repair damage."""

    repair: Literal["0", "1"] = Field("0", description="1 repairs what is damaged.")


async def order(state: ControlState, query: Order) -> schemas.PrefetchOrder:
    """Fetch content before clients ask for it, while no client's fill needs the link.

    In a cluster each node keeps it; it crosses the WAN once.
    """
    try:
        if query.path is not None:
            queued = state.prefetcher.order(query.path, query.version, query.language)
        else:
            queued = state.prefetcher.order_newest(_newest(state, query))
    except NotThereError as error:
        raise web.HTTPNotFound(text=str(error)) from error
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    book, missing = state.dependencies.book, tuple[str, ...]()
    if book is not None:
        wanted = [{"key": fetch.key.text, "path": fetch.path} for fetch in queued]
        missing = await book.issue("prefetch", {"wanted": wanted})
    rows = [prefetch_row(state, fetch) for fetch in queued]
    return schemas.PrefetchOrder(wanted=rows, unconfirmed=list(missing))


def _newest(state: ControlState, query: Order) -> dict[Stream, str]:
    """The newest revision of each stream of a product: of those held, and those that clients were sent."""
    asked = {stream: known.newest for stream, known in state.prefetcher.revisions.streams.items()}
    newest: dict[Stream, str] = {}
    for revisions in (state.index.rows.newest_held(), state.traffic.newest(), asked):
        for stream, revision in revisions.items():
            newest[stream] = max(revision, newest.get(stream, ""))

    def fits(stream: Stream) -> bool:
        called = state.dependencies.label_of(stream, "") or Label(stream[2], "", "", "")
        return (
            same(query.product, called.product)
            and (query.version is None or same(query.version, stream[0], called.version))
            and (query.language is None or same(query.language, stream[1], called.language))
        )

    found = {stream: revision for stream, revision in newest.items() if revision and fits(stream)}
    if not found:
        raise NotThereError(
            f"product: no revision of {query.product!r} is known: nothing of it is stored, and no client was "
            "sent any. Give the path, or a product as `gup cache list` shows it"
        )
    return found


async def queue(state: ControlState, query: Queue) -> schemas.PrefetchQueue:
    """The prefetch queue: in progress, queued, and results."""
    queued = state.prefetcher.queue
    return schemas.PrefetchQueue(
        enabled=state.settings.prefetch.enabled,
        pending=queued.pending,
        wanted=[prefetch_row(state, fetch) for fetch in islice(reversed(queued.rows.values()), query.limit)],
        left_out=[
            schemas.SkippedStream(stream="/".join(stream), product=state.label(stream)[0], why=why)
            for stream, why in state.prefetcher.left_out.items()
        ],
    )


def prefetch_row(state: ControlState, fetch: QueuedFetch) -> schemas.Prefetch:
    product, language = state.label((fetch.key.version, fetch.key.language, fetch.key.stream))
    return schemas.Prefetch(**fetch.model_dump(mode="json"), product=product, language=language)


async def evict(state: ControlState) -> schemas.Evictions:
    """Apply the limits now."""
    done = await state.evictor.evict()
    freed_bytes = sum(one.size_bytes for one in done)
    return schemas.Evictions.model_validate({"evicted": done, "freed_bytes": freed_bytes})


async def verification(state: ControlState) -> schemas.Verification:
    """Progress and findings of the last verification."""
    return state.verification.progress()


async def verify(state: ControlState, query: Verify) -> schemas.Verification:
    """Begin to check everything in the cache directory."""
    if not state.verification.start(repair=query.repair == "1"):
        raise web.HTTPConflict(text="a verification is in progress")
    return state.verification.progress()


async def reload(state: ControlState) -> schemas.Reloaded:
    """Read the settings again."""
    result = await state.dependencies.reload()
    return schemas.Reloaded(
        reloaded=not result.problems,
        problems=list(result.problems),
        changed=list(result.changed),
        waiting=list(result.waiting),
    )


async def test_alarms(state: ControlState) -> schemas.TestMessages:
    """Send a test message to the receivers of alarms, and wait for their answers."""
    if not (sent := await state.notifications.test()):
        raise web.HTTPConflict(text="there is no receiver: set alarms.webhook or alarms.command")
    return schemas.TestMessages(sent=sent)


async def upgrade(state: ControlState) -> schemas.Upgraded:
    """Have the program that is installed now take over, without an interruption."""
    before = [worker["pid"] for worker in state.dependencies.workers()]
    problems = await state.dependencies.upgrade()
    return schemas.Upgraded.model_validate(
        {"upgraded": not problems, "problems": problems, "pid": os.getpid(), "workers": before}
    )


ENDPOINTS = (
    Endpoint("GET", "/api/v1/prefetch", queue),
    Endpoint("POST", "/api/v1/prefetch", order, takes=JSON, status=202, problems=(404,)),
    Endpoint("POST", "/api/v1/evict", evict),
    Endpoint("GET", "/api/v1/verify", verification),
    Endpoint("POST", "/api/v1/verify", verify, status=202, problems=(409,)),
    Endpoint("POST", "/api/v1/reload", reload),
    Endpoint("POST", "/api/v1/alarms/test", test_alarms, problems=(409,)),
    Endpoint("POST", "/api/v1/upgrade", upgrade),
)
