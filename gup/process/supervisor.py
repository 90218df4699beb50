"""The supervisor: starts, watches, replaces, reloads and stops the children; serves nothing itself."""

import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum, auto

from gup import log
from gup.config import Settings
from gup.errors import GupError, SettingsError
from gup.process import sockets
from gup.process.child import Assignment, Child, Role, command, dump
from gup.process.descriptors import use_all_descriptors
from gup.process.page import CONFIG_OK, CONFIG_RELOADED_AT
from gup.process.premises import Premises, open_premises, signal_socket
from gup.process.reload import effective
from gup.process.seat import Phase, Seat
from gup.process.shared import CONTROLLER, SUPERVISOR, worker_block

_LOG = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_STILL_SECONDS = 5.0
"""A pause between two ticks that means that the machine stood still, not only a child."""
_WORKERS_FIRST_SECONDS = 2.0
"""The controller starts when all workers are ready, or after this: clients come before pages."""
_STARTING_AT_ONCE = max(8, 2 * len(os.sched_getaffinity(0)))
"""Children that may be starting at one time: more would only keep each other from being ready in time."""
_PAST_DRAIN_SECONDS = 5.0
_CONTROLLER_STOP_SECONDS = 10.0

Reload = Callable[[], Settings]
ChildCommand = Callable[[str], list[str]]


class Stage(Enum):
    """Of the service; forward only."""

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
    """Run the service until a signal ends it; the exit status. In the main thread only.

    `reload` reads the settings again (SettingsError: they can't be used). `environment` is the process's own
    by default; tests give others, and other commands for the children.
    """
    log.configure(settings.log)
    use_all_descriptors()
    with ExitStack() as stack:
        stack.callback(log.close)
        try:
            premises = open_premises(settings, os.environ if environment is None else environment, stack)
        except GupError as error:
            _LOG.error("%s", error)
            return 1
        supervisor = Supervisor(settings, premises, reload, child_command)
        with signal_socket() as signals:
            supervisor.run(signals)
    return 0


