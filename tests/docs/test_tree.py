"""The tree explains itself: packages have docstrings, and tests/ is grouped as they are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOPS = ("adapters", "benchmarks", "chaos", "cli", "service", "train")
PACKAGES = sorted(path.parent for top in TOPS for path in (ROOT / top).rglob("__init__.py"))
# Folders of tests/ without a package of their name, or whose package lies deeper.
OTHERS = {"console", "deploy", "docs", "fuzz", "gpu", "suite", "support"}


def name_of(package: Path) -> str:
    return ".".join(package.relative_to(ROOT).parts)


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_every_package_says_in_two_sentences_what_it_is(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    assert len(re.findall(r"[.?!](?=\s|$)", docstring)) >= 2


@pytest.mark.slow
def test_no_test_file_imports_another() -> None:
    imports = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for module in _imported(node)
        if re.match(r"tests\.(.+\.)?test_", module)
    }
    assert not imports


def test_every_folder_of_tests_is_that_of_a_package() -> None:
    packages = {package.name for package in PACKAGES if len(package.relative_to(ROOT).parts) <= 2}
    folders = {path.parent.relative_to(TESTS).parts for path in TESTS.rglob("test_*.py")}
    assert all(len(parts) >= 1 for parts in folders), "a test lies in no folder"
    assert {parts[0] for parts in folders} - OTHERS <= packages


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []
