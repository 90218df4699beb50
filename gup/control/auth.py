"""Access to the control plane: tokens, TLS, and the decision on each request.

On a loopback address everybody on the machine may read; changes need a token, and beyond loopback every
request does. A browser sends requests for any web site: so the Host header must be a name of this machine (a
rebound DNS name is not), an Origin must be that of gup's page, and credentials that a browser adds by itself
permit no changes.
"""

import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from aiofiles.os import wrap

from gup.config import Listen
from gup.errors import SettingsError
from gup.files import PEM_BYTES, FileError, read_file, replace_file, trust

_log = logging.getLogger("gup.control.auth")

# --- tokens

_TOKEN = re.compile(r"[!-~]+")  # more than RFC 6750 permits, but without spaces
_SHORT = 16
_MAX_BYTES = 4096
_HOW = "such as made by: openssl rand -hex 32"


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


class Tokens:
    """The valid tokens, as digests; "" for those that are not set."""

    def __init__(self, *, change: str = "", read: str = "", local: str = "") -> None:
        self._digests = [_digest(token) if token else b"" for token in (change, read, local)]

    def right(self, shown: Presented | None, *, near: bool) -> Right | None:
        """The token's right; None for an unknown one. All tokens are compared, in constant time.

        The local token is valid on its own machine only (`near`); credentials added by a browser permit
        reading only.
        """
        if shown is None:
            return Right.NONE
        digest = _digest(shown.token)
        changes, reads, is_local = (hmac.compare_digest(digest, known) for known in self._digests)
        found = Right.CHANGE if changes or (is_local and near) else Right.READ if reads else None
        return min(found, Right.READ) if found is not None and shown.by_browser else found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_token(path: Path) -> str:
    """FileError with what would be right."""
    try:
        text = read_file(path, _MAX_BYTES + 1)
    except FileError as error:
        raise FileError(f"{error}: it must hold a token, {_HOW}") from error
    token = text.decode("utf-8", "replace").strip()
    if not token:
        raise FileError(f"{str(path)!r} is empty: it must hold a token, {_HOW}")
    if len(text) > _MAX_BYTES or not _TOKEN.fullmatch(token):
        raise FileError(f"{str(path)!r} holds no token: it must be one line of ASCII without spaces, {_HOW}")
    return token


def token_doubts(path: Path) -> Iterator[str]:
    """What makes a token file unsafe, as sentences."""
    with suppress(OSError, FileError):
        yield from _readable_by_all(path)
        if len(read_token(path)) < _SHORT:
            yield f"the token in {path} is short enough to be guessed: take one {_HOW}"


def _readable_by_all(path: Path) -> Iterator[str]:
    if path.stat().st_mode & stat.S_IROTH:
        yield f"{path} can be read by everybody on this machine: chmod o-r {path}"


def local_path(run: Path) -> Path:
    """The token that is made at each start, in `run/`, for commands on the same machine."""
    return run / "admin-token"


def make_local_token(run: Path) -> None:
    """Write a new local token, readable by its owner only; OSError."""
    replace_file(local_path(run), f"{secrets.token_hex(32)}\n".encode(), durable=False)


# --- TLS

_RIGHT_CERT = "it must hold the control plane's certificate with its chain, in PEM"
_RIGHT_KEY = "it must hold the certificate's key, in PEM, without a password"


