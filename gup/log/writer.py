"""Takes records without ever waiting, and writes them in a thread; what a slow destination leaves no room for
is dropped, counted and told. Knows no format and no destination.
"""

import logging
import os
import queue
import threading
import time

from gup.log.destinations import Destination

_MOST_RECORDS = 8192
_BATCH = 256
_END_SECONDS = 2.0
"""How long the end waits for a destination that takes no lines."""
_COMPLAIN_SECONDS = 60.0


class WritingHandler(logging.Handler):
    """One handler a process. `emit` puts a record in the queue, at most 8192, from any thread."""

    def __init__(self, destination: Destination) -> None:
        super().__init__()
        self._destination = destination
        self._queue: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._dropped = 0
        self._counting = threading.Lock()  # not the handler's, which `logging` holds while it closes this
        self._complain_at = 0.0
        self._closed = False
        # no daemon's end may be awaited for ever: a destination can hang
        self._thread = threading.Thread(target=self._run, name="gup-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        if self._queue.qsize() >= _MOST_RECORDS:
            self._drop(1)
            return
        try:
            record.msg, record.args = record.getMessage(), None  # as it is now: what it tells of may change
        except (TypeError, ValueError):  # our own mistake, in a call of the log; it must end no thread
            self.handleError(record)
            return
        self._queue.put(record)

    def retire(self) -> None:
        """Take no more; what is in the queue is still written. Never waits."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    def close(self) -> None:
        """Write what is in the queue, as far as the destination takes it in time, and end the thread."""
        self.retire()
        self._thread.join(_END_SECONDS)
        super().close()

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            ends = None in batch
            self._write([record for record in batch if record is not None])
            if ends:
                self._destination.close()
                return

    def _write(self, records: list[logging.LogRecord]) -> None:
        lost = self._take_dropped()
        if lost:
            records.append(_told(lost))
        try:
            if records:
                self._destination.write(records)
        except OSError as error:
            self._drop(lost + len(records) - bool(lost))
            self._complain(error)

    def _drop(self, count: int) -> None:
        with self._counting:
            self._dropped += count

    def _take_dropped(self) -> int:
        """How many were dropped that were not told yet."""
        with self._counting:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def _complain(self, error: OSError) -> None:
        """On standard error, once a minute: where the log itself can't be written, there is nothing else."""
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + _COMPLAIN_SECONDS
            text = f"gup: the log can't be written: {error.strerror or error}\n"
            try:
                os.write(2, text.encode())
            except OSError:
                return


def _told(lost: int) -> logging.LogRecord:
    text = "%d lines of the log were dropped: they came too fast, or could not be written"
    return logging.LogRecord("gup.log", logging.WARNING, __file__, 0, text, (lost,), None)
