"""One client's connection to gup, kept alive, from an address of its own where that is possible."""

import http.client
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 60.0
PIECE_BYTES = 64 * 1024


class Connection:
    """HTTP/1.1 by the standard library's client, whose sockets locust replaces. One client alone uses it."""

    def __init__(self, url: str, address: str | None = None) -> None:
        """`url` is scheme, host and port; `address` is the local one to connect from."""
        parts = urlsplit(url)
        local = None if address is None else (address, 0)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.netloc, timeout=TIMEOUT_SECONDS, source_address=local, context=context
            )
        else:
            self._http = http.client.HTTPConnection(
                parts.netloc, timeout=TIMEOUT_SECONDS, source_address=local
            )
        self._used = False

    def get(self, path: str, fields: Mapping[str, str]) -> http.client.HTTPResponse:
        """The head of the answer. A connection that was closed while idle is opened again, once."""
        reused, self._used = self._used, True
        try:
            return self._get(path, fields)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            if not reused:
                raise
            self._http.close()
            return self._get(path, fields)

    def _get(self, path: str, fields: Mapping[str, str]) -> http.client.HTTPResponse:
        self._http.request("GET", path, headers=dict(fields))
        return self._http.getresponse()

    def close(self) -> None:
        self._http.close()
        self._used = False
