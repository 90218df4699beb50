"""What the supervisor opens once, before it starts the first child."""

import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from gup.cache.store import Store
from gup.config import Settings
from gup.control.tokens import local_path, make_local_token
from gup.errors import GupError
from gup.process.instance_lock import InstanceLock
from gup.process.shared_memory import SharedFile
from gup.process.sockets import Listeners, open_listeners
from gup.process.systemd import VARIABLES, Notifier, passed_sockets

_LOG = logging.getLogger(__name__)

_EVENT_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Resources:
    """Open for as long as the service runs, and shared with its children."""

    lock: InstanceLock
    shared: SharedFile
    listeners: Listeners
    events: tuple[socket.socket, socket.socket]
    """A channel of events: the workers' end, the controller's end."""
    notifier: Notifier
    environment: Mapping[str, str]
    """The environment of children."""


def open_resources(settings: Settings, environment: Mapping[str, str], stack: ExitStack) -> Resources:
    """Open everything; `stack` closes it. GupError tells what can't be opened."""
    store = Store(settings.cache.directory)
    store.prepare()
    lock = InstanceLock(store.run)
    stack.callback(lock.close)
    passed = passed_sockets(environment, os.getpid())
    listeners = open_listeners(settings.listen, settings.worker_count, passed)
    stack.callback(listeners.close)
    _require_token(listeners.admin, settings)
    try:
        make_local_token(store.run)
    except OSError as error:  # a full disk must not stop the service
        _LOG.warning("no token for commands on this machine: %s: %s", local_path(store.run), error.strerror)
    names = [upstream.name for upstream in settings.upstream]
    shared = SharedFile.create(store.run / "shared", names, settings.worker_count)
    stack.callback(shared.close)
    # Not SOCK_DGRAM: the kernel queues at most ten of its packets (net.unix.max_dgram_qlen).
    events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in events:
        stack.callback(end.close)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _EVENT_BUFFER_BYTES)
        end.setblocking(False)
    notifier = Notifier.from_environment(environment, os.getpid())
    inherited = {name: value for name, value in environment.items() if name not in VARIABLES}
    return Resources(lock, shared, listeners, events, notifier, inherited)


def _require_token(admin: Sequence[socket.socket], settings: Settings) -> None:
    """GupError if other machines can reach the control plane and it needs no token.

    The settings alone don't tell: systemd may have bound the socket to another address.
    """
    for sock in admin:
        if sock.family == socket.AF_UNIX or ip_address(sock.getsockname()[0].split("%")[0]).is_loopback:
            continue
        if settings.listen.admin_token_file is None:
            raise GupError(
                f"other machines can reach the control plane at {sock.getsockname()[0]}, so each request "
                "needs a token: set listen.admin_token_file to a file with a token"
            )


@contextmanager
def signal_socket() -> Iterator[socket.socket]:
    """A socket that receives each signal's number as one byte. No signal interrupts anything else."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    read, write = socket.socketpair()
    with read, write:
        read.setblocking(False)
        write.setblocking(False)
        wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield read
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
