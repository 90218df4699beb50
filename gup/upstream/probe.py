"""Asks the members of a cluster directly whether they serve: `GET /readyz` at their own port, signed."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import aiohttp

from gup.cluster.signing import Signer

PATH = "/readyz"
_MOST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Alive:
    """The member answered; `ready` when it serves. `time_ms` is the engine's time as it knows it."""

    ready: bool
    time_ms: int
    known: str = ""
    """What it knows of orders."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The member's signed answer; the names in `fields` are compared without case."""

    status: int
    fields: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer of the member; `refused`: nobody listens at its address."""

    why: str
    refused: bool = False


class Prober:
    """Probes from one node; connections are kept."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._session: aiohttp.ClientSession | None = None

    async def probe(
        self, name: str, address: str, signer: Signer, time_ms: int, seconds: float
    ) -> Alive | Failed:
        """One question to `name`; takes at most so long."""
        answer = await self.ask(name, address, signer, time_ms, seconds)
        if isinstance(answer, Failed):
            return answer
        return Alive(
            answer.status == 200, int(answer.fields.get("GUP-Time", "0")), answer.fields.get("GUP-Known", "")
        )

    async def ask(
        self,
        name: str,
        address: str,
        signer: Signer,
        time_ms: int,
        seconds: float,
        path: str = PATH,
        fields: Mapping[str, str] = MappingProxyType({}),
        most_bytes: int = _MOST_BYTES,
    ) -> Answered | Failed:
        """One question of the controller to a member's peer port. The body is not signed."""
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False, cookie_jar=aiohttp.DummyCookieJar())
        question = signer.ask(self._node, name, "GET", path, time_ms, fields.items())
        body = b""
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.get(address + path, headers=question.fields, allow_redirects=False) as response,
            ):
                while len(body) < most_bytes and (
                    piece := await response.content.read(most_bytes - len(body))
                ):
                    body += piece
        except TimeoutError:
            return Failed("it does not answer")
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            number = error.os_error.errno  # asyncio's own text names the address again
            return Failed(os.strerror(number) if number else str(error.os_error), refused=refused)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Failed(str(error)[:200] or type(error).__name__)
        if not signer.verify_answer(question, response.status, response.headers.items()):
            return Failed(f"its answer ({response.status}) is not signed by {name} with the cluster's secret")
        return Answered(response.status, response.headers, body)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
