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
        problems.append(f"listen.{error.setting}: {error}")
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
        """Read everything, for the first time.

        The supervisor has found it in order before it started; what is not any more (this process may begin
        anew at any time) lets nobody in until a reload, and does not keep the controller from its work.
        """
        try:
            context = await asyncio.to_thread(_checked, listen)
        except SettingsError as error:
            _complain(error, "until a reload this lets nobody in")
            context = await asyncio.to_thread(_context_or_none, listen)
        tls = listen.admin_cert_file is not None
        self._tls = Renewable(context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) if tls else None
        name = admin.getsockname()
        address = str(name[0]) if isinstance(name, tuple) else ""
        self.door = Door(address, tls=tls, token_file=str(local_path(run)))
        self.tokens = await asyncio.to_thread(_tokens, listen, run)
        if not self.door.on_loopback and not tls:
            _log.warning("the control plane at %s has no TLS: tokens cross the network as they are", address)

    async def renew(self, listen: Listen, run: Path) -> None:
        """Read tokens and certificate again; what can't be used leaves the old ones in force."""
        try:
            context, tokens = await asyncio.to_thread(_checked_with_tokens, listen, run)
        except SettingsError as error:
            _complain(error, "the old ones hold")
            return
        if self._tls is not None and context is not None:
            self._tls.renew(context)
        self.tokens = tokens


def _complain(error: SettingsError, what_now: str) -> None:
    for problem in error.problems:
        _log.error("%s; %s", problem, what_now)


def _checked(listen: Listen) -> ssl.SSLContext | None:
    require_access(listen)
    for file, look in _files(listen):
        for doubt in look(file):
            _log.warning("%s", doubt)
    return _context_or_none(listen)


def _checked_with_tokens(listen: Listen, run: Path) -> tuple[ssl.SSLContext | None, Tokens]:
    """SettingsError also for a file that was changed between its check and its reading."""
    context, tokens = _checked(listen), _tokens(listen, run)
    require_access(listen)
    return context, tokens


def _context_or_none(listen: Listen) -> ssl.SSLContext | None:
    try:
        return _context(listen)
    except CertificateError:
        return None


def _files(listen: Listen) -> list[tuple[Path, Callable[[Path], Iterable[str]]]]:
    rows = (
        (listen.admin_token_file, doubts),
        (listen.admin_read_token_file, doubts),
        (listen.admin_key_file, key_doubts),
    )
    return [(file, look) for file, look in rows if file is not None]


def _tokens(listen: Listen, run: Path) -> Tokens:
    local = _token_or_none(local_path(run))
    if not local:
        _log.warning("commands on this machine find no token in %s", local_path(run))
    return Tokens.of(
        change=_token_or_none(listen.admin_token_file),
        read=_token_or_none(listen.admin_read_token_file),
        local=local,
    )


def _token_or_none(file: Path | None) -> str:
    """The token in a file, empty for none: what is wrong with it was told when it was checked."""
    try:
        return read_token(file) if file is not None else ""
    except TokenError:
        return ""
