"""HTTPS by the service itself: one process and several, its health check, its clients, renewal."""

import json
import os
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import trustme

from service.access.tls import BadCertificate, Certificate, certificate_of
from service.client import Client, InvalidCall, Retries, Unreachable
from service.settings import read_settings
from tests.support.certificates import issue
from tests.support.service_process import TREE, ready_service
from tests.support.tiny_models import save_backbone
from tests.support.typed_commands import typed


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_service_speaks_https_and_renews_its_certificate(
    workers: int, authority: trustme.CA, ca: Path, tmp_path: Path
) -> None:
    backbone = save_backbone(tmp_path / "backbone")
    cert, key = issue(authority, tmp_path)
    files = {"TLS_CERT": str(cert), "TLS_KEY": str(key)}
    with ready_service(backbone, tmp_path, workers=workers, **files) as running:
        assert running.url.startswith("https://127.0.0.1:")
        with Client(running.url, ca=str(ca)) as client:
            assert client.ready().status == "ok"
            assert client.adapters() == []
        with (
            Client(running.url, retries=Retries(attempts=1)) as stranger,
            pytest.raises(Unreachable, match="certificate"),
        ):
            stranger.adapters()
        plain = running.url.replace("https", "http")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{plain}/healthz", timeout=10)

        port = running.url.rpartition(":")[2]
        environment = {"PATH": os.environ["PATH"], "IDSPAM_PORT": port, "IDSPAM_TLS_CERT": "x"}
        alive = subprocess.run(
            [sys.executable, "-S", "deploy/alive.py"],
            cwd=TREE,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert alive.returncode == 0, alive.stdout
        assert json.loads(alive.stdout)["status"] == "ok"
        listed = typed("adapters", "list", "--url", running.url, ID_SPAM_CA=str(ca))
        assert listed.returncode == 0, listed.stderr

        before = served(running.url)
        issue(authority, tmp_path)
        deadline = time.monotonic() + 30
        while served(running.url) == before:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def served(url: str) -> str:
    """The certificate that a server shows."""
    host, _, port = url.removeprefix("https://").partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def test_a_file_that_cannot_be_used_is_named_with_its_setting(
    authority: trustme.CA, tmp_path: Path
) -> None:
    cert, key = issue(authority, tmp_path)
    Certificate(cert, key).check()
    other = tmp_path / "other"
    other.mkdir()
    _, other_key = issue(authority, other)
    junk, none = tmp_path / "junk.pem", tmp_path / "none.pem"
    junk.write_text("junk\n")
    locked = tmp_path / "locked.pem"
    locked.write_text(ENCRYPTED)
    for files, said in (
        (Certificate(none, key), f"IDSPAM_TLS_CERT: {none} cannot be read: No such file"),
        (Certificate(cert, none), f"IDSPAM_TLS_KEY: {none} cannot be read: No such file"),
        (Certificate(junk, key), f"IDSPAM_TLS_CERT: {junk} has no certificate"),
        (Certificate(cert, junk), f"IDSPAM_TLS_KEY: {junk} has no private key"),
        (Certificate(cert, other_key), f"IDSPAM_TLS_KEY: {other_key} is not the key of {cert}"),
        (Certificate(cert, locked), f"IDSPAM_TLS_KEY: {locked} has no private key"),
    ):
        with pytest.raises(BadCertificate) as caught:
            files.check()
        assert str(caught.value).startswith(said)
    for one, other_name in (("CERT", "KEY"), ("KEY", "CERT")):
        with pytest.raises(BadCertificate, match=f"^IDSPAM_TLS_{other_name}: missing"):
            certificate_of(read_settings({f"IDSPAM_TLS_{one}": str(cert)}))
    assert certificate_of(read_settings({})) is None


@pytest.mark.slow
def test_bad_files_stop_the_start(tmp_path: Path) -> None:
    environ = {"IDSPAM_ADAPTER_DIR": str(tmp_path), "IDSPAM_TLS_CERT": str(tmp_path / "x")}
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=TREE,
        env={"PATH": "", "IDSPAM_PORT": "0"} | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "service: IDSPAM_TLS_KEY: missing, IDSPAM_TLS_CERT is set\n"


def test_a_clients_file_of_authorities_is_checked(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk\n")
    for path, said in ((junk, "no certificates in PEM format"), (tmp_path / "x", "No such file")):
        with pytest.raises(InvalidCall, match=said):
            Client("https://127.0.0.1:1", ca=str(path))
    Client("http://127.0.0.1:1", ca=str(junk)).close()


# An empty PKCS#8 body is enough: the header alone makes OpenSSL ask for a password.
ENCRYPTED = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"
