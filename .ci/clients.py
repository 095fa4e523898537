"""Make the environment of other projects' clients: `python .ci/clients.py FOLDER`.

Needs the standard library only. They want older versions of what the service itself stands on, so
they get a folder of their own, with exactly what .ci/clients.txt lists.
"""

from __future__ import annotations  # a Python that is too old must get as far as being told so

import subprocess
import sys
import venv
from pathlib import Path

LIST = Path(__file__).resolve().with_name("clients.txt")
MARK = "ready"


def main(folder: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # the Python that was found, not the project's
        _stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=...")
    mark = folder / MARK
    if mark.exists() and mark.read_text() == LIST.read_text():
        return
    _say(f"making {folder}: about 500 MB, about a minute")
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, ImportError):
        _stop("Python's venv module is incomplete (Debian and Ubuntu: install python3.11-venv)")
    # Everything is listed: what pip would choose besides is a mistake in the list.
    _pip(folder, "install", "-qq", "--no-deps", "--requirement", str(LIST))
    _pip(folder, "check")
    mark.write_text(LIST.read_text())


def _pip(folder: Path, *arguments: str) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, *arguments], check=False).returncode:
        _stop("pip failed (see above)")


def _say(line: str) -> None:
    sys.stdout.write(f"clients: {line}\n")
    sys.stdout.flush()


def _stop(line: str) -> None:
    sys.exit(f"clients: {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
