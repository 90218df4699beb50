"""Asks a running service's control plane; knows its URLs, shows nothing."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode

from gup.config import Settings
from gup.errors import GupError

_TIMEOUT_SECONDS = 10.0
_PAGE = 1000
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a service on all addresses is asked


class AdminError(GupError):
    """The control plane could not be asked, or refused; the text says why."""


class NobodyThereError(AdminError):
    """Nothing answers at that address."""


def admin_url(settings: Settings) -> str:
    """Where a service with `settings` has its control plane, as seen from its own machine."""
    host = _WILDCARDS.get(settings.listen.admin_address, settings.listen.admin_address)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.listen.admin_port}"


class Admin:
    """The control plane at `url`. Every method raises AdminError."""

    def __init__(self, url: str) -> None:
        self._url = (url if "://" in url else f"http://{url}").rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise AdminError(f"{url}: the control plane's URL begins with http://")
        # the control plane is near: a web proxy named in the environment has no part in it
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def status(self) -> dict[str, Any]:
        return self._ask("GET", "/api/v1/status")

    def entries(self, filters: Mapping[str, str], limit: int) -> Iterator[dict[str, Any]]:
        """Entries, at most `limit` (0 = all), page by page."""
        cursor: str | None = None
        left = limit or None
        while True:
            page = {"limit": str(min(left or _PAGE, _PAGE))} | ({"cursor": cursor} if cursor else {})
            answer = self._ask("GET", "/api/v1/content?" + urlencode({**filters, **page}))
            found = answer["entries"]
            yield from found
            left = left - len(found) if left is not None else None
            cursor = answer["cursor"]
            if cursor is None or left == 0:
                return

    def purge(self, key: str) -> dict[str, Any]:
        return self._ask("DELETE", f"/api/v1/content/{quote(key)}")

    def pin(self, key: str, *, pinned: bool) -> dict[str, Any]:
        return self._ask("PUT" if pinned else "DELETE", f"/api/v1/content/{quote(key)}/pin")

    def verification(self) -> dict[str, Any]:
        """How far the last verification has come, and what it found."""
        return self._ask("GET", "/api/v1/verify")

    def verify(self, *, repair: bool) -> dict[str, Any]:
        """Begin one."""
        return self._ask("POST", f"/api/v1/verify?repair={int(repair)}")

    def prefetch(self, path: str, version: str | None, language: str | None) -> dict[str, Any]:
        """Have something fetched before anybody asks."""
        order = {"path": path, "version": version, "language": language}
        given = {name: value for name, value in order.items() if value is not None}
        return self._ask("POST", "/api/v1/prefetch", given)

    def prefetched(self) -> dict[str, Any]:
        """What is fetched ahead, the latest first."""
        return self._ask("GET", f"/api/v1/prefetch?limit={_PAGE}")

    def reload(self) -> dict[str, Any]:
        return self._ask("POST", "/api/v1/reload")

    def _ask(self, method: str, target: str, body: Mapping[str, str] | None = None) -> dict[str, Any]:
        text = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + target, text, method=method)  # noqa: S310 - checked: http
            if text is not None:
                request.add_header("Content-Type", "application/json")
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                return self._understood(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise AdminError(f"{self._url}: {_detail(error.read()) or error}") from error
        except (OSError, HTTPException, ValueError) as error:  # URLError among them; ValueError: no such URL
            reason = getattr(error, "reason", error)
            raise NobodyThereError(
                f"no control plane answers at {self._url} ({reason}); is gup running? --admin asks elsewhere"
            ) from error

    def _understood(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise AdminError(f"{self._url}: what answers there is no control plane of gup") from error
        if not isinstance(answer, dict):
            raise AdminError(f"{self._url}: what answers there is no control plane of gup")
        return answer


def _detail(body: bytes) -> str:
    """What a problem document says, "" when the body is none."""
    try:
        problem = json.loads(body)
    except ValueError:
        return ""
    return str(problem.get("detail") or problem.get("title") or "") if isinstance(problem, dict) else ""
