"""The supervisor, gup's master process: starts, watches, restarts, replaces and stops the children.

Children are replaced when the number of workers changes and when the supervisor runs a new program
(gup.process.handover). New workers start beside the earlier ones, on the same sockets. When all of them are
ready, the earlier ones leave: they accept no more, hand their idle connections to the new ones, and exit when
their last response has been sent. Then the controller is replaced.
"""

import logging
import math
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
from pathlib import Path

from pydantic import BaseModel

import gup
from gup import log
from gup.cache.fair_shares import clear_column, shares_file
from gup.cache.store import Store
from gup.cache.streams import free_streams, idle_streams
from gup.config import Cluster, Settings
from gup.control.auth import local_path, make_local_token
from gup.errors import GupError, SettingsError
from gup.process import handover, shared_memory, sockets
from gup.process.child import Assignment, Child, ChildSlot, Inherited, Message, Phase
from gup.process.handover import Handover, KeptChild, KeptFile, Trial
from gup.process.instance_lock import InstanceLock
from gup.process.shared_memory import Earlier, Page, Row, SharedFile
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
_CONTROLLER_LEAVE_SECONDS = 20.0
_BUFFER_BYTES = 4 << 20
_SPARE_BLOCKS = 61
"""Of counters and of the page, besides four for each worker: for workers that finish their responses while
others serve already, and for those that a reload adds."""

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

    For a supervisor that wants to run this program (gup.process.handover), either only say whether it can, or
    go on in its place.
    """
    taken = handover.received(environment)
    if taken is not None and taken.pid != os.getpid():
        handover.load_children()
        handover.say_so()
        return 0
    environment = {name: text for name, text in environment.items() if name != handover.VARIABLE}
    signals: list[int] = []
    for number in (signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, lambda number, _: signals.append(number))  # nothing else is interrupted
    log.configure(settings.log)
    _raise_descriptor_limit()
    with ExitStack() as stack:
        stack.callback(log.close)
        try:
            supervisor = Supervisor(settings, reload, child_command, environment, stack, taken)
        except GupError as error:
            _LOG.error("%s", error)
            return 1
        supervisor.run(signals)
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
        taken: Handover | None = None,
    ) -> None:
        """Open all that the service needs; `stack` closes it. GupError tells what can't be opened.

        With `taken` go on with what the program before has opened and started.
        """
        self._settings, self._reload, self._command = settings, reload, child_command
        self._own_environment = environment
        self._environment = {name: text for name, text in environment.items() if name not in VARIABLES}
        self._notifier = Notifier(environment, os.getpid())
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._workers: list[ChildSlot] = []
        self._controller = ChildSlot("controller", 0, shared_memory.CONTROLLER)
        self._leaving: list[ChildSlot] = []
        self._earlier: list[Earlier] = []
        self._trial: Trial | None = None
        self._asked_by: ChildSlot | None = None
        self._stage = Stage.SERVING
        self._deadline = 0.0
        self._announced = False
        self._ticked_at = self._watched_from = time.monotonic()
        self._watchdog_at = 0.0
        if taken is None:
            self._open(environment, stack)
        else:
            self._take_over(taken, stack)
        self._beats = self._page.row(Row.BEAT)

    def _open(self, environment: Mapping[str, str], stack: ExitStack) -> None:
        settings = self._settings
        store = Store(settings.cache.directory)
        store.prepare()
        for doubt in doubts(settings, time.time()):
            _LOG.warning("%s", doubt)
        self._lock = InstanceLock(store.run, LOCK_SECONDS)
        stack.callback(self._lock.close)
        passed = passed_sockets(environment, os.getpid())
        self._listeners = sockets.open_listeners(settings.listen, settings.worker_count, passed)
        stack.callback(lambda: sockets.close(*self._listeners.data, *self._listeners.admin))
        _require_token(self._listeners.admin, settings)
        try:
            make_local_token(store.run)
        except OSError as error:  # a full disk must not stop the service
            path = local_path(store.run)
            _LOG.warning("no token for commands on this machine: %s: %s", path, error.strerror)
        idle = idle_streams(store.run / "streams", store.content)
        names = [upstream.name for upstream in settings.upstream]
        self._shared = SharedFile.create(store.run / "shared", names, settings.worker_count, idle)
        with suppress(OSError):  # a full disk: at the next start
            free_streams(store.run / "streams", idle)
        stack.callback(self._close_files)
        self._page = Page.create(shared_memory.FIRST_WORKER + 4 * settings.worker_count + _SPARE_BLOCKS)
        stack.callback(self._page.close)
        self._shares_fd = shares_file(self._page.capacity - shared_memory.FIRST_WORKER)
        stack.callback(os.close, self._shares_fd)
        self._events, self._handed = _pair(), {"worker": _pair(), "controller": _pair()}
        stack.callback(sockets.close, *self._events, *(end for pair in self._handed.values() for end in pair))
        self._make_slots(settings.worker_count, generation=0)
        self._controller.start_at = time.monotonic() + _WORKERS_FIRST_SECONDS

    def _close_files(self) -> None:
        for file in (*(earlier.file for earlier in self._earlier), self._shared):
            file.close()

    def _make_slots(self, workers: int, generation: int) -> None:
        """Empty slots, with blocks that no process has."""
        free = self._free_blocks()[:workers]
        self._workers = [
            ChildSlot("worker", n, block, self._shared, generation=generation) for n, block in enumerate(free)
        ]
        self._controller = ChildSlot(
            "controller", 0, shared_memory.CONTROLLER, self._shared, generation=self._controller.generation
        )

    def _free_blocks(self) -> list[int]:
        held = {slot.block for slot in self._slots if slot.child is not None}
        return [n for n in range(shared_memory.FIRST_WORKER, self._page.capacity) if n not in held]

    @property
    def _slots(self) -> list[ChildSlot]:
        return [*self._workers, self._controller, *self._leaving]

    @property
    def _blocks(self) -> int:
        """So many of the page's words in a row are in use."""
        return 1 + max(slot.block for slot in self._slots)

    def run(self, signals: list[int]) -> None:
        """Run until the service has ended. No child is left, whatever happens.

        `signals` have come already, and more are put there.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: signals.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handover.SIGNALS)
        try:
            self._tick(time.monotonic())
            while self._stage is not Stage.ENDED:
                for key, _ in self._selector.select(_TICK_SECONDS):
                    self._handle_messages(key.data)
                while signals:
                    self._handle_signal(signals.pop(0))
                self._reap()
                self._tick(time.monotonic())
                self._continue_upgrade(time.monotonic(), signals)
        finally:
            self._stage = Stage.ENDED
            if self._trial is not None:
                self._trial.stop()
            self._kill(self._slots, "the supervisor is exiting")
            for slot in self._slots:
                if slot.child is not None:
                    slot.child.process.wait()
            self._reap()
            self._continue_replacing(time.monotonic())

    def _tick(self, now: float) -> None:
        if now - self._ticked_at > _SUSPENDED_SECONDS:
            self._watched_from = now
        self._ticked_at = now
        if self._controller.generation == 0 and all(slot.phase is Phase.READY for slot in self._workers):
            self._controller.start_at = now
        self._continue_replacing(now)
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
        listening = listeners.of_worker(slot.number, len(self._workers)) if worker else listeners.admin
        assert slot.shared is not None
        assignment = Assignment(
            role=slot.role,
            slot=slot.number,
            block=slot.block,
            blocks=self._blocks,
            settings=self._settings,
            listen_fds=tuple(sock.fileno() for sock in listening),
            handed_fds=_fds(self._handed[slot.role]),
            page_fd=self._page.fd,
            shared_fd=slot.shared.fd,
            shares_fd=self._shares_fd,
            event_fd=self._events[0 if worker else 1].fileno(),
            lock_fd=self._lock.children_fd,
            generation=slot.generation,
        )
        try:
            slot.child = Child.start(self._command(slot.role), assignment, self._environment)
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
            elif message.get("upgrade") and slot.role == "controller":
                self._begin_upgrade(slot)

    def _reap(self) -> None:
        for slot in self._slots:
            child = slot.child
            if child is None or (status := child.process.poll()) is None:
                continue
            if slot.closed_at is None:
                self._selector.unregister(child)
            child.close()
            assert slot.shared is not None
            slot.shared.clear_gauges(slot.block)
            self._page.clear(slot.block)
            if slot.role == "worker":
                clear_column(self._shares_fd, slot.block - shared_memory.FIRST_WORKER)
            restart = self._stage is Stage.SERVING and slot not in self._leaving
            if restart and slot.role == "worker":
                self._shared.counters(shared_memory.SUPERVISOR).add("gup_worker_restarts_total")
            level = logging.WARNING if restart or status else logging.INFO
            _LOG.log(level, "%s, pid %d, %s", slot.name, child.process.pid, _exit_reason(status))
            if restart and self._leaving and slot.phase is Phase.STARTING:
                _LOG.error("new %s does not start: the earlier processes go on serving", slot.name)
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
                "ready": slot.phase is not Phase.STARTING,
                "leaving": slot in self._leaving,
            }
            for slot in (*self._workers, *self._leaving)
            if slot.child is not None and slot.role == "worker"
        ]
        told = [slot for slot in self._every("controller") if slot.phase is not Phase.LEAVING]
        self._send(told, {"workers": rows})

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
        if self._announced or any(
            slot.phase is not Phase.READY for slot in (*self._workers, self._controller)
        ):
            return
        self._announced = True
        count, tls = len(self._workers), self._settings.listen.admin_cert_file is not None
        content, control = sockets.url(self._listeners.data), sockets.url(self._listeners.admin, tls=tls)
        workers = "1 worker" if count == 1 else f"{count} workers"
        status = f"serving on {content}, control plane on {control}, {workers}"
        print(f"gup: {status}", file=sys.stderr, flush=True)  # noqa: T201 - for people, not the log
        self._notifier.send("READY=1", f"STATUS={status}")

    def _ready_again(self) -> None:
        """After RELOADING=1, unless the service is still starting: _announce tells that it is ready."""
        if any(slot.phase is Phase.READY for slot in self._every("worker")):
            self._notifier.send("READY=1")

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload_settings()
        elif number == signal.SIGUSR2:
            self._begin_upgrade()
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
        if self._trial is not None:
            self._end_trial(["the service is stopping"])
        if self._settings.cluster.url is not None:
            self._send([self._controller], {"goodbye": True})
        self._send(self._every("worker"), {"drain": True})
        # When the workers have closed their copies too, new connections are refused.
        sockets.close(*self._listeners.data)

    def _continue_stopping(self, now: float) -> None:
        if self._stage is Stage.DRAINING:
            if not self._every("worker"):
                self._stage = Stage.STOPPING
                self._deadline = now + _CONTROLLER_STOP_SECONDS
                self._send(self._every("controller"), {"stop": True})
            elif now >= self._deadline:
                self._kill(self._every("worker"), "draining took too long")
        if self._stage is Stage.STOPPING:
            if not self._every("controller"):
                self._stage = Stage.ENDED
            elif now >= self._deadline:
                self._kill(self._every("controller"), "stopping took too long")

    def _every(self, role: str) -> list[ChildSlot]:
        """Those with a process, the leaving ones among them."""
        return [slot for slot in self._slots if slot.role == role and slot.child is not None]

    # --- other processes in the place of these

    def _replace_children(self, workers: int) -> None:
        """Have new processes take the place of all; GupError, and nothing has changed, if that can't be."""
        most = self._page.capacity - shared_memory.FIRST_WORKER
        if workers + len(self._workers) > most:
            raise GupError(
                f"workers.count: {workers} are too many to change to at run time: restart the service"
            )
        if len(self._free_blocks()) < workers:
            pids = ", ".join(str(slot.child.process.pid) for slot in self._leaving if slot.child is not None)
            raise GupError(
                f"too many earlier processes still finish their responses (pids {pids}): try again later"
            )
        self._listeners.extend(workers, self._settings.listen.backlog)
        run = Store(self._settings.cache.directory).run
        names = [upstream.name for upstream in self._settings.upstream]
        blocks = 1 + self._free_blocks()[workers - 1]
        new, earlier = SharedFile.succeed(run / "shared", self._shared, names, blocks)
        self._earlier.append(earlier)
        self._shared = new
        self._leaving += [slot for slot in (*self._workers, self._controller) if slot.child is not None]
        generation = max(slot.generation for slot in self._workers)
        self._make_slots(workers, generation)
        self._controller.start_at = math.inf
        self._announced = False

    def _continue_replacing(self, now: float) -> None:
        if self._stage is Stage.SERVING:
            if all(slot.phase is Phase.READY for slot in self._workers):
                staying = [slot for slot in self._leaving if slot.phase in (Phase.STARTING, Phase.READY)]
                for slot in staying:
                    slot.move(Phase.LEAVING)
                    if slot.role == "controller":
                        slot.leave_until = now + _CONTROLLER_LEAVE_SECONDS
                self._send(staying, {"leave": True})
            if self._controller.start_at == math.inf and len(self._every("controller")) == 0:
                self._controller.start_at = now
        for earlier in self._earlier:
            earlier.move(self._shared)
        self._leaving = [slot for slot in self._leaving if slot.child is not None]
        in_use = {id(slot.shared) for slot in self._leaving}
        for earlier in [earlier for earlier in self._earlier if id(earlier.file) not in in_use]:
            self._earlier.remove(earlier)
            earlier.file.close()

    # --- another program in the place of this

    def _begin_upgrade(self, asked_by: ChildSlot | None = None) -> None:
        problem = None
        if self._stage is not Stage.SERVING:
            problem = "the service is stopping"
        elif self._trial is not None:
            problem = "an upgrade is under way already"
        else:
            try:
                self._trial = Trial(self._handover(), self._environment)
            except OSError as error:
                problem = f"the new program can't be started: {error}"
            else:
                self._asked_by = asked_by
                _LOG.info("upgrade: the new program is tried, pid %d", self._trial.process.pid)
        if problem is not None:
            self._answer_upgrade(asked_by, [problem])

    def _answer_upgrade(self, asked_by: ChildSlot | None, problems: Sequence[str]) -> None:
        for problem in problems:
            _LOG.error("not upgraded: %s", problem)
        if asked_by is not None and asked_by.child is not None:
            asked_by.child.send({"upgrade": list(problems)})

    def _end_trial(self, problems: Sequence[str] | None) -> None:
        assert self._trial is not None
        if problems is not None and self._trial.process.returncode is None:
            self._trial.stop()
        self._trial = None
        self._answer_upgrade(self._asked_by, problems or [])

    def _continue_upgrade(self, now: float, signals: list[int]) -> None:
        if self._trial is None or (problems := self._trial.problems(now)) is None:
            return
        self._end_trial(problems)
        if problems:
            return
        _LOG.info("upgrade: the program is replaced")
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        log.close()
        waiting = signals[:]
        signals.clear()
        try:
            handover.replace_program(self._handover(), self._own_environment, waiting)
        except OSError as error:
            log.configure(self._settings.log)
            _LOG.error("not upgraded: the new program can't be executed: %s", error)
            self._ready_again()

    def _handover(self) -> Handover:
        current = (*self._workers, self._controller)
        children = [
            KeptChild(
                role=slot.role,
                number=slot.number,
                block=slot.block,
                pid=slot.child.process.pid,
                channel_fd=slot.child.fileno(),
                file=slot.shared.fd,
                phase=slot.phase.name,
                current=slot in current,
                generation=slot.generation,
                started_at=slot.started_at,
                ready_at=slot.ready_at,
            )
            for slot in self._slots
            if slot.child is not None and slot.shared is not None
        ]
        files = [KeptFile(fd=e.file.fd, moved=dict(e.moved)) for e in self._earlier]
        return Handover(
            pid=os.getpid(),
            settings=self._settings.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            workers=len(self._workers),
            data_fds=[sock.fileno() for sock in self._listeners.data],
            admin_fds=[sock.fileno() for sock in self._listeners.admin],
            shared_sockets=self._listeners.shared,
            page_fd=self._page.fd,
            shares_fd=self._shares_fd,
            event_fds=_fds(self._events),
            handed_fds={role: _fds(pair) for role, pair in self._handed.items()},
            lock_fds=self._lock.fds,
            files=[*files, KeptFile(fd=self._shared.fd)],
            children=children,
        )

    def _take_over(self, taken: Handover, stack: ExitStack) -> None:
        """Go on with all that the program before had, and have new children take the place of its own."""
        for fd in taken.descriptors:
            os.set_inheritable(fd, False)
        self._lock = InstanceLock(Path(), fds=taken.lock_fds)
        stack.callback(self._lock.close)
        data, admin = ([socket.socket(fileno=fd) for fd in fds] for fds in (taken.data_fds, taken.admin_fds))
        self._listeners = sockets.Listeners(data, admin, taken.shared_sockets)
        stack.callback(lambda: sockets.close(*self._listeners.data, *self._listeners.admin))
        self._page = Page(taken.page_fd)
        stack.callback(self._page.close)
        self._shares_fd = taken.shares_fd
        stack.callback(os.close, self._shares_fd)
        self._events = _sockets(taken.event_fds)
        self._handed = {role: _sockets(fds) for role, fds in taken.handed_fds.items()}
        stack.callback(sockets.close, *self._events, *(end for pair in self._handed.values() for end in pair))
        files = {file.fd: SharedFile(file.fd) for file in taken.files}
        self._shared = files[taken.files[-1].fd]
        self._earlier = [Earlier(files[file.fd], file.moved or {}) for file in taken.files[:-1]]
        stack.callback(self._close_files)
        new, self._settings = self._settings, taken.old_settings()
        for kept in taken.children:
            self._keep(kept, files[kept.file])
        there = [slot.number for slot in self._workers]
        missing = [number for number in range(taken.workers) if number not in there]
        self._workers += [
            ChildSlot("worker", number, block, self._shared)
            for number, block in zip(missing, self._free_blocks(), strict=False)
        ]
        _LOG.info("gup %s takes over the service of gup %s", gup.__version__, taken.version)
        try:
            Store(self._settings.cache.directory).prepare()
            self._apply(new, everything=True)
        except (GupError, OSError) as error:
            _LOG.error("the earlier processes go on serving: %s", error)
        self._ready_again()

    def _keep(self, kept: KeptChild, shared: SharedFile) -> None:
        slot = ChildSlot(kept.role, kept.number, kept.block, shared, Phase[kept.phase])
        slot.generation, slot.started_at, slot.ready_at = kept.generation, kept.started_at, kept.ready_at
        slot.child = Child(socket.socket(fileno=kept.channel_fd), Inherited(kept.pid))
        self._selector.register(slot.child, selectors.EVENT_READ, slot)
        if not kept.current:
            self._leaving.append(slot)
        elif kept.role == "controller":
            self._controller = slot
        else:
            self._workers.append(slot)

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
            self._page.words[shared_memory.CONFIG_RELOADED_AT] = int(time.time())
        except (GupError, OSError) as error:
            problems = error.problems if isinstance(error, SettingsError) else [str(error)]
            for problem in problems:
                _LOG.error("settings not reloaded: %s", problem)
        self._page.words[shared_memory.CONFIG_OK] = not problems
        self._ready_again()
        return {"problems": problems, "changed": changed, "waiting": waiting}

    def _apply(self, new: Settings, *, everything: bool = False) -> tuple[list[str], list[str]]:
        """Take over the new settings; the keys that took effect, and those that wait for a restart.

        GupError, and nothing has changed, when they can't be applied. With `everything` the children are
        replaced whatever has changed.
        """
        settings, waiting = reloadable(self._settings, new)
        count = settings.worker_count
        log.configure(settings.log)  # raises if the destination can't be used
        if everything or count != len(self._workers):
            try:
                self._replace_children(count)
            except GupError:
                log.configure(self._settings.log)
                raise
        changed = differing(self._settings, settings)
        self._settings = settings
        for key in waiting:
            _LOG.warning("%s: takes effect at the next start", key)
        # children of another version may not know all of them
        told = [slot for slot in self._slots if slot not in self._leaving or not slot.inherited]
        self._send(told, {"settings": settings.model_dump(mode="json", by_alias=True)})
        self._page.raise_epoch(shared_memory.POLICY_EPOCH)
        if changed or not everything:
            _LOG.info("settings reloaded: %s", ", ".join(changed) or "nothing has changed")
        return changed, waiting


def _pair() -> tuple[socket.socket, socket.socket]:
    """Not SOCK_DGRAM: the kernel queues at most ten of its packets (net.unix.max_dgram_qlen)."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        end.setblocking(False)
    return pair


def _fds(pair: tuple[socket.socket, socket.socket]) -> tuple[int, int]:
    return pair[0].fileno(), pair[1].fileno()


def _sockets(fds: tuple[int, int]) -> tuple[socket.socket, socket.socket]:
    return socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])


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
    "site": ("name",),
    "cluster": tuple(Cluster.model_fields),
}
"""Settings that need a restart: sockets, cache directory, the name in Via, the cluster.
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
