"""The supervisor, gup's master process: starts, watches, restarts, reloads and stops the children."""

import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum, auto
from ipaddress import ip_address

from pydantic import BaseModel

from gup import log
from gup.cache.fair_shares import shares_file
from gup.cache.store import Store
from gup.cache.streams import free_streams, idle_streams
from gup.config import Cluster, Settings
from gup.control.auth import local_path, make_local_token
from gup.errors import GupError, SettingsError
from gup.process import shared_memory, sockets
from gup.process.child import Assignment, Child, ChildSlot, Message, Phase
from gup.process.instance_lock import InstanceLock
from gup.process.shared_memory import Row, SharedFile
from gup.process.sockets import VARIABLES, Notifier, passed_sockets
from gup.process.start_check import doubts

_LOG = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_SUSPENDED_SECONDS = 5.0  # after a longer pause between two ticks, the whole machine was suspended
_WORKERS_FIRST_SECONDS = 2.0  # the controller starts when all workers are ready, or after this time
_STARTING_AT_ONCE = max(
    8, 2 * len(os.sched_getaffinity(0))
)  # more would slow each other beyond READY_SECONDS
PAST_DRAIN_SECONDS = 5.0
LOCK_SECONDS = 5.0  # how long the previous service on the directory may take to end
_CONTROLLER_STOP_SECONDS = 10.0
_EVENT_BUFFER_BYTES = 4 << 20

Reload = Callable[[], Settings]
ChildCommand = Callable[[str], Sequence[str]]


class Stage(Enum):
    SERVING = auto()
    DRAINING = auto()  # workers finish
    STOPPING = auto()  # the controller does
    ENDED = auto()


def _command(role: str) -> Sequence[str]:
    return [sys.executable, "-m", f"gup.process.{role}"]


