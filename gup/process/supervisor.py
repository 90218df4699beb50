"""The supervisor: starts, watches, restarts, reloads and stops the children."""

import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum, auto
from ipaddress import ip_address

from gup import log
from gup.config import Settings
from gup.errors import GupError, SettingsError
from gup.process import sockets
from gup.process.bootstrap import Resources, open_resources, signal_socket
from gup.process.child import Assignment, Child, ChildSlot, Phase, command, dump
from gup.process.shared_memory import CONFIG_OK, CONFIG_RELOADED_AT, CONTROLLER, FIRST_WORKER, SUPERVISOR

_LOG = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_SUSPENDED_SECONDS = 5.0
"""After a longer pause between two ticks the whole machine is assumed to have been suspended."""
_WORKERS_FIRST_SECONDS = 2.0
"""The controller starts when all workers are ready, or after this time: client requests come first."""
_STARTING_AT_ONCE = max(8, 2 * len(os.sched_getaffinity(0)))
"""Limit of children that start at the same time: more would slow each other beyond the time limit."""
_PAST_DRAIN_SECONDS = 5.0
_CONTROLLER_STOP_SECONDS = 10.0

Reload = Callable[[], Settings]
ChildCommand = Callable[[str], list[str]]


class Stage(Enum):
    """Stages of the service, in this order."""

    SERVING = auto()
    DRAINING = auto()  # workers finish
    STOPPING = auto()  # the controller finishes
    ENDED = auto()


