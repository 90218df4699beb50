"""Signatures of archives: Ed25519, made by whoever exports, required by whoever imports."""

import hashlib
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import Base64Bytes, BaseModel, Field

from gup.cache.archive import ArchiveError, member_bytes
from gup.files import PEM_BYTES, FileError, read_file

_PIECE_BYTES = 256 * 1024
SIGNATURE = "gup-archive-signature.json"
_SIGNED_AS = b"gup archive 1\n"
_TRAILER_BYTES = 2 * tarfile.BLOCKSIZE
_SIGNATURE_BYTES = 2 * tarfile.BLOCKSIZE + _TRAILER_BYTES
"""Of the last member, the signature with its header, and the tar's end."""


class _Signature(BaseModel):
    """The member behind the last one. Both are Base64; what is signed is the SHA-512 of all bytes before."""

    public_key: Annotated[Base64Bytes, Field(min_length=32, max_length=32)]
    ed25519: Annotated[Base64Bytes, Field(min_length=64, max_length=64)]


def read_signing_key(file: Path) -> Ed25519PrivateKey:
    """The private key in a file; FileError."""
    right = "it must hold a private Ed25519 key in PEM, made by: openssl genpkey -algorithm ed25519"
    key: Ed25519PrivateKey = _read_key(
        file, lambda text: load_pem_private_key(text, None), Ed25519PrivateKey, right
    )
    return key


def sign(file: Path, key: Ed25519PrivateKey) -> str:
    """Sign a written archive in place; returns the key's fingerprint."""
    public = key.public_key().public_bytes_raw()
    with file.open("r+b") as archive:
        end = archive.seek(-_TRAILER_BYTES, os.SEEK_END)
        signed = _Signature.model_construct(public_key=public, ed25519=key.sign(_digest(archive, end)))
        text = signed.model_dump_json().encode().ljust(tarfile.BLOCKSIZE)
        archive.seek(end)
        archive.write(member_bytes(SIGNATURE, text, time.time()) + bytes(_TRAILER_BYTES))
    return _fingerprint(public)


def signer_of(archive: IO[bytes]) -> str | None:
    """The fingerprint of the key that signed a file, from whose beginning it can be read then; None when it
    is not signed. ArchiveError when the file is not what was signed.
    """
    size = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, size - _SIGNATURE_BYTES))
    last = archive.read(_SIGNATURE_BYTES)
    try:
        member = tarfile.TarInfo.frombuf(last[: tarfile.BLOCKSIZE], "utf-8", "strict")
        if member.name != SIGNATURE:
            return None
        signed = _Signature.model_validate_json(last[tarfile.BLOCKSIZE : 2 * tarfile.BLOCKSIZE])
        key = Ed25519PublicKey.from_public_bytes(signed.public_key)
        key.verify(signed.ed25519, _digest(archive, size - _SIGNATURE_BYTES))
    except tarfile.HeaderError:
        return None
    except (ValueError, InvalidSignature) as error:
        raise ArchiveError("it is not what was signed: it was changed since, nothing was taken") from error
    finally:
        archive.seek(0)
    return _fingerprint(signed.public_key)


def require_signer(signer: str | None, key_file: Path) -> None:
    """ArchiveError unless it was this key; FileError when `key_file` holds none."""
    right = "it must hold a public Ed25519 key in PEM, made by: openssl pkey -in KEY -pubout"
    wanted = _fingerprint(
        _read_key(key_file, load_pem_public_key, Ed25519PublicKey, right).public_bytes_raw()
    )
    if signer != wanted:
        is_ = "it is not signed" if signer is None else f"it is signed by the key {signer}"
        raise ArchiveError(f"{is_}, and a signature by {wanted} is required: nothing was taken")


def _read_key(file: Path, load: Callable[[bytes], object], kind: Any, right: str) -> Any:
    try:
        key = load(read_file(file, PEM_BYTES))
    except FileError as error:
        raise FileError(f"{error}: {right}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FileError(f"{str(file)!r} holds no such key: {right}") from error
    if not isinstance(key, kind):
        raise FileError(f"{str(file)!r} holds another key: {right}")
    return key


def _digest(archive: IO[bytes], end: int) -> bytes:
    """The signed digest of an archive that ends there."""
    digest = hashlib.sha512()
    archive.seek(0)
    while end > 0 and (piece := archive.read(min(_PIECE_BYTES, end))):
        digest.update(piece)
        end -= len(piece)
    return _SIGNED_AS + digest.digest()


def _fingerprint(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()[:32]