def load_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """A server's TLS context; FileError, with the setting, when the files can't be read or don't match."""
    setting, right = "cert", _RIGHT_CERT
    try:
        read_file(cert_file, 1)
        setting, right = "key", _RIGHT_KEY
        text = read_file(key_file, PEM_BYTES)
    except FileError as error:
        raise FileError(f"listen.admin_{setting}_file: {error}: {right}") from error
    key = f"listen.admin_key_file: {str(key_file)!r}"
    if b"ENCRYPTED" in text:
        raise FileError(f"{key} is encrypted; gup can't ask for its password: {_RIGHT_KEY}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file, password="")  # else OpenSSL asks at the terminal
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise FileError(f"{key} is not the key of the certificate in {str(cert_file)!r}") from error
        try:
            trust(cert_file)
        except FileError as lacking:
            raise FileError(f"listen.admin_cert_file: {lacking}") from error
        raise FileError(f"{key} holds no key: {_RIGHT_KEY}") from error
    return context


# --- the decision


_FOR_PROBES = frozenset({"/healthz", "/readyz"})
"""Requested by monitors without a token; they reveal no secrets."""
_BEARER = 'Bearer realm="gup"'
_HOST = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::[0-9]*)?")


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
    """`peer` and `local` are the connection's addresses, "" for a Unix socket, None when unknown. `right` is
    that of its token, None for an unknown token; `bearer`: it was in a Bearer header.
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
        return self.method not in ("GET", "HEAD", "OPTIONS")


class Refusal(NamedTuple):
    """Status and reason; `challenges` are the WWW-Authenticate values (RFC 9110 section 11.6.1)."""

    status: int
    detail: str
    challenges: tuple[str, ...] = ()


def is_near(peer: str | None) -> bool:
    return peer == "" or is_loopback(peer)


def refusal(attempt: AccessRequest, listener: AdminListener) -> Refusal | None:
    """Why the request is refused; None when it is allowed."""
    probe = attempt.path in _FOR_PROBES and not attempt.changes
    # Beyond loopback health checks use any name, and a Bearer token shows that a request is intended.
    any_name = not listener.on_loopback and (probe or (attempt.bearer and attempt.right))
    if not any_name and not _host_is_ours(attempt, listener.address):
        return Refusal(403, "The Host header does not name this control plane")
    if probe:
        return None
    if attempt.changes:
        own_origin = f"{'https' if listener.tls else 'http'}://{attempt.host.lower()}"
        foreign = attempt.origin is not None and attempt.origin.lower() != own_origin
        if foreign or attempt.fetch_site not in (None, "same-origin", "none"):
            return Refusal(403, "The request comes from another site's page")
    return _lacking(attempt, listener)


def _lacking(attempt: AccessRequest, listener: AdminListener) -> Refusal | None:
    where, near = "", is_near(attempt.peer)
    if listener.token_file and near:
        where = f"; on this machine one is in {listener.token_file} (gup's commands: --token-file)"
    if attempt.right is None:
        return Refusal(401, f"The token is not known{where}", (f'{_BEARER}, error="invalid_token"',))
    if attempt.changes and attempt.right < Right.CHANGE:
        if attempt.bearer and attempt.right is Right.READ:
            challenge = f'{_BEARER}, error="insufficient_scope"'
            return Refusal(403, "The token allows reading only", (challenge,))
        return Refusal(401, f"Changes need a token (Authorization: Bearer TOKEN){where}", (_BEARER,))
    if attempt.right is Right.NONE and not (listener.on_loopback and near):
        page = ('Basic realm="gup", charset="UTF-8"',) if attempt.path == "/" else ()
        detail = f"Beyond loopback every request needs a token (Authorization: Bearer TOKEN){where}"
        return Refusal(401, detail, (_BEARER, *page))
    return None


def is_loopback(address: str | None) -> bool:
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
    # A malformed host has no name.
    found = _HOST.fullmatch(attempt.host)
    name = (found[1] or found[2] or "").lower() if found else ""
    if is_loopback(name) or (name and name in (admin_address.lower(), (attempt.local or "").lower())):
        return True
    # Beyond loopback the machine's host name is accepted: another site can't make it resolve to this machine.
    machine = socket.gethostname().lower()
    return not is_loopback(admin_address) and name in (machine, machine.split(".")[0])


# --- the files named by the settings


class _Files(NamedTuple):
    tokens: Tokens
    context: ssl.SSLContext | None
    problems: list[str]
    doubts: list[str]


def _read_files(listen: Listen, run: Path | None = None) -> _Files:
    """`run` is the folder of the local token."""
    found, context = {"local": ""}, None
    problems: list[str] = []
    doubts: list[str] = []
    for right, name in (("change", "admin_token_file"), ("read", "admin_read_token_file")):
        found[right], file = "", getattr(listen, name)
        if file is not None:
            doubts += token_doubts(file)
            try:
                found[right] = read_token(file)
            except FileError as error:
                problems.append(f"listen.{name}: {error}")
    if found["change"] and found["change"] == found["read"]:
        text = "listen.admin_read_token_file: it holds the token of admin_token_file; they must differ"
        problems.append(text)
    if listen.admin_cert_file is not None and (key := listen.admin_key_file) is not None:
        try:
            context = load_context(listen.admin_cert_file, key)
            doubts += _readable_by_all(key)
        except FileError as error:
            problems.append(str(error))
        except OSError:  # removed meanwhile
            problems.append(f"listen.admin_key_file: {str(key)!r} can't be read")
    if run is not None:
        try:
            found["local"] = read_token(local_path(run))
        except FileError:
            doubts.append(f"commands on this machine find no token in {local_path(run)}")
    return _Files(Tokens(**found), context, problems, doubts)


def require_access(listen: Listen) -> None:
    """SettingsError with a sentence for each token or certificate that can't be used."""
    if problems := _read_files(listen).problems:
        raise SettingsError(problems)


class Access:
    """Tokens and certificate in force. Before `open`, no request may change anything."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.listener = AdminListener()
        self.tls: ssl.SSLContext | None = None
        """For the listening socket; None without TLS. Each connection gets the certificate in force."""
        self._certificate: ssl.SSLContext | None = None
        self._wrong_tokens = 0

    def note_wrong_token(self, peer: str | None) -> None:
        """The 1st, 2nd, 4th, 8th … is logged."""
        self._wrong_tokens += 1
        if not self._wrong_tokens & (self._wrong_tokens - 1):
            _log.warning("unknown token from %s; %d so far", peer or "this machine", self._wrong_tokens)

    async def open(self, listen: Listen, run: Path, admin: socket.socket) -> None:
        """Read tokens and certificate at the start.

        The supervisor checked them before it started this process. If they are unusable now (the controller
        may be restarted at any time), no token is accepted until a reload; the controller runs on.
        """
        name, tls = admin.getsockname(), listen.admin_cert_file is not None
        address = str(name[0]) if isinstance(name, tuple) else ""
        self.listener = AdminListener(address, tls=tls, token_file=str(local_path(run)))
        if tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.sni_callback = self._choose
        elif not self.listener.on_loopback:
            _log.warning("the control plane at %s has no TLS: tokens cross the network unencrypted", address)
        await self.read(listen, run, at_start=True)

    async def read(self, listen: Listen, run: Path, *, at_start: bool = False) -> None:
        """Read tokens and certificate again; unusable files leave the old ones in force."""
        files = await wrap(_read_files)(listen, run)
        for doubt in files.doubts:
            _log.warning("%s", doubt)
        what_now = "no token is accepted until a reload" if at_start else "the old ones stay in force"
        for problem in files.problems:
            _log.error("%s; %s", problem, what_now)
        if at_start or not files.problems:
            self.tokens, self._certificate = files.tokens, files.context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        if self._certificate is not None:
            connection.context = self._certificate
