"""The client of a running service's control plane."""

import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote, urlencode, urlsplit

from gup.cli.options import Where
from gup.config import Settings, load
from gup.control.tokens import TokenError, local_path, read_token
from gup.errors import GupError
from gup.files import FileError, trust

_TIMEOUT_SECONDS = 10.0
_PAGE = 1000
_BLOCK_BYTES = 256 * 1024
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a service on all addresses is asked
_PEM_BEGIN, _PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class AdminError(GupError):
    """The control plane could not be asked, or refused; the text says why."""


class NobodyThereError(AdminError):
    """Nothing answers at that address."""


def admin_at(where: Where) -> "Admin":
    """The control plane that the flags mean; SettingsError or AdminError when they mean none."""
    settings = None
    if where.url is None or where.config is not None:
        settings = load(where.config)
    token, lack = _token(where, settings)
    if where.url is not None:
        return Admin(where.url, Credentials(token, lack, where.ca_file))
    assert settings is not None
    pinned = settings.listen.admin_cert_file if where.ca_file is None else None
    return Admin(admin_url(settings), Credentials(token, lack, where.ca_file, pinned))


def admin_url(settings: Settings) -> str:
    """Where a service with `settings` has its control plane, as seen from its own machine."""
    listen = settings.listen
    host = _WILDCARDS.get(listen.admin_address, listen.admin_address)
    scheme = "http" if listen.admin_cert_file is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listen.admin_port}"


