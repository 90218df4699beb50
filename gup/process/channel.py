"""JSON messages over one SOCK_SEQPACKET socket, of any length, descriptors of its own; knows no message."""

import array
import json
import os
import socket
from typing import Any

_INLINE_BYTES = 32 * 1024
"""Longer messages travel as a memory file: a packet must fit the socket's buffer whole (212,992 bytes unless
the machine is set up otherwise), and the settings of many upstreams don't."""

Message = dict[str, Any]


class Channel:
    """One end. Both ends trust each other: they are one service."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> bool:
        """Put the message in the queue; False when the other end is gone or does not read."""
        text = json.dumps(message, separators=(",", ":")).encode()
        try:
            if len(text) <= _INLINE_BYTES:
                self._socket.send(text)
            else:
                self._send_file(text)
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def _send_file(self, text: bytes) -> None:
        fd = os.memfd_create("gup-message", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(text)
            socket.send_fds(self._socket, [b"\0"], [fd])
        finally:
            os.close(fd)

    def receive(self) -> list[Message] | None:
        """All messages that wait; None at the end, when the other end is gone and everything is read."""
        messages: list[Message] = []
        while True:
            try:
                message = self.receive_one()
            except BlockingIOError:
                return messages
            if message is None:
                return messages or None
            messages.append(message)

    def receive_one(self) -> Message | None:
        """The next message; None at the end. BlockingIOError when none waits."""
        try:
            text, fds = self._receive_packet()
        except ConnectionError:
            return None
        if not text:
            return None
        message: Message = json.loads(_read_files(fds) if fds else text)
        return message

    def _receive_packet(self) -> tuple[bytes, list[int]]:
        room = socket.CMSG_SPACE(array.array("i").itemsize)
        text, ancillary, flags, _ = self._socket.recvmsg(_INLINE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        fds = array.array("i")
        for _, _, piece in ancillary:
            fds.frombytes(piece)
        return text, fds.tolist()

    def close(self) -> None:
        self._socket.close()


def _read_files(fds: list[int]) -> bytes:
    pieces = []
    for fd in fds:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)  # the offset is the sender's, who has written
            pieces.append(file.read())
    return b"".join(pieces)
