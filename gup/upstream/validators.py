"""An upstream's validators (RFC 9110 section 8.8): whether two of its answers are of one body; no I/O."""

import re
from dataclasses import dataclass

import xxhash

from gup.jsonmodel import Form, InvalidError, shown, text
from gup.units import parse_http_date

_LONGEST = 512
_SENDABLE = Form(re.compile("[ -~]*"), "text of a header field")


@dataclass(frozen=True, slots=True)
class Validators:
    """Of one answer of one upstream; those of two upstreams are not comparable.

    `etag` may be weak. `strong_date`: the answer's `Date` is at least a second later than its
    `Last-Modified`, which makes that a strong validator (section 8.8.2.2).
    """

    etag: str | None = None
    last_modified: str | None = None
    strong_date: bool = False

    @classmethod
    def of(cls, etag: str | None, last_modified: str | None, date: str | None) -> "Validators":
        """From the fields of an answer. What is no text that can be sent back is only compared."""
        modified_at, sent_at = (parse_http_date(text) if text else None for text in (last_modified, date))
        strong_date = modified_at is not None and sent_at is not None and sent_at > modified_at
        return cls(
            bounded(etag) if etag else None, bounded(last_modified) if last_modified else None, strong_date
        )

    @property
    def if_range(self) -> str | None:
        """What goes into `If-Range`: a strong tag, else a date that is strong (section 13.1.5).

        Beside a weak tag the date is sent too, which section 13.1.5 does not provide for: servers that tag
        weakly compare the date, and one that does not sends the whole body.
        """
        if self.etag is not None and not _is_weak(self.etag):
            return self.etag
        return self.last_modified if self.strong_date else None

    def same_as(self, now: "Validators", *, vouched: bool = False) -> bool:
        """Whether nothing in a later answer of the same upstream tells of another body.

        `vouched`: that answer is a 206 to a request with `If-Range`, which may leave validators out
        (section 15.3.7). Where the earlier answer had validators and the later one shares none of them, the
        body counts as another.
        """
        tagged = self.etag is not None and now.etag is not None
        if self.etag is not None and now.etag is not None:
            if self.etag.removeprefix("W/") != now.etag.removeprefix("W/"):
                return False
            if not _is_weak(self.etag) and not _is_weak(now.etag):
                return True
        if self.last_modified is not None and now.last_modified is not None:
            return self.last_modified == now.last_modified
        nothing = (None, None)
        both = (self.etag, self.last_modified), (now.etag, now.last_modified)
        return tagged or (vouched and both[1] == nothing) or both == (nothing, nothing)

    def to_json(self) -> list[object]:
        return [self.etag, self.last_modified, self.strong_date]

    @classmethod
    def from_json(cls, fields: object) -> "Validators":
        """InvalidError when `fields` are none."""
        if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[2], bool):
            raise InvalidError(f"validators must be an array of two texts and a flag, not {shown(fields)}")
        etag, last_modified = (
            None if one is None else text(one, "a validator", _LONGEST, _SENDABLE) for one in fields[:2]
        )
        return cls(etag, last_modified, fields[2])


def _is_weak(etag: str) -> bool:
    return not etag.startswith('"')


def bounded(text: str) -> str:
    """`text`, or where it is long or has other bytes than printable ASCII, a weak tag made from it."""
    if len(text) <= _LONGEST and text.isascii() and text.isprintable():
        return text
    return f'W/"{xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))}"'
