"""Runs examples of the pages as a reader would, in a folder of their own, and compares what they
print with what the page shows.

`http://127.0.0.1:8000` on the pages is the address of the service that the tests have started.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

import httpx

from tests.support.page_examples import TREE, Block, Kind
from tests.support.warm_python import EPOCHS

SHOWN_PORT = 8000
# Folders of the tree whose files examples name.
_LINKED = ("adapters", "deploy", "docs")
# Pages show scores in bfloat16, the tests run in float32: the bound of docs/exactness.md.
TOLERANCE = 0.02
# Numbers under these keys are other ones every time.
VARYING = {"created", "tokenize", "queue", "inference", "low", "high", "p_value", "since"}
STOPPED_AFTER_SECONDS = 2.0
# For a block to end that has no mark `limit`.
LIMIT_SECONDS = 600.0
READY_SECONDS = 240.0
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_RULES = re.compile(r"[━─═┏┓┗┛┡┩│┃┬┴┼╇╈┳┻╋├┤└┘┌┐╞╡╪]+")


@dataclass(frozen=True, slots=True)
class Ran:
    """What a block has printed: its standard output, and what is on a terminal, and its code."""

    output: str
    errors: str
    code: int


@dataclass
class ExampleShell:
    """A folder with the files of the examples, and a shell in it.

    python: an executable that takes the place of `python` and `.venv/bin/python`. port: of the
    service that is asked. done: commands that have run before on the same files, each with a folder
    of what it wrote and, in `printed`, what it printed: they are not run again. epochs: of
    trainings that do not say how many they have; None: as many as for a reader.
    """

    folder: Path
    python: Path
    port: int
    done: Mapping[str, Path] = field(default_factory=dict)
    epochs: int | None = None
    _services: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        for place in (self.folder / ".venv" / "bin", self.folder / ".bin"):
            place.mkdir(parents=True)
            (place / "python").symlink_to(self.python)
        # Commands name files of the tree, such as deploy/compose.yaml.
        for name in _LINKED:
            (self.folder / name).symlink_to(TREE / name)
        # An answer that is an error fails the example, and is printed all the same.
        (self.folder / ".curlrc").write_text("fail-with-body\n")

    def run(self, block: Block) -> Ran:
        """Run a block to its end; of one that has none, its first seconds."""
        text = self._without_done(self._here(block.text))
        if block.kind is Kind.PROGRAM:
            (self.folder / "example.py").write_text(text)
            text = "python example.py"
        with self._start(text) as running:
            try:
                seconds = float(block.marks.get("limit", LIMIT_SECONDS))
                if "until Ctrl-C" in block.marks:
                    seconds = STOPPED_AFTER_SECONDS
                output, errors = running.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                if "until Ctrl-C" not in block.marks:
                    raise
                os.killpg(running.pid, signal.SIGINT)
                output, errors = running.communicate(timeout=30)
            finally:
                if running.poll() is None:
                    os.killpg(running.pid, signal.SIGKILL)
        return Ran(self._there(output), self._there(errors), running.returncode)

    def serve(self, block: Block, port: int) -> None:
        """Start the service that a block starts; from now on it is the one that is asked."""
        self.port = port
        with (self.folder / "service.log").open("w") as log:
            self._services.append(self._start(self._here(block.text), log, log))

    def stop(self) -> None:
        """End the services that the page has started."""
        for running in self._services:
            os.killpg(running.pid, signal.SIGTERM)
        for running in self._services:
            running.communicate(timeout=60)

    def leave(self) -> None:
        """Take away what this shell has put into the folder beside the files."""
        for name in (".venv", ".bin"):
            shutil.rmtree(self.folder / name)
        for name in _LINKED:
            (self.folder / name).unlink()
        (self.folder / ".state").unlink(missing_ok=True)

    def _without_done(self, text: str) -> str:
        for command, folder in self.done.items():
            line = rf"^(\.venv/bin/)?{re.escape(command)}$"
            instead = f"cp {shlex.quote(str(folder))}/* . && cat printed"
            text = re.sub(line, instead, text, flags=re.MULTILINE)
        return text

    def _here(self, text: str) -> str:
        return text.replace(f"127.0.0.1:{SHOWN_PORT}", f"127.0.0.1:{self.port}")

    def _there(self, text: str) -> str:
        return text.replace(f"127.0.0.1:{self.port}", f"127.0.0.1:{SHOWN_PORT}")

    def _start(
        self, script: str, stdout: int | IO[str] = PIPE, stderr: int | IO[str] = PIPE
    ) -> "subprocess.Popen[str]":
        """A shell that has the variables of the blocks before, and keeps its own for the next."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment = kept | {
            "PATH": f"{self.folder / '.bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(TREE),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
            # Where .curlrc is.
            "CURL_HOME": str(self.folder),
            "IDSPAM_PORT": str(self.port),
            "IDSPAM_DEVICE": "cpu",
            "IDSPAM_DTYPE": "float32",
        }
        if self.epochs is not None:
            environment[EPOCHS] = str(self.epochs)
        before = (
            f"touch .state; . ./.state; export IDSPAM_PORT={self.port}; set -a\n"
            "trap 'export -p > .state' EXIT\n"
        )
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", before + script],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )


def difference(block: Block, printed: str) -> str | None:
    """What a page shows and its example does not print; None if there is no difference."""
    if block.language == "json":
        try:
            shown = json.loads(block.text)
        except ValueError as error:
            return f"the page shows no JSON: {error}"
        return _json_difference(shown, printed)
    lines = [_plain(line) for line in block.text.rstrip().splitlines()]
    actual = [_plain(line) for line in printed.rstrip().splitlines()]
    if _lines_match(lines, actual, vary="numbers vary" in block.marks):
        return None
    return f"shown:\n{block.text}\nprinted:\n{printed}"


def _json_difference(shown: Any, printed: str) -> str | None:
    try:
        actual = json.loads(printed)
    except ValueError:
        return f"not JSON: {printed!r}"
    return next(_differences(actual, shown, "answer"), None)


def _differences(actual: Any, shown: Any, path: str) -> Iterator[str]:
    match shown:
        case dict() if isinstance(actual, dict) and "..." in shown:
            for name in shown.keys() - {"..."}:
                yield from _differences(actual.get(name), shown[name], f"{path}.{name}")
        case dict() if isinstance(actual, dict):
            if list(actual) != list(shown):
                yield f"{path}: fields {list(actual)}, shown {list(shown)}"
                return
            for name in shown:
                if name in VARYING and isinstance(shown[name], int | float):
                    if not isinstance(actual[name], int | float):
                        yield f"{path}.{name}: {actual[name]!r}, shown a number"
                else:
                    yield from _differences(actual[name], shown[name], f"{path}.{name}")
        case list() if isinstance(actual, list) and "..." in shown:
            for number, item in enumerate(shown[: shown.index("...")]):
                yield from _differences(actual[number], item, f"{path}[{number}]")
        case list() if isinstance(actual, list) and len(actual) == len(shown):
            for number, (one, other) in enumerate(zip(actual, shown, strict=True)):
                yield from _differences(one, other, f"{path}[{number}]")
        case float() if isinstance(actual, int | float):
            if not abs(actual - shown) < TOLERANCE:
                yield f"{path}: {actual}, shown {shown}"
        case str() if isinstance(actual, str) and "..." in shown:
            pattern = ".*".join(re.escape(part) for part in shown.split("..."))
            if not re.fullmatch(pattern, actual, re.DOTALL):
                yield f"{path}: {actual!r}, shown {shown!r}"
        case _ if actual != shown or isinstance(actual, bool) != isinstance(shown, bool):
            yield f"{path}: {actual!r}, shown {shown!r}"


def _plain(line: str) -> str:
    """Without the rules of tables, and one space between words."""
    return " ".join(_RULES.sub(" ", line).split())


def _lines_match(shown: Sequence[str], actual: Sequence[str], *, vary: bool) -> bool:
    """Whether the lines are equal; `...` is any number of lines, and blank ones do not count."""
    shown, actual = [line for line in shown if line], [line for line in actual if line]

    def match(left: int, right: int) -> bool:
        if left == len(shown):
            return right == len(actual)
        if shown[left] == "...":
            return any(match(left + 1, later) for later in range(right, len(actual) + 1))
        return (
            right < len(actual)
            and _line_matches(shown[left], actual[right], vary=vary)
            and match(left + 1, right + 1)
        )

    return match(0, 0)


def _line_matches(shown: str, actual: str, *, vary: bool) -> bool:
    if "..." in shown:
        parts = [_pattern(part, vary=vary) for part in shown.split("...")]
        found = re.fullmatch(".*".join(parts), actual)
        numbers = [] if found is None else list(found.groups())
    else:
        found = re.fullmatch(_pattern(shown, vary=vary), actual)
        numbers = [] if found is None else list(found.groups())
    if found is None:
        return False
    expected = [] if vary else _NUMBER.findall(shown)
    return vary or all(map(_close, numbers, expected))


def _pattern(text: str, *, vary: bool) -> str:
    """A pattern of the text in which every number is a group."""
    words = _NUMBER.split(text)
    number = f"(?:{_NUMBER.pattern})" if vary else f"({_NUMBER.pattern})"
    return number.join(re.escape(word) for word in words)


def _close(actual: str, shown: str) -> bool:
    """Whole numbers are equal, others nearly."""
    if "." not in shown:
        return actual == shown
    return abs(float(actual.replace(",", "")) - float(shown.replace(",", ""))) < TOLERANCE


def wait_until_ready(url: str) -> None:
    """Return when the service is ready."""

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"{url}: not ready"
        time.sleep(0.1)
