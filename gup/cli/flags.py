"""Flags of `gup serve` as settings nested like the file; checks their form, and no value."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gup.errors import SettingsError

_HOST_PORT = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*):([0-9]{1,5})")


def host_port(flag: str, text: str) -> tuple[str, int]:
    """Host ("" when left out) and port of "127.0.0.1:2967", "[::1]:2967" or ":2967"; SettingsError else."""
    match = _HOST_PORT.fullmatch(text.strip())
    if match is None or int(match[2]) > 65535 or match[1] == "[]":
        raise SettingsError(
            [f"{flag}: {text!r} is not right: must be HOST:PORT, such as 127.0.0.1:2967, [::1]:2967 or :2967"]
        )
    return match[1].strip("[]"), int(match[2])


def serve_flags(
    *,
    upstream: Sequence[str],
    listen: str | None,
    admin: str | None,
    cache_dir: Path | None,
    workers: int | None,
) -> dict[str, Any]:
    """What stands on the command line, nothing else. SettingsError names every flag of a wrong form."""
    problems: list[str] = []
    addresses: dict[str, Any] = {}
    for flag, text, prefix in (("--listen", listen, ""), ("--admin", admin, "admin_")):
        try:
            host, port = host_port(flag, text) if text is not None else ("", None)
        except SettingsError as error:
            problems += error.problems
            continue
        addresses |= {f"{prefix}address": host} if host else {}
        addresses |= {f"{prefix}port": port} if port is not None else {}
    if problems:
        raise SettingsError(problems)
    flags: dict[str, Any] = {
        "listen": addresses,
        "upstream": [{"url": url} for url in upstream],
        "cache": {"directory": cache_dir} if cache_dir is not None else {},
        "workers": {"count": workers} if workers is not None else {},
    }
    return {section: values for section, values in flags.items() if values}
