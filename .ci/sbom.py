"""List the packages of an environment as a CycloneDX document: `python .ci/sbom.py FOLDER FILE`.

The tool gets an environment of its own, so that it does not appear in the list. It checks what it
has written against the schema, which takes most of the time; `--no-validate` leaves that out.
"""

from __future__ import annotations  # so that a Python that is too old gets as far as the message

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import setup


def main(folder: Path, output: Path, *options: str) -> None:
    setup.check_python()
    python = folder / "bin" / "python"
    if not python.exists():
        setup.stop(f"{folder}: not an environment")
    with tempfile.TemporaryDirectory() as temporary:
        tools = Path(temporary) / "tools"
        # The pip of this Python fills it.
        venv.create(tools, with_pip=False)
        setup.install(tools, "sbom")
        command = [str(tools / "bin" / "cyclonedx-py"), "environment", *options]
        # The same packages give the same bytes.
        command += ["--output-reproducible", "--output-format", "JSON"]
        command += ["--output-file", str(output), str(python)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        setup.stop(f"cyclonedx-py failed:\n{done.stderr}")
    setup.say(f"wrote {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]), *sys.argv[3:])
