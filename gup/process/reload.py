"""What of new settings can take effect in a running service; reads and applies nothing."""

from ipaddress import ip_address

from gup.config import Settings

_LISTEN_KEYS = ("address", "port", "admin_address", "admin_port", "backlog")
_TLS_KEYS = ("admin_cert_file", "admin_key_file")


def effective(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The new settings as far as they can hold now, and the keys that keep their old value until a restart.

    Sockets, cache directory and processes are made once; so it is settled whether the control plane's socket
    speaks TLS, and whether it needs a token. Names of upstreams are those of counters, whose
    words are laid out at the start; so where the names differ, all upstreams stay as they were.
    """
    late = [f"listen.{key}" for key in _LISTEN_KEYS if getattr(old.listen, key) != getattr(new.listen, key)]
    kept = {key: getattr(old.listen, key) for key in _LISTEN_KEYS}
    if (old.listen.admin_cert_file is None) != (new.listen.admin_cert_file is None):
        late.append("listen.admin_cert_file")
        kept |= {key: getattr(old.listen, key) for key in _TLS_KEYS}
    if new.listen.admin_token_file is None and not ip_address(old.listen.admin_address).is_loopback:
        late.append("listen.admin_token_file")
        kept["admin_token_file"] = old.listen.admin_token_file
    listen = new.listen.model_copy(update=kept)
    cache, workers, upstream = new.cache, new.workers, new.upstream
    if cache.directory != old.cache.directory:
        late.append("cache.directory")
        cache = cache.model_copy(update={"directory": old.cache.directory})
    if workers.count != old.workers.count:
        late.append("workers.count")
        workers = old.workers
    if {row.name for row in upstream} != {row.name for row in old.upstream}:
        late.append("upstream")
        upstream = old.upstream
    changed = {"listen": listen, "cache": cache, "workers": workers, "upstream": upstream}
    return new.model_copy(update=changed), late
