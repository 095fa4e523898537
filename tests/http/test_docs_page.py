"""/docs: served by the service alone, without the internet, behind any prefix."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest

from tests.support.browser import chromium_program
from tests.support.http_service import RunningService, serve


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), API_KEYS="k") as running:
        yield running


@pytest.mark.slow
def test_the_page_and_all_that_it_loads_come_from_the_service_without_a_key(
    live: RunningService,
) -> None:
    page = live.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert {path.rpartition(".")[2] for path in loaded} == {"png", "css", "json", "js"}
    kinds = {"png": "image/png", "css": "text/css", "json": "application/json"}
    for path in loaded:
        # Relative: a proxy may have put the page under any prefix.
        assert not path.startswith("/")
        assert ":" not in path
        answer = live.client.get(urljoin("/docs", path))
        assert answer.status_code == 200
        expected = kinds.get(path.rpartition(".")[2], "text/javascript")
        assert answer.headers["content-type"].startswith(expected)
        assert answer.headers.get("x-content-type-options") == "nosniff" or path == "openapi.json"
        if path.endswith(".css"):
            assert not re.search(r"url\((?!['\"]?data:)", answer.text)


@pytest.mark.parametrize("path", ["/docs/swagger-ui.css", "/docs/favicon.png", "/console/app.js"])
def test_a_file_that_the_browser_has_is_not_sent_again(live: RunningService, path: str) -> None:
    tag = live.client.get(path).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = live.client.get(path, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == tag
    assert live.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_no_other_server_may_be_asked_by_the_page(live: RunningService) -> None:
    policy = live.client.get("/docs").headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert directives["script-src"] == directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"
    assert "http" not in policy
    assert "*" not in policy


@pytest.mark.slow
def test_a_browser_without_the_internet_shows_every_route(
    live: RunningService, tmp_path: Path
) -> None:
    command = [
        chromium_program(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += ["--virtual-time-budget=20000", "--dump-dom", f"{live.url}/docs"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    paths = live.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 25
    for path in paths:
        assert f'data-path="{path}"' in shown
