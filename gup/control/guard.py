"""Who may ask the control plane: against DNS rebinding and forged cross-site requests. Decides, does no I/O.

There is no password: whoever reaches the address may look, and only this machine may change things, unless
the operator chose an address beyond loopback. A browser on this machine is an open door for any web site, so
the Host header must be a name of ours (a rebound name is not) and an Origin must be our own page's.
"""

import ipaddress
import socket
from dataclasses import dataclass

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FOR_MACHINES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Read by monitoring under whatever name; they tell no secrets."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the decision needs of a request. `peer` and `local` are addresses of the connection's ends."""

    method: str
    path: str
    host: str
    origin: str | None
    fetch_site: str | None
    peer: str | None
    local: str | None


def refusal(asked: Asked, admin_address: str) -> str | None:
    """Why the request is refused, None when it may pass."""
    changes = asked.method not in _SAFE_METHODS
    open_to_others = not _is_loopback(admin_address)
    if not (open_to_others and not changes and asked.path in _FOR_MACHINES) and not _host_is_ours(
        asked, admin_address
    ):
        return "The Host header does not name this control plane"
    if not changes:
        return None
    if not open_to_others and not _is_loopback(asked.peer):
        return "Only this machine may change things"
    if asked.origin is not None and asked.origin.lower() != f"http://{asked.host.lower()}":
        return "The request comes from another site's page"
    if asked.fetch_site not in (None, "same-origin", "none"):
        return "The request comes from another site's page"
    return None


def _is_loopback(address: str | None) -> bool:
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
    if name == "localhost" or _is_loopback(name):
        return True
    if name in {admin_address.lower(), (asked.local or "").lower()} - {""}:
        return True
    # Beyond loopback the machine is called by its name; a page elsewhere can't make that one resolve to us.
    ours = {socket.gethostname().lower(), socket.gethostname().split(".")[0].lower()}
    return not _is_loopback(admin_address) and name in ours


def _without_port(host: str) -> str:
    """The name in a Host header; empty when it is not well-formed."""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or rest.startswith(":")) else ""
    name, _, port = host.partition(":")
    return name if not port or port.isdigit() else ""