def serve(
    settings: Settings,
    reload: Reload | None = None,
    *,
    child_command: ChildCommand = _command,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Run the service until a signal stops it, and return the exit status. Call it in the main thread.

    `reload` reads the settings again; it raises SettingsError when they are invalid. `child_command` is the
    command line of a role, to which the number of the control descriptor is appended.
    """
    log.configure(settings.log)
    _raise_descriptor_limit()
    with ExitStack() as stack:
        stack.callback(log.close)
        try:
            supervisor = Supervisor(settings, reload, child_command, environment, stack)
        except GupError as error:
            _LOG.error("%s", error)
            return 1
        supervisor.run()
    return 0


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit: a client takes one descriptor, often two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # `fs.nr_open` is lower, or a sandbox forbids it
        _LOG.warning("the limit of open files stays at %d: setrlimit: %s", soft, error)


class Supervisor:
    """The children of one service, what they share, and the loop that looks after them."""

    def __init__(
        self,
        settings: Settings,
        reload: Reload | None,
        child_command: ChildCommand,
        environment: Mapping[str, str],
        stack: ExitStack,
    ) -> None:
        """Open all that the service needs; `stack` closes it. GupError tells what can't be opened."""
        self._settings, self._reload, self._command = settings, reload, child_command
        self._environment = {name: text for name, text in environment.items() if name not in VARIABLES}
        self._notifier = Notifier(environment, os.getpid())
        store = Store(settings.cache.directory)
        store.prepare()
        for doubt in doubts(settings, time.time()):
            _LOG.warning("%s", doubt)
        self._lock = InstanceLock(store.run, LOCK_SECONDS)
        stack.callback(self._lock.close)
        passed = passed_sockets(environment, os.getpid())
        self._listeners = sockets.open_listeners(settings.listen, settings.worker_count, passed)
        stack.callback(sockets.close, *self._listeners.data, *self._listeners.admin)
        _require_token(self._listeners.admin, settings)
        try:
            make_local_token(store.run)
        except OSError as error:  # a full disk must not stop the service
            path = local_path(store.run)
            _LOG.warning("no token for commands on this machine: %s: %s", path, error.strerror)
        names = [upstream.name for upstream in settings.upstream]
        idle = idle_streams(store.run / "streams", store.content)
        self._shared = SharedFile.create(store.run / "shared", names, settings.worker_count, idle)
        with suppress(OSError):  # a full disk: at the next start
            free_streams(store.run / "streams", idle)
        stack.callback(self._shared.close)
        self._shares_fd = shares_file(settings.worker_count)
        stack.callback(os.close, self._shares_fd)
        self._beats = self._shared.row(Row.BEAT)
        self._counters = self._shared.counters(shared_memory.SUPERVISOR)
        # Events: the workers' end, the controller's end. Not SOCK_DGRAM: the kernel queues at most ten of its
        # packets (net.unix.max_dgram_qlen).
        self._events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(sockets.close, *self._events)
        for end in self._events:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _EVENT_BUFFER_BYTES)
            end.setblocking(False)
        self._selector = stack.enter_context(selectors.DefaultSelector())

        first = shared_memory.FIRST_WORKER
        self._workers = [ChildSlot("worker", n, first + n) for n in range(settings.worker_count)]
        self._controller = ChildSlot("controller", 0, shared_memory.CONTROLLER)
        self._controller.start_at = time.monotonic() + _WORKERS_FIRST_SECONDS
        self._slots = [*self._workers, self._controller]
        self._stage = Stage.SERVING
        self._deadline = 0.0
        self._announced = False
        self._ticked_at = self._watched_from = time.monotonic()
        self._watchdog_at = 0.0

    def run(self) -> None:
        """Run until the service has ended. No child is left, whatever happens."""
        signals: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.append(number))  # nothing else is interrupted
        try:
            self._tick(time.monotonic())
            while self._stage is not Stage.ENDED:
                for key, _ in self._selector.select(_TICK_SECONDS):
                    self._handle_messages(key.data)
                while signals:
                    self._handle_signal(signals.pop(0))
                self._reap()
                self._tick(time.monotonic())
        finally:
            self._stage = Stage.ENDED
            self._kill(self._slots, "the supervisor is exiting")
            for slot in self._slots:
                if slot.child is not None:
                    slot.child.process.wait()
            self._reap()

    def _tick(self, now: float) -> None:
        if now - self._ticked_at > _SUSPENDED_SECONDS:
            self._watched_from = now
        self._ticked_at = now
        if self._controller.generation == 0 and all(slot.phase is Phase.READY for slot in self._workers):
            self._controller.start_at = now
        for slot in self._slots:
            starting = sum(other.phase is Phase.STARTING for other in self._slots)
            due = slot.phase is Phase.WAITING and slot.start_at <= now
            if due and self._stage is Stage.SERVING and starting < _STARTING_AT_ONCE:
                self._start(slot)
            reason = slot.reason_to_kill(now, self._beats[slot.block] / 1e9, self._watched_from)
            if reason is not None:
                self._kill([slot], reason)
        self._announce()
        self._continue_stopping(now)
        watchdog = self._notifier.watchdog_seconds
        if watchdog and now - self._watchdog_at >= watchdog / 3:
            self._notifier.send("WATCHDOG=1")
            self._watchdog_at = now

    # --- one child

    def _start(self, slot: ChildSlot) -> None:
        slot.start(time.monotonic())
        self._beats[slot.block] = 0
        worker, listeners = slot.role == "worker", self._listeners
        listening = listeners.of_worker(slot.number) if worker else listeners.admin
        assignment = Assignment(
            role=slot.role,
            slot=slot.number,
            block=slot.block,
            settings=self._settings,
            listen_fds=tuple(sock.fileno() for sock in listening),
            shared_fd=self._shared.fd,
            shares_fd=self._shares_fd,
            event_fd=self._events[0 if worker else 1].fileno(),
            lock_fd=self._lock.children_fd,
            generation=slot.generation,
        )
        try:
            slot.child = Child(self._command(slot.role), assignment, self._environment)
        except OSError as error:
            _LOG.error("%s could not be started: %s", slot.name, error)
            slot.exited(slot.started_at, restart=True)
            return
        self._selector.register(slot.child, selectors.EVENT_READ, slot)
        _LOG.info("%s started, pid %d", slot.name, slot.child.process.pid)

    def _handle_messages(self, slot: ChildSlot) -> None:
        child = slot.child
        if child is None:
            return
        messages = child.receive()
        if messages is None:
            self._selector.unregister(child)
            slot.closed_at = time.monotonic()
            return
        for message in messages:
            if message.get("ready"):
                slot.became_ready(time.monotonic())
                self._report_workers()
            elif message.get("drained"):
                _LOG.info("%s has drained", slot.name)
            elif message.get("reload") and slot.role == "controller":
                child.send(self._reload_settings())

    def _reap(self) -> None:
        for slot in self._slots:
            child = slot.child
            if child is None or (status := child.process.poll()) is None:
                continue
            if slot.closed_at is None:
                self._selector.unregister(child)
            child.close()
            self._shared.clear_gauges(slot.block)
            restart = self._stage is Stage.SERVING
            if restart and slot.role == "worker":
                self._counters.add("gup_worker_restarts_total")
            level = logging.WARNING if restart or status else logging.INFO
            _LOG.log(level, "%s, pid %d, %s", slot.name, child.process.pid, _exit_reason(status))
            slot.exited(time.monotonic(), restart=restart)
            self._report_workers()

    def _report_workers(self) -> None:
        """Send the list of workers to the controller, which shows it: at each change."""
        started = time.time() - time.monotonic()
        rows = [
            {
                "slot": slot.number,
                "pid": slot.child.process.pid,
                "up_since": started + slot.started_at,
                "ready": slot.phase is Phase.READY,
            }
            for slot in self._workers
            if slot.child is not None
        ]
        self._send([self._controller], {"workers": rows})

    def _kill(self, slots: Sequence[ChildSlot], reason: str) -> None:
        for slot in slots:
            if slot.child is not None and slot.phase is not Phase.KILLED:
                _LOG.warning("%s, pid %d, is killed: %s", slot.name, slot.child.process.pid, reason)
                slot.move(Phase.KILLED)
                slot.child.process.kill()

    def _send(self, slots: Sequence[ChildSlot], message: Message) -> None:
        for slot in slots:
            if slot.child is not None and not slot.child.send(message):
                _LOG.warning("%s does not read its messages (%s)", slot.name, ", ".join(message))

    # --- the service

    def _announce(self) -> None:
        if self._announced or any(slot.phase is not Phase.READY for slot in self._slots):
            return
        self._announced = True
        count, tls = len(self._workers), self._settings.listen.admin_cert_file is not None
        content, control = sockets.url(self._listeners.data), sockets.url(self._listeners.admin, tls=tls)
        workers = "1 worker" if count == 1 else f"{count} workers"
        status = f"serving on {content}, control plane on {control}, {workers}"
        print(f"gup: {status}", file=sys.stderr, flush=True)  # noqa: T201 - for people, not the log
        self._notifier.send("READY=1", f"STATUS={status}")

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload_settings()
        else:
            self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        """Begin to drain. A second call kills all children."""
        if self._stage is not Stage.SERVING:
            self._kill(self._slots, f"{reason} came again")
            return
        _LOG.info("%s: draining", reason)
        self._stage = Stage.DRAINING
        self._deadline = time.monotonic() + self._settings.listen.drain_timeout + PAST_DRAIN_SECONDS
        self._notifier.send("STOPPING=1", "STATUS=draining")
        for slot in [slot for slot in self._slots if slot.phase is Phase.WAITING]:
            slot.move(Phase.ENDED)
        if self._settings.cluster.url is not None:
            self._send([self._controller], {"leave": True})
        self._send(self._workers, {"drain": True})
        # When the workers have closed their copies too, new connections are refused.
        sockets.close(*self._listeners.data)

    def _continue_stopping(self, now: float) -> None:
        if self._stage is Stage.DRAINING:
            if all(slot.phase is Phase.ENDED for slot in self._workers):
                self._stage = Stage.STOPPING
                self._deadline = now + _CONTROLLER_STOP_SECONDS
                self._send([self._controller], {"stop": True})
            elif now >= self._deadline:
                self._kill(self._workers, "draining took too long")
        if self._stage is Stage.STOPPING:
            if self._controller.phase is Phase.ENDED:
                self._stage = Stage.ENDED
            elif now >= self._deadline:
                self._kill([self._controller], "stopping took too long")

    def _reload_settings(self) -> Message:
        """Read the settings again and send them to the children. Returns the answer to the controller."""
        if self._reload is None or self._stage is not Stage.SERVING:
            problem = "there is no settings file" if self._reload is None else "the service is stopping"
            _LOG.warning("settings not reloaded: %s", problem)
            return {"problems": [problem], "changed": [], "waiting": []}
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        problems: list[str] = []
        changed: list[str] = []
        waiting: list[str] = []
        try:
            changed, waiting = self._apply(self._reload())
            self._shared.words[shared_memory.CONFIG_RELOADED_AT] = int(time.time())
        except (GupError, OSError) as error:
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            for problem in problems:
                _LOG.error("settings not reloaded: %s", problem)
        self._shared.words[shared_memory.CONFIG_OK] = not problems
        if self._announced:
            self._notifier.send("READY=1")
        return {"problems": problems, "changed": changed, "waiting": waiting}

    def _apply(self, new: Settings) -> tuple[list[str], list[str]]:
        """Take over the new settings; the keys that took effect, and those that wait for a restart."""
        settings, waiting = reloadable(self._settings, new)
        log.configure(settings.log)  # raises if the destination can't be used
        changed = differing(self._settings, settings)
        self._settings = settings
        for key in waiting:
            _LOG.warning("%s: takes effect at the next start", key)
        self._send(self._slots, {"settings": settings.model_dump(mode="json", by_alias=True)})
        self._shared.raise_epoch(shared_memory.POLICY_EPOCH)
        _LOG.info("settings reloaded: %s", ", ".join(changed) or "nothing has changed")
        return changed, waiting


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    known = -status in {*signal.Signals}
    return f"was ended by {signal.Signals(-status).name if known else f'signal {-status}'}"


