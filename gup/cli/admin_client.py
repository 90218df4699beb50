"""The client of a running service's control plane."""

import json
import ssl
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from gup.config import Settings, read
from gup.control.auth import local_path, read_token
from gup.errors import GupError
from gup.files import FileError, trust

_TIMEOUT_SECONDS = 10.0
_PIECE_BYTES = 256 * 1024
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a service on all addresses is asked
_PEM_BEGIN, _PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class AdminError(GupError):
    """The control plane could not be asked, or refused; the text says why."""


class NobodyThereError(AdminError):
    """Nothing answers at that address."""


def admin_at(url: str | None, config: Path | None, token_file: Path | None, ca_file: Path | None) -> "Admin":
    """The control plane that the flags name; AdminError when they name none.

    Mistakes in the settings file are only warned of: the running service has settings that were valid.
    """
    settings, problems = read(config) if url is None or config is not None else (None, [])
    for problem in problems:
        sys.stderr.write(f"gup: warning: {problem}\n")
    files = [token_file]
    if token_file is None and settings is not None:
        files = [settings.listen.admin_token_file, local_path(settings.cache.directory / "run")]
    token, lack = "", "gup's commands: --token-file"
    for file in files:
        try:
            if file is not None and not token:
                token = read_token(file)
        except FileError as error:
            if token_file is not None:
                raise AdminError(f"--token-file: {error}") from error
            lack = str(error)
    if url is not None:
        return Admin(url, token=token, lack=lack, ca_file=ca_file)
    assert settings is not None
    pinned = settings.listen.admin_cert_file if ca_file is None else None
    return Admin(admin_url(settings), token=token, lack=lack, ca_file=ca_file, pinned=pinned)


def admin_url(settings: Settings) -> str:
    """The control plane's address of a service with `settings`, as seen from its own machine."""
    listen = settings.listen
    host = _WILDCARDS.get(listen.admin_address, listen.admin_address)
    scheme = "http" if listen.admin_cert_file is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listen.admin_port}"


@dataclass
class Admin:
    """The control plane at `url`. Every method raises AdminError.

    `lack` says why there is no `token`. `ca_file` is trusted in addition to the machine's certificates.
    `pinned` is the service's own certificate (PEM): it must present that one, under any name.
    """

    url: str
    token: str = field(default="", repr=False)
    lack: str = ""
    ca_file: Path | None = None
    pinned: Path | None = None

    def __post_init__(self) -> None:
        given, self.url = self.url, self.url.rstrip("/")
        if "://" not in given:
            self.url = f"http://{self.url}"
        if not self.url.startswith(("http://", "https://")):
            raise AdminError(f"{given}: the control plane's URL must begin with http:// or https://")

    def ask(
        self, method: str, resource: str, given: object = None, patience_seconds: float = _TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        """One request below /api/v1/, with `given` as its JSON; returns the response's JSON."""
        body = None if given is None else json.dumps(given).encode()
        return self.understood(self.pieces(method, resource, body, patience_seconds=patience_seconds))

    def understood(self, pieces: Iterable[bytes]) -> dict[str, Any]:
        try:
            answer = json.loads(b"".join(pieces))
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AdminError(f"{self.url}: the server there is not a gup control plane")
        return answer

    def pieces(
        self,
        method: str,
        resource: str,
        body: bytes | IO[bytes] | None = None,
        media: str = "application/json",
        patience_seconds: float = _TIMEOUT_SECONDS,
    ) -> Iterator[bytes]:
        """One request; a file is sent, and a successful response returned, piece by piece."""
        headers = {"Content-Type": media} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        connection = self._connected()
        try:
            connection.sock.settimeout(patience_seconds)
            try:
                target = f"{urlsplit(self.url).path}/api/v1/{resource}"
                connection.request(method, target, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                if body is None:
                    raise  # else it has seen enough of the body to refuse it, and has said why
            response = connection.getresponse()
            if response.status >= 300:
                raise self._refusal(response)
            while piece := response.read(_PIECE_BYTES):
                yield piece
        except (OSError, HTTPException) as error:
            hint = "; does it speak TLS (https://)?" if self.url.startswith("http:") else ""
            words = f"{self.url}: the connection broke off ({error or type(error).__name__}){hint}"
            raise AdminError(words) from error
        finally:
            connection.close()

    def _connected(self) -> HTTPConnection:
        try:
            connection = self._connection()
            try:
                connection.connect()
                if self.pinned is not None:  # nothing was sent yet
                    self._compare(connection.sock, self.pinned)
            except BaseException:
                connection.close()
                raise
        except FileError as error:
            flag = "listen.admin_cert_file" if self.ca_file is None else "--ca-file"
            raise AdminError(f"{flag}: {error}") from error
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            hint = "does it speak TLS? its certificate is in listen.admin_cert_file"
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "name a certificate to trust with --ca-file"
            words = f"{self.url}: TLS failed ({reason}); {hint}"
            raise AdminError(words) from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no such URL
            words = f"no control plane answers at {self.url} ({error}); is it running? --admin names another"
            raise NobodyThereError(words) from error
        return connection

    def _connection(self) -> HTTPConnection:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            return HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS, blocksize=_PIECE_BYTES)
        context = ssl.create_default_context()
        if self.pinned is not None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif self.ca_file is not None:
            trust(self.ca_file)
            context.load_verify_locations(self.ca_file)
        return HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context)

    def _compare(self, connected: Any, pinned: Path) -> None:
        trust(pinned)
        text = pinned.read_text()
        first = text[text.index(_PEM_BEGIN) : text.index(_PEM_END) + len(_PEM_END)]
        if connected.getpeercert(binary_form=True) != ssl.PEM_cert_to_DER_cert(first):
            raise AdminError(
                f"the server at {self.url} does not show the certificate in {pinned}: "
                "it is another service, or has not reloaded its certificate (send it SIGHUP)"
            )

    def _refusal(self, response: HTTPResponse) -> AdminError:
        detail = f"HTTP Error {response.status}: {response.reason}"
        try:
            problem = json.loads(response.read())  # RFC 9457
            detail = str(problem.get("detail") or problem.get("title") or detail)
        except (ValueError, AttributeError):
            pass
        if response.status == 401 and self.lack not in detail:
            detail += f" ({self.lack})"
        return AdminError(f"{self.url}: {detail}")
