"""Receivers of alarm messages: a webhook, signed as Standard Webhooks 1.0.0 describes it, and a command.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
import signal
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import gup
from gup.config import KEY_IS, Alarms, signing_keys
from gup.errors import GupError, quoted
from gup.files import FileError, read_file, trust
from gup.upstream.exchange import retry_after_seconds

_SECRET_BYTES = 4096
_GONE = 410


class NotAcceptedError(GupError):
    """A receiver did not accept a message. `after_seconds`: how long it wants to be left alone; `gone`: it
    wants no more of them.
    """

    def __init__(self, detail: str, *, after_seconds: float = 0.0, gone: bool = False) -> None:
        super().__init__(detail)
        self.after_seconds = after_seconds
        self.gone = gone


# --- the webhook


def read_keys(alarms: Alarms) -> list[bytes]:
    """The keys of the signatures, from the settings or their file; FileError."""
    text, file = alarms.webhook_secret or "", alarms.webhook_secret_file
    try:
        if file is not None:
            text = read_file(file, _SECRET_BYTES).decode("utf-8", "replace")
        return signing_keys(text)
    except FileError as error:
        raise FileError(f"alarms.webhook_secret_file: {error}: it {KEY_IS}") from error
    except ValueError as error:
        raise FileError(f"alarms.webhook_secret_file: {str(file)!r} {error}") from error


def signatures(keys: Iterable[bytes], message: str, at: int, body: bytes) -> str:
    """The value of `webhook-signature`: one for each key."""
    signed = b"%s.%d.%s" % (message.encode(), at, body)
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


@dataclass(frozen=True, slots=True)
class Webhook:
    alarms: Alarms
    keys: list[bytes] = field(repr=False)
    tls: ssl.SSLContext

    @classmethod
    def read(cls, alarms: Alarms) -> Self:
        """FileError when the secret or the certificates can't be used. Blocks on files."""
        keys, file = read_keys(alarms), alarms.webhook_ca_file
        try:
            return cls(alarms, keys, ssl.create_default_context() if file is None else trust(file))
        except FileError as error:
            raise FileError(f"alarms.webhook_ca_file: {error}") from error

    async def send(self, message: str, body: bytes, at: float) -> str:
        """POST it; NotAcceptedError unless the receiver answers 2xx.

        Redirects are not followed and the environment's proxies not used: only the receiver that the settings
        name gets the message. A connection a message: they are rare.
        """
        import aiohttp  # noqa: PLC0415 - the supervisor imports this module to check settings

        from gup.upstream.connector import URL, failure_of  # noqa: PLC0415 - imports aiohttp

        alarms, name = self.alarms, urlsplit(self.alarms.webhook or "").netloc
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"gup/{gup.__version__}",
            "webhook-id": message,
            "webhook-timestamp": str(int(at)),
            "webhook-signature": signatures(self.keys, message, int(at), body),
        }
        timeout = aiohttp.ClientTimeout(total=alarms.webhook_timeout)
        connector = aiohttp.TCPConnector(ssl=self.tls, force_close=True)
        session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        )
        try:
            async with (
                session,
                session.post(
                    URL(alarms.webhook or ""),
                    data=body,
                    headers=headers,
                    proxy=alarms.webhook_proxy,
                    allow_redirects=False,
                ) as response,
            ):
                status, fields = response.status, response.headers
        except Exception as error:
            failure = failure_of(error, name, "alarms.webhook_timeout", alarms.webhook_proxy)
            if failure is None:
                raise
            raise NotAcceptedError(
                failure.detail.replace("upstream.proxy", "alarms.webhook_proxy")
            ) from error
        if 200 <= status < 300:
            return ""
        detail = f"{name} answered {status}"
        if 300 <= status < 400:
            detail += ": redirects are not followed; set alarms.webhook to the final address"
        if status == 407:
            detail += ": the web proxy refuses the user or password in alarms.webhook_proxy"
        if status == _GONE:
            detail += ": no more messages are sent until a reload or restart"
        after = retry_after_seconds(fields.get("Retry-After"), fields.get("Date"), at)
        raise NotAcceptedError(detail, after_seconds=after or 0.0, gone=status == _GONE)


# --- the command

_OUTPUT_BYTES = 4096
_LAST_OUTPUT_SECONDS = 1.0
_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ")
"""What the program gets of the service's environment, which may hold secrets."""


async def run_command(
    command: Sequence[str], body: bytes, variables: Mapping[str, str], seconds: float
) -> str:
    """Run it with `body` on its standard input; return what it wrote, shortened.

    NotAcceptedError unless it ends with status 0 within `seconds`. What it leaves running in its process
    group is killed; a daemon, which has left the group, goes on.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with contextlib.ExitStack() as stack:
        # A file as its input and a pipe of our own: asyncio then waits for its end, not for its pipes.
        given = os.memfd_create("alarm")
        stack.callback(os.close, given)
        os.write(given, body)
        os.lseek(given, 0, os.SEEK_SET)
        ours, its = os.pipe()
        output = _Output()
        loop = asyncio.get_running_loop()
        pipe, _ = await loop.connect_read_pipe(lambda: output, os.fdopen(ours, "rb", 0))
        stack.callback(pipe.close)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=given,
                stdout=its,
                stderr=its,
                env={**kept, **variables},
                start_new_session=True,
            )
        except OSError as error:
            raise NotAcceptedError(f"{command[0]} can't be run: {error.strerror or error}") from error
        finally:
            os.close(its)
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            words = f"{command[0]} did not end within {seconds:g} s (alarms.command_timeout) and was killed"
            raise NotAcceptedError(words + output.words()) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        with contextlib.suppress(TimeoutError):  # a child in a group of its own may hold the pipe
            async with asyncio.timeout(_LAST_OUTPUT_SECONDS):
                await output.ended.wait()
    if process.returncode:
        why = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        raise NotAcceptedError(f"{command[0]} ended with {why}{output.words()}")
    return quoted(output.text.strip())


class _Output(asyncio.Protocol):
    """The beginning of what a program writes; the rest is read and forgotten."""

    def __init__(self) -> None:
        self.text = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.text += data[: _OUTPUT_BYTES - len(self.text)]

    def connection_lost(self, _error: Exception | None) -> None:
        self.ended.set()

    def words(self) -> str:
        return f": {quoted(text)}" if (text := self.text.strip()) else ""
