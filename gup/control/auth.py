"""Access to the control plane: TLS, and the decision on each request.

On a loopback address everybody on the machine may read; changes need a token, and beyond loopback everything
does. A browser carries out what any web site tells it: so the Host header must be a name of this machine (a
rebound DNS name is not), an Origin must be that of our own page, and credentials that a browser adds by
itself change nothing.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gup.config import Listen
from gup.control.tokens import Right, TokenError, Tokens, local_path, read_token, token_doubts
from gup.errors import SettingsError
from gup.files import FileError, read_file, trust


class CertificateError(ValueError):
    """Files that can't be used; the text tells which and why. `setting` is the one at fault."""

    def __init__(self, text: str, setting: str) -> None:
        super().__init__(text)
        self.setting = setting


_CERT, _KEY = "admin_cert_file", "admin_key_file"
_RIGHT = {
    _CERT: "it must hold the control plane's certificate with its chain, in PEM",
    _KEY: "it must hold the certificate's key, in PEM, without a password",
}


def load_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """A server's TLS context; CertificateError when the files can't be read or don't match."""
    for setting, file in ((_CERT, cert_file), (_KEY, key_file)):
        try:
            read_file(file, 1)
        except FileError as error:
            raise CertificateError(f"{error}: {_RIGHT[setting]}", setting) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise _told(error, cert_file, key_file) from error
    return context


class _EncryptedKeyError(ValueError):
    """The key is encrypted: somebody would have to enter its password at each start."""


def _no_password() -> str:
    raise _EncryptedKeyError


def _told(error: Exception, cert_file: Path, key_file: Path) -> CertificateError:
    reason = getattr(error, "reason", None) or str(error)
    if isinstance(error, _EncryptedKeyError):
        words = f"{str(key_file)!r} is encrypted; gup can ask nobody for its password: {_RIGHT[_KEY]}"
        return CertificateError(words, _KEY)
    if reason == "KEY_VALUES_MISMATCH":
        words = f"{str(key_file)!r} is not the key of the certificate in {str(cert_file)!r}"
        return CertificateError(words, _KEY)
    try:
        trust(cert_file)
    except FileError as lacking:
        return CertificateError(str(lacking), _CERT)
    return CertificateError(f"{str(key_file)!r} holds no key: {_RIGHT[_KEY]}", _KEY)


class Renewable:
    """The TLS context of a listening socket; `renew` changes the certificate of later connections."""

    def __init__(self, first: ssl.SSLContext) -> None:
        self.context = first
        self._current = first
        first.sni_callback = self._choose

    def renew(self, context: ssl.SSLContext) -> None:
        self._current = context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current


def key_doubts(key_file: Path) -> Iterator[str]:
    """What makes the key file unsafe, as sentences."""
    with suppress(OSError):
        if key_file.stat().st_mode & 0o004:
            yield f"{key_file} can be read by everybody on this machine: chmod o-r {key_file}"


_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FOR_PROBES = frozenset({"/healthz", "/readyz"})
"""Attempt by whoever watches over the process, without a token; they tell no secrets."""
_BEARER = 'Bearer realm="gup"'


@dataclass(frozen=True, slots=True)
class AdminListener:
    """Where the control plane listens: an IP address, or "" for a Unix socket."""

    address: str = "127.0.0.1"
    tls: bool = False
    token_file: str = ""
    """The token file of commands on this machine; named in refusals."""

    @property
    def on_loopback(self) -> bool:
        return not self.address or is_loopback(self.address)


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """What the decision needs to know of a request.

    `peer` and `local` are the addresses of the connection, "" for a Unix socket, None when unknown. `right`
    is that of its token, None for an unknown token; `bearer` tells that it had one in a Bearer header.
    """

    method: str
    path: str
    host: str
    origin: str | None
    fetch_site: str | None
    peer: str | None
    local: str | None
    right: Right | None = Right.NONE
    bearer: bool = False

    @property
    def changes(self) -> bool:
        return self.method not in _SAFE_METHODS


@dataclass(frozen=True, slots=True)
class Refusal:
    """Status and reason; `challenges` are the WWW-Authenticate values (RFC 9110 section 11.6.1)."""

    status: int
    detail: str
    challenges: tuple[str, ...] = ()


def is_near(peer: str | None) -> bool:
    """Whether the peer is on this machine."""
    return peer == "" or is_loopback(peer)


def refusal(attempt: AccessRequest, listener: AdminListener) -> Refusal | None:
    """Why the request is refused; None when it is allowed."""
    probe = attempt.path in _FOR_PROBES and not attempt.changes
    if not _named_rightly(attempt, listener, probe=probe):
        return Refusal(403, "The Host header does not name this control plane")
    if probe:
        return None
    if attempt.changes and _is_foreign(attempt, listener):
        return Refusal(403, "The request comes from another site's page")
    return _lacking(attempt, listener)


