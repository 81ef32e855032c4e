"""A certificate authority of the tests' own, which clients may be told to trust."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple


class Authority(NamedTuple):
    """A certificate authority that clients may be told to trust, in a folder."""

    folder: Path

    @property
    def certificate(self) -> Path:
        """Its own certificate."""
        return self.folder / "ca.pem"

    def issue(self, *names: str, days: int = 2, is_signed: bool = True) -> ssl.SSLContext:
        """Return the context of a server with a certificate for these names, signed by itself unless it is signed."""
        key, request, certificate = (self.folder / f"leaf.{kind}" for kind in ("key", "csr", "pem"))
        extensions = self.folder / "extensions"
        extensions.write_text(f"subjectAltName={','.join(names)}\n")
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key]
        openssl("req", "-new", *new_key, "-subj", "/CN=node", "-out", request)
        signer = ["-CA", self.certificate, "-CAkey", self.folder / "ca.key", "-CAcreateserial"]
        signer = signer if is_signed else ["-signkey", key]
        openssl("x509", "-req", "-in", request, *signer, "-days", days, "-extfile", extensions, "-out", certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context


def openssl(*arguments: object) -> None:
    """Run the openssl command, which every CI image and every developer's machine has."""
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def make_authority(folder: Path) -> Authority:
    """Make an authority; clients trust it when SSL_CERT_FILE names its certificate."""
    made = Authority(folder)
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", folder / "ca.key"]
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    openssl("req", "-x509", *new_key, "-subj", "/CN=tests", "-days", 2, *usage, "-out", made.certificate)
    return made
