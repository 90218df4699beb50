"""Tokens and certificate of the control plane: checked before a start, read again on reload; answers none."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

from gup.config import Listen
from gup.control.guard import Door
from gup.control.tls import CertificateError, Renewable, key_doubts, load_context
from gup.control.tokens import TokenError, Tokens, doubts, local_path, read_token
from gup.errors import SettingsError

_log = logging.getLogger("gup.control.access")


def require_access(listen: Listen) -> None:
    """SettingsError with a sentence for each token or certificate that can't be used."""
    problems: list[str] = []
    tokens = {}
    for name in ("admin_token_file", "admin_read_token_file"):
        file = getattr(listen, name)
        try:
            tokens[name] = read_token(file) if file is not None else name
        except TokenError as error:
            problems.append(f"listen.{name}: {error}")
    if len(tokens) == 2 and len(set(tokens.values())) == 1:
        problems.append(
            "listen.admin_read_token_file: it holds the token of admin_token_file; they must differ"
        )
    try:
        _context(listen)
    except CertificateError as error:
        problems.append(f"listen.admin_cert_file: {error}")
    if problems:
        raise SettingsError(problems)


def _context(listen: Listen) -> ssl.SSLContext | None:
    if listen.admin_cert_file is None or listen.admin_key_file is None:
        return None
    return load_context(listen.admin_cert_file, listen.admin_key_file)


class Access:
    """What holds at present. Changed by `open` and `renew` only; by itself, nobody may change anything."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.door = Door()
        self._tls: Renewable | None = None
        self._wrong_tokens = 0

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For the listening socket; None without TLS."""
        return self._tls.context if self._tls is not None else None

    def note_wrong_token(self, peer: str | None) -> None:
        """Somebody showed a token that is not ours; the 1st, 2nd, 4th, 8th … time stands in the log."""
        self._wrong_tokens += 1
        if not self._wrong_tokens & (self._wrong_tokens - 1):
            _log.warning("a wrong token from %s; %d so far", peer or "this machine", self._wrong_tokens)

    async def open(self, listen: Listen, run: Path, admin: socket.socket) -> None:
        """Read everything, for the first time. SettingsError when it can't be used."""
        context = await asyncio.to_thread(_checked, listen)
        self._tls = Renewable(context) if context is not None else None
        name = admin.getsockname()
        address = str(name[0]) if isinstance(name, tuple) else ""
        self.door = Door(address, tls=context is not None, token_file=str(local_path(run)))
        self.tokens = await asyncio.to_thread(_tokens, listen, run)
        if not self.door.on_loopback and context is None:
            _log.warning("the control plane at %s has no TLS: tokens cross the network as they are", address)

    async def renew(self, listen: Listen, run: Path) -> None:
        """Read tokens and certificate again; what can't be used leaves the old ones in force."""
        try:
            context = await asyncio.to_thread(_checked, listen)
        except SettingsError as error:
            for problem in error.problems:
                _log.error("not read again: %s", problem)
            return
        if self._tls is not None and context is not None:
            self._tls.renew(context)
        self.tokens = await asyncio.to_thread(_tokens, listen, run)


def _checked(listen: Listen) -> ssl.SSLContext | None:
    require_access(listen)
    for file, look in _files(listen):
        for doubt in look(file):
            _log.warning("%s", doubt)
    return _context(listen)


def _files(listen: Listen) -> list[tuple[Path, Callable[[Path], Iterable[str]]]]:
    rows = (
        (listen.admin_token_file, doubts),
        (listen.admin_read_token_file, doubts),
        (listen.admin_key_file, key_doubts),
    )
    return [(file, look) for file, look in rows if file is not None]


def _tokens(listen: Listen, run: Path) -> Tokens:
    change, read = (
        read_token(file) if file is not None else ""
        for file in (listen.admin_token_file, listen.admin_read_token_file)
    )
    try:
        local = read_token(local_path(run))
    except TokenError as error:
        local = ""
        _log.warning("commands on this machine can change nothing without a token of their own: %s", error)
    return Tokens.of(change=change, read=read, local=local)
