"""What the supervisor opens once, before the first child, and how signals reach it; starts nothing."""

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
from gup.process import sockets
from gup.process.instance import Instance
from gup.process.notify import VARIABLES, Notifier, passed_sockets
from gup.process.shared import SharedFile
from gup.process.sockets import Listeners

_LOG = logging.getLogger(__name__)

_EVENT_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Premises:
    """What is opened once, before the first child, and held to the end."""

    instance: Instance
    shared: SharedFile
    listeners: Listeners
    events: tuple[socket.socket, socket.socket]  # the workers' end, the controller's
    notifier: Notifier
    environment: Mapping[str, str]  # of children


def open_premises(settings: Settings, environment: Mapping[str, str], stack: ExitStack) -> Premises:
    """In this order; what is opened closes with `stack`. GupError says what can't be had."""
    store = Store(settings.cache.directory)
    store.prepare()
    instance = Instance(store.run)
    stack.callback(instance.close)
    passed = passed_sockets(environment, os.getpid())
    listeners = sockets.open_listeners(settings.listen, settings.worker_count, passed)
    stack.callback(listeners.close)
    _require_token(listeners.admin, settings)
    _make_local_token(store)
    names = [upstream.name for upstream in settings.upstream]
    shared = SharedFile.create(store.run / "shared", names, settings.worker_count)
    stack.callback(shared.close)
    # Not SOCK_DGRAM, of which the kernel queues ten at most (net.unix.max_dgram_qlen).
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        stack.callback(end.close)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _EVENT_BUFFER_BYTES)
        end.setblocking(False)
    notifier = Notifier.from_environment(environment, os.getpid())
    kept = {name: value for name, value in environment.items() if name not in VARIABLES}
    return Premises(instance, shared, listeners, (ours, theirs), notifier, kept)


def _require_token(admin: Sequence[socket.socket], settings: Settings) -> None:
    """Sockets that systemd passed may be bound elsewhere than the settings say."""
    for sock in admin:
        if sock.family == socket.AF_UNIX or ip_address(sock.getsockname()[0].split("%")[0]).is_loopback:
            continue
        if settings.listen.admin_token_file is None:
            raise GupError(
                f"the control plane's socket at {sock.getsockname()[0]} can be reached by others, so every "
                "request needs a token: listen.admin_token_file must name a file with one"
            )


def _make_local_token(store: Store) -> None:
    try:
        make_local_token(store.run)
    except OSError as error:  # a full disk must not stop the service
        _LOG.warning("no token for commands on this machine: %s: %s", local_path(store.run), error.strerror)


@contextmanager
def signal_socket() -> Iterator[socket.socket]:
    """A socket on which each signal's number arrives as a byte; a signal interrupts nothing else."""
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
