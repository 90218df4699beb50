"""Tokens of the control plane: made, read from files, and compared."""

import base64
import hashlib
import hmac
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from gup.files import FileError, read_file, replace_file

LOCAL_NAME = "admin-token"
"""File in `run/` of the cache directory, made at each start for commands on the same machine."""

_TOKEN = re.compile(r"[!-~]+")  # more than RFC 6750 has, but what a header can hold in one piece
_SHORT = 16
_MAX_BYTES = 4096


class Right(IntEnum):
    """What a token allows; each includes the one before."""

    NONE = 0
    READ = 1
    CHANGE = 2


@dataclass(frozen=True, slots=True)
class Presented:
    """The token of an Authorization header, and whether a browser may have added it."""

    token: str
    by_browser: bool = False


def presented(header: str | None) -> Presented | None:
    """The token of Bearer (RFC 6750), or Basic's password (RFC 7617); a malformed one matches nothing."""
    if header is None:
        return None
    scheme, _, rest = header.strip().partition(" ")
    if scheme.lower() != "basic":
        return Presented(rest.strip() if scheme.lower() == "bearer" else "")
    password = ""
    with suppress(ValueError):
        password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
    return Presented(password, by_browser=True)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Digests of the valid tokens, empty for those that are not set."""

    change: bytes = b""
    read: bytes = b""
    local: bytes = b""

    @classmethod
    def of(cls, *, change: str = "", read: str = "", local: str = "") -> "Tokens":
        return cls(*(_digest(token) if token else b"" for token in (change, read, local)))

    def right(self, shown: Presented | None, *, near: bool) -> Right | None:
        """What the token allows; None for an unknown one. All are compared, in constant time.

        The local token is valid on its own machine only (`near`); what a browser adds allows reading.
        """
        if shown is None:
            return Right.NONE
        digest = _digest(shown.token)
        reads, changes, is_local = (
            hmac.compare_digest(digest, known) for known in (self.read, self.change, self.local)
        )
        found = Right.CHANGE if changes or (is_local and near) else Right.READ if reads else None
        return min(found, Right.READ) if found is not None and shown.by_browser else found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_token(path: Path) -> str:
    """The token in a file; FileError with what would be right."""
    try:
        text = read_file(path, _MAX_BYTES + 1)
    except FileError as error:
        raise FileError(f"{error}: it must hold a token, {HOW}") from error
    token = text.decode("utf-8", "replace").strip()
    if not token:
        raise FileError(f"{str(path)!r} is empty: it must hold a token, {HOW}")
    if len(text) > _MAX_BYTES or not _TOKEN.fullmatch(token):
        raise FileError(f"{str(path)!r} holds no token: it must be one line of ASCII without spaces, {HOW}")
    return token


HOW = "such as made by: openssl rand -hex 32"


def token_doubts(path: Path) -> Iterator[str]:
    """What makes a token file unsafe, as sentences."""
    with suppress(OSError, FileError):
        yield from readable_by_all(path)
        if len(read_token(path)) < _SHORT:
            yield f"the token in {path} is short enough to be guessed: take one {HOW}"


def readable_by_all(path: Path) -> Iterator[str]:
    if path.stat().st_mode & stat.S_IROTH:
        yield f"{path} can be read by everybody on this machine: chmod o-r {path}"


def local_path(run: Path) -> Path:
    return run / LOCAL_NAME


def make_local_token(run: Path) -> None:
    """Write a new token into `run/`, readable by its owner only; OSError."""
    replace_file(local_path(run), f"{secrets.token_hex(32)}\n".encode(), durable=False)