class Supervisor:
    """The children of one service, and the one loop that looks after them."""

    def __init__(
        self, settings: Settings, premises: Premises, reload: Reload | None, child_command: ChildCommand
    ) -> None:
        self._settings = settings
        self._premises = premises
        self._reload = reload
        self._command = child_command
        self._workers = [Seat("worker", slot, worker_block(slot)) for slot in range(settings.worker_count)]
        self._controller = Seat("controller", 0, CONTROLLER)
        self._controller.start_at = time.monotonic() + _WORKERS_FIRST_SECONDS
        self._seats = [*self._workers, self._controller]
        self._counters = premises.shared.counters(SUPERVISOR)
        self._selector = selectors.DefaultSelector()
        self._stage = Stage.SERVING
        self._deadline = 0.0
        self._announced = False
        self._ticked_at = self._watched_from = time.monotonic()
        self._told_at = 0.0

    def run(self, signals: socket.socket) -> None:
        """Until the service has ended. Whatever happens, no child is left."""
        with self._selector:
            self._selector.register(signals, selectors.EVENT_READ)
            try:
                self._tick(time.monotonic())
                while self._stage is not Stage.ENDED:
                    for key, _ in self._selector.select(self._pause_seconds(time.monotonic())):
                        if key.data is None:
                            self._take_signals(signals)
                        else:
                            self._hear(key.data)
                    self._reap()
                    self._tick(time.monotonic())
            finally:
                self._stage = Stage.ENDED
                self._kill(self._seats, "the supervisor ends")
                for seat in self._seats:
                    if seat.child is not None:
                        seat.child.wait()
                self._reap()

    def _pause_seconds(self, now: float) -> float:
        due = [seat.start_at - now for seat in self._waiting() if self._may_start()]
        watchdog = self._premises.notifier.watchdog_seconds
        return max(0.0, min([_TICK_SECONDS, *due, *([watchdog / 3] if watchdog else [])]))

    def _tick(self, now: float) -> None:
        if now - self._ticked_at > _STILL_SECONDS:
            self._watched_from = now
        self._ticked_at = now
        if self._controller.generation == 0 and all(seat.phase is Phase.READY for seat in self._workers):
            self._controller.start_at = now
        for seat in self._waiting():
            if seat.start_at <= now and self._may_start():
                self._start(seat)
        for seat in self._seats:
            last_beat = self._premises.shared.page.last_beat(seat.block) / 1e9
            reason = seat.verdict(now, last_beat, self._watched_from)
            if reason is not None:
                self._kill([seat], reason)
        self._announce()
        self._advance(now)
        watchdog = self._premises.notifier.watchdog_seconds
        if watchdog and now - self._told_at >= watchdog / 3:
            self._premises.notifier.watchdog()
            self._told_at = now

    def _waiting(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.phase is Phase.WAITING]

    def _may_start(self) -> bool:
        starting = sum(seat.phase is Phase.STARTING for seat in self._seats)
        return self._stage is Stage.SERVING and starting < _STARTING_AT_ONCE

    # --- one child

    def _start(self, seat: Seat) -> None:
        now = time.monotonic()
        seat.start(now)
        self._premises.shared.page.forget_beat(seat.block)
        try:
            child = Child(self._command(seat.role), self._assignment(seat), self._premises.environment)
        except OSError as error:
            _LOG.error("%s could not be started: %s", seat.name, error)
            seat.died(now, again=True)
            return
        seat.child = child
        self._selector.register(child.fd, selectors.EVENT_READ, seat)
        _LOG.info("%s started, pid %d", seat.name, child.pid)

    def _assignment(self, seat: Seat) -> Assignment:
        role: Role = seat.role
        premises, listeners = self._premises, self._premises.listeners
        return Assignment(
            role=role,
            slot=seat.slot,
            block=seat.block,
            settings=dump(self._settings),
            listen_fds=listeners.of_worker(seat.slot) if role == "worker" else listeners.of_controller(),
            shared_fd=premises.shared.fd,
            event_fd=premises.events[0 if role == "worker" else 1].fileno(),
            lock_fd=premises.instance.children_fd,
            generation=seat.generation,
        )

    def _hear(self, seat: Seat) -> None:
        child = seat.child
        if child is None:
            return
        messages = child.receive()
        if messages is None:
            self._selector.unregister(child.fd)
            seat.closed_at = time.monotonic()
            return
        for message in messages:
            if message.get("ready"):
                seat.ready(time.monotonic())
                self._tell_of_workers()
            elif message.get("drained"):
                _LOG.info("%s has drained", seat.name)
            elif message.get("reload") and seat.role == "controller":
                child.send(self._reload_settings())

    def _reap(self) -> None:
        """Bury the dead: fold their counters, then let the seat be taken again."""
        for seat in self._seats:
            child = seat.child
            if child is None or (status := child.poll()) is None:
                continue
            if seat.closed_at is None:
                self._selector.unregister(child.fd)
            child.close()
            self._premises.shared.fold(seat.block)
            again = self._stage is Stage.SERVING
            if again and seat.role == "worker":
                self._counters.add("gup_worker_restarts_total")
            level = logging.WARNING if again or status else logging.INFO
            _LOG.log(level, "%s, pid %d, %s", seat.name, child.pid, _how(status))
            seat.died(time.monotonic(), again=again)
            self._tell_of_workers()

    def _tell_of_workers(self) -> None:
        """The controller shows them; it hears of every change, and of all when it has begun."""
        now = time.monotonic()
        rows = [
            {
                "slot": seat.slot,
                "pid": seat.child.pid,
                "up_since": time.time() - (now - seat.started_at),
                "ready": seat.phase is Phase.READY,
            }
            for seat in self._workers
            if seat.child is not None
        ]
        self._tell([self._controller], {"workers": rows})

    def _kill(self, seats: Sequence[Seat], reason: str) -> None:
        for seat in seats:
            if seat.child is not None and seat.phase is not Phase.DOOMED:
                _LOG.warning("%s, pid %d, is killed: %s", seat.name, seat.child.pid, reason)
                seat.move(Phase.DOOMED)
                seat.child.kill()

    # --- the service

    def _announce(self) -> None:
        if self._announced or any(seat.phase is not Phase.READY for seat in self._seats):
            return
        self._announced = True
        print(f"gup: {self._status()}", file=sys.stderr, flush=True)  # noqa: T201 - for people, not the log
        self._premises.notifier.ready(self._status())

    def _status(self) -> str:
        listeners, count = self._premises.listeners, len(self._workers)
        tls = self._settings.listen.admin_cert_file is not None
        plane, control = sockets.url(listeners.data), sockets.url(listeners.admin, tls=tls)
        workers = "1 worker" if count == 1 else f"{count} workers"
        return f"serving on {plane}, control plane on {control}, {workers}"

    def _take_signals(self, signals: socket.socket) -> None:
        numbers = signals.recv(4096)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self._reload_settings()

    def _stop(self, why: str) -> None:
        """Begin to drain; asked a second time, end at once."""
        if self._stage is not Stage.SERVING:
            self._kill(self._seats, f"{why} came again")
            return
        _LOG.info("%s: draining", why)
        self._stage = Stage.DRAINING
        self._deadline = time.monotonic() + self._settings.listen.drain_timeout + _PAST_DRAIN_SECONDS
        self._premises.notifier.stopping("draining")
        for seat in self._seats:
            if seat.phase is Phase.WAITING:
                seat.move(Phase.GONE)
        self._tell(self._workers, {"drain": True})
        self._premises.listeners.close_data()  # with the workers' own copies: connects are refused

    def _advance(self, now: float) -> None:
        """Go on with stopping, as far as the children have."""
        if self._stage is Stage.DRAINING:
            if all(seat.phase is Phase.GONE for seat in self._workers):
                self._stage = Stage.STOPPING
                self._deadline = now + _CONTROLLER_STOP_SECONDS
                self._tell([self._controller], {"stop": True})
            elif now >= self._deadline:
                self._kill(self._workers, "draining took too long")
        if self._stage is Stage.STOPPING:
            if self._controller.phase is Phase.GONE:
                self._stage = Stage.ENDED
            elif now >= self._deadline:
                self._kill([self._controller], "stopping took too long")

    def _reload_settings(self) -> dict[str, object]:
        """Read the settings again and hand them out; what the controller is told of it."""
        if self._reload is None or self._stage is not Stage.SERVING:
            problem = "there is nothing to read again" if self._reload is None else "the service is stopping"
            _LOG.warning("settings not reloaded: %s", problem)
            return {"reloaded": False, "problems": [problem]}
        page = self._premises.shared.page
        self._premises.notifier.reloading()
        try:
            self._apply(self._reload())
        except (GupError, OSError) as error:  # whatever is wrong with them, the service goes on
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
            self._premises.notifier.ready(self._status())
        return answer

    def _apply(self, new: Settings) -> None:
        settings, late = effective(self._settings, new)
        log.configure(settings.log)  # which may refuse
        self._settings = settings
        for key in late:
            _LOG.warning("%s: takes effect at the next start", key)
        self._tell(self._seats, {"settings": dump(self._settings)})
        self._premises.shared.page.raise_policy()
        _LOG.info("settings reloaded")

    def _tell(self, seats: Sequence[Seat], message: dict[str, object]) -> None:
        for seat in seats:
            if seat.child is not None and not seat.child.send(message):
                _LOG.warning("%s takes no message (%s)", seat.name, ", ".join(message))


def _how(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
