"""Which client sockets are ready: one epoll of the worker's own, which the event loop watches.

The loop sees one descriptor, readable when any client socket is ready. Its own way would cost a handle, a
selector key and a context for each event (1 µs of the 7 that a small hit takes) and as much memory for each
idle connection. Level-triggered: what was not read or written is reported again.
"""

import asyncio
import select
from typing import Protocol

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_MOST_EVENTS = 256
_FEW_EVENTS = 8  # after fewer, looking again at once is not worth a system call
_LOOKS = 4  # in one turn of the loop: timers and fills must not wait long


class Watched(Protocol):
    def on_ready(self, events: int) -> None:
        """The socket is ready for these, or has an error or an end to report (EPOLLERR, EPOLLHUP)."""


class Poller:
    """Sockets by descriptor. A descriptor must be unwatched before it is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        loop.add_reader(self._epoll.fileno(), self._turn)

    def watch(self, fd: int, watched: Watched, before: int, events: int) -> None:
        """Report other `events` to `watched` than `before`; 0 is none at all, not even errors."""
        if not before:
            self._watched[fd] = watched
            self._epoll.register(fd, events)
        elif events:
            self._epoll.modify(fd, events)
        else:
            self._epoll.unregister(fd)
            del self._watched[fd]

    def close(self) -> None:
        assert not self._watched
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _turn(self) -> None:
        for _ in range(_LOOKS):
            ready = self._epoll.poll(0, _MOST_EVENTS)
            for fd, events in ready:
                found = self._watched.get(fd)
                if found is not None:  # else: closed by what came before it in this list
                    found.on_ready(events)
            if len(ready) < _FEW_EVENTS:
                return
