"""Reads a tar archive from a stream, member by member, in bounded memory whatever its headers say.

The formats are ustar with pax headers (POSIX.1-2017, pax, "pax Interchange Format") and GNU's long names. The
standard library's tarfile reads a header of any size into memory at once and follows headers without end.
"""

from dataclasses import dataclass
from typing import IO

from gup.errors import GupError

_BLOCK = 512
_PIECE_BYTES = 256 * 1024
_MAX_HEADER_BYTES = 64 * 1024
"""Of a pax header, and of a long name."""
_MAX_HEADERS = 8
"""Pax headers and long names before one member."""
_MAX_SIZE = 1 << 62
_FILES, _WITHOUT_CONTENT = frozenset((0, *b"07")), frozenset(b"123456")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"xgLKS"


class TarError(GupError):
    """The stream is no tar archive, is cut off, or has a header that can't be read."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member's name and the size of its content; `is_file` is False for links, folders and devices."""

    name: str
    size_bytes: int
    is_file: bool


@dataclass(slots=True)
class _Extended:
    """What the headers before a member say of it."""

    name: str | None = None
    size_bytes: int | None = None


class TarReader:
    """Members in their order. `read` gives the content of the last one; what was not read is passed over."""

    def __init__(self, stream: IO[bytes]) -> None:
        """`stream.read` may give any amount. One that can seek is not read where it need not be."""
        self._stream = stream
        seekable = getattr(stream, "seekable", None)
        self._seeks = bool(seekable is not None and seekable())
        self._held = b""
        self._left = 0
        self._padding = 0

    def next(self) -> Member | None:
        """The next member; None at the end. TarError when it can't be read on."""
        extended = _Extended()
        for _ in range(_MAX_HEADERS + 1):
            self._skip(self._left + self._padding)
            self._left = self._padding = 0
            block = self._take(_BLOCK)
            if not block or block == bytes(_BLOCK):
                return None
            kind, name, size_bytes = _parse(block)
            if kind in _WITHOUT_CONTENT:
                return Member(extended.name or name, 0, False)
            if kind in _FILES and extended.size_bytes is not None:
                size_bytes = extended.size_bytes
            self._left, self._padding = size_bytes, -size_bytes % _BLOCK
            if kind == _SPARSE:
                raise TarError("it has a sparse member")
            if kind in (_PAX, _LONG_NAME):
                if size_bytes > _MAX_HEADER_BYTES:
                    raise TarError(f"a header of {size_bytes} bytes; {_MAX_HEADER_BYTES} are allowed")
                _extend(extended, kind, self.read(size_bytes))
            elif kind not in (_PAX_GLOBAL, _LONG_LINK):
                return Member(extended.name or name, size_bytes, kind in _FILES)
        raise TarError(f"more than {_MAX_HEADERS} headers before one member")

    def read(self, size_bytes: int) -> bytes:
        """So many bytes of the member's content, fewer at its end only; TarError when it is cut off."""
        wanted = min(size_bytes, self._left)
        piece = self._take(wanted)
        if len(piece) < wanted:
            raise TarError("it is cut off")
        self._left -= wanted
        return piece

    def _take(self, size_bytes: int) -> bytes:
        """So many bytes; none at the end of the stream. TarError when it ends in between."""
        pieces = [self._held[:size_bytes]]
        self._held = self._held[size_bytes:]
        missing = size_bytes - len(pieces[0])
        while missing:
            piece = self._stream.read(missing if self._seeks else _PIECE_BYTES)
            if not piece:
                break
            pieces.append(piece[:missing])
            self._held = piece[missing:]
            missing -= len(pieces[-1])
        taken = b"".join(pieces)
        if taken and missing:
            raise TarError("it is cut off")
        return taken

    def _skip(self, size_bytes: int) -> None:
        if self._seeks:
            self._stream.seek(size_bytes, 1)
            return
        while size_bytes:
            piece = self._take(min(size_bytes, _PIECE_BYTES))
            if not piece:
                raise TarError("it is cut off")
            size_bytes -= len(piece)


def _parse(block: bytes) -> tuple[int, str, int]:
    """Type, name and size in a header block."""
    if block[257:262] != b"ustar" or _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
        raise TarError("it has a damaged header, or is no tar archive")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return block[156], name, _number(block[124:136])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if not all(0x30 <= digit <= 0x37 for digit in digits):
            raise TarError("it has a header with a bad number")
        value = int(digits, 8)
    if value > _MAX_SIZE:
        raise TarError("it has a header with a number that is too large")
    return value


def _extend(extended: _Extended, kind: int, content: bytes) -> None:
    if kind == _LONG_NAME:
        extended.name = _text(content)
        return
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        record, content = content[len(length) + 1 : size], content[size:]
        keyword, equals, value = record.partition(b"=")
        if not rest or not equals or not value.endswith(b"\n"):
            raise TarError("it has a damaged pax header")
        if keyword == b"path":
            extended.name = value[:-1].decode(errors="replace")
        elif keyword == b"size":
            if not value[:-1].isdigit() or len(value) > 20:
                raise TarError("it has a pax header with a bad size")
            extended.size_bytes = min(int(value), _MAX_SIZE)
        elif keyword.startswith(b"GNU.sparse."):
            raise TarError("it has a sparse member")
