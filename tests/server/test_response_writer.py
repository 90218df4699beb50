"""What the socket is given of a response: from a descriptor or from memory, the same bytes."""

import errno
import os
import random
import socket

import pytest

from gup.server.ranges import Span
from gup.server.response import Response
from gup.server.response_writer import BROKEN, FINISHED, ResponseWriter

LENGTH = 700_001
BYTES = random.Random(5).randbytes(LENGTH)
SENT, STREAM = 0, 1


class FileBody:
    """A stored body, all of it available."""

    def __init__(self, path, *, in_memory):
        self._fd = os.open(path, os.O_RDONLY)
        self.fd = -1 if in_memory else self._fd
        self.told = 0

    def available(self, offset, want):
        return min(want, LENGTH - offset)

    def view(self, offset, length):
        return memoryview(os.pread(self._fd, length, offset))

    def close(self):
        os.close(self._fd)

    def end(self):
        return LENGTH

    def unreadable(self):
        self.told += 1


@pytest.fixture(params=[False, True], ids=["descriptor", "memory"])
def body(request, tmp_path):
    (tmp_path / "body").write_bytes(BYTES)
    body = FileBody(tmp_path / "body", in_memory=request.param)
    yield body
    body.close()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def writing(words, body, span, *, sent=0):
    writer = ResponseWriter(words)
    writer.start(Response(200, b"head", (span,), body=body, sent_at=SENT, stream_at=STREAM), sent)
    return writer


def drive(writer, ours, theirs, most=1 << 20):
    """Push to the end; what arrived."""
    got = bytearray()
    while True:
        try:
            done = writer.write(ours, most)
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
    writer = writing(words, body, span)
    assert drive(writer, *pair, most) == (FINISHED, b"head" + BYTES[span.start : span.stop])
    assert words[SENT] == words[STREAM] == writer.sent_bytes == span.stop - span.start


def test_what_has_left_already_is_not_sent_again(body, pair):
    words = memoryview(bytearray(16)).cast("q")
    writer = writing(words, body, Span(1, 400_000), sent=5_000)
    assert drive(writer, *pair) == (FINISHED, b"head" + BYTES[5_001:400_000])
    assert writer.sent_bytes == 399_999
    assert words[SENT] == 394_999


def test_literal_parts_of_a_body_are_counted_and_a_problems_text_is_not(body, pair):
    words = memoryview(bytearray(16)).cast("q")
    segments = (b"--x", Span(0, 3), b"--x--")
    writer = ResponseWriter(words)
    writer.start(Response(206, b"head", segments, body=body, sent_at=SENT, stream_at=STREAM))
    assert drive(writer, *pair) == (FINISHED, b"head--x" + BYTES[:3] + b"--x--")
    assert words[SENT] == writer.sent_bytes == 11
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer.start(Response(404, b"head", (b"problem",)))
        assert drive(writer, ours, theirs) == (FINISHED, b"headproblem")
    assert words[SENT] == 11


def test_a_file_that_is_shorter_than_it_was_breaks_off_where_it_ends(body, pair, tmp_path):
    os.truncate(tmp_path / "body", 300_000)
    words = memoryview(bytearray(16)).cast("q")
    writer = writing(words, body, Span(0, LENGTH))
    assert drive(writer, *pair) == (BROKEN, b"head" + BYTES[:300_000])
    assert body.told == 1


def test_an_error_of_the_disk_breaks_off(body, pair, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "it is broken")

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(os, "sendfile", refuse)
    writer = writing(memoryview(bytearray(16)).cast("q"), body, Span(0, LENGTH))
    assert drive(writer, *pair) == (BROKEN, b"head")
    assert body.told == 1
