"""Files that settings and flags name: read whole, bounded, and what is wrong with one is said in words."""

import contextlib
import ssl
from pathlib import Path

from gup.errors import GupError
from gup.fsutil import read_regular

PEM_BYTES = 16 << 20
"""No bundle of certificates is larger; what the largest systems trust takes 0.3 MB."""
_DER_BEGIN = b"\x30\x82"
"""A SEQUENCE with a length of two bytes: how a certificate in DER begins."""


class FileError(GupError, ValueError):
    """A file that can't be used; the text names the file and the cause."""


def read_file(path: Path, most_bytes: int) -> bytes:
    """The file, or its first `most_bytes`. FileError unless it is a regular file that can be read."""
    try:
        return read_regular(path, most_bytes)
    except OSError as error:
        raise FileError(f"{str(path)!r} can't be read: {error.strerror or error}") from error


def trust(path: Path) -> ssl.SSLContext:
    """A client's context that trusts the certificates in this file alone. FileError when it holds none."""
    right = "it must hold certificates, in PEM"
    try:
        text = read_file(path, PEM_BYTES)
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    with contextlib.suppress(ssl.SSLError, OSError, ValueError):
        context = ssl.create_default_context(cafile=path)
        if context.cert_store_stats()["x509"]:
            return context
    raise FileError(f"{str(path)!r} {_lacking(text)}: {right}")


def _lacking(text: bytes) -> str:
    """Why a file gives no certificate."""
    if not text.strip():
        return "is empty"
    if b"-----BEGIN CERTIFICATE-----" in text or b"-----BEGIN TRUSTED CERTIFICATE-----" in text:
        return "holds a damaged certificate"
    if text.startswith(_DER_BEGIN):
        return "is no PEM but perhaps a certificate in DER (openssl x509 -inform der turns it into PEM)"
    return "holds a key but no certificate" if b"PRIVATE KEY-----" in text else "holds no certificate"
