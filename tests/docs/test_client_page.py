"""docs/client.md: its Python runs as shown, and its commands exist."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import ClientError, Retries, errors
from service.client.environment import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE
from service.client.sync import Client
from service.commands.main import parser
from service.commands.reading import MAX_LINE_BYTES
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        for seed, name in enumerate(("sms-spam", "banking77", "sentiment")):
            running.put(name, make_adapter(make_backbone(), seed=seed))
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(5))
def test_the_pages_python_runs(
    live: RunningService, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(blocks("python")) == 5
    program = blocks("python")[number]
    assert DEFAULT_URL in program
    exec(
        compile(program.replace(DEFAULT_URL, live.url), "docs/client.md", "exec"),
        {"__name__": "page"},
    )
    assert capsys.readouterr().out
    assert [item.name for item in live.app.state.service.catalog.entries()] == [
        "banking77",
        "sentiment",
        "sms-spam",
    ]


def test_the_pages_commands_can_be_typed() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(lines) == 17
    for line in lines:
        words = shlex.split(line.partition(" > ")[0].rpartition("| ")[2])
        assert words[:3] == ["python", "-m", "service"]
        assert parser().parse_args(words[3:]).command == words[3]


def test_the_page_says_what_the_code_says() -> None:
    retries = Retries()
    assert f"Retries(attempts={retries.attempts}, seconds={retries.seconds:g})" in PAGE
    assert f"double from {retries.first:g} to {retries.longest:g} seconds" in PAGE
    assert {API_KEY_VARIABLE, URL_VARIABLE} <= set(re.findall(r"\w+", PAGE))
    assert f"more than {MAX_LINE_BYTES // 2**20} MiB" in PAGE
    arguments = inspect.signature(Client).parameters
    assert f"| `seconds` | {arguments['seconds'].default:g} |" in PAGE
    assert f"| `connections` | {arguments['connections'].default} |" in PAGE


def test_the_page_names_every_error() -> None:
    kinds = {
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ClientError)
    }
    assert {name for name in kinds if not re.search(rf"\b{name}\b", PAGE)} == set()
