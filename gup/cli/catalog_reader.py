"""The catalogues that a service with given settings would use, read without one.

From `catalog.file`; else from each manager; else the copy that the cache directory holds of it.
"""

import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException

from gup import config
from gup.cache.catalog_cache import FILE, read_kept
from gup.cache.store import Store
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog
from gup.errors import GupError
from gup.files import FileError, read_file, trust


class CatalogError(GupError):
    """The catalogue that the settings name can't be read."""


@dataclass(frozen=True, slots=True)
class Found:
    """One upstream's catalogue, and where it was read; `rows` is None where there was none, `source` why."""

    rows: Mapping[str, Listed] | None
    source: str


def read_catalog(settings: config.Settings, upstream: config.Upstream) -> Found:
    """CatalogError when `catalog.file` is set and can't be read."""
    named = settings.catalog.file
    if named is not None:
        try:
            return Found(parse_catalog(read_file(named, MAX_CATALOG_BYTES)), str(named))
        except FileError as error:
            raise CatalogError(f"catalog.file: {error}") from error
    if upstream.kind == "liveupdate":
        return Found(None, "LiveUpdate has no catalogue")
    url = upstream.url + CATALOG_PATH
    try:
        rows = parse_catalog(_fetch(url, upstream))
        if rows:
            return Found(rows, url)
        reason = "what is there lists nothing"
    except FileError as error:
        reason = f"upstream.ca_file: {error}"
    except (OSError, HTTPException, ValueError) as error:  # URLError and TLS errors among them
        reason = str(getattr(error, "reason", error))
    return _stored(settings, upstream) or Found(None, f"{url} can't be read ({reason})")


def _fetch(url: str, upstream: config.Upstream) -> bytes:
    tls = trust(upstream.ca_file) if upstream.ca_file is not None else ssl.create_default_context()
    if not upstream.verify_tls:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    proxies = {"http": upstream.proxy, "https": upstream.proxy} if upstream.proxy else {}
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=tls)
    )
    request = urllib.request.Request(url, headers=upstream.headers)  # noqa: S310 - settings: http or https
    with opener.open(request, timeout=upstream.read_timeout) as response:
        return bytes(response.read(MAX_CATALOG_BYTES))


def _stored(settings: config.Settings, upstream: config.Upstream) -> Found | None:
    run = Store(settings.cache.directory).run
    kept = read_kept(run).get(upstream.name)
    if kept is None or kept.rows is None or kept.source != upstream.url + CATALOG_PATH:
        return None
    return Found(kept.rows, f"{run / FILE} (the manager does not answer)")
