"""Names of clients in the log and in reports: their addresses, or keyed hashes of them."""

import contextlib
import hashlib
import ipaddress
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Literal

Mode = Literal["full", "hashed", "off"]

_log = logging.getLogger("gup.client_names")
_HASHED = re.compile(r"h-[0-9a-f]{16}")
_KEY_BYTES = 32
_MOST_REMEMBERED = 20_000


def read_key(path: Path) -> bytes:
    """The site's key, created if there is none; of several processes that create one the first wins.

    If it can't be stored, this process uses a key of its own until it ends, whose hashes no other knows.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, secrets.token_bytes(_KEY_BYTES).hex().encode())
            os.fsync(fd)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            os.close(fd)
            temporary.unlink()
        return _read(path)
    except (OSError, ValueError) as error:
        _log.warning("the key of hashed addresses can't be kept, so they change at the next start: %s", error)
        return secrets.token_bytes(_KEY_BYTES)


def _read(path: Path) -> bytes:
    key = bytes.fromhex(path.read_text())
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{path} is no key")
    return key


def is_name(text: str) -> bool:
    """Whether `text` is a client's name: a well-formed address, or a hash."""
    if _HASHED.fullmatch(text):
        return True
    try:
        return str(ipaddress.ip_address(text)) == text
    except ValueError:
        return False


def is_hashed(name: str) -> bool:
    return bool(_HASHED.fullmatch(name))


class ClientNames:
    """Clients' names under one key. Each address has one spelling; mapped IPv6 becomes IPv4."""

    def __init__(self, mode: Mode, key: bytes) -> None:
        self.mode = mode
        """Replaced by a reload only."""
        self._key = key
        self._plain: dict[str, str] = {}
        self._hashed: dict[str, str] = {}

    def of(self, address: str) -> str:
        """The name that identifies a client; with mode "off" a hash that is neither shown nor kept."""
        return self._remembered(address, self.mode != "full")

    def shown(self, address: str) -> str | None:
        """The name that the log may show, if any."""
        return None if self.mode == "off" else self.of(address)

    def hashed(self, address: str) -> str:
        return self._remembered(address, True)

    def _remembered(self, address: str, hashed: bool) -> str:
        table = self._hashed if hashed else self._plain
        name = table.get(address)
        if name is None:
            name = _plain(address)
            if hashed:
                name = "h-" + hashlib.blake2b(name.encode(), key=self._key, digest_size=8).hexdigest()
            if len(table) >= _MOST_REMEMBERED:
                table.clear()
            table[address] = name
        return name


def _plain(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