def _named_rightly(attempt: AccessRequest, listener: AdminListener, *, probe: bool) -> bool:
    """Beyond loopback health checks use any name, and a request with a token was made on purpose."""
    if not listener.on_loopback and (probe or (attempt.bearer and attempt.right)):
        return True
    return _host_is_ours(attempt, listener.address)


def _is_foreign(attempt: AccessRequest, listener: AdminListener) -> bool:
    ours = f"{'https' if listener.tls else 'http'}://{attempt.host.lower()}"
    return (attempt.origin is not None and attempt.origin.lower() != ours) or (
        attempt.fetch_site not in (None, "same-origin", "none")
    )


def _lacking(attempt: AccessRequest, listener: AdminListener) -> Refusal | None:
    """The refusal of a request whose token does not allow it."""
    where = _where(attempt, listener)
    if attempt.right is None:
        return Refusal(401, f"That token is not known here{where}", (f'{_BEARER}, error="invalid_token"',))
    if attempt.changes and attempt.right < Right.CHANGE:
        if attempt.bearer and attempt.right is Right.READ:
            challenge = f'{_BEARER}, error="insufficient_scope"'
            return Refusal(403, "That token is good for reading only", (challenge,))
        return Refusal(401, f"Changing needs Authorization: Bearer TOKEN{where}", (_BEARER,))
    if attempt.right is Right.NONE and not (listener.on_loopback and is_near(attempt.peer)):
        page = ('Basic realm="gup", charset="UTF-8"',) if attempt.path == "/" else ()
        return Refusal(
            401,
            f"Beyond loopback every request needs Authorization: Bearer TOKEN{where}",
            (_BEARER, *page),
        )
    return None


def _where(attempt: AccessRequest, listener: AdminListener) -> str:
    if not (listener.token_file and is_near(attempt.peer)):
        return ""
    return f"; on this machine there is one in {listener.token_file} (gup's commands: --token-file)"


def is_loopback(address: str | None) -> bool:
    """Whether this is a loopback address, or "localhost"."""
    if address is None:
        return False
    if address.lower() == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _host_is_ours(attempt: AccessRequest, admin_address: str) -> bool:
    name = _without_port(attempt.host).lower()
    if name == "localhost" or is_loopback(name):
        return True
    if name in {admin_address.lower(), (attempt.local or "").lower()} - {""}:
        return True
    # Beyond loopback the machine is called by its host name, which another site can't make resolve to us.
    ours = {socket.gethostname().lower(), socket.gethostname().split(".")[0].lower()}
    return not is_loopback(admin_address) and name in ours


def _without_port(host: str) -> str:
    """The name in a Host header; empty when malformed."""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or rest.startswith(":")) else ""
    name, _, port = host.partition(":")
    return name if not port or port.isdigit() else ""


_log = logging.getLogger("gup.control.auth")


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
    """Tokens and certificate in force. Before `open`, no request may change anything."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.listener = AdminListener()
        self._tls: Renewable | None = None
        self._wrong_tokens = 0

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For the listening socket; None without TLS."""
        return self._tls.context if self._tls is not None else None

    def note_wrong_token(self, peer: str | None) -> None:
        """Count an unknown token; the 1st, 2nd, 4th, 8th … is logged."""
        self._wrong_tokens += 1
        if not self._wrong_tokens & (self._wrong_tokens - 1):
            _log.warning("unknown token from %s; %d so far", peer or "this machine", self._wrong_tokens)

    async def open(self, listen: Listen, run: Path, admin: socket.socket) -> None:
        """Read tokens and certificate at the start.

        The supervisor checked them before it started this process. If they are unusable now (the controller
        may be restarted at any time), nobody gets in until a reload, and the controller goes on working.
        """
        try:
            context = await asyncio.to_thread(_checked, listen)
        except SettingsError as error:
            _complain(error, "nobody gets in until a reload")
            context = await asyncio.to_thread(_context_or_none, listen)
        tls = listen.admin_cert_file is not None
        self._tls = Renewable(context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) if tls else None
        name = admin.getsockname()
        address = str(name[0]) if isinstance(name, tuple) else ""
        self.listener = AdminListener(address, tls=tls, token_file=str(local_path(run)))
        self.tokens = await asyncio.to_thread(_tokens, listen, run)
        if not self.listener.on_loopback and not tls:
            _log.warning("the control plane at %s has no TLS: tokens cross the network unencrypted", address)

    async def renew(self, listen: Listen, run: Path) -> None:
        """Read tokens and certificate again; unusable files leave the old ones in force."""
        try:
            context, tokens = await asyncio.to_thread(_checked_with_tokens, listen, run)
        except SettingsError as error:
            _complain(error, "the old ones stay in force")
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
    """SettingsError also when a file was changed between the check and the reading."""
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
        (listen.admin_token_file, token_doubts),
        (listen.admin_read_token_file, token_doubts),
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
    """The token in a file; empty when there is none. The check has told what is wrong with it."""
    try:
        return read_token(file) if file is not None else ""
    except TokenError:
        return ""
