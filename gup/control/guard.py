"""Who may ask the control plane: tokens, DNS rebinding, forged cross-site requests. Decides, does no I/O.

On a loopback address whoever is on the machine may look; what changes something needs a token, and beyond
loopback everything does. A browser is an open door for any web site: so the Host header must be a name of
ours (a rebound name is not), an Origin must be our own page's, and what a browser adds by itself changes
nothing.
"""

import ipaddress
import socket
from dataclasses import dataclass

from gup.control.tokens import Right

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FOR_PROBES = frozenset({"/healthz", "/readyz"})
"""Asked by whoever watches over the process, without a token; they tell no secrets."""
_BEARER = 'Bearer realm="gup"'


@dataclass(frozen=True, slots=True)
class Door:
    """Where the control plane listens: an IP address, or "" for a socket in the file system."""

    address: str = "127.0.0.1"
    tls: bool = False
    token_file: str = ""
    """Where commands on this machine find their token, for whoever lacks one."""

    @property
    def on_loopback(self) -> bool:
        return not self.address or is_loopback(self.address)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the decision needs of a request.

    `peer` and `local` are addresses of the connection's ends, "" where they are none, None when they can't be
    told. `right` is what its token is good for, None for one that is not ours; `bearer`: it had such a token.
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
    """Why a request may not pass; `challenges` are those of a 401 (RFC 9110 section 11.6.1)."""

    status: int
    detail: str
    challenges: tuple[str, ...] = ()


def is_near(peer: str | None) -> bool:
    """Whether who asks is on this machine."""
    return peer == "" or is_loopback(peer)


def refusal(asked: Asked, door: Door) -> Refusal | None:
    """Why the request is refused, None when it may pass."""
    probe = asked.path in _FOR_PROBES and not asked.changes
    if not _named_rightly(asked, door, probe=probe):
        return Refusal(403, "The Host header does not name this control plane")
    if probe:
        return None
    if asked.changes and _is_foreign(asked, door):
        return Refusal(403, "The request comes from another site's page")
    return _lacking(asked, door)


def _named_rightly(asked: Asked, door: Door, *, probe: bool) -> bool:
    """Beyond loopback probes use whatever name, and who shows a token is no page that was led here."""
    if not door.on_loopback and (probe or (asked.bearer and asked.right)):
        return True
    return _host_is_ours(asked, door.address)


def _is_foreign(asked: Asked, door: Door) -> bool:
    ours = f"{'https' if door.tls else 'http'}://{asked.host.lower()}"
    return (asked.origin is not None and asked.origin.lower() != ours) or (
        asked.fetch_site not in (None, "same-origin", "none")
    )


def _lacking(asked: Asked, door: Door) -> Refusal | None:
    """What the request has no right to."""
    where = _where(asked, door)
    if asked.right is None:
        return Refusal(401, f"That token is not known here{where}", (f'{_BEARER}, error="invalid_token"',))
    if asked.changes and asked.right < Right.CHANGE:
        if asked.bearer and asked.right is Right.READ:
            challenge = f'{_BEARER}, error="insufficient_scope"'
            return Refusal(403, "That token is good for reading only", (challenge,))
        return Refusal(401, f"Changing needs Authorization: Bearer TOKEN{where}", (_BEARER,))
    if asked.right is Right.NONE and not (door.on_loopback and is_near(asked.peer)):
        page = ('Basic realm="gup", charset="UTF-8"',) if asked.path == "/" else ()
        return Refusal(
            401,
            f"Beyond loopback every request needs Authorization: Bearer TOKEN{where}",
            (_BEARER, *page),
        )
    return None


def _where(asked: Asked, door: Door) -> str:
    if not (door.token_file and is_near(asked.peer)):
        return ""
    return f"; on this machine there is one in {door.token_file} (gup's commands: --token-file)"


def is_loopback(address: str | None) -> bool:
    """Whether an IP address, or "localhost", is this machine's alone."""
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


def _host_is_ours(asked: Asked, admin_address: str) -> bool:
    name = _without_port(asked.host).lower()
    if name == "localhost" or is_loopback(name):
        return True
    if name in {admin_address.lower(), (asked.local or "").lower()} - {""}:
        return True
    # Beyond loopback the machine is called by its name; a page elsewhere can't make that one resolve to us.
    ours = {socket.gethostname().lower(), socket.gethostname().split(".")[0].lower()}
    return not is_loopback(admin_address) and name in ours


def _without_port(host: str) -> str:
    """The name in a Host header; empty when it is not well-formed."""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or rest.startswith(":")) else ""
    name, _, port = host.partition(":")
    return name if not port or port.isdigit() else ""
