"""Publishing an adapter file: on the real service, and on servers that are busy or broken."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uvicorn

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, save_adapter
from service.client import Client, NotFound
from service.settings import Settings
from tests.support.broken_server import answer, broken
from tests.support.http_service import make_app
from tests.support.tiny_models import make_adapter, make_backbone
from train.cli import main
from train.commands.push import ATTEMPTS, push
from train.errors import PushError

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


def _revision(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _published(revision: str) -> bytes:
    return answer({"name": "spam", "revision": revision, "created": True, "changed": True})


def _refusal(path: Path, url: str, **more: str) -> str:
    with pytest.raises(PushError) as caught:
        push(path, "spam", url, **more)  # type: ignore[arg-type]  # only texts are passed on
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_an_adapter_is_created_on_a_service_that_is_loading(path: Path, serve: Serve) -> None:
    url = serve()
    notes: list[str] = []
    pushed = push(path, "spam", url + "/", note=notes.append)
    assert (pushed.name, pushed.revision, pushed.outcome) == ("spam", _revision(path), "created")
    assert all("the service is busy (503), trying again in" in note for note in notes)
    with Client(url) as client:
        assert client.predict("free call", "spam")[0].revision == pushed.revision


@pytest.mark.slow
def test_the_command_prints_name_revision_and_outcome(
    path: Path, backbone: Backbone, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve()
    other = path.with_name("y.safetensors")
    save_adapter(other, make_adapter(backbone, seed=7))
    for file, outcome in ((path, "created"), (path, "unchanged"), (other, "replaced")):
        assert main(["push", "--adapter", str(file), "--name", "spam", "--url", url]) == 0
        assert capsys.readouterr().out == f"spam {_revision(file)} {outcome}\n"


@pytest.mark.slow
def test_the_card_beside_the_file_is_sent_unless_told_otherwise(
    path: Path, backbone: Backbone, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(max_upload_bytes=2**20)
    argv = ["push", "--name", "spam", "--url", url, "--adapter"]

    def pushed(*words: str) -> str:
        assert main([*argv, *words]) == 0
        return capsys.readouterr().err.splitlines()[-1]

    def kept() -> str | None:
        with Client(url) as client:
            try:
                return client.card("spam").text
            except NotFound:
                return None

    assert pushed(str(path)).startswith("checking ")
    assert kept() is None
    card = path.with_suffix(".md")
    card.write_text("# Spam ü\n")
    # The same bytes change nothing, but for the card.
    assert pushed(str(path)) == f"with its model card {card} (9 characters)"
    assert kept() == "# Spam ü\n"
    # A new revision has no card before it is given one; the old one keeps its own.
    other = path.with_name("y.safetensors")
    save_adapter(other, make_adapter(backbone, seed=7))
    other.with_suffix(".md").write_text("never sent")
    assert pushed(str(other), "--no-card").startswith("checking ")
    assert kept() is None
    named = path.with_name("named.markdown")
    named.write_text("# Another")
    assert "named.markdown (9 characters)" in pushed(str(other), "--card", str(named))
    assert kept() == "# Another"
    with Client(url) as client:
        assert client.card("spam", _revision(path)).text == "# Spam ü\n"
    # One that just lies there stops nothing; one that is named is meant.
    other.with_suffix(".md").write_bytes(b"\xff")
    assert main([*argv, str(other)]) == 0
    assert "no model card is sent: " in (said := capsys.readouterr().err)
    assert "y.md: not UTF-8" in said
    for content, reason in ((b"\xff", "not UTF-8"), (b"x" * (2**18 + 1), "at most 256 KiB")):
        named.write_bytes(content)
        assert main([*argv, str(path), "--card", str(named)]) == 2
        assert reason in (said := capsys.readouterr().err)
        # Nothing was sent.
        assert "checking" not in said
    assert main([*argv, str(path), "--card", "none.md"]) == 2
    assert "none.md: cannot be read: No such file" in capsys.readouterr().err
    assert main([*argv, str(path), "--card", "none.md", "--no-card"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_card_that_the_service_refuses_is_said_to_be_missing(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older service has no route for cards."""
    card = path.with_suffix(".md")
    card.write_text("# Spam")
    missing = answer(
        {"error": {"type": "not_found", "message": "Not Found", "details": []}}, status="404 Not"
    )
    argv = ["push", "--adapter", str(path), "--name", "spam"]
    with broken(_published(_revision(path)), missing) as server:
        assert main([*argv, "--url", server.url]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(" created\n")
    assert f"published without its model card {card} (6 characters): 404 not_found" in said.err
    with broken(_published(_revision(path)), missing) as server:
        assert main([*argv, "--url", server.url, "--card", str(card)]) == 2
    said = capsys.readouterr()
    assert said.out.endswith(" created\n")
    assert f"is published, but without its model card {card}" in said.err


@pytest.mark.slow
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


@pytest.mark.slow
def test_keys_come_from_the_flag_or_the_environment_and_may_be_refused(
    path: Path,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = serve(api_keys=("user",), admin_keys=("admin",))
    assert "401 unauthorized" in _refusal(path, url)
    assert "give --api-key" in _refusal(path, url, key="wrong")
    assert "403 forbidden" in _refusal(path, url, key="user")
    monkeypatch.setenv("IDSPAM_API_KEY", "admin")
    monkeypatch.setenv("ID_SPAM_API_KEY", "user")
    argv = ["push", "--adapter", str(path), "--name", "spam", "--url", url]
    assert main(argv) == 2
    assert "403 forbidden" in capsys.readouterr().err
    assert main([*argv, "--api-key", "admin"]) == 0


@pytest.mark.slow
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
        "prompt.layer: 5",
    ):
        assert message.count(difference) == 1


@pytest.mark.slow
def test_faults_that_only_the_service_can_find_are_listed(
    path: Path, adapter: Adapter, serve: Serve
) -> None:
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in adapter.tensors.items()}
    save_adapter(path, Adapter(adapter.spec, huge))
    message = _refusal(path, serve())
    assert "422 adapter_invalid" in message
    assert "not finite" in message


