"""Where the service listens: both families of addresses, one line where that cannot be."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.http.server import address_text, bound_host, listen, listen_shared, reserve, url_of
from tests.support.service_process import TREE, environ, service_process
from tests.support.tiny_models import save_backbone
from tests.support.unavailable import unavailable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_two_colons_are_every_address_of_both_families(
    folder: Path, tmp_path: Path, workers: str
) -> None:
    environment = environ(folder, tmp_path, HOST="::", WORKERS=workers, API_KEYS="k")
    # As in a pod whose namespace has a service called `idspam`.
    environment |= {"IDSPAM_SERVICE_HOST": "10.0.0.1", "IDSPAM_SERVICE_PORT": "8000"}
    with service_process(environment) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        line = running.stdout.readline()
        assert line.startswith("serving http://[::]:"), running.stderr.read()
        port = line.split()[1].rpartition(":")[2]
        # Several connections, so that each worker's socket gets some.
        for _ in range(8):
            for host in ("127.0.0.1", "[::1]"):
                assert httpx.get(f"http://{host}:{port}/readyz").status_code == 200
        running.terminate()
        assert running.wait(30) == 0
        log = running.stderr.read()
    (ignored,) = [line for line in log.splitlines() if "enableServiceLinks" in line]
    assert "IDSPAM_SERVICE_HOST, IDSPAM_SERVICE_PORT" in ignored


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0", "localhost"])
def test_an_address_is_reserved_and_shared_as_it_was_bound(host: str) -> None:
    listener = listen(host, 0)
    bound, port = bound_host(listener), listener.getsockname()[1]
    reachable = [host] if host not in ("::", "0.0.0.0") else ["127.0.0.1"]
    reachable += ["::1"] if host == "::" else []
    with reserve(listener), listen_shared(bound, port), listen_shared(bound, port):
        for address in reachable:
            socket.create_connection((address, port), timeout=5).close()


def test_one_address_of_ipv6_is_not_one_of_ipv4() -> None:
    with listen("::1", 0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5)


def test_addresses_of_ipv6_are_in_brackets() -> None:
    assert address_text("127.0.0.1", 80) == "127.0.0.1:80"
    assert address_text("::1", 80) == "[::1]:80"
    assert address_text("fe80::1%2", 80) == "[fe80::1%252]:80"
    with listen("::1", 0) as listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_an_address_of_one_link_keeps_its_scope() -> None:
    links = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    local = [(line[0], int(line[1], 16)) for line in links if line[3] == "20"]
    if not local:
        pytest.skip("no interface has a link-local address")
    digits, scope = local[0]
    address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    listener = listen(f"{address}%{scope}", 0)
    bound, port = bound_host(listener), listener.getsockname()[1]
    assert bound == f"{address}%{scope}"
    with reserve(listener), listen_shared(bound, port):
        socket.create_connection((bound, port), timeout=5).close()


def test_a_system_without_ipv6_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel without IPv6 refuses the socket itself."""

    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(OSError, match=r"IDSPAM_HOST=0\.0\.0\.0") as caught:
        listen("::", 0)
    assert caught.value.errno == errno.EAFNOSUPPORT
    assert not caplog.records


@pytest.mark.slow
def test_where_ipv6_is_switched_off_the_start_ends_with_one_line(tmp_path: Path) -> None:
    """In a network namespace of its own, whose IPv6 is switched off."""
    switched_off = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
    command = f"echo 1 > {switched_off} && exec {sys.executable} -m service serve"
    probe = subprocess.run(
        ["unshare", "-n", "sh", "-c", f"echo 1 > {switched_off}"], capture_output=True, check=False
    )
    if probe.returncode:
        unavailable(f"no network namespace: {probe.stderr.decode()}")
    ended = subprocess.run(
        ["unshare", "-n", "sh", "-c", command],
        cwd=TREE,
        env=environ(tmp_path, tmp_path, HOST="::1", API_KEYS="k"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("service: cannot listen on [::1]:0: Cannot assign requested address; ")
    assert "IDSPAM_HOST=0.0.0.0" in line
