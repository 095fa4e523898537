"""Every example of every page runs, or its page says why not, and prints what the page prints.

One service with the default backbone and the zoo answers all of them. `make docs-examples` does the
same and trains the tutorial's adapters for thirty tasks, where `make test` has files for three, and
every adapter for all of its epochs, where `make test` trains only that of the README so long.
"""

import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cli.shell import CommandFailed, parser_of
from service.commands.main import parser as service_parser
from tests.support.example_files import ZOO, write_example_files
from tests.support.example_shell import (
    ExampleShell,
    difference,
    wait_until_ready,
)
from tests.support.page_examples import TREE, Block, Kind, blocks_of, count, pages
from tests.support.service_process import environ, service_process
from tests.support.warm_python import warm_python
from train.cli import COMMANDS as TRAIN

ALL = os.environ.get("DOCS_EXAMPLES") == "all"
# Of trainings: enough for what they print and write. The tutorial's adapters also answer.
EPOCHS = {"docs/tutorial.md": 5}
FEW_EPOCHS = 2
# The README's and the quick start's, which is run once.
FIT = "python -m train fit --train docs/examples/tickets.csv --output tickets.safetensors"
WITH_EXAMPLES = [page for page in pages() if any(block.runs for block in blocks_of(page))]


@dataclass(frozen=True)
class Bench:
    """What all examples share: a service, a Python, and their files."""

    url: str
    python: Path
    files: Path
    done: Mapping[str, Path]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def tidy(self) -> None:
        """Serve the zoo and nothing else, as after a start."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            names = {item["name"] for item in client.get("/v1/adapters").json()["adapters"]}
            zoo = {path.stem: path for path in ZOO.glob("*.safetensors")}
            for name in names - zoo.keys():
                client.delete(f"/v1/adapters/{name}").raise_for_status()
            for name, path in zoo.items():
                client.delete(f"/v1/adapters/{name}/traffic")
                answer = client.put(
                    f"/v1/adapters/{name}", params={"force": True}, content=path.read_bytes()
                )
                answer.raise_for_status()
                shown = client.get(f"/v1/adapters/{name}").json()
                for revision in shown["revisions"]:
                    if revision != shown["revision"]:
                        client.delete(f"/v1/adapters/{name}/revisions/{revision}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("examples")
    files = folder / "files"
    files.mkdir()
    write_example_files(files, desks=30 if ALL else 3)
    environment = environ(
        Path("all-MiniLM-L6-v2"), folder / "store", ZOO_DIR="tree", UNCERTAIN_TEXTS="50"
    )
    with (
        warm_python(folder) as python,
        (folder / "service.log").open("w") as log,
        # A pipe that nobody reads would fill up, and the service would wait.
        service_process(environment, stderr=log, python=python) as running,
    ):
        assert running.stdout is not None
        found = re.search(r"http://\S+", running.stdout.readline())
        assert found
        url = found[0]
        shell = ExampleShell(files, python, int(url.rpartition(":")[2]))
        trained = shell.run(Block(TREE / "README.md", 0, "sh", FIT, Kind.COMMANDS, {}))
        assert trained.code == 0, trained.errors
        shell.leave()
        made = folder / "made"
        made.mkdir()
        (made / "printed").write_text(trained.output)
        for path in files.glob("tickets.*"):
            if path.name != "tickets.csv":
                shutil.copy(path, made)
        wait_until_ready(url)
        shutil.copy(files / "tickets.safetensors", files / "task.safetensors")
        yield Bench(url, python, files, {FIT: made})


@pytest.mark.slow
# A page with a dozen trainings takes five minutes beside other tests on a slow processor.
@pytest.mark.timeout(7200 if ALL else 600)
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(TREE)))
def test_the_examples_of_a_page_print_what_it_shows(
    bench: Bench, page: Path, tmp_path: Path
) -> None:
    bench.tidy()
    folder = tmp_path / "here"
    shutil.copytree(bench.files, folder)
    for block in blocks_of(page):
        # What the page makes itself is not there yet.
        for made in re.findall(r"--output (\S+\.safetensors)", block.text) if block.runs else ():
            (folder / made).unlink(missing_ok=True)
            (folder / made).with_suffix(".md").unlink(missing_ok=True)
    epochs = None if ALL else EPOCHS.get(str(page.relative_to(TREE)), FEW_EPOCHS)
    shell = ExampleShell(folder, bench.python, bench.port, bench.done, epochs)
    faults = []
    printed: str | None = None
    try:
        for block in blocks_of(page):
            if block.reason is not None:
                # What it prints is not there to be compared.
                printed = None if block.kind is not Kind.OUTPUT else printed
                continue
            if block.kind is Kind.OUTPUT:
                if printed is not None and (fault := difference(block, printed)) is not None:
                    faults.append(f"{block.place}: {fault}")
            elif "serves" in block.marks:
                shell.serve(block, free_port())
                wait_until_ready(f"http://127.0.0.1:{shell.port}")
            elif block.runs:
                ran = shell.run(block)
                printed = ran.output
                expected = int(block.marks.get("fails", "0"))
                if expected:
                    printed += ran.errors
                if "until Ctrl-C" in block.marks:
                    expected = 130
                if ran.code != expected:
                    faults.append(f"{block.place}: exit code {ran.code}\n{ran.output}{ran.errors}")
    finally:
        shell.stop()
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(TREE)))
def test_every_command_on_a_page_can_be_typed(page: Path) -> None:
    """Also those that no test runs: their flags and targets exist."""
    faults = []
    for block in blocks_of(page):
        if block.kind is not Kind.COMMANDS:
            continue
        for program, words in _typed(block):
            try:
                _check(program, words)
            except (CommandFailed, AssertionError) as error:
                faults.append(f"{block.place}: {shlex.join(words)}: {error}")
    assert not faults, "\n".join(faults)


def test_a_few_blocks_only_are_not_run() -> None:
    counts = count([block for page in pages() for block in blocks_of(page)])
    assert counts["run"] > counts["not run"]


def _typed(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The commands of ours in a block: `service`, `train` or `make`, and their arguments."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        found = re.search(r"(?:^|[ /])(?:python -m (service|train)|(make))( .*)?$", line)
        if found is None or line.lstrip().startswith("#"):
            continue
        arguments = re.split(r"\s[|>&;]+\s?|\s#|\s*\)", (found[3] or "") + " ")[0]
        if "..." in arguments or "$" in arguments:
            continue
        yield found[1] or "make", shlex.split(arguments)


def _check(program: str, words: list[str]) -> None:
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (TREE / "Makefile").read_text(), re.MULTILINE)
        target = next((word for word in words if "=" not in word), "help")
        assert target in targets, f"no target {target}"
    elif program == "train":
        parser_of(TRAIN, module="train", description="").parse_args(words)
    elif words:
        service_parser().parse_args(words)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
