"""Proxies of the environment: loopback has none, and every other fault names the variable."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from adapters.format.files import save_adapter
from service.client import InvalidCall, Refused, Retries, Unreachable
from service.client.proxies import proxy_of
from service.client.sync import Client
from tests.support.broken_server import answer, broken, results
from tests.support.either_client import either
from tests.support.http_service import serve
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone

ONCE = Retries(attempts=1)
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
FAR = "http://service.example:8000"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def closed() -> str:
    """The URL of a proxy that is down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocking", "awaited"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback_is_never_proxied(
    kind: str, host: str, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, host=host) as live:
        # httpx of the test itself would fail with these variables.
        monkeypatch.setenv("HTTP_PROXY", closed)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", "[::1]")
        with either(kind, live.url) as client:
            assert client.ready().status == "ok"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.8.8.8", "[::1]", "0.0.0.0"],
)
def test_what_is_loopback(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "ftp://nonsense")
    assert proxy_of(httpx.URL(f"http://{host}:8000")) is None


@pytest.mark.parametrize(
    ("excepted", "host"),
    [
        ("service.example", "service.example"),
        (".example", "service.example"),
        ("*", "service.example"),
        ("[fd00::7]", "[fd00::7]"),
        ("other, fd00::7", "[fd00::7]"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_what_no_proxy_names_is_asked_directly(
    excepted: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    url = httpx.URL(f"http://{host}:8000")
    assert proxy_of(url) is not None
    monkeypatch.setenv("NO_PROXY", excepted)
    assert proxy_of(url) is None


def test_requests_go_through_the_proxy_and_its_refusals_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = answer(b"<title>Forbidden by policy</title>", "403 Forbidden")
    with broken(results(1), page) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://me:secret@"))
        with Client(FAR, retries=ONCE) as client:
            assert client.predict("x", "a")[0].label == "ham"
            assert proxy.requests == [f"POST {FAR}/v1/predict HTTP/1.1"]
            assert proxy.headers[0]["proxy-authorization"].startswith("Basic ")
            with pytest.raises(Refused) as caught:
                client.adapters()
    said = f"403: Forbidden by policy, through the proxy {proxy.url} of http_proxy"
    assert str(caught.value) == said


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
def test_a_proxy_that_is_down_is_named(
    variable: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, closed.replace("://", "://me:secret@"))
    with Client(FAR, retries=ONCE) as client, pytest.raises(Unreachable) as caught:
        client.ready()
    said = f"no service answers: {FAR} through the proxy {closed} of {variable}: "
    assert str(caught.value).startswith(said)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["ftp://p:1", "http://", "http://[::1", "http://p:port", "://"])
def test_a_proxy_that_cannot_be_used_is_one_clear_line(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(InvalidCall, match=r"^HTTP_PROXY: .*no address of a proxy"):
        Client(FAR)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is installed")
@pytest.mark.parametrize("command", ["predict", "adapters", "top", "push"])
def test_a_socks_proxy_without_its_package_is_one_clear_line(command: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(file, make_adapter(make_backbone()))
    arguments = {
        "predict": ["service", "predict", "-", "--adapter", "a"],
        "adapters": ["service", "adapters", "list"],
        "top": ["service", "top", "--once"],
        "push": ["train", "push", "--name", "a", "--adapter", str(file)],
    }[command]
    ended = subprocess.run(
        [sys.executable, "-m", *arguments, "--url", FAR],
        cwd=TREE,
        env={"PATH": os.environ["PATH"], "ALL_PROXY": "socks5://me:secret@127.0.0.1:1080"},
        input="x\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode != 0
    *notes, line = ended.stderr.splitlines()
    assert len(notes) == (command == "push"), "only push says first what it does"
    assert "ALL_PROXY: the proxy socks5://127.0.0.1:1080 needs the package socksio" in line
    assert "secret" not in line
