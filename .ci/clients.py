"""Make the environment of other projects' clients: `python .ci/clients.py FOLDER`.

They want older versions of packages that the service uses, so they get an environment of their own,
with exactly what requirements/other-clients.txt lists. Needs the standard library only.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the message

import sys
from pathlib import Path

import setup

NAME = "other-clients"
LIST = setup.ROOT / "requirements" / f"{NAME}.txt"


def main(folder: Path) -> None:
    setup.check_python()
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == LIST.read_text():
        return
    setup.say(f"making {folder}: about 500 MB, about a minute")
    setup.make_environment(folder)
    # Everything is listed: whatever pip would add is missing from the list.
    setup.install(folder, NAME)
    setup.pip(folder, "check")
    ready.write_text(LIST.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
