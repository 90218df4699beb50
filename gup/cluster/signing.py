"""Signatures with the site's secret: of rows and orders in the engine, of members' questions and answers.

Pure, but for reading the files. What is not signed with one of the site's secrets was written by nobody.

A question is a request to a member's port. It carries these fields besides its own, whose names begin with
`GUP-` too: `GUP-From` and `GUP-To` (names of both nodes), `GUP-Time` (the engine's, ms), `GUP-Nonce`,
`GUP-Signature`. The signature is HMAC-SHA-256, in hex, over lines: what it is, the site, method, target,
and each `GUP-` field as `name: value`, sorted, the names in lower case. The answer's also covers the status
and the fields in `ANSWER_FIELDS`; it repeats the nonce, and tells the time.
"""

import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gup.files import FileError, read_file

_MAX_BYTES = 4096
_LEAST = 16
_HOW = "such as made by: openssl rand -hex 32"
TIME_TOLERANCE_MS = 30_000
SIGNATURE = "gup-signature"
ANSWER_FIELDS = frozenset(
    {"age", "content-length", "content-range", "content-type", "etag", "last-modified", "retry-after"}
)
"""Of an answer's head, what is signed besides its `GUP-` fields."""

Fields = Iterable[tuple[str, str]]
"""Names and values of header fields, in any case."""


# --- the files


def read_secrets(path: Path | None) -> tuple[bytes, ...]:
    """The secrets of `cluster.secret_file`: the first signs, all are accepted. FileError."""
    assert path is not None
    right = (
        f"it must hold a secret of at least {_LEAST} characters without spaces, {_HOW}; or two, one a line"
    )
    try:
        lines = read_file(path, _MAX_BYTES + 1)
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    found = tuple(line.strip() for line in lines.splitlines() if line.strip())
    good = [line for line in found if len(line) >= _LEAST and all(0x20 < byte < 0x7F for byte in line)]
    if len(lines) > _MAX_BYTES or not 1 <= len(good) == len(found) <= 2:
        raise FileError(f"{str(path)!r} holds no secret: {right}")
    return found


def read_password(path: Path) -> str:
    """The engine's password; FileError."""
    right = "it must hold the engine's password, in one line, without spaces"
    try:
        text = read_file(path, _MAX_BYTES + 1)
        password = text.decode().strip()
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    except UnicodeDecodeError:
        password = ""
    if len(password.split()) != 1 or len(text) > _MAX_BYTES or not password.isprintable():
        raise FileError(f"{str(path)!r} holds no password: {right}")
    return password


# --- signatures

Refusal = Literal["forged", "time"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question that was asked, by this node or of it. Its answer is signed and verified with it."""

    asker: str
    member: str
    method: str
    target: str
    nonce: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """All its `GUP-` fields, their names in lower case; with the signature they are what is sent."""


@dataclass(frozen=True, slots=True)
class Refused:
    """`time`: signed well, but too early or late; the asker may learn the time from the signed answer."""

    reason: Refusal
    question: Question | None = None


class Signer:
    """Signs and verifies for one site."""

    def __init__(self, site: str, keys: tuple[bytes, ...]) -> None:
        assert keys
        self._site, self._keys = site, keys

    # --- texts in the engine

    def seal(self, what: str, text: str) -> str:
        """`text` with a signature before it; `what` it is belongs to it, such as "row"."""
        return f"{self._signature(what, (text,))} {text}"

    def unseal(self, what: str, sealed: str) -> str | None:
        """The text; None when the signature is not the site's."""
        signature, _, text = sealed.partition(" ")
        return text if self._verifies(signature, what, (text,)) else None

    # --- questions and answers

    def ask(
        self, asker: str, member: str, method: str, target: str, time_ms: int, fields: Fields = ()
    ) -> Question:
        """A question to `member`, signed; `fields` are its own `GUP-` fields."""
        nonce = secrets.token_hex(16)
        all_fields = {name.lower(): value for name, value in fields}
        assert all(name.startswith("gup-") for name in all_fields)
        all_fields |= {
            "gup-from": asker,
            "gup-to": member,
            "gup-time": str(time_ms),
            "gup-nonce": nonce,
        }
        all_fields[SIGNATURE] = self._signature("question", _question_lines(method, target, all_fields))
        return Question(asker, member, method, target, nonce, all_fields)

    def verify_question(
        self, node: str, method: str, target: str, fields: Fields, times_ms: Iterable[int]
    ) -> Question | Refused:
        """What `node` is asked. `times_ms` are the engine's times that count as now."""
        own = _own_fields(fields)
        if own is None or not {"gup-from", "gup-to", "gup-time", "gup-nonce"} <= own.keys():
            return Refused("forged")
        signature = own.get(SIGNATURE, "")
        if own["gup-to"] != node or not own["gup-time"].isascii() or not own["gup-time"].isdecimal():
            return Refused("forged")
        if not self._verifies(signature, "question", _question_lines(method, target, own)):
            return Refused("forged")
        question = Question(own["gup-from"], node, method, target, own["gup-nonce"], own)
        told = int(own["gup-time"][:20])
        if not any(abs(told - now) <= TIME_TOLERANCE_MS for now in times_ms):
            return Refused("time", question)
        return question

    def answer(self, question: Question, status: int, time_ms: int, fields: Fields = ()) -> dict[str, str]:
        """The fields to add to an answer that has this status and these `fields`: all those to be signed."""
        own = {"gup-nonce": question.nonce, "gup-time": str(time_ms)}
        lines = _answer_lines(question, status, [*fields, *own.items()])
        assert lines is not None, "a field is given twice"
        return own | {SIGNATURE: self._signature("answer", lines)}

    def verify_answer(self, question: Question, status: int, fields: Fields) -> bool:
        """Whether the head is the member's answer to this question. Its time is in `gup-time`."""
        fields = list(fields)
        own, lines = _own_fields(fields), _answer_lines(question, status, fields)
        if own is None or lines is None or own.get("gup-nonce") != question.nonce:
            return False
        return self._verifies(own.get(SIGNATURE, ""), "answer", lines)

    # --- HMAC

    def _signature(self, what: str, lines: Iterable[str], key: bytes | None = None) -> str:
        message = "\n".join(("gup-1", what, self._site, *lines)).encode("utf-8", "surrogateescape")
        return hmac.digest(key or self._keys[0], message, "sha256").hex()

    def _verifies(self, signature: str, what: str, lines: Iterable[str]) -> bool:
        lines, given = tuple(lines), signature.encode("utf-8", "surrogateescape")
        right = [hmac.compare_digest(given, self._signature(what, lines, key).encode()) for key in self._keys]
        return any(right)


def _own_fields(fields: Fields) -> dict[str, str] | None:
    """The `GUP-` fields by their names in lower case; None when one comes twice."""
    own: dict[str, str] = {}
    for name, value in fields:
        lower = name.lower()
        if lower.startswith("gup-"):
            if lower in own:
                return None
            own[lower] = value
    return own


def _question_lines(method: str, target: str, own: Mapping[str, str]) -> list[str]:
    return [method, target, *_lines(own)]


def _answer_lines(question: Question, status: int, fields: Fields) -> list[str] | None:
    """None when a field that is signed comes twice."""
    signed: dict[str, str] = {}
    for name, value in fields:
        lower = name.lower()
        if lower.startswith("gup-") or lower in ANSWER_FIELDS:
            if lower in signed:
                return None
            signed[lower] = value
    head = [question.asker, question.member, question.method, question.target, str(status)]
    return [*head, *_lines(signed)]


def _lines(fields: Mapping[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in sorted(fields.items()) if name != SIGNATURE]
