"""Certificates of an authority that only a test trusts."""

from pathlib import Path

import trustme


def issue(authority: trustme.CA, folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
    """The files of a new certificate and its key; replaced if they exist."""
    issued = authority.issue_cert(name)
    cert, key = folder / "cert.pem", folder / "key.pem"
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    cert.write_bytes(chain)
    key.write_bytes(issued.private_key_pem.bytes())
    return cert, key
