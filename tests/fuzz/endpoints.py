"""Raw HTTP on one event loop: an upstream that sends what it is told, and a client that sends its own."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

_HANG_SECONDS = 20.0
_PIECE_BYTES = 1 << 16


@contextlib.asynccontextmanager
async def upstream(answer: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """The URL of a server that reads one head a connection, sends `answer(head)` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            writer.write(answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        await server.wait_closed()


async def exchange(address: tuple[str, int], *pieces: bytes) -> bytes:
    """What a server sends to these bytes, until it closes. It has read a piece before the next is sent."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        # The close is a reset: tens of thousands of connections must not use up the ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(_HANG_SECONDS):
            await loop.sock_connect(sock, address)
            received = bytearray()
            # Whoever sends more after `Connection: close` may find the connection reset behind the answer.
            with contextlib.suppress(ConnectionError):
                for number, piece in enumerate(pieces):
                    if number:
                        for _ in range(5):  # the server's turns: to accept, to read
                            await asyncio.sleep(0)
                    await loop.sock_sendall(sock, piece)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while piece := await loop.sock_recv(sock, _PIECE_BYTES):
                    received += piece
    return bytes(received)
