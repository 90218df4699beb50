"""TLS of the control plane: certificate and key from files, renewed without a restart. Owns no socket."""

import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gup.files import FileError, read_file, trust


class CertificateError(ValueError):
    """Files that can't be used; the text says which, and why. `setting` names the one that is to blame."""

    def __init__(self, text: str, setting: str) -> None:
        super().__init__(text)
        self.setting = setting


_CERT, _KEY = "admin_cert_file", "admin_key_file"
_RIGHT = {
    _CERT: "it must hold the control plane's certificate with its chain, in PEM",
    _KEY: "it must hold the certificate's key, in PEM, without a password",
}


def load_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """A server's context; CertificateError when the files can't be read or do not belong together."""
    for setting, file in ((_CERT, cert_file), (_KEY, key_file)):
        try:
            read_file(file, 1)
        except FileError as error:
            raise CertificateError(f"{error}: {_RIGHT[setting]}", setting) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise _told(error, cert_file, key_file) from error
    return context


class _EncryptedKeyError(ValueError):
    """Whoever encrypts the key would have to be asked at each start."""


def _no_password() -> str:
    raise _EncryptedKeyError


def _told(error: Exception, cert_file: Path, key_file: Path) -> CertificateError:
    reason = getattr(error, "reason", None) or str(error)
    if isinstance(error, _EncryptedKeyError):
        words = f"{str(key_file)!r} is encrypted; gup can ask nobody for its password: {_RIGHT[_KEY]}"
        return CertificateError(words, _KEY)
    if reason == "KEY_VALUES_MISMATCH":
        words = f"{str(key_file)!r} is not the key of the certificate in {str(cert_file)!r}"
        return CertificateError(words, _KEY)
    try:
        trust(cert_file)
    except FileError as lacking:
        return CertificateError(str(lacking), _CERT)
    return CertificateError(f"{str(key_file)!r} holds no key: {_RIGHT[_KEY]}", _KEY)


class Renewable:
    """A context for a listening socket, whose certificate can be changed: for connections that come later."""

    def __init__(self, first: ssl.SSLContext) -> None:
        self.context = first
        self._current = first
        first.sni_callback = self._choose

    def renew(self, context: ssl.SSLContext) -> None:
        self._current = context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current


def key_doubts(key_file: Path) -> Iterator[str]:
    """What makes the key less safe than it could be, as sentences."""
    with suppress(OSError):
        if key_file.stat().st_mode & 0o004:
            yield f"{key_file} can be read by everybody on this machine: chmod o-r {key_file}"
