"""What leaves of a body by descriptor, lent to the socket or copied through a buffer: the same bytes."""

import errno
import os
import random
import socket

import pytest

from gup.server.outgoing import BROKEN, FINISHED, Outgoing
from gup.server.ranges import Span

LENGTH = 700_001
BYTES = random.Random(5).randbytes(LENGTH)
SENT, STREAM = 0, 1


class FileBody:
    """A stored body, all of it available."""

    def __init__(self, path, *, copied):
        self.fd = os.open(path, os.O_RDONLY)
        self.copied = copied
        self.told = 0

    def available(self, offset, want):
        return min(want, LENGTH - offset)

    def end(self):
        return LENGTH

    def unreadable(self):
        self.told += 1


@pytest.fixture(params=[False, True], ids=["lent", "copied"])
def body(request, tmp_path):
    (tmp_path / "body").write_bytes(BYTES)
    body = FileBody(tmp_path / "body", copied=request.param)
    yield body
    os.close(body.fd)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def drive(outgoing, ours, theirs, most=1 << 20):
    """Push to the end; what arrived."""
    got = bytearray()
    while True:
        try:
            done = outgoing.push(ours, most)
        except BlockingIOError:
            got += theirs.recv(1 << 20)
            continue
        if done <= 0:
            break
    ours.shutdown(socket.SHUT_WR)
    while piece := theirs.recv(1 << 20):
        got += piece
    return done, bytes(got)


@pytest.mark.parametrize("most", [1 << 20, 1000])
@pytest.mark.parametrize("span", [Span(0, LENGTH), Span(1, 400_000), Span(LENGTH - 1, LENGTH)])
def test_a_span_arrives_whole_and_is_counted(body, pair, span, most):
    words = memoryview(bytearray(16)).cast("q")
    outgoing = Outgoing(words, b"head", (span,), body, SENT, STREAM)
    assert drive(outgoing, *pair, most) == (FINISHED, b"head" + BYTES[span.start : span.stop])
    assert words[SENT] == words[STREAM] == outgoing.sent_bytes == span.stop - span.start


@pytest.mark.parametrize("body", [True], indirect=True, ids=["copied"])
def test_what_a_slow_client_does_not_take_is_hardly_copied(body, pair, monkeypatch):
    """It has room for few bytes whenever it is asked: of what is read for it, half leaves or more."""
    ours, theirs = pair
    read = []

    def preadv(fd, buffers, offset):
        read.append(got := real(fd, buffers, offset))
        return got

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    outgoing = Outgoing(memoryview(bytearray(16)).cast("q"), b"", (Span(0, LENGTH),), body, SENT, STREAM)
    took = 0

    class Slow:
        """A socket with room for 20,000 bytes."""

        fileno = ours.fileno

        def send(self, piece):
            nonlocal took
            took += (sent := ours.send(piece[:20_000]))
            theirs.recv(1 << 20)
            return sent

    while took < LENGTH:
        assert outgoing.push(Slow(), 1 << 20) > 0
    assert sum(read) <= 2 * LENGTH + (256 << 10)


def test_a_file_that_is_shorter_than_it_was_breaks_off_where_it_ends(body, pair, tmp_path):
    os.truncate(tmp_path / "body", 300_000)
    words = memoryview(bytearray(16)).cast("q")
    outgoing = Outgoing(words, b"", (Span(0, LENGTH),), body, SENT, STREAM)
    assert drive(outgoing, *pair) == (BROKEN, BYTES[:300_000])
    assert body.told == 1


def test_an_error_of_the_disk_breaks_off(body, pair, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "it is broken")

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "sendfile", refuse)
    outgoing = Outgoing(memoryview(bytearray(16)).cast("q"), b"", (Span(0, LENGTH),), body, SENT, STREAM)
    assert drive(outgoing, *pair) == (BROKEN, b"")
    assert body.told == 1
