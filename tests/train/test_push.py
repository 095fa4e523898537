"""Publishing an adapter file: on the real service, and on servers that are busy or broken."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, save_adapter
from service.settings import Settings
from tests.support.http_service import make_app
from tests.support.tiny_models import make_adapter, make_backbone
from train.cli import main
from train.errors import PushError
from train.push import ATTEMPTS, push

Serve = Callable[..., str]


@contextmanager
def _service(store: Path, **changes: object) -> Iterator[str]:
    """The real service with a tiny backbone, still loading when it is handed out."""
    settings = replace(Settings(), device="cpu", zoo_dir=None, adapter_dir=store, **changes)  # type: ignore[arg-type]  # tests name any setting
    app = make_app(settings, make_backbone)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts services, which end with the test."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(_service(tmp_path / "store", **changes))


@pytest.fixture
def path(tmp_path: Path, adapter: Adapter) -> Path:
    """A sound adapter file."""
    file = tmp_path / "x.safetensors"
    save_adapter(file, adapter)
    return file


@dataclass
class Script:
    """Answers in turn, the last one again and again; requests as they came."""

    url: str
    requests: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)


@contextmanager
def _scripted(*answers: tuple[int, Mapping[str, str], bytes]) -> Iterator[Script]:
    """A real HTTP server for answers that the service cannot be brought to give on demand."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:  # the base class finds methods by this name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, content = answers[min(len(script.requests), len(answers) - 1)]
            script.requests.append((self.path, dict(self.headers), body))
            if status == 0:
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: ARG002  # quiet
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        script = Script(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join(timeout=10)


def _revision(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _published(path: Path) -> bytes:
    content = {"name": "spam", "revision": _revision(path), "created": True, "changed": True}
    return json.dumps(content).encode()


def _refusal(path: Path, url: str, **more: str) -> str:
    with pytest.raises(PushError) as caught:
        push(path, "spam", url, **more)  # type: ignore[arg-type]  # only texts are passed on
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_is_created_on_a_service_that_still_loads(path: Path, serve: Serve) -> None:
    url = serve()
    notes: list[str] = []
    pushed = push(path, "spam", url + "/", note=notes.append)
    assert (pushed.name, pushed.revision, pushed.outcome) == ("spam", _revision(path), "created")
    assert all("the service is busy (503), trying again in" in note for note in notes)
    answer = httpx.post(f"{url}/v1/predict", json={"adapter": "spam", "inputs": "free call"})
    assert answer.json()["results"][0]["revision"] == pushed.revision


def test_the_command_prints_name_revision_and_outcome(
    path: Path, backbone: Backbone, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve()
    other = path.with_name("y.safetensors")
    save_adapter(other, make_adapter(backbone, seed=7))
    for file, outcome in ((path, "created"), (path, "unchanged"), (other, "replaced")):
        assert main(["push", "--adapter", str(file), "--name", "spam", "--url", url]) == 0
        assert capsys.readouterr().out == f"spam {_revision(file)} {outcome}\n"


def test_compare_and_swap_refuses_another_current_revision(
    path: Path, backbone: Backbone, serve: Serve
) -> None:
    url = serve()
    other = path.with_name("y.safetensors")
    save_adapter(other, make_adapter(backbone, seed=7))
    assert "412 revision_conflict" in _refusal(path, url, if_match="a" * 64)
    push(path, "spam", url)
    assert "someone else has published since" in _refusal(other, url, if_match=_revision(other))
    assert push(other, "spam", url, if_match=_revision(path)).outcome == "replaced"
    assert push(path, "spam", url, if_match=f'"{_revision(other)}"').outcome == "replaced"


def test_keys_are_asked_for_sent_and_refused(
    path: Path,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = serve(api_keys=("user",), admin_keys=("admin",))
    assert "401 unauthorized" in _refusal(path, url)
    assert "give --api-key" in _refusal(path, url, api_key="wrong")
    assert "403 forbidden" in _refusal(path, url, api_key="user")
    monkeypatch.setenv("IDSPAM_API_KEY", "user")
    argv = ["push", "--adapter", str(path), "--name", "spam", "--url", url]
    assert main(argv) == 2
    assert "403 forbidden" in capsys.readouterr().err
    assert main([*argv, "--api-key", "admin"]) == 0


def test_an_adapter_of_another_backbone_is_refused_with_every_difference(
    tmp_path: Path, serve: Serve
) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(
        path, make_adapter(make_backbone(seed=5, hidden_size=16, layers=6), insertion_layer=5)
    )
    message = _refusal(path, serve())
    assert "409 adapter_incompatible" in message
    for difference in (
        "backbone: trained on 'tiny-bert-5'",
        "hidden_size: 16",
        "insertion_layer: 5",
    ):
        assert message.count(difference) == 1


def test_what_only_the_service_can_find_wrong_is_listed(
    path: Path, adapter: Adapter, serve: Serve
) -> None:
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in adapter.tensors.items()}
    save_adapter(path, Adapter(adapter.spec, huge))
    message = _refusal(path, serve())
    assert "422 adapter_invalid" in message
    assert "not finite" in message


def test_too_large_a_file_is_refused(path: Path, serve: Serve) -> None:
    assert "413 too_large" in _refusal(path, serve(max_upload_bytes=1024))


def test_a_broken_file_is_refused_here_and_never_sent(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _scripted((500, {}, b"")) as script:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InvalidAdapter):
            push(path, "spam", script.url)
        for file, expected in ((path, "not a valid adapter: "), (path.parent / "no", "[Errno 2]")):
            argv = ["push", "--adapter", str(file), "--name", "spam", "--url", script.url]
            assert main(argv) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"error: {expected}")
            assert err.count("\n") == 1
    assert script.requests == []


@pytest.mark.parametrize("name", ["", "Spam", "a/b", "../x", "-a", "a" * 65, "é"])
def test_a_name_that_is_none_is_refused_here(path: Path, name: str) -> None:
    with pytest.raises(PushError, match="expected 1 to 64 of a-z 0-9"):
        push(path, name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:x", "http://[::1"]
)
def test_an_address_that_is_none_is_refused_in_one_line(path: Path, url: str) -> None:
    assert _refusal(path, url).startswith(f"--url {url!r}: ")


def test_a_key_that_no_header_can_hold_is_refused(path: Path) -> None:
    for key in ("schlüssel", "a\r\nX-Evil: 1"):
        assert _refusal(path, "http://127.0.0.1:9", api_key=key).startswith("keys and revisions")


def test_a_refused_connection_names_the_address(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    message = _refusal(path, url)
    assert message.startswith(f"no service answers at {url}/v1/adapters/spam: ")
    assert "refused" in message


def test_a_busy_service_is_asked_again_after_the_time_that_it_names(path: Path) -> None:
    busy = (429, {"Retry-After": "0"}, b"{}")
    notes: list[str] = []
    with _scripted(busy, (503, {"Retry-After": "1"}, b""), (201, {}, _published(path))) as script:
        started = time.monotonic()
        assert push(path, "spam", script.url, api_key="k", note=notes.append).outcome == "created"
        assert time.monotonic() - started >= 1.0
    assert [note.split(",")[0] for note in notes] == [
        "the service is busy (429)",
        "the service is busy (503)",
    ]
    assert len(script.requests) == 3
    for route, headers, body in script.requests:
        assert route == "/v1/adapters/spam"
        assert headers["Authorization"] == "Bearer k"
        assert body == path.read_bytes()


def test_a_service_that_stays_busy_is_given_up(path: Path) -> None:
    error = {"error": {"type": "overloaded", "message": "full", "details": ["a", "b"]}}
    with _scripted((429, {"Retry-After": "0"}, json.dumps(error).encode())) as script:
        assert _refusal(path, script.url).endswith(": 429 overloaded: full; a; b")
    assert len(script.requests) == ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, {}, b"<html>hello</html>"), "answered 200, but not as this service does"),
        ((200, {}, b'{"name": "spam", "revision": 7}'), "answered 200, but not as this service"),
        ((404, {}, b"nothing here"), "404: Not Found; is this the service's address?"),
        ((404, {}, b'{"error": "text"}'), "404: Not Found; is this the service's address?"),
        ((301, {"Location": "http://elsewhere/"}, b""), "301: Moved Permanently"),
        ((500, {}, b'["list"]'), "500: Internal Server Error"),
        ((200, {}, b'{"name": "spam", "revision": "abc"}'), "with revision abc, not this file's"),
        ((0, {}, b""), "did not answer: "),
    ],
)
def test_another_server_is_not_taken_for_the_service(
    path: Path, answer: tuple[int, Mapping[str, str], bytes], expected: str
) -> None:
    with _scripted(answer) as script:
        assert expected in _refusal(path, script.url)


def test_push_asks_for_nothing_twice_without_reason(path: Path) -> None:
    answers: Sequence[tuple[int, Mapping[str, str], bytes]] = [(500, {}, b"")]
    with _scripted(*answers) as script:
        _refusal(path, script.url)
    assert len(script.requests) == 1
