"""A small web proxy: absolute-form requests are sent on, CONNECT opens a tunnel."""

import base64
import contextlib
import socket
import socketserver
import threading
from urllib.parse import urlsplit


class _Proxied(socketserver.StreamRequestHandler):
    server: "WebProxy"

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            head += line
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        fields = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        self.server.seen.append((method, target, fields))
        if self.server.password and fields.get("proxy-authorization") != self.server.password:
            self.wfile.write(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
        else:
            parts = urlsplit(target)
            host, port = parts.hostname or "", str(parts.port or 80)
        with socket.create_connection((host, int(port)), 10) as upstream:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = urlsplit(target).path
                kept = [
                    line for line in lines[1:-2] if not line.lower().startswith(("proxy-", "connection:"))
                ]
                request = "\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""])
                upstream.sendall(request.encode("latin-1"))
            back = threading.Thread(target=_pass_on, args=(self.connection, upstream))
            back.start()
            _pass_on(upstream, self.connection)
            back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class WebProxy(socketserver.ThreadingTCPServer):
    """A real, small web proxy: absolute-form requests are sent on, CONNECT opens a tunnel."""

    def __init__(self, user: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Proxied)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.password = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        self.url = f"http://{user + '@' if user else ''}127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
