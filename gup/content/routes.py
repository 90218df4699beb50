"""Routes: which content a request target names, and its content key.

Two paths never share a key, except where only the moniker's case differs, or any case where upstream ignores
case. A name that upstream may take for another one (a moniker with something behind it, on Windows any name
that ends in a dot) is refused: it would escape that one's rules, and be stored a second time.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import quote, unquote, unquote_to_bytes

from gup import config
from gup.content.key import ABSENT, ANY, FULL, MAX_PART_BYTES, ContentKey, Folder, Kind, Variant, delta_step
from gup.errors import Problem

LIVEUPDATE_STREAM = "liveupdate"
"""The stream of files at LiveUpdate's root; under /content/ a stream is a moniker in braces or ABSENT."""

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ABSOLUTE_FORM = re.compile(rb"(?i:(https?))://([^/?]*)([^?]*)")
_AUTHORITY = re.compile(rb"([A-Za-z0-9._~!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
_DEFAULT_PORTS = {b"http": 80, b"https": 443}

_ANY_CASE = re.IGNORECASE | re.ASCII
_MONIKER = re.compile(r"\{[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\}")
_LIKE_A_MONIKER = re.compile(r"\{|.*[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_OTHER_NAME_ON_WINDOWS = re.compile(r".*[. ]|.*:.*|[^.]{1,6}~[0-9]{1,6}(?:\.[^.]{1,3})?")
"""Windows drops dots and spaces at the end, takes what follows a colon for a stream of the file, and gives a
long name a short one, such as XDELTA~1.DAX."""
_REVISION = re.compile(r"[0-9]+")
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_DELTA = re.compile(r"xdelta.*\.dax", _ANY_CASE)

_LIVEUPDATE_INDEX = re.compile(r"minitri\.flg|.*_livetri\.zip", _ANY_CASE)
_KNOWN_INDEX = re.compile(r"contentinfo\.txt|minitri\.flg|.*_livetri\.zip", _ANY_CASE)
_LIVEUPDATE_VARIANT = re.compile(r".+_([^_]+)_([^_]+)_livetri\.zip", _ANY_CASE)
_LIVEUPDATE_PAYLOAD = re.compile(r".+\.(?:m25|7z|zip|jdb)", _ANY_CASE)

_PATH_SAFE = "/!$&'()*+,;=:@"  # pchar and "/" of RFC 3986 section 3.3; quote() adds the unreserved ones


@dataclass(frozen=True, slots=True)
class Target:
    """A request target, decoded once and checked.

    `path` begins with "/". `authority` is `host:port` of the absolute form in lower case, the port always
    written; None for the origin form.
    """

    authority: str | None
    path: str


@dataclass(frozen=True)
class Route:
    """The content that a path names, before its variant is chosen.

    `upstream_path` is percent-encoded, the moniker as the client spelled it. `stream`, `revision` and `file`
    are safe parts of a key. `variant` is set where the name states it, or where the body is stored under
    another variant than the one whose upstreams are asked; `elsewhere` are variants whose stored body is
    equivalent.
    """

    kind: Kind
    immutable: bool
    stream: str
    revision: str
    file: str
    upstream_path: str
    variant: Variant | None = None
    elsewhere: tuple[Variant, ...] = (Variant(ANY, ANY),)

    @property
    def known_index(self) -> bool:
        """Whether the name is that of an index file which upstreams have, not one that anybody makes up."""
        return _KNOWN_INDEX.fullmatch(self.file) is not None

    def keys(self, variant: Variant) -> tuple[ContentKey, ...]:
        """All keys to look up, first the one under which a fill stores.

        A variant stated by the name wins over the one given.
        """
        chosen = self.variant or variant
        keys = self._keys.get(chosen)
        if keys is None:
            variants = dict.fromkeys((chosen, *self.elsewhere))
            name = self.stream, self.revision, self.file
            keys = self._keys[chosen] = tuple([ContentKey(v.version, v.language, *name) for v in variants])
        return keys

    def key(self, variant: Variant) -> ContentKey:
        return self.keys(variant)[0]

    @cached_property
    def _keys(self) -> dict[Variant, tuple[ContentKey, ...]]:
        return {}


def parse_target(target: bytes) -> Target:
    """Origin form or absolute form (RFC 9112 section 3.2), without its query.

    Problem "bad-request" for other forms and a bad authority, "bad-path" for a path with two meanings.
    """
    if target.startswith(b"/"):
        return Target(None, _decode_path(target.partition(b"?")[0]))
    found = _ABSOLUTE_FORM.match(target)
    if not found:
        raise Problem("bad-request", "The request target is neither a path nor an http URL.")
    scheme, authority, path = found.groups()
    return Target(_normal_authority(authority, _DEFAULT_PORTS[scheme.lower()]), _decode_path(path or b"/"))


class Routes:
    """The routing table; LiveUpdate's files at the root only with `liveupdate`.

    `fold_case`: no upstream for content tells names apart by their case.
    """

    def __init__(self, *, liveupdate: bool = False, fold_case: bool = False) -> None:
        self._liveupdate, self._fold_case = liveupdate, fold_case

    @classmethod
    def of(cls, upstreams: Sequence[config.Upstream]) -> "Routes":
        """The routes to these upstreams. Managers run on Windows; what is behind another gup is unknown."""
        kinds = {upstream.kind for upstream in upstreams}
        return cls(liveupdate="liveupdate" in kinds, fold_case="gup" not in kinds)

    def route(self, path: str) -> Route:
        """The route of a decoded path (as `parse_target` gives it).

        Problem "not-content" when it names no content, "bad-path" when its name is too long for a file.
        """
        root, *segments = path.removeprefix("/").split("/")
        route = None
        if root == "content" and segments and segments[-1]:
            route = _content_route(path, segments, fold_case=self._fold_case)
        elif self._liveupdate and root and not segments:
            route = _liveupdate_route(path, root)
        if route is None:
            raise Problem("not-content", "This path is not content that gup serves.")
        return route


_ALL_ROUTES = Routes(liveupdate=True), Routes(liveupdate=True, fold_case=True)
_ENCODED_PATH = re.compile(r"/[!-~]{1,8192}")
_PLAIN_END = re.compile(r"/[0-9]{1,20}/(?:xdelta[0-9]{1,20}_To_[0-9]{1,20}\.dax|full\.zip)")
"""Revision and file that a path and a key spell alike, and that any folder may have."""


def leads_to(path: str, key: ContentKey) -> bool:
    """Whether `path` (percent-encoded, as an upstream is asked) is a path of the body called `key`.

    Checked because records and fill states may come from elsewhere: a path may name another body or host.
    """
    end = f"/{key.revision}/{key.file}"
    if path.endswith(end) and _PLAIN_END.fullmatch(end):
        return _is_folder_of(path.removesuffix(end), key.stream)
    return _leads_to(path, key)


@lru_cache(maxsize=1024)  # a stream's folder is the same for all its files: routing costs some 50 µs
def _is_folder_of(folder: str, stream: str) -> bool:
    return _leads_to(f"{folder}/1/full.zip", ContentKey("_", "_", stream, "1", "full.zip"))


def _leads_to(path: str, key: ContentKey) -> bool:
    if not _ENCODED_PATH.fullmatch(path) or "?" in path:
        return False
    try:
        decoded = parse_target(path.encode()).path
        found = [routes.route(decoded) for routes in _ALL_ROUTES]
    except Problem:
        return False
    return any((r.stream, r.revision, r.file) == (key.stream, key.revision, key.file) for r in found)


def path_of(key: ContentKey) -> str:
    """A path that leads to `key`, with the moniker in upper case, where the client's is unknown."""
    folders = [part for part in ("content", key.stream, key.revision) if part != ABSENT]
    if key.stream == LIVEUPDATE_STREAM:
        folders = []
    return quote("/".join(("", *map(unquote, (*folders, *key.file.split("%2F"))))), safe=_PATH_SAFE)


def spelled_moniker(upstream_path: str) -> str:
    """The moniker of a content path as the client spelled it, percent-encoded; "" when there is none."""
    parts = upstream_path.split("/")
    return parts[2] if len(parts) == 5 and parts[1] == "content" else ""


def delta_path(moniker: str, from_revision: str, to_revision: str, folder: Folder) -> str:
    under = from_revision if folder is Folder.FROM else to_revision
    return f"/content/{moniker}/{under}/xdelta{from_revision}_To_{to_revision}.dax"


def _content_route(path: str, segments: list[str], *, fold_case: bool) -> Route | None:
    if _LIKE_A_MONIKER.match(segments[0]) and not _MONIKER.fullmatch(segments[0]):
        raise _bad_path("something like a moniker, which is {GUID} and nothing else")
    if any(map(_OTHER_NAME_ON_WINDOWS.fullmatch, segments)):
        raise _bad_path("a name that another one stands for on Windows")
    stream, revision, files = ABSENT, ABSENT, [*map(_folded, segments)] if fold_case else segments
    if _MONIKER.fullmatch(segments[0]):
        stream, files = segments[0].upper(), files[1:]
        if not files:  # the moniker alone is a folder
            return None
        if len(files) > 1:
            revision, files = _part(files[0]), files[1:]
    kind = Kind.INDEX
    # Only a number names content that never changes; a folder called "latest" must be asked for again.
    if len(files) == 1 and _REVISION.fullmatch(revision):
        if FULL.fullmatch(files[0]):
            kind = Kind.FULL
        elif _DELTA.fullmatch(files[0]):
            kind = Kind.DELTA
    return Route(kind, kind is not Kind.INDEX, stream, revision, _file(files), _quoted(path))


def _quoted(path: str) -> str:
    return "/".join(map(_quoted_part, path.split("/")))


@lru_cache(4096)
def _quoted_part(part: str) -> str:
    return quote(part, safe=_PATH_SAFE)


def _folded(name: str) -> str:
    """`name` without regard to case: as managers spell it, else in lower case."""
    if (step := delta_step(name)) is not None:
        return f"xdelta{step.from_revision}_To_{step.to_revision}.dax"
    lower = name.translate(_LOWER)
    return "ContentInfo.txt" if lower == "contentinfo.txt" else lower


def _liveupdate_route(path: str, name: str) -> Route | None:
    index = bool(_LIVEUPDATE_INDEX.fullmatch(name))
    if not index and not _LIVEUPDATE_PAYLOAD.fullmatch(name):
        return None
    # Taken from the right: a product's name may contain underscores, a version or a language does not.
    stated = _LIVEUPDATE_VARIANT.fullmatch(name)
    variant = Variant(*(_part(part.replace("$20", " ")) for part in stated.groups())) if stated else None
    kind, file = Kind.INDEX if index else Kind.OTHER, _file([name])
    return Route(kind, not index, LIVEUPDATE_STREAM, ABSENT, file, _quoted(path), variant)


def _file(segments: list[str]) -> str:
    # "%" is escaped first, so "%2F" can only come from joining: deeper paths stay apart from flat names.
    return _checked("%2F".join(segment.replace("%", "%25") for segment in segments))


def _part(segment: str) -> str:
    """`segment` as version, language or revision: never taken for ABSENT or a hidden file, never a folder."""
    escaped = segment.replace("%", "%25").replace("/", "%2F")
    if escaped == ABSENT:
        escaped = "%5F"
    if escaped.startswith("."):
        escaped = f"%2E{escaped[1:]}"
    return _checked(escaped)


def _checked(part: str) -> str:
    if len(part.encode()) > MAX_PART_BYTES:
        raise Problem("bad-path", f"A name in the path is longer than {MAX_PART_BYTES} bytes.")
    return part


def _decode_path(raw: bytes) -> str:
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise _bad_path("text that is not UTF-8") from error
    for found, is_bad in (
        ("a '%' without two hexadecimal digits", _BAD_ESCAPE.search(raw)),
        ("a fragment", b"#" in raw),
        ("an encoded '/'", b"%2f" in raw.lower()),
        ("an unprintable character", not path.isprintable()),  # also marks of writing direction
        ("a backslash", "\\" in path),
        ("'//'", "//" in path),
        ("a name that begins with a dot", "/." in path),  # also "." and "..": none leads anywhere
    ):
        if is_bad:
            raise _bad_path(found)
    for segment in path.split("/"):
        _checked(segment)
    return path


def _bad_path(found: str) -> Problem:
    return Problem("bad-path", f"The path contains {found}.")


def _normal_authority(raw: bytes, default_port: int) -> str:
    found = _AUTHORITY.fullmatch(raw)
    port = int(found[2] or default_port) if found else 0
    if not found or not 0 < port < 65536:
        raise Problem("bad-request", "The request target's host is malformed.")
    return f"{found[1].decode().lower()}:{port}"
