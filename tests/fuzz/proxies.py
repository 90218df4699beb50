"""PROXY headers: a connection's bytes, read in pieces whose size is by the first byte."""

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from fuzz import Check
from gup.errors import Problem
from gup.server.proxy_protocol import MAX_HEADER_BYTES, client_in, missing_bytes


@contextmanager
def target() -> Iterator[Check]:
    """A header is refused, not whole yet, or names a client or none; the same however it is cut into pieces,
    and nothing behind it is read.
    """
    yield check


def check(given: bytes) -> None:
    stream, size = given[1:], given[0] % 32 + 1 if given else 1
    found = _read(stream, MAX_HEADER_BYTES)
    assert _read(stream, size) == found
    if isinstance(found, tuple):
        client, length = found
        assert _read(stream[:length], 1) == found
        assert length <= MAX_HEADER_BYTES
        if client is not None:
            ipaddress.ip_address(client[0])
            assert 0 <= client[1] <= 0xFFFF


def _read(stream: bytes, size: int) -> tuple[tuple[str, int] | None, int] | str:
    """The client and the header's length, or why there is none."""
    begun = b""
    try:
        while missing := missing_bytes(begun):
            piece = stream[len(begun) : len(begun) + min(missing, size)]
            if not piece:
                return "not whole"
            begun += piece
    except Problem:
        return "refused"
    return client_in(begun), len(begun)
