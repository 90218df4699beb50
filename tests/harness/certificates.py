"""Certificates of a private certificate authority, made with the openssl command."""

import ssl
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from harness.processes import needs

NEW_KEY = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"


@dataclass
class Authority:
    """A private certificate authority, made with the openssl command."""

    folder: Path
    name: str = "test authority"
    ca: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ca = self.folder / "ca.pem"
        self._openssl("ca", f"/CN={self.name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def _openssl(self, file: str, subject: str, *more: str) -> None:
        command = [needs("openssl"), *NEW_KEY.split(), "-subj", subject, *more]
        command += ["-keyout", str(self.folder / f"{file}.key"), "-out", str(self.folder / f"{file}.pem")]
        subprocess.run(command, check=True, capture_output=True)

    def server(self, names: str) -> str:
        """nginx directives of a server with a certificate for these names."""
        self._make_server(names)
        return (
            f"ssl_certificate {self.folder}/server.pem; ssl_certificate_key {self.folder}/server.key; "
            "ssl_protocols TLSv1.2 TLSv1.3;"
        )

    def context(self, names: str = "IP:127.0.0.1") -> ssl.SSLContext:
        """The same for a server of Python's."""
        self._make_server(names)
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return made

    def _make_server(self, names: str) -> None:
        self._openssl(
            *("server", "/CN=manager", "-CA", str(self.ca), "-CAkey", str(self.folder / "ca.key")),
            *("-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:FALSE"),
        )
