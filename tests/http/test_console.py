"""The files of the console: from the service alone, without a key, under a strict policy."""

import base64
import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest

from service.http.console.files import static_files
from tests.support.http_service import Brake, RunningService, error_of, serve

FIRST_LOAD_BYTES = 100_000


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), API_KEYS="k") as running:
        yield running


def policy(live: RunningService, path: str) -> dict[str, str]:
    directives = live.client.get(path).headers["content-security-policy"].split("; ")
    return {name: value for name, _, value in (part.partition(" ") for part in directives)}


@pytest.mark.parametrize("path", ["/", "/console"])
def test_the_page_and_all_that_it_loads_come_from_the_service_without_a_key(
    live: RunningService, path: str
) -> None:
    page = live.client.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert loaded.count("console/all.js") == 1
    for address in loaded:
        # Relative: a proxy may have put the page under any prefix.
        assert not address.startswith("/")
        assert ":" not in address
        assert live.client.get(urljoin(path, address)).status_code == 200


def test_every_import_of_every_module_is_a_file_of_the_console() -> None:
    modules = {name: file.content.decode() for name, file in static_files().items()}
    imports = [
        urljoin(name, address)
        for name, source in modules.items()
        if name.endswith(".js")
        for address in re.findall(r'(?:from|import\()\s*"([^"]+)"', source)
    ]
    assert len(imports) > 30
    assert set(imports) <= modules.keys()
    for name, source in modules.items():
        # Other projects' files name their homes; the policy lets none of them ask anybody.
        if name.startswith("vendor/"):
            continue
        # No other server is asked, whatever the page does.
        others = set(re.findall(r"https?://[\w.:]+", source))
        assert others <= {"http://127.0.0.1:8000", "http://www.w3.org"}, name


def test_no_script_of_another_server_and_no_markup_made_by_scripts(live: RunningService) -> None:
    for path in ("/", "/console", "/console/app.js", "/console/pages/try.js"):
        directives = policy(live, path)
        assert directives["default-src"] == "'none'"
        assert directives["connect-src"] == "'self'"
        # Of what is written in the page, only these very bytes are run.
        page = live.client.get("/").text
        for name, element in (("script-src", "script"), ("style-src", "style")):
            [written] = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()
            assert directives[name] == f"'self' 'sha256-{digest}'"
        assert directives["require-trusted-types-for"] == "'script'"
        assert directives["trusted-types"] == "'none'"
        assert directives["frame-ancestors"] == "'none'"
        assert "unsafe" not in str(directives)
        headers = live.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", sorted(static_files()))
def test_a_file_is_sent_packed_to_who_takes_that_and_once(live: RunningService, name: str) -> None:
    path = "/" if name == "index.html" else f"/console/{name}"
    stored = static_files()[name]
    plain = live.client.get(path, headers={"Accept-Encoding": "identity"})
    assert plain.content == stored.content
    assert "content-encoding" not in plain.headers
    with live.client.stream("GET", path, headers={"Accept-Encoding": "br, gzip;q=0.5"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) == len(raw)
    assert gzip.decompress(raw) == stored.content
    assert packed.headers["vary"] == "Accept-Encoding"
    # Kept and asked about: the packed bytes have another tag than the plain ones.
    assert packed.headers["cache-control"] == "no-cache"
    assert packed.headers["etag"] != plain.headers["etag"]
    for answer, encoding in ((plain, "gzip;q=0"), (packed, "gzip")):
        ask = {"Accept-Encoding": encoding, "If-None-Match": f'"x", W/{answer.headers["etag"]}'}
        again = live.client.get(path, headers=ask)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/console/",
        "/console/nothing.js",
        "/console/..%2froutes.py",
        "/console/pages/",
        "/console/x/y/z",
        "/console/pages%2ftry.js",
        "/console/%00",
    ],
)
def test_what_is_no_file_of_the_console_is_not_found(live: RunningService, path: str) -> None:
    answer = live.client.get(path, headers={"Authorization": "Bearer k"})
    if path == "/console/pages%2ftry.js":
        # A slash is a slash, however it is written.
        assert answer.text.startswith("//")
        return
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "not_found"


@pytest.mark.slow
def test_the_console_is_there_before_the_service_is_ready(tmp_path: Path) -> None:
    brake = Brake()
    brake.on()
    with serve(tmp_path, load=brake.load, wait=False) as live:
        try:
            # Its warm-up waits at the brake.
            assert live.client.get("/readyz").status_code == 503
            assert live.client.get("/").status_code == 200
            assert live.client.get("/console/app.js").status_code == 200
            assert live.client.post("/", json={"inputs": "x"}).status_code == 503
        finally:
            brake.off()


def test_page_loads_are_not_counted_as_requests_of_the_route_that_predicts(
    live: RunningService,
) -> None:
    key = {"Authorization": "Bearer k"}
    live.client.get("/")
    text = live.client.get("/metrics", headers=key).text
    counted = re.findall(r'idspam_requests_total\{outcome="success",route="([^"]*)"\} (\S+)', text)
    assert float(dict(counted)["/console"]) >= 1
    assert float(dict(counted).get("/", 0)) == 0


def test_the_first_page_is_one_script_with_all_modules_in_it_and_small() -> None:
    """Twenty modules would come in waves of six connections."""
    files = static_files()
    page, script = (files[name].content.decode() for name in ("index.html", "all.js"))
    assert re.findall(r'<script[^>]* src="([^"]*)"', page) == ["console/all.js"]
    assert "stylesheet" not in page
    for name, file in files.items():
        if name.endswith(".js") and "vendor" not in name and name not in ("all.js", "early.js"):
            # As it was written: the comments, too.
            assert file.content.decode().splitlines()[0] in script, name
    assert not re.findall(r"^(?:import|export)\b.*", script, re.MULTILINE)
    assert re.findall(r'import\("([^"]+)"\)', script) == ["./vendor/marked.js"]
    first = ("index.html", "all.js", "icon.svg")
    assert sum(len(files[name].gzipped) for name in first) < FIRST_LOAD_BYTES