@pytest.mark.slow
def test_too_large_a_file_is_refused(path: Path, serve: Serve) -> None:
    assert "413 too_large" in _refusal(path, serve(max_upload_bytes=1024))


def test_a_broken_file_is_refused_locally_and_never_sent(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with broken(answer(b"", "500 Oh")) as server:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InvalidAdapter):
            push(path, "spam", server.url)
        missing = path.parent / "no"
        for file, expected in ((path, "not a valid adapter: "), (missing, f"{missing}: No such")):
            argv = ["push", "--adapter", str(file), "--name", "spam", "--url", server.url]
            assert main(argv) == 2
            out, err = capsys.readouterr()
            assert out == ""
            first, line = err.splitlines()
            assert first.startswith(f"checking {file}, ")
            assert line.startswith(f"error: {expected}")
        assert server.requests == []


@pytest.mark.parametrize("name", ["", "Spam", "a/b", "../x", "-a", "a" * 65, "é"])
def test_an_invalid_name_is_refused_locally(path: Path, name: str) -> None:
    with pytest.raises(PushError, match="expected 1 to 64 of a-z 0-9"):
        push(path, name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:x", "http://[::1"]
)
def test_an_invalid_address_is_refused_in_one_line(path: Path, url: str) -> None:
    assert f"{url!r} is no address: " in _refusal(path, url)


def test_a_key_that_no_header_can_hold_is_refused(path: Path) -> None:
    for key in ("schlüssel", "a\r\nX-Evil: 1"):
        assert "keys and headers must be" in _refusal(path, "http://127.0.0.1:9", key=key)


def test_a_refused_connection_names_the_address(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    message = _refusal(path, url)
    assert f"no service answers: {url}: " in message
    assert "refused" in message


@pytest.mark.slow
def test_a_busy_service_is_retried_after_the_time_that_it_names(path: Path) -> None:
    busy = answer({}, "429 Busy", "Retry-After: 0")
    starting = answer(b"", "503 Starting", "Retry-After: 1")
    notes: list[str] = []
    with broken(busy, starting, _published(_revision(path))) as server:
        started = time.monotonic()
        assert push(path, "spam", server.url, key="k", note=notes.append).outcome == "created"
        assert time.monotonic() - started >= 1.0
        assert server.requests == ["PUT /v1/adapters/spam HTTP/1.1"] * 3
        assert [headers["authorization"] for headers in server.headers] == ["Bearer k"] * 3
        assert server.bodies == [path.read_bytes()] * 3
    assert [note.split(",")[0] for note in notes] == [
        "the service is busy (429)",
        "the service is busy (503)",
    ]


def test_a_service_that_stays_busy_is_given_up(path: Path) -> None:
    error = {"error": {"type": "overloaded", "message": "full", "details": ["a", "b"]}}
    with broken(answer(error, "429 Busy", "Retry-After: 0")) as server:
        assert _refusal(path, server.url).endswith(": 429 overloaded: full; a; b")
        assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (answer(b"<html>hello</html>"), "answered 200, but not as this service does"),
        (answer({"name": "spam", "revision": 7}), "answered 200, but not as this service does"),
        (
            answer(b"nothing", "404 No"),
            "404: nothing; not the service's answer: is this its address, or does a proxy refuse?",
        ),
        (
            answer(b"", "404 No"),
            "404: Not Found; not the service's answer: is this its address, or does a proxy",
        ),
        (answer({"error": "text"}, "404 No"), "404: text; not the service"),
        (
            answer(b"", "301 Moved", "Location: http://elsewhere/"),
            "301: redirected to http://elsewhere/",
        ),
        (answer(["list"], "500 Oh"), '500: ["list"]'),
        (_published("abc"), "revision abc, not this file's"),
        (None, "the connection broke: "),
    ],
)
def test_another_server_is_not_taken_for_the_service(
    path: Path, reply: bytes | None, expected: str
) -> None:
    with broken(reply) as server:
        assert expected in _refusal(path, server.url)
        assert len(server.requests) == 1


def test_push_repeats_nothing_without_reason(path: Path) -> None:
    with broken(answer(b"", "500 Oh")) as server:
        _refusal(path, server.url)
        assert len(server.requests) == 1