def _require_token(admin: Sequence[socket.socket], settings: Settings) -> None:
    """GupError if other machines can reach the control plane and it needs no token.

    Checked on the socket, since systemd may have bound it to another address than the settings'.
    """
    for sock in admin:
        host = "::1" if sock.family == socket.AF_UNIX else sock.getsockname()[0]
        if not ip_address(host.split("%")[0]).is_loopback and settings.listen.admin_token_file is None:
            raise GupError(
                f"other machines can reach the control plane at {host}, so each request needs a token: set "
                "listen.admin_token_file to a file with a token"
            )


_FIXED = {
    "listen": ("address", "port", "admin_address", "admin_port", "backlog"),
    "cache": ("directory",),
    "workers": ("count",),
    "site": ("name",),
    "cluster": tuple(Cluster.model_fields),
}
"""Settings that need a restart: sockets, cache directory, number of processes, the name in Via, the cluster.
(The cluster's files are read again on reload.)"""


def differing(old: BaseModel, new: BaseModel, above: str = "") -> list[str]:
    """The keys whose values differ, in their spelling in the file; a list is one key."""
    found: list[str] = []
    for name, field in type(old).model_fields.items():
        before, after, key = getattr(old, name), getattr(new, name), above + (field.alias or name)
        if isinstance(before, BaseModel):
            found += differing(before, after, f"{key}.")
        elif before != after:
            found.append(key)
    return found


def reloadable(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The new settings as far as a running service can apply them, and the keys that need a restart.

    Besides those in _FIXED, whether the control plane uses TLS and whether it needs a token is fixed. The
    shared file has counters for the names of upstreams at the start, so if the set of names differs, all
    upstreams keep their old settings.
    """
    fixed, postponed = dict(_FIXED), []
    if (old.listen.admin_cert_file is None) != (new.listen.admin_cert_file is None):
        fixed["listen"] += ("admin_cert_file", "admin_key_file")
    if new.listen.admin_token_file is None and not ip_address(old.listen.admin_address).is_loopback:
        fixed["listen"] += ("admin_token_file",)
    changed: dict[str, object] = {}
    for section, keys in fixed.items():
        before, after = getattr(old, section), getattr(new, section)
        kept = {key: own for key in keys if (own := getattr(before, key)) != getattr(after, key)}
        postponed += [f"{section}.{key}" for key in kept if key != "admin_key_file"]
        changed[section] = after.model_copy(update=kept)
    if {row.name for row in new.upstream} != {row.name for row in old.upstream}:
        postponed.append("upstream")
        changed["upstream"] = old.upstream
    return new.model_copy(update=changed), postponed
