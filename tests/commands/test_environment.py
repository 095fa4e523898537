"""Where commands find their service: the flag, the clients' variables, the service's own."""

from pathlib import Path

import pytest

from service.client import Client, InvalidCall
from service.client.environment import DEFAULT_URL, from_environment, service_url
from service.client.retry import ONCE
from service.commands.main import main
from tests.support.http_service import serve
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import refused, typed


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, DEFAULT_URL),
        ({"ID_SPAM_URL": " https://a:1/x/ "}, "https://a:1/x"),
        ({"ID_SPAM_URL": "http://a", "IDSPAM_PORT": "9"}, "http://a"),
        ({"ID_SPAM_URL": "", "IDSPAM_PORT": "8123"}, "http://127.0.0.1:8123"),
        ({"IDSPAM_PORT": "8_123"}, "http://127.0.0.1:8123"),
        ({"IDSPAM_PORT": "tcp://10.0.0.1:8000"}, DEFAULT_URL),
        ({"IDSPAM_HOST": "0.0.0.0"}, DEFAULT_URL),
        ({"IDSPAM_HOST": "::"}, DEFAULT_URL),
        ({"IDSPAM_HOST": "::1"}, "http://[::1]:8000"),
        ({"IDSPAM_HOST": "10.1.2.3", "IDSPAM_PORT": "1"}, "http://10.1.2.3:1"),
        ({"IDSPAM_HOST": "localhost", "IDSPAM_TLS_CERT": "c.pem"}, "https://localhost:8000"),
    ],
)
def test_the_address_of_the_environment(environ: dict[str, str], expected: str) -> None:
    assert service_url(None, environ) == expected
    assert service_url("http://flag/", environ) == "http://flag"


@pytest.mark.parametrize("port", ["0", "x", "65536", "-1", "8000000"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(InvalidCall, match=f"IDSPAM_PORT={port} is no port of a service"):
        service_url(None, {"IDSPAM_PORT": port})


def test_a_key_of_the_environment_is_not_sent_to_another_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ID_SPAM_API_KEY", "mine")
    monkeypatch.setenv("ID_SPAM_URL", "http://own:1")
    assert from_environment(None, None, None) == ("http://own:1", "mine", None)
    assert from_environment("http://other", None, None) == ("http://other", None, None)


@pytest.mark.slow
def test_every_client_command_takes_address_and_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, answers = tmp_path / "texts.txt", tmp_path / "answers.jsonl"
    texts.write_text("free\n")
    words = [
        ("predict", str(texts), "--adapter", "a"),
        ("batch", str(texts), str(answers), "--adapter", "a"),
        ("adapters", "list"),
        ("top", "--once", "--interval", "0.1"),
        ("demo", "--seconds", "0.2", "--no-changes", "--patience", "1"),
    ]
    with serve(tmp_path / "adapters", ADMIN_KEYS="k") as running:
        running.client.headers["authorization"] = "Bearer k"
        running.put("a", make_adapter(make_backbone()))
        port = running.url.rpartition(":")[2]
        for each in words:
            done = typed(*each, ID_SPAM_URL=running.url, ID_SPAM_API_KEY="k")
            assert done.returncode == 0, (each, done.stderr)
        for each in words[2:4]:
            done = typed(*each, IDSPAM_PORT=port, ID_SPAM_API_KEY="k")
            assert done.returncode == 0, (each, done.stderr)
        line = refused("adapters", "list", IDSPAM_PORT=port)
        assert "give --api-key, or set ID_SPAM_API_KEY" in line
        monkeypatch.setenv("ID_SPAM_URL", running.url)
        monkeypatch.setenv("ID_SPAM_API_KEY", "k")
        with Client() as client:
            assert [adapter.name for adapter in client.adapters()] == ["a"]


def test_a_service_that_does_not_run_is_said_to_be_started_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ID_SPAM_URL", raising=False)
    monkeypatch.setenv("IDSPAM_PORT", "1")
    # Otherwise it asks for 14 seconds.
    monkeypatch.setattr("service.client.sync.Retries", lambda: ONCE)
    assert main(["adapters", "list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("service: no service answers: http://127.0.0.1:1")
    assert line.endswith(" -m service serve` starts one")
