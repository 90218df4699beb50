"""Checks of what settings name, without a service: whether one can start with them, and the catalogues.

`gup config check`, `gup serve` and every reload use `usable`, so that all three refuse the same.
"""

import os
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gup import log
from gup.cache.catalog_cache import FILE, read_kept
from gup.cache.store import Store
from gup.cluster.signing import read_password, read_secrets
from gup.config import Alarms, Cluster, Settings, Upstream, read
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog
from gup.content.rules import Rulebook
from gup.control.auth import require_access
from gup.control.receivers import Webhook
from gup.errors import GupError, SettingsError
from gup.files import FileError, read_file, trust


def usable(
    file: Path | None, flags: Mapping[str, Any] | None = None, problems: Sequence[str] = (), *, servable: bool
) -> Settings:
    """Settings that a service can start with; else SettingsError with every mistake, also in what they name.

    `problems` were found before, in the flags; `servable` as for `gup.config.read`.
    """
    settings, found = read(file, flags=flags, servable=servable)
    problems = [*problems, *found, *_unusable(settings)]
    if problems:
        raise SettingsError(problems)
    return settings


def _unusable(settings: Settings) -> list[str]:
    """What a service could not use: the setting, the file, the cause and what would be right."""
    problems: list[str] = []
    checks: list[tuple[str, Callable[[], object]]] = [
        (f"upstream#{number}.ca_file", partial(trust, upstream.ca_file))
        for number, upstream in enumerate(settings.upstream, 1)
        if upstream.ca_file is not None
    ]
    checks += [
        ("catalog.file", lambda: _require_catalogue(settings.catalog.file)),
        ("cache.directory", lambda: _require_folder(settings.cache.directory)),
        ("listen", lambda: require_access(settings.listen)),
        ("log", lambda: log.require_destination(settings.log)),
        ("rules", lambda: Rulebook(settings)),
        ("alarms", lambda: _require_receivers(settings.alarms)),
    ]
    if settings.cluster.url is not None:
        checks += _of_cluster(settings.cluster)
    for setting, check in checks:
        try:
            check()
        except FileError as error:
            named = str(error).startswith(f"{setting}.")
            problems.append(str(error) if named else f"{setting}: {error}")
        except SettingsError as error:
            problems += error.problems
    return problems


def _of_cluster(cluster: Cluster) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "cluster", _require_redis
    yield "cluster.secret_file", partial(read_secrets, cluster.secret_file)
    if cluster.ca_file is not None:
        yield "cluster.ca_file", partial(trust, cluster.ca_file)
    if cluster.password_file is not None:
        yield "cluster.password_file", partial(read_password, cluster.password_file)


def _require_redis() -> None:
    if find_spec("redis") is None:
        raise FileError("the package redis is missing: pip install 'gup[cluster]'")


def _require_catalogue(file: Path | None) -> None:
    right = "it must be a manager's ContentInfo.txt, with lines {MONIKER}: product - … - language"
    if file is None:
        return
    try:
        if parse_catalog(read_file(file, MAX_CATALOG_BYTES)):
            return
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    raise FileError(f"{str(file)!r} lists nothing: {right}")


def _require_folder(folder: Path) -> None:
    """The folder may be missing, but neither it nor a folder above it may be a file."""
    for path in (folder, *folder.parents):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise FileError(f"{str(path)!r} can't be accessed: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise FileError(
                f"{str(path)!r} is not a folder: name a folder, or a path that does not exist yet"
            )
        return


def _require_receivers(alarms: Alarms) -> None:
    """FileError for what the controller could not use."""
    if alarms.webhook is not None:
        Webhook.read(alarms)
    if alarms.command and not (os.access(program := alarms.command[0], os.X_OK) and Path(program).is_file()):
        raise FileError(f"alarms.command: {program!r} is not a program that can be run")


# --- catalogues


def read_catalog(settings: Settings, upstream: Upstream) -> tuple[Mapping[str, Listed] | None, str]:
    """One upstream's catalogue, and where it was read; else None and why. GupError for `catalog.file`.

    From `catalog.file`; else from the manager; else the copy in the cache directory.
    """
    from http.client import HTTPException  # noqa: PLC0415 - with urllib for this alone

    named = settings.catalog.file
    if named is not None:
        try:
            return parse_catalog(read_file(named, MAX_CATALOG_BYTES)), str(named)
        except FileError as error:
            raise GupError(f"catalog.file: {error}") from error
    if upstream.kind == "liveupdate":
        return None, "LiveUpdate has no catalogue"
    url = upstream.url + CATALOG_PATH
    try:
        rows = parse_catalog(_fetch(url, upstream))
        if rows:
            return rows, url
        reason = "its catalogue lists nothing"
    except FileError as error:
        reason = f"upstream.ca_file: {error}"
    except (OSError, HTTPException, ValueError) as error:  # URLError and TLS errors among them
        reason = str(getattr(error, "reason", error))
    run = Store(settings.cache.directory).run
    kept = read_kept(run).get(upstream.name)
    if kept is not None and kept.rows is not None and kept.source == url:
        return kept.rows, f"{run / FILE} (the manager does not answer)"
    return None, f"{url} can't be read ({reason})"


def _fetch(url: str, upstream: Upstream) -> bytes:
    import urllib.request  # noqa: PLC0415 - a service that starts does without

    tls = trust(upstream.ca_file) if upstream.ca_file is not None else ssl.create_default_context()
    if not upstream.verify_tls:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    proxies = {"http": upstream.proxy, "https": upstream.proxy} if upstream.proxy else {}
    handlers = urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=tls)
    request = urllib.request.Request(url, headers=upstream.headers)  # noqa: S310 - settings: http or https
    with urllib.request.build_opener(*handlers).open(request, timeout=upstream.read_timeout) as response:
        return bytes(response.read(MAX_CATALOG_BYTES))
