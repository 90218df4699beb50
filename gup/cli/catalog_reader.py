"""The catalogues that a service with given settings would use, read without one.

From `catalog.file`; else from each manager; else the copy that the cache directory holds of it.
"""

import ssl
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException

from gup import config
from gup.cache.catalog_cache import FILE, read_kept
from gup.cache.store import Store
from gup.content.catalog import CATALOG_PATH, MAX_CATALOG_BYTES, Listed, parse_catalog
from gup.errors import GupError
from gup.files import FileError, read_file, trust


def read_catalog(
    settings: config.Settings, upstream: config.Upstream
) -> tuple[Mapping[str, Listed] | None, str]:
    """One upstream's catalogue, and where it was read; else None and why. GupError for `catalog.file`."""
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
        reason = "what is there lists nothing"
    except FileError as error:
        reason = f"upstream.ca_file: {error}"
    except (OSError, HTTPException, ValueError) as error:  # URLError and TLS errors among them
        reason = str(getattr(error, "reason", error))
    run = Store(settings.cache.directory).run
    kept = read_kept(run).get(upstream.name)
    if kept is not None and kept.rows is not None and kept.source == url:
        return kept.rows, f"{run / FILE} (the manager does not answer)"
    return None, f"{url} can't be read ({reason})"


def _fetch(url: str, upstream: config.Upstream) -> bytes:
    tls = trust(upstream.ca_file) if upstream.ca_file is not None else ssl.create_default_context()
    if not upstream.verify_tls:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    proxies = {"http": upstream.proxy, "https": upstream.proxy} if upstream.proxy else {}
    handlers = urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=tls)
    request = urllib.request.Request(url, headers=upstream.headers)  # noqa: S310 - settings: http or https
    with urllib.request.build_opener(*handlers).open(request, timeout=upstream.read_timeout) as response:
        return bytes(response.read(MAX_CATALOG_BYTES))