def serve(
    settings: Settings,
    reload: Reload | None = None,
    *,
    child_command: ChildCommand = command,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run the service until a signal stops it, and return the exit status. Call it in the main thread.

    `reload` reads the settings again; it raises SettingsError when they are invalid. `environment` defaults
    to the environment of this process.
    """
    log.configure(settings.log)
    _raise_descriptor_limit()
    with ExitStack() as stack:
        stack.callback(log.close)
        try:
            resources = open_resources(settings, os.environ if environment is None else environment, stack)
        except GupError as error:
            _LOG.error("%s", error)
            return 1
        supervisor = Supervisor(settings, resources, reload, child_command)
        with signal_socket() as signals:
            supervisor.run(signals)
    return 0


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit; children inherit it.

    A client takes one descriptor, often two. If the system refuses (the hard limit is above `fs.nr_open`, or
    a sandbox forbids the call), the service runs with the limit it has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        _LOG.warning("the limit of open files stays at %d: setrlimit: %s", soft, error)


class Supervisor:
    """The children of one service, and the loop that looks after them."""

    def __init__(
        self, settings: Settings, resources: Resources, reload: Reload | None, child_command: ChildCommand
    ) -> None:
        self._settings = settings
        self._resources = resources
        self._reload = reload
        self._command = child_command
        self._workers = [ChildSlot("worker", n, FIRST_WORKER + n) for n in range(settings.worker_count)]
        self._controller = ChildSlot("controller", 0, CONTROLLER)
        self._controller.start_at = time.monotonic() + _WORKERS_FIRST_SECONDS
        self._slots = [*self._workers, self._controller]
        self._counters = resources.shared.counters(SUPERVISOR)
        self._selector = selectors.DefaultSelector()
        self._stage = Stage.SERVING
        self._deadline = 0.0
        self._announced = False
        self._ticked_at = self._watched_from = time.monotonic()
        self._watchdog_at = 0.0

    def run(self, signals: socket.socket) -> None:
        """Run until the service has ended. No child is left, whatever happens."""
        with self._selector:
            self._selector.register(signals, selectors.EVENT_READ)
            try:
                self._tick(time.monotonic())
                while self._stage is not Stage.ENDED:
                    for key, _ in self._selector.select(self._pause_seconds(time.monotonic())):
                        if key.data is None:
                            self._handle_signals(signals)
                        else:
                            self._handle_messages(key.data)
                    self._reap()
                    self._tick(time.monotonic())
            finally:
                self._stage = Stage.ENDED
                self._kill(self._slots, "the supervisor is exiting")
                for slot in self._slots:
                    if slot.child is not None:
                        slot.child.process.wait()
                self._reap()

    def _pause_seconds(self, now: float) -> float:
        due = [slot.start_at - now for slot in self._waiting() if self._may_start()]
        watchdog = self._resources.notifier.watchdog_seconds
        return max(0.0, min([_TICK_SECONDS, *due, *([watchdog / 3] if watchdog else [])]))

    def _tick(self, now: float) -> None:
        if now - self._ticked_at > _SUSPENDED_SECONDS:
            self._watched_from = now
        self._ticked_at = now
        if self._controller.generation == 0 and all(slot.phase is Phase.READY for slot in self._workers):
            self._controller.start_at = now
        for slot in self._waiting():
            if slot.start_at <= now and self._may_start():
                self._start(slot)
        for slot in self._slots:
            last_beat = self._resources.shared.page.last_beat(slot.block) / 1e9
            reason = slot.reason_to_kill(now, last_beat, self._watched_from)
            if reason is not None:
                self._kill([slot], reason)
        self._announce()
        self._continue_stopping(now)
        watchdog = self._resources.notifier.watchdog_seconds
        if watchdog and now - self._watchdog_at >= watchdog / 3:
            self._resources.notifier.watchdog()
            self._watchdog_at = now

    def _waiting(self) -> list[ChildSlot]:
        return [slot for slot in self._slots if slot.phase is Phase.WAITING]

    def _may_start(self) -> bool:
        starting = sum(slot.phase is Phase.STARTING for slot in self._slots)
        return self._stage is Stage.SERVING and starting < _STARTING_AT_ONCE

    # --- one child

    def _start(self, slot: ChildSlot) -> None:
        now = time.monotonic()
        slot.start(now)
        self._resources.shared.page.forget_beat(slot.block)
        try:
            child = Child(self._command(slot.role), self._assignment(slot), self._resources.environment)
        except OSError as error:
            _LOG.error("%s could not be started: %s", slot.name, error)
            slot.exited(now, restart=True)
            return
        slot.child = child
        self._selector.register(child, selectors.EVENT_READ, slot)
        _LOG.info("%s started, pid %d", slot.name, child.process.pid)

    def _assignment(self, slot: ChildSlot) -> Assignment:
        worker, resources, listeners = slot.role == "worker", self._resources, self._resources.listeners
        return Assignment(
            role=slot.role,
            slot=slot.number,
            block=slot.block,
            settings=dump(self._settings),
            listen_fds=listeners.of_worker(slot.number) if worker else listeners.of_controller(),
            shared_fd=resources.shared.fd,
            event_fd=resources.events[0 if worker else 1].fileno(),
            lock_fd=resources.lock.children_fd,
            generation=slot.generation,
        )

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
                slot.ready(time.monotonic())
                self._report_workers()
            elif message.get("drained"):
                _LOG.info("%s has drained", slot.name)
            elif message.get("reload") and slot.role == "controller":
                child.send(self._reload_settings())

    def _reap(self) -> None:
        """Reap exited children: add their counters to the totals and free their slots."""
        for slot in self._slots:
            child = slot.child
            if child is None or (status := child.process.poll()) is None:
                continue
            if slot.closed_at is None:
                self._selector.unregister(child)
            child.close()
            self._resources.shared.fold(slot.block)
            restart = self._stage is Stage.SERVING
            if restart and slot.role == "worker":
                self._counters.add("gup_worker_restarts_total")
            level = logging.WARNING if restart or status else logging.INFO
            _LOG.log(level, "%s, pid %d, %s", slot.name, child.process.pid, _exit_reason(status))
            slot.exited(time.monotonic(), restart=restart)
            self._report_workers()

    def _report_workers(self) -> None:
        """Send the list of workers to the controller, which shows it: at each change."""
        now = time.monotonic()
        rows = [
            {
                "slot": slot.number,
                "pid": slot.child.process.pid,
                "up_since": time.time() - (now - slot.started_at),
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

    def _send(self, slots: Sequence[ChildSlot], message: dict[str, object]) -> None:
        for slot in slots:
            if slot.child is not None and not slot.child.send(message):
                _LOG.warning("%s does not read its messages (%s)", slot.name, ", ".join(message))

    # --- the service

    def _announce(self) -> None:
        if self._announced or any(slot.phase is not Phase.READY for slot in self._slots):
            return
        self._announced = True
        print(f"gup: {self._status()}", file=sys.stderr, flush=True)  # noqa: T201 - for people, not the log
        self._resources.notifier.ready(self._status())

    def _status(self) -> str:
        listeners, count = self._resources.listeners, len(self._workers)
        tls = self._settings.listen.admin_cert_file is not None
        content, control = sockets.url(listeners.data), sockets.url(listeners.admin, tls=tls)
        workers = "1 worker" if count == 1 else f"{count} workers"
        return f"serving on {content}, control plane on {control}, {workers}"

    def _handle_signals(self, signals: socket.socket) -> None:
        for number in signals.recv(4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self._reload_settings()

    def _stop(self, reason: str) -> None:
        """Begin to drain. A second call kills all children."""
        if self._stage is not Stage.SERVING:
            self._kill(self._slots, f"{reason} came again")
            return
        _LOG.info("%s: draining", reason)
        self._stage = Stage.DRAINING
        self._deadline = time.monotonic() + self._settings.listen.drain_timeout + _PAST_DRAIN_SECONDS
        self._resources.notifier.stopping("draining")
        for slot in self._waiting():
            slot.move(Phase.ENDED)
        self._send(self._workers, {"drain": True})
        # When the workers have closed their copies too, new connections are refused.
        self._resources.listeners.close_data()

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

    def _reload_settings(self) -> dict[str, object]:
        """Read the settings again and send them to the children. Returns the answer to the controller."""
        if self._reload is None or self._stage is not Stage.SERVING:
            problem = "there is no file to read" if self._reload is None else "the service is stopping"
            _LOG.warning("settings not reloaded: %s", problem)
            return {"reloaded": False, "problems": [problem]}
        page = self._resources.shared.page
        self._resources.notifier.reloading()
        try:
            self._apply(self._reload())
        except (GupError, OSError) as error:
            page.words[CONFIG_OK] = 0
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            for problem in problems:
                _LOG.error("settings not reloaded: %s", problem)
            answer: dict[str, object] = {"reloaded": False, "problems": problems}
        else:
            page.words[CONFIG_OK] = 1
            page.words[CONFIG_RELOADED_AT] = int(time.time())
            answer = {"reloaded": True, "problems": []}
        if self._announced:
            self._resources.notifier.ready(self._status())
        return answer

    def _apply(self, new: Settings) -> None:
        settings, postponed = reloadable(self._settings, new)
        log.configure(settings.log)  # raises if the destination can't be used
        self._settings = settings
        for key in postponed:
            _LOG.warning("%s: takes effect at the next start", key)
        self._send(self._slots, {"settings": dump(settings)})
        self._resources.shared.page.raise_policy()
        _LOG.info("settings reloaded")


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


_LISTEN_KEYS = ("address", "port", "admin_address", "admin_port", "backlog")
_TLS_KEYS = ("admin_cert_file", "admin_key_file")


def reloadable(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The new settings as far as a running service can take them over, and the keys that need a restart.

    Sockets, cache directory and number of processes are fixed at the start; so are whether the control plane
    uses TLS and whether it needs a token. The shared file has counters for the names of upstreams at the
    start, so if the set of names differs, all upstreams keep their old settings.
    """
    postponed = [
        f"listen.{key}" for key in _LISTEN_KEYS if getattr(old.listen, key) != getattr(new.listen, key)
    ]
    kept = {key: getattr(old.listen, key) for key in _LISTEN_KEYS}
    if (old.listen.admin_cert_file is None) != (new.listen.admin_cert_file is None):
        postponed.append("listen.admin_cert_file")
        kept |= {key: getattr(old.listen, key) for key in _TLS_KEYS}
    if new.listen.admin_token_file is None and not ip_address(old.listen.admin_address).is_loopback:
        postponed.append("listen.admin_token_file")
        kept["admin_token_file"] = old.listen.admin_token_file
    cache, workers, upstream = new.cache, new.workers, new.upstream
    if cache.directory != old.cache.directory:
        postponed.append("cache.directory")
        cache = cache.model_copy(update={"directory": old.cache.directory})
    if workers.count != old.workers.count:
        postponed.append("workers.count")
        workers = old.workers
    if {row.name for row in upstream} != {row.name for row in old.upstream}:
        postponed.append("upstream")
        upstream = old.upstream
    listen = new.listen.model_copy(update=kept)
    changed = {"listen": listen, "cache": cache, "workers": workers, "upstream": upstream}
    return new.model_copy(update=changed), postponed
