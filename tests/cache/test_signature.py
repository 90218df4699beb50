"""Signed archives: who signed one, and what is no signature."""

import io
import tarfile

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from gup.cache.archive import ArchiveError, written
from gup.cache.signature import read_signing_key, require_signer, sign, signer_of
from gup.cache.store import Store
from gup.files import FileError


@pytest.fixture
async def archive(tmp_path):
    """A written archive without entries."""
    file = tmp_path / "a.tar"
    file.write_bytes(b"".join([piece async for piece in written(Store(tmp_path), [], "lyon", 1.0)]))
    return file


@pytest.fixture
def pair(tmp_path):
    """Makes a private key and its public one, in two files."""

    def make(name="key", kind=Ed25519PrivateKey):
        private, public, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub", kind.generate()
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return private, public

    return make


def test_a_signed_archive_names_its_signer_and_any_change_of_it_is_told(archive, pair):
    private, public = pair()
    unsigned = archive.read_bytes()
    with io.BytesIO(unsigned) as stream:
        assert signer_of(stream) is None
    signer = sign(archive, read_signing_key(private))
    signed = archive.read_bytes()
    assert signed[: len(unsigned) - 1024] == unsigned[:-1024]
    with archive.open("rb") as stream:
        assert signer_of(stream) == signer
        assert stream.tell() == 0
    require_signer(signer, public)
    with tarfile.open(archive) as opened:
        assert opened.getnames() == [
            "gup-archive.json", "gup-archive-end.json", "gup-archive-signature.json",
        ]  # fmt: skip
    for at in (0, 600, len(unsigned) - 1025, len(signed) - 1536):
        changed = bytearray(signed)
        changed[at] ^= 1
        with pytest.raises(ArchiveError, match="not what was signed"):
            signer_of(io.BytesIO(changed))
    for cut in (signed[:-1], signed[:1000], b""):
        assert signer_of(io.BytesIO(cut)) is None


def test_a_required_signature_is_that_key_s(archive, pair):
    (private, _), (_, public) = pair(), pair("other")
    with pytest.raises(ArchiveError, match=r"it is not signed, and a signature by \w{32} is required"):
        require_signer(None, public)
    with pytest.raises(ArchiveError, match=r"it is signed by the key \w{32}, and"):
        require_signer(sign(archive, read_signing_key(private)), public)


def test_files_that_hold_no_such_key_are_told_with_what_would_be_right(tmp_path, pair):
    private, public = pair()
    other, _ = pair("x", X25519PrivateKey)
    for file, words in (
        (tmp_path / "none", "can't be read: No such file"),
        (public, "holds no such key: it must hold a private Ed25519 key"),
        (other, "holds another key: it must hold a private Ed25519 key"),
    ):
        with pytest.raises(FileError, match=words):
            read_signing_key(file)
    with pytest.raises(FileError, match="holds no such key: it must hold a public Ed25519 key"):
        require_signer(None, private)
