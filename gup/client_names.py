"""Names of clients in the log and in reports: their addresses, or keyed hashes of them."""

import hashlib
import ipaddress
import logging
import os
import re
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Literal

from gup.files import lock_range

Mode = Literal["full", "hashed", "off"]

_log = logging.getLogger("gup.client_names")
_HASHED = re.compile(r"h-[0-9a-f]{16}")
_KEY_BYTES = 32


def read_key(path: Path) -> bytes:
    """The site's key, created if missing; of several processes that create one the first wins.

    If it can't be stored, this process uses a key of its own until it ends, and its hashes match no other's.
    """
    try:
        key = bytes.fromhex((path.read_text() if path.exists() else "") or _create(path))
        if len(key) != _KEY_BYTES:
            raise ValueError(f"{path} is not a key of {_KEY_BYTES} bytes")  # noqa: TRY301 - told as what can not be read is
    except (OSError, ValueError) as error:
        _log.warning("the key of hashed addresses can't be kept, so they change at the next start: %s", error)
        return secrets.token_bytes(_KEY_BYTES)
    return key


def _create(path: Path) -> str:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "r+", encoding="ascii") as file:
        lock_range(fd, 0, wait=True)  # closing frees it
        text = file.read()  # written by another process, which was first
        if not text:
            text = secrets.token_hex(_KEY_BYTES)
            file.write(text)
            file.flush()
            os.fsync(fd)
        return text


@lru_cache(maxsize=4096)
def is_name(text: str) -> bool:
    """Whether `text` is a client's name: a well-formed address, or a hash."""
    try:
        return is_hashed(text) or str(ipaddress.ip_address(text)) == text
    except ValueError:
        return False


def is_hashed(name: str) -> bool:
    return bool(_HASHED.fullmatch(name))


class ClientNames:
    """Clients' names under one key. Each address has one spelling; mapped IPv6 becomes IPv4."""

    def __init__(self, mode: Mode, key: bytes) -> None:
        self.mode = mode
        """Replaced by a reload only."""
        self._plain = lru_cache(20_000)(_plain)

        def hashed(address: str) -> str:
            return "h-" + hashlib.blake2b(_plain(address).encode(), key=key, digest_size=8).hexdigest()

        self.hashed = lru_cache(20_000)(hashed)

    def of(self, address: str) -> str:
        """The name that identifies a client; with mode "off" a hash that is neither shown nor kept."""
        return self._plain(address) if self.mode == "full" else self.hashed(address)

    def shown(self, address: str) -> str | None:
        """The name that the log may show; None with mode "off"."""
        return None if self.mode == "off" else self.of(address)


def _plain(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
