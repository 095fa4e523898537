"""docs/client.md says what the code says: defaults, limits, errors."""

import inspect
import re
from pathlib import Path

from service.client import ClientError, Retries, errors
from service.client.environment import API_KEY_VARIABLE, URL_VARIABLE
from service.client.sync import Client
from service.commands.reading import MAX_LINE_BYTES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()


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
