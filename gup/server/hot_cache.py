"""The hot cache: ready-made responses of one worker, found by a request's bytes without parsing them.

A row is found by a request's whole head, byte for byte; or, since heads differ between clients, by its
target, once one regular expression has recognised the head as a plain GET. Rows hold only decisions of the
handler, for entries that are open, verified and fresh: same bytes, same decision.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gup.cache.open_entries import Entry
from gup.cache.records import CHUNK_BYTES
from gup.content.client_identity import NOTHING, Stated
from gup.content.key import Kind
from gup.server.downloads import is_download
from gup.server.ranges import Span

MAX_HEAD_BYTES = 2048  # longer heads are not learned
_MOST_ROWS = 8192
SMALL_BODY_BYTES = 32 * 1024  # a body up to this size is sent with its head in one `send`
_MOST_MESSAGE_BYTES = 4 << 20  # of all messages that are kept for a second
_WARM_SECONDS = 5.0  # how long a body of one chunk is not checked again for being in the page cache


@dataclass(slots=True, eq=False)
class HotRow:
    """A ready-made response. `fresh_until` is monotonic (None: for ever), `validated_at` wall time, for Age.

    `planned` is the head of a plain GET, its Age 0. `download`: whether it takes a slot. `client` is what the
    client with this head states; unknown for a row found by its target. `date` is a new object every second,
    so rendered heads are compared with it by identity.
    """

    entry: Entry
    kind: Kind
    planned: bytes
    fresh_until: float | None
    sent_at: int
    stream_at: int  # position of the counter of its body bytes
    client: Stated = NOTHING
    key_text: str = field(init=False)
    length: int = field(init=False)
    validated_at: float = field(init=False)
    download: bool = field(init=False)
    small: bool = field(init=False)
    whole: Span = field(init=False)
    _before_length: bytes = field(init=False)
    _after_length: bytes = field(init=False)
    message: bytes | None = None  # head and body together, valid while `message_date` is the date
    message_date: bytes | None = None
    _head: bytes = b""
    _head_date: bytes | None = None
    _warm_until: float = 0.0

    def __post_init__(self) -> None:
        record = self.entry.record
        self.key_text, self.length, self.validated_at = record.key.text, record.length, record.validated_at
        self.download = is_download(self.kind, record.length)
        self.small = self.length <= SMALL_BODY_BYTES
        self.whole = Span(0, self.length)
        rest, length_line = self.planned.partition(b"\r\nAge: 0\r\n")[2], b"\r\nContent-Length: %d\r\n"
        self._before_length, _, self._after_length = rest.partition(length_line % self.length)

    def head(self, date: bytes, wall_now: float, span: Span) -> bytes:
        """The head for `span`: a 200 for `whole` itself, else a 206. Age is exact to a second, as Date is."""
        age = max(0, int(wall_now - self.validated_at))
        before, after = self._before_length, self._after_length
        if span is not self.whole:
            start, stop = span
            return (
                b"HTTP/1.1 206 Partial Content\r\nDate: %b\r\nAge: %d\r\n%b\r\nContent-Length: %d\r\n"
                b"Content-Range: bytes %d-%d/%d\r\n%b"
            ) % (date, age, before, stop - start, start, stop - 1, self.length, after)
        if self._head_date is not date:
            self._head_date = date
            self._head = b"HTTP/1.1 200 OK\r\nDate: %b\r\nAge: %d\r\n%b\r\nContent-Length: %d\r\n%b" % (
                (date, age, before, self.length, after)
            )
        return self._head

    def in_page_cache(self, start: int, length: int, now: float) -> bool:
        """Whether these bytes can be sent without waiting for the disk."""
        if now < self._warm_until:
            return True
        if self.entry.available(start, length) < length:
            return False
        if self.length <= CHUNK_BYTES:
            self._warm_until = now + _WARM_SECONDS
        return True

    def read(self) -> bytes | None:
        """All bytes of a small body, if they are in the page cache."""
        if self.entry.available(0, 1) > 0:
            with contextlib.suppress(OSError):
                body = os.pread(self.entry.fd, self.length, 0)
                if len(body) == self.length:
                    return body
            self.entry.unreadable()
        return None


Epochs = tuple[int, int, int]
# A row, the requested span, what identifies the client, whether the connection ends.
Found = tuple[HotRow, Span, Stated | bytes, bool]


class HotCache:
    """Bounded: the oldest rows are dropped first; rows still asked for are learned again.

    `shared_epochs` reads those of policy and store: a change of the first drops all rows, of the second those
    whose file has no link left.
    """

    def __init__(
        self, shared_epochs: Callable[[], tuple[int, int]], close_removed: Callable[[], object]
    ) -> None:
        self._by_head: dict[bytes, HotRow] = {}
        self._by_target: dict[bytes, HotRow] = {}
        self._shared = shared_epochs
        self._close_removed = close_removed
        self._seen = shared_epochs()
        self._drops = 0
        self._with_message: list[HotRow] = []
        self._message_bytes = 0

    # --- looking up

    def look_up(self, head: bytes) -> Found | None:
        """The row for a whole head, or for bytes that may be one; None when they must be parsed."""
        row = self._by_head.get(head)
        if row is not None and self._valid(row):
            return row, row.whole, row.client, False
        plain, last = _plain_head(head), False
        if plain is None:
            # A client that sends `Connection: close` wants no further response; the rest may be plain.
            rest, found = _CLOSE.subn(b"", head)
            plain, last = _plain_head(rest) if found == 1 else None, True
        if plain is None:
            return None
        target, *positions = plain.groups()
        row = self.find_target(target)
        if row is None or (last and not row.small):
            return None
        if positions == _NO_RANGE:
            return row, row.whole, head, last
        span = _span(row.length, positions)
        return None if span is None or last else (row, span, head, False)

    def find_target(self, target: bytes) -> HotRow | None:
        """The row of a plain, keep-alive HTTP/1.1 GET for `target`."""
        row = self._by_target.get(target)
        return row if row is not None and self._valid(row) else None

    def _valid(self, row: HotRow) -> bool:
        if self._shared() != self._seen:
            self.refresh()
            return False
        if row.fresh_until is not None and time.monotonic() >= row.fresh_until:
            return False
        return row.entry.all_verified

    # --- learning and forgetting

    @property
    def epochs(self) -> Epochs:
        """Read before a decision; `learn` refuses the decision when they have changed since."""
        return (*self._shared(), self._drops)

    def learn(self, head: bytes | None, target: bytes | None, row: HotRow, epochs: Epochs) -> None:
        """Store a decision made while `epochs` were in force; without `target`, for that head only."""
        if epochs != self.epochs:
            return
        if epochs[:2] != self._seen:
            self.refresh()
        if head is not None and len(head) <= MAX_HEAD_BYTES:
            _insert(self._by_head, head, row)
        if target is not None:
            _insert(self._by_target, target, row)

    def drop(self) -> None:
        """Forget everything: the settings have changed in this process.

        The policy's epoch is not enough: it rises when new settings are sent, so a decision by the old ones
        may still be learned after it.
        """
        self._by_head.clear()
        self._by_target.clear()
        self.forget_messages()
        self._drops += 1

    def refresh(self) -> None:
        policy, store = self._shared()
        if policy != self._seen[0]:
            self.drop()
        if store != self._seen[1]:
            self._close_removed()
            for table in (self._by_head, self._by_target):
                for name in [n for n, row in table.items() if row.entry.is_removed]:
                    del table[name]
        self._seen = (policy, store)

    # --- messages: head and body of small bodies, kept for a second

    def make_message(self, row: HotRow, date: bytes, wall_now: float) -> bytes | None:
        """Head and body together, kept while the date is right; None when the body is not in the page cache.

        This is not a cache of bodies: the body is read again every second.
        """
        body = row.read()
        if body is None:
            return None
        message = row.head(date, wall_now, row.whole) + body
        if self._message_bytes + len(message) <= _MOST_MESSAGE_BYTES:
            row.message, row.message_date = message, date
            self._with_message.append(row)
            self._message_bytes += len(message)
        return message

    def forget_messages(self) -> None:
        for row in self._with_message:
            row.message = row.message_date = None
        self._with_message.clear()
        self._message_bytes = 0


def _insert(table: dict[bytes, HotRow], name: bytes, row: HotRow) -> None:
    if len(table) >= _MOST_ROWS:
        del table[next(iter(table))]
    table[name] = row


# --- plain heads: A strict subset of what gup.server.request accepts: origin form, HTTP/1.1, keep-alive, one
# Host, no field that matters here except one range. Other heads are parsed. With six fields this takes 1.1
# µs, the parser with its checks 22.

# Names that begin with none of the letters of Connection, Content-Length, Expect, Host, If-…, Range, Upgrade,
# Proxy-Connection, Transfer-Encoding and Via, and three harmless ones that do. All quantifiers are
# possessive: a head is matched in one pass.
_HARMLESS = (
    rb"(?:[ABDFGJKLMNOQSWXYZabdfgjklmnoqswxyz][!#$%&'*+.^_`|~0-9A-Za-z-]*+|User-Agent|Cache-Control|Pragma)"
    rb":[\t\x20-\x7e\x80-\xff]*+\r\n"
)
_KEEP_ALIVE = rb"(?i:connection):[ \t]*+(?i:keep-alive)[ \t]*+\r\n"
_HOST = (
    rb"(?i:host):[ \t]*+(?:[A-Za-z0-9._~!$&'()*+,;=%-]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]{0,5}+)?+[ \t]*+\r\n"
)
_RANGE = rb"(?i:range):[ \t]*+bytes=([0-9]{1,18}+)-([0-9]{1,18}+)[ \t]*+\r\n"
_OTHERS = rb"(?:" + _HARMLESS + rb"|" + _KEEP_ALIVE + rb"){0,30}+"
_PERHAPS_RANGE = rb"(?:" + _RANGE + _OTHERS + rb")?+"

PLAIN_HEAD = re.compile(
    rb"GET (/[\x21-\x7e]*+) HTTP/1\.1\r\n"
    + (_OTHERS + _PERHAPS_RANGE + _HOST + _OTHERS + _PERHAPS_RANGE)
    + rb"\r\n"
)
"""For `fullmatch`. Groups: the target, first and last of a range before Host, the same of one after it."""
_CLOSE = re.compile(rb"\r\n(?i:connection):[ \t]*+(?i:close)[ \t]*+(?=\r\n)")

_plain_head = PLAIN_HEAD.fullmatch
_NO_RANGE = [None] * 4


def _span(length: int, positions: list[bytes | None]) -> Span | None:
    """One range that can be satisfied, before Host or after it; None for any other."""
    first, last, other_first, other_last = positions
    if first is not None and other_first is not None:
        return None
    start, stop = int(first or other_first or 0), min(int(last or other_last or 0) + 1, length)
    return Span(start, stop) if start < stop else None