def _token(where: Where, settings: Settings | None) -> tuple[str, str]:
    """The token, and why there is none."""
    if where.token_file is not None:
        try:
            return read_token(where.token_file), ""
        except TokenError as error:
            raise AdminError(f"--token-file: {error}") from error
    if settings is None:
        return "", "gup's commands: --token-file"
    lack = ""
    for file in (settings.listen.admin_token_file, local_path(settings.cache.directory / "run")):
        if file is None:
            continue
        try:
            return read_token(file), ""
        except TokenError as error:
            lack = str(error)
    return "", lack


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the client shows to the control plane, and what that must show.

    `token` "" for none, then `lack` says why. `ca_file` is trusted besides what the machine trusts. `pinned`
    is the service's own certificate (PEM): it must show that very one, whatever name it is asked by.
    """

    token: str = ""
    lack: str = ""
    ca_file: Path | None = None
    pinned: Path | None = None


class Admin:
    """The control plane at `url`. Every method raises AdminError."""

    def __init__(self, url: str, credentials: Credentials = Credentials()) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise AdminError(f"{url}: the control plane's URL begins with http:// or https://")
        self._credentials = credentials

    def status(self) -> dict[str, Any]:
        return self.ask("GET", "/api/v1/status")

    def entries(self, filters: Mapping[str, str], limit: int) -> Iterator[list[dict[str, Any]]]:
        """Entries, at most `limit` (0 = all), page by page."""
        cursor: str | None = None
        left = limit or None
        while True:
            page = {"limit": str(min(left or _PAGE, _PAGE))} | ({"cursor": cursor} if cursor else {})
            answer = self.ask("GET", "/api/v1/content?" + urlencode({**filters, **page}))
            found = answer["entries"]
            yield found
            left = left - len(found) if left is not None else None
            cursor = answer["cursor"]
            if cursor is None or left == 0:
                return

    def purge(self, key: str) -> dict[str, Any]:
        return self.ask("DELETE", f"/api/v1/content/{quote(key)}")

    def pin(self, key: str, *, pinned: bool) -> dict[str, Any]:
        return self.ask("PUT" if pinned else "DELETE", f"/api/v1/content/{quote(key)}/pin")

    def verification(self) -> dict[str, Any]:
        """How far the last verification has come, and what it found."""
        return self.ask("GET", "/api/v1/verify")

    def verify(self, *, repair: bool) -> dict[str, Any]:
        """Begin one."""
        return self.ask("POST", f"/api/v1/verify?repair={int(repair)}")

    def report(self, name: str, parameters: Mapping[str, int]) -> dict[str, Any]:
        """One of the reports: content, clients, savings."""
        return self.ask("GET", f"/api/v1/report/{name}?{urlencode(parameters)}")

    def prefetch(self, path: str, version: str | None, language: str | None) -> dict[str, Any]:
        """Have content fetched before a client asks."""
        order = {"path": path, "version": version, "language": language}
        given = {name: value for name, value in order.items() if value is not None}
        return self.ask("POST", "/api/v1/prefetch", given)

    def prefetched(self) -> dict[str, Any]:
        """The prefetch queue, the latest first."""
        return self.ask("GET", f"/api/v1/prefetch?limit={_PAGE}")

    def reload(self) -> dict[str, Any]:
        return self.ask("POST", "/api/v1/reload")

    def ask(self, method: str, target: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, with `given` as its JSON, and the JSON that answers it."""
        body = json.dumps(given).encode() if given is not None else None
        with self.opened(
            method, target, body, {"Content-Type": "application/json"} if body else {}
        ) as answer:
            return self._understood(answer.read())

    def send(self, target: str, body: IO[bytes], media: str, patience_seconds: float) -> dict[str, Any]:
        """A file, piece by piece, and the JSON that answers it."""
        headers = {"Content-Type": media}
        with self.opened("POST", target, body, headers, patience_seconds=patience_seconds) as answer:
            return self._understood(answer.read())

    def opened(
        self,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        patience_seconds: float = _TIMEOUT_SECONDS,
    ) -> "_Answer":
        """One request, and its good answer as it comes."""
        token = self._credentials.token
        shown = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        connection, prefix = self._connected()
        try:
            connection.sock.settimeout(patience_seconds)
            try:
                connection.request(method, prefix + target, body, shown)
            except (BrokenPipeError, ConnectionResetError):
                if body is None:
                    raise  # else it has seen enough of the body to refuse it, and has said why
            return _Answer(connection, self._good(connection.getresponse()))
        except (OSError, HTTPException) as error:
            connection.close()
            hint = "; does it speak TLS (https://)?" if self.url.startswith("http:") else ""
            words = f"{self.url}: the connection broke off ({error or type(error).__name__}){hint}"
            raise AdminError(words) from error
        except BaseException:
            connection.close()
            raise

    def _connected(self) -> tuple[HTTPConnection, str]:
        """A connection that stands, and the path before every request's."""
        try:
            connection, prefix = self._connection()
            try:
                connection.connect()
            except BaseException:
                connection.close()
                raise
        except FileError as error:
            asked = self._credentials.ca_file is not None
            raise AdminError(f"{'--ca-file' if asked else 'listen.admin_cert_file'}: {error}") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no such URL
            raise self._unanswered(error) from error
        return connection, prefix

    def _connection(self) -> tuple[HTTPConnection, str]:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            plain = HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS, blocksize=_BLOCK_BYTES)
            return plain, parts.path
        pinned = self._credentials.pinned
        if pinned is not None:
            return _Pinned(host, port, pinned), parts.path
        context = ssl.create_default_context()
        if self._credentials.ca_file is not None:
            trust(self._credentials.ca_file)
            context.load_verify_locations(self._credentials.ca_file)
        return HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context), parts.path

    def _unanswered(self, error: Exception) -> AdminError:
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            hint = (
                "--ca-file names whom to trust"
                if isinstance(error, ssl.SSLCertVerificationError)
                else ("does it speak TLS? its certificate is in listen.admin_cert_file")
            )
            return AdminError(f"{self.url}: no TLS with what answers there ({reason}); {hint}")
        return NobodyThereError(
            f"no control plane answers at {self.url} ({error}); is gup running? --admin asks elsewhere"
        )

    def _good(self, response: HTTPResponse) -> HTTPResponse:
        if response.status < 300:
            return response
        detail = _detail(response.read()) or f"HTTP Error {response.status}: {response.reason}"
        if response.status == 401 and self._credentials.lack not in detail:
            detail += f" ({self._credentials.lack})"
        raise AdminError(f"{self.url}: {detail}")

    def _understood(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise AdminError(f"{self.url}: what answers there is no control plane of gup") from error
        if not isinstance(answer, dict):
            raise AdminError(f"{self.url}: what answers there is no control plane of gup")
        return answer


class _Answer:
    """A good answer that is being read; closes its connection."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()

    def pieces(self, size_bytes: int) -> Iterator[bytes]:
        with self:
            while piece := self.read(size_bytes):
                yield piece

    def read(self, most: int | None = None) -> bytes:
        """Some of the body, b"" at its end; AdminError when it breaks off."""
        try:
            return self._response.read(most)
        except (OSError, HTTPException) as error:
            raise AdminError(f"the answer broke off ({error})") from error


class _Pinned(HTTPSConnection):
    """TLS with whoever shows one certificate and no other; nothing is sent before that was seen."""

    def __init__(self, host: str, port: int | None, pinned: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host, port, timeout=_TIMEOUT_SECONDS, context=context)
        self._pinned = pinned

    def connect(self) -> None:
        trust(self._pinned)
        text = self._pinned.read_text()
        first = text[text.index(_PEM_BEGIN) : text.index(_PEM_END) + len(_PEM_END)]
        wanted = ssl.PEM_cert_to_DER_cert(first)
        super().connect()
        assert isinstance(self.sock, ssl.SSLSocket)
        if self.sock.getpeercert(binary_form=True) != wanted:
            self.close()
            raise AdminError(
                f"what answers at {self.host}:{self.port} does not show the certificate in {self._pinned}: "
                "another service, or one that has not read it again (SIGHUP makes it)"
            )


def _detail(body: bytes) -> str:
    """What a problem document says, "" when the body is none."""
    try:
        problem = json.loads(body)
    except ValueError:
        return ""
    return str(problem.get("detail") or problem.get("title") or "") if isinstance(problem, dict) else ""
