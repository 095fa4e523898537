"""The packages have generic names: each is imported from this tree, and pyproject lists them."""

import importlib
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from adapters import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", ["adapters", "cli", "service", "train"])
def test_each_package_is_imported_from_this_tree(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ == str(ROOT / name / "__init__.py")


def test_pyproject_packages_what_runs_and_nothing_else() -> None:
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in ROOT.glob("[a-z]*/**/__init__.py")
        if not {"build", "runs"} & {*init.relative_to(ROOT).parts}
    }
    shipped = {name for name in packages if any(fnmatch(name, pattern) for pattern in patterns)}
    assert {name.split(".")[0] for name in packages - shipped} <= {"benchmarks", "chaos", "deploy"}
    assert {"adapters.slots", "service.http.protocols.oip", "train.fit"} <= shipped


def test_every_folder_with_code_is_a_package() -> None:
    folders = {
        path.parent
        for top in ("adapters", "cli", "service", "train")
        for path in (ROOT / top).rglob("*.py")
    }
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_the_project_cannot_be_uploaded_by_mistake() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_everything_that_is_required_is_pinned() -> None:
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    required = [*project["dependencies"], *(item for extra in extras for item in extra)]
    assert not {item.split(">")[0] for item in required} - pinned


def test_the_version_is_the_same_everywhere() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    headings = [line for line in lines if line.startswith("## [") and line != "## [Unreleased]"]
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())
    assert PROJECT["project"]["version"] == __version__ == client["project"]["version"]
    assert headings[0].startswith(f"## [{__version__}]")
