"""Heads between upstream and clients: what is told of a body, and its ETag; does no I/O."""

import secrets

import xxhash

from gup.cache.record import Head, kept_field, kept_tag
from gup.content.key import ContentKey
from gup.errors import Problem
from gup.upstream.exchange import RemoteHead, UpstreamFailure


def make_etag(key: ContentKey, length: int, remote: RemoteHead) -> str:
    """Our strong ETag: of key, length and the first response's validators, or of chance if it has none."""
    validator = remote.etag or remote.last_modified
    return _tag(key, length, validator) if validator else etag_of_chance(key, length)


def etag_of_chance(key: ContentKey, length: int) -> str:
    """A tag that no other body has: for one whose validators do not tell it from others."""
    return _tag(key, length, secrets.token_hex(16))


def _tag(key: ContentKey, length: int, validator: str) -> str:
    name = "\n".join((key.text, str(length), validator))
    return f'"{xxhash.xxh3_128_hexdigest(name.encode())}"'


def head_of(key: ContentKey, remote: RemoteHead, *, changed: bool = False) -> Head:
    """What clients are told of a body that `remote` announces.

    `changed`: other bytes were known under these validators, so they make no tag.
    """
    etag = None
    if remote.length is not None:
        etag = etag_of_chance(key, remote.length) if changed else make_etag(key, remote.length, remote)
    return Head(
        length=remote.length,
        etag=etag,
        content_type=kept_field(remote.content_type) or "application/octet-stream",
        last_modified=kept_field(remote.last_modified),
        upstream=remote.upstream,
        upstream_etag=kept_tag(remote.etag),
    )


def remote_of(head: Head) -> RemoteHead:
    """What upstream told at first of a body that was begun."""
    return RemoteHead(
        200, 0, head.length, head.upstream_etag, head.last_modified, head.content_type, head.upstream
    )


def absent(remote: RemoteHead) -> Problem | UpstreamFailure:
    """What an answer without a body means."""
    if remote.status == 304:
        detail = f"{remote.upstream} answered 304 though nothing was asked conditionally"
        return UpstreamFailure("error", "upstream-error", detail, again=False)
    slug = "upstream-gone" if remote.status == 410 else "upstream-not-found"
    return Problem(slug, f"{remote.upstream} answered {remote.status}")
