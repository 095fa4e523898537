"""Make the environment of deploy/ray: `python .ci/ray_environment.py FOLDER VENV`.

It has what requirements/ray.txt lists, and takes everything else from VENV: Ray changes no version
of what is there, so torch need not be installed twice. Needs the standard library only.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the message

import sys
from pathlib import Path

import setup

NAME = "ray"
LIST = setup.ROOT / "requirements" / f"{NAME}.txt"


def main(folder: Path, base: Path) -> None:
    setup.check_python()
    ready = folder / "ready"
    made_of = f"{base}\n{LIST.read_text()}"
    if ready.exists() and ready.read_text() == made_of:
        return
    setup.say(f"making {folder}: about 350 MB, under a minute")
    setup.make_environment(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (base_packages,) = base.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(f"{base_packages}\n")
    setup.install(folder, NAME)
    ready.write_text(made_of)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
