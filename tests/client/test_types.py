"""The clients without a service: their methods, names and imports."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import service.client
from service.client import AsyncClient, Client, InvalidCall

TREE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://x", "http://", "http://[::1", "http://h:x", "http://h/?a=1"]
)
def test_an_invalid_address_is_refused_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidCall, match="no address"):
            kind(url)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "two\nlines"},
        {"api_key": "schlüssel"},
        {"headers": {"x-a": "b\r\nc: d"}},
        {"connections": 0},
        {"seconds": 0},
    ],
)
def test_unusable_options_are_refused_at_once(options: Any) -> None:
    with pytest.raises(InvalidCall):
        Client("http://127.0.0.1:1", **options)


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(kind).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    awaited = methods(AsyncClient)
    awaited["close"] = awaited.pop("aclose")
    assert methods(Client) == awaited
    parameters = [inspect.signature(kind).parameters for kind in (Client, AsyncClient)]
    assert list(parameters[0]) == list(parameters[1])


def test_everything_public_is_listed_in_order() -> None:
    names = service.client.__all__
    assert names == sorted(names)
    assert all(inspect.isclass(getattr(service.client, name)) for name in names)
    # The clients themselves are imported on first use.
    imported = {name for name, value in vars(service.client).items() if inspect.isclass(value)}
    assert imported | {"AsyncClient", "Client"} == set(names)


def test_types_and_errors_do_not_import_httpx() -> None:
    program = "import sys, service.client.types, service.client; print('httpx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_client_needs_no_model_and_no_server() -> None:
    program = (
        "import sys, service.client\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'starlette', 'pydantic',"
        " 'uvicorn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
