"""A certificate authority of our own, with one server and one client certificate."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.brokers.processes import BrokerError

#: Python 3.13 checks strictly: without key usage and key identifiers it refuses the chain.
CA_EXTENSIONS = (
    "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
)
LEAF_EXTENSIONS = """basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage={usage}
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
subjectAltName=DNS:localhost,IP:127.0.0.1
"""
CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of the PEM files."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


def make_certificates(directory: Path) -> Certificates:
    """Make them with openssl where they are missing; safe to repeat."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = Certificates(
        *(directory / f"{name}.pem" for name in ("ca", "server", "server-key", "client", "client-key"))
    )
    if not paths.client_cert.exists():
        ca_key = directory / "ca-key.pem"
        _authority(paths.ca, ca_key)
        _leaf(paths.server_cert, paths.server_key, paths.ca, ca_key, usage="serverAuth")
        _leaf(paths.client_cert, paths.client_key, paths.ca, ca_key, usage="clientAuth")
        for key in (paths.server_key, paths.client_key):
            key.chmod(0o644)  # a container's broker runs as another user; nothing is secret here
    return paths


def _authority(cert: Path, key: Path) -> None:
    _request(cert.with_suffix(".csr"), key, "/CN=streamtools test authority")
    _sign(cert, CA_EXTENSIONS, "-signkey", str(key))


def _leaf(cert: Path, key: Path, ca: Path, ca_key: Path, *, usage: str) -> None:
    _request(cert.with_suffix(".csr"), key, f"/CN={cert.stem}")
    extensions = LEAF_EXTENSIONS.format(usage=usage)
    _sign(cert, extensions, "-CA", str(ca), "-CAkey", str(ca_key), "-CAcreateserial")


def _request(csr: Path, key: Path, subject: str) -> None:
    _openssl("req", "-new", *CURVE, "-keyout", str(key), "-out", str(csr), "-subj", subject)


def _sign(cert: Path, extensions: str, *signer: str) -> None:
    settings = cert.with_suffix(".ext")
    settings.write_text(extensions)
    csr = str(cert.with_suffix(".csr"))
    _openssl("x509", "-req", "-in", csr, "-out", str(cert), "-days", "3650", "-extfile", str(settings), *signer)


def _openssl(*arguments: str) -> None:
    if not shutil.which("openssl"):
        raise BrokerError("openssl was not found; it makes the test certificates. Type: apt-get install openssl")
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BrokerError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
