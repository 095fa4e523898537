"""docs/architecture.md names files and functions: every one of them exists."""

import ast
import re
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
PAGE = (TREE / "docs" / "architecture.md").read_text()
# `service/http/predict.py:predict`, `service/engine/engine.py:LocalEngine.predict`
FUNCTIONS = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))
PACKAGES = ("adapters", "cli", "service", "train")


def test_the_page_names_functions() -> None:
    assert len(FUNCTIONS) > 30


@pytest.mark.parametrize(("file", "name"), FUNCTIONS)
def test_every_function_on_the_page_exists(file: str, name: str) -> None:
    body = ast.parse((TREE / file).read_text()).body
    for part in name.split("."):
        matches = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == part
        ]
        assert matches, f"{file} defines no {name}"
        body = matches[0].body


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", PAGE))))
def test_every_path_on_the_page_exists(path: str) -> None:
    assert (TREE / path).exists()


def test_the_page_names_every_package() -> None:
    """A room that is not in the drawing cannot be found."""
    packages = {
        f"{init.parent.relative_to(TREE)}/"
        for top in PACKAGES
        for init in (TREE / top).rglob("__init__.py")
    }
    assert sorted(package for package in packages if f"`{package}`" not in PAGE) == []
