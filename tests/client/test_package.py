"""The client as a package of its own, built from service/client: it needs nothing else of it."""

import ast
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.http_service import serve
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone

PACKAGE = TREE / "clients" / "python"
REQUIRED = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["dependencies"]

PROGRAM = """
import asyncio, sys
from idspam_client import AsyncClient, Client, Input, NotFound, Unanswered

url = sys.argv[1]
with Client(url) as client:
    (result,) = client.predict("free win now", "a")
    streamed = [each.label for each in client.stream(["free", Input("win")], "a")]
    try:
        client.predict("x", "none")
    except NotFound as error:
        assert error.type == "adapter_not_found", error.type

async def ask():
    async with AsyncClient() as client:
        (result,) = await client.predict("free win now", "a")
        names = [adapter.name for adapter in await client.adapters()]
        return result, names, [each.label async for each in client.stream(["free", "win"], "a")]

again, names, streamed_again = asyncio.run(ask())
assert result == again and names == ["a"] and streamed == streamed_again, (result, again, names)
print(result.label, sorted(name for name in ("torch", "numpy", "service") if name in sys.modules))
"""


def test_the_client_imports_what_its_package_requires_and_nothing_else() -> None:
    allowed = {Requirement(line).name for line in REQUIRED} | {"service.client"}
    for module in (TREE / "service" / "client").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            for name in _imported(node):
                top = name.split(".")[0]
                known = top in sys.stdlib_module_names or top in allowed
                assert known or name.startswith("service.client"), f"{module}: {name}"


@pytest.mark.slow
def test_the_wheel_predicts_in_an_environment_that_has_only_what_it_requires(
    tmp_path: Path,
) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    flags = ["--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, *flags, str(PACKAGE)], check=True)
    (wheel,) = tmp_path.glob("idspam_client-*.whl")
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    _install(wheel, packages)
    with serve(tmp_path / "adapters") as running:
        running.put("a", make_adapter(make_backbone()))
        expected = running.predict(adapter="a", inputs="free win now")["results"][0]["label"]
        done = subprocess.run(
            [str(python), "-I", "-c", PROGRAM, running.url],
            cwd=tmp_path,
            env={"ID_SPAM_URL": running.url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.stdout, done.stderr) == (f"{expected} []\n", "")


def _install(wheel: Path, packages: Path) -> None:
    """Unpack the wheel, and link the distributions that it requires, with all that they require."""
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(packages)], check=True)
    (metadata,) = packages.glob("idspam_client-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    prefix = "Requires-Dist: "
    needed = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    assert len(needed) == len(REQUIRED)
    found: set[str] = set()
    while needed:
        requirement = Requirement(needed.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name in found:
            continue
        found.add(requirement.name)
        installed = distribution(requirement.name)
        needed += installed.requires or []
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            source = Path(str(installed.locate_file(top)))
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []
