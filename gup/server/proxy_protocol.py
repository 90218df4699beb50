"""The header of the PROXY protocol, version 2, by which a proxy in front tells the client's address.

It precedes what the client sends: https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt, section 2.2.
"""

import struct
from socket import AF_INET, AF_INET6, inet_ntop

from gup.errors import Problem

MAX_HEADER_BYTES = 536
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_START = struct.Struct("!12sBBH")
"""The signature, version and command, family and transport, and how many bytes follow."""
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_NO_ADDRESS = (0x00, 0x31)
"""A client of an unknown family, and one on the proxy's Unix socket."""
_ADDRESSES = {_TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")}
"""Where the client and the proxy have their ends: addresses, then ports. Further fields (TLVs) may follow."""


def missing_bytes(begun: bytes) -> int:
    """How many more bytes can be read without reading past the header; 0 when it is whole.

    Problem "bad-request" as soon as these bytes can't begin a header.
    """
    if not begun.startswith(SIGNATURE[: len(begun)]):
        if begun.startswith(b"PROXY "):
            raise _bad("is of version 1, which is text; gup reads version 2 (HAProxy: send-proxy-v2)")
        raise _bad("(version 2) is missing, which listen.proxy_protocol demands from this address")
    if len(begun) < _START.size:
        return _START.size - len(begun)
    command: int
    length: int
    _, command, family, length = _START.unpack_from(begun)
    if command not in (_LOCAL, _PROXY):
        raise _bad(f"has version and command {command:#04x}")
    if _START.size + length > MAX_HEADER_BYTES:
        raise _bad(f"is longer than {MAX_HEADER_BYTES} bytes")
    if command == _PROXY:
        if family not in (*_ADDRESSES, *_NO_ADDRESS):
            raise _bad(f"has family and transport {family:#04x}, which is not TCP")
        if family in _ADDRESSES and length < _ADDRESSES[family].size:
            raise _bad("is too short for its addresses")
    return _START.size + length - len(begun)


def client_in(header: bytes) -> tuple[str, int] | None:
    """The client's address and port in a whole header; None where the connection's own end counts.

    That is for a connection of the proxy itself, as for a health check, and a client without an address.
    """
    _, command, family, _ = _START.unpack_from(header)
    if command == _LOCAL or family in _NO_ADDRESS:
        return None
    packed, _, port, _ = _ADDRESSES[family].unpack_from(header, _START.size)
    return inet_ntop(AF_INET if family == _TCP4 else AF_INET6, packed), port


def _bad(reason: str) -> Problem:
    return Problem("bad-request", f"The PROXY header {reason}.")
