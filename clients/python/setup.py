"""Makes `idspam_client` from service/client, the one source of the client, and packages it.

In a source distribution the package is there already.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
SOURCE = TREE / "service" / "client"
# Below build/, so that nothing of it is ever in the repository.
TARGET = HERE / "build" / "src" / "idspam_client"
NAME = re.compile(r"\bservice\.client\b")


def make_package() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for module in sorted(SOURCE.glob("*.py")):
        (TARGET / module.name).write_text(NAME.sub("idspam_client", module.read_text()))
    (TARGET / "py.typed").touch()
    shutil.copy(TREE / "LICENSE", TARGET / "LICENSE")


if SOURCE.is_dir():
    make_package()
setup(
    packages=["idspam_client"],
    package_dir={"": "build/src"},
    package_data={"idspam_client": ["py.typed", "LICENSE"]},
)
