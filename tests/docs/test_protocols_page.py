"""docs/protocols.md: the default backbone answers every request on the page as shown there."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.service_process import TREE, environ, service_process

pytestmark = pytest.mark.slow

PAGE = (TREE / "docs" / "protocols.md").read_text()
EXAMPLES = re.findall(r"```sh\n(curl .*?)```\n\n```json\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("adapters")
    with service_process(environ(Path("all-MiniLM-L6-v2"), folder, ZOO_DIR="tree")) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[1]


def close(answer: Any, shown: Any) -> bool:
    """Equal, except for digits that the page leaves out: it shows scores in bfloat16."""
    match shown:
        case float():
            return bool(abs(answer - shown) < 0.02)
        case list():
            return len(answer) == len(shown) and all(map(close, answer, shown))
        case dict():
            return list(answer) == list(shown) and all(map(close, answer.values(), shown.values()))
        case _:
            return bool(answer == shown)


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("command", "answer"), EXAMPLES)
def test_a_request_is_answered_as_shown(url: str, command: str, answer: str) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    (address,) = (word for word in words if word.startswith("http"))
    body = words[words.index("-d") + 1]
    headers = {"Content-Type": "application/json"}
    response = httpx.post(url + urlsplit(address).path, content=body, headers=headers, timeout=60)
    content = response.json()
    for varying in {"id", "created"} & (content.keys() if isinstance(content, dict) else set()):
        del content[varying]
    assert close(content, json.loads(answer))
