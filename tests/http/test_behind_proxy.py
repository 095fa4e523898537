"""Behind a reverse proxy: a prefix, the real client, and whom the service believes."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from service.http.app import route_paths
from service.http.proxies import BehindProxy, root_path_of, taken_by_a_route
from service.http.server import listen
from service.settings import InvalidSettings, read_settings
from tests.support.http_service import RunningService, error_of, serve
from tests.support.service_process import TREE, environ, service_process
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.unavailable import unavailable

FETCHED = TREE / ".cache" / "nginx" / "usr" / "sbin"

# `stripped` takes the prefix off and names it; `kept` leaves it; `bare` takes it off silently.
CONFIG = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto https;
    location /stripped/ {{
      proxy_set_header X-Forwarded-Prefix /stripped;
      proxy_pass {url}/;
    }}
    location /kept/ {{ proxy_pass {url}; }}
    location /bare/ {{ proxy_pass {url}/; }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, url: str) -> Iterator[str]:
    """A real nginx in front of a service; its URL."""
    program = shutil.which("nginx", path=str(FETCHED)) or shutil.which("nginx")
    program = program or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        unavailable("nginx is missing: run .ci/nginx (Debian) or install nginx")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    folder.mkdir()
    (folder / "conf").write_text(CONFIG.format(folder=folder, port=port, url=url.rstrip("/")))
    command = [program, "-p", str(folder), "-c", str(folder / "conf"), "-e", "stderr"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                except httpx.TransportError:
                    assert running.poll() is None, running.stderr and running.stderr.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()


def servers(url: str, **headers: str) -> list[str]:
    document = httpx.get(f"{url}/openapi.json", headers=headers).json()
    return [server["url"] for server in document.get("servers", [])]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, TRUSTED_PROXIES="127.0.0.1", ROOT_PATH="/kept/") as running:
        running.put("a", make_adapter(make_backbone(), seed=1))
        yield running


@pytest.mark.slow
def test_every_route_works_through_a_real_proxy(live: RunningService, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", live.url) as proxy:
        for prefix in ("stripped", "kept", "bare"):
            base = f"{proxy}/{prefix}"
            body = {"adapter": "a", "inputs": "x"}
            assert httpx.post(f"{base}/v1/predict", json=body).status_code == 200
            assert httpx.post(f"{base}/adapters/a", json={"inputs": "x"}).status_code == 200
            assert httpx.get(f"{base}/v2/models/a").status_code == 200
            assert 'src="docs/swagger-ui-bundle.js"' in httpx.get(f"{base}/docs").text
            assert httpx.get(f"{base}/docs/swagger-ui-bundle.js").status_code == 200
            # The errors have the shape of the path below the prefix.
            refused = httpx.get(f"{base}/v1/adapters/missing")
            assert error_of(refused)["type"] == "adapter_not_found"
            assert "error_type" in httpx.get(f"{base}/adapters/missing/info").json()
        # The prefix that the proxy names, or else the one that is set.
        assert servers(f"{proxy}/stripped") == ["/stripped"]
        assert servers(f"{proxy}/kept") == servers(f"{proxy}/bare") == ["/kept"]
        route = "/v1/predict"
        assert live.metric("idspam_requests_total", route=route, outcome="success") == 3


@pytest.mark.slow
def test_workers_behind_a_prefix(tmp_path: Path) -> None:
    environment = environ(
        Path("all-MiniLM-L6-v2"), tmp_path, WORKERS="2", ROOT_PATH="/x", TRUSTED_PROXIES="::1"
    )
    with service_process(environment) as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[1]
        assert servers(url) == servers(f"{url}/x") == ["/x"]
        # Not from a trusted proxy.
        assert servers(url, **{"X-Forwarded-Prefix": "/other"}) == ["/x"]
        running.terminate()
        assert running.wait(40) == 0


@pytest.mark.slow
def test_only_trusted_proxies_are_believed(tmp_path: Path, live: RunningService) -> None:
    prefix = {"X-Forwarded-Prefix": "/outer, /inner/"}
    assert servers(live.url, **prefix) == ["/outer/inner"]
    with serve(tmp_path / "none") as alone:
        assert servers(alone.url, **prefix) == []
    with serve(tmp_path / "other", TRUSTED_PROXIES="10.0.0.0/8, ::1") as other:
        assert servers(other.url, **prefix) == []


@pytest.mark.parametrize(
    "prefix",
    ["//evil.example", "evil", "/a b", "/../x", '/x"', "https://evil", "/" + "x" * 300, ""],
)
def test_a_prefix_that_is_no_path_is_ignored(live: RunningService, prefix: str) -> None:
    assert servers(live.url, **{"X-Forwarded-Prefix": prefix}) == ["/kept"]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client", "scheme"),
    [
        ("10.0.0.1", "203.0.113.7", "203.0.113.7", "https"),
        ("::ffff:10.0.0.1", "203.0.113.7", "203.0.113.7", "https"),
        # What the client wrote itself stands before what the proxy added.
        ("10.0.0.1", "1.1.1.1, 203.0.113.7, 10.0.0.2", "203.0.113.7", "https"),
        ("203.0.113.9", "1.1.1.1", "203.0.113.9", "http"),
        ("::ffff:203.0.113.9", "1.1.1.1", "203.0.113.9", "http"),
    ],
)
async def test_the_client_is_the_one_that_a_trusted_proxy_names(
    peer: str, forwarded: str, client: str, scheme: str
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    headers = [(b"x-forwarded-for", forwarded.encode()), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": (peer, 1), "scheme": "http", "headers": headers, "path": "/"}
    proxied = BehindProxy(app, root_path="", trusted=("10.0.0.0/8",))
    await proxied(scope, None, None)  # type: ignore[arg-type]  # this app reads and sends nothing
    assert seen[0]["client"][0] == client
    assert seen[0]["scheme"] == scheme
    assert root_path_of(seen[0]) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IDSPAM_ROOT_PATH", "idspam"),
        ("IDSPAM_ROOT_PATH", "//host"),
        ("IDSPAM_ROOT_PATH", "/a/../b"),
        ("IDSPAM_ROOT_PATH", "/a b"),
        ("IDSPAM_TRUSTED_PROXIES", "*"),
        ("IDSPAM_TRUSTED_PROXIES", "proxy.example"),
        ("IDSPAM_TRUSTED_PROXIES", "10.0.0.1/8"),
    ],
)
def test_a_bad_setting_stops_the_start(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings({key: value})
    assert caught.value.faults[0].startswith(f"{key}: ")


@pytest.mark.slow
def test_a_prefix_that_begins_like_a_route_is_refused(tmp_path: Path) -> None:
    assert taken_by_a_route("/v1", route_paths())
    assert taken_by_a_route("/adapters/x", route_paths())
    assert not taken_by_a_route("/idspam", route_paths())
    environment = environ(tmp_path, tmp_path, ROOT_PATH="/v2/models")
    with service_process(environment) as running:
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 2
    assert errors.startswith("service: IDSPAM_ROOT_PATH: ")
    assert len(errors.splitlines()) == 1
