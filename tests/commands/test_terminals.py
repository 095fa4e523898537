"""Output into a closed pipe, on a narrow terminal, and without colours."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.tables import print_table
from tests.support.http_service import RunningService, serve
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import command, environment, terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|4[0-7]|9[0-7]|38|48)[0-9;]*m")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        for name in ("a-long-name-of-an-adapter-for-tickets", "b"):
            running.put(name, make_adapter(make_backbone()))
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts.txt").write_text("free\n" * 3000)
    (folder / "keys.jsonl").write_text("")
    (folder / "keys.jsonl").chmod(0o600)
    return folder


COMMANDS = (
    "predict texts.txt --adapter b",
    "predict texts.txt --adapter b --format csv",
    "batch texts.txt - --adapter b",
    "adapters list",
    "adapters show b",
    "adapters list --json",
    "keys list --file keys.jsonl",
    "top --once --interval 0.1",
    "demo --seconds 0.5 --no-changes",
    "settings",
    "settings --in-force",
    "metrics",
    "doctor --quick",
)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_a_closed_pipe_ends_every_command_quietly(
    live: RunningService, files: Path, words: str
) -> None:
    line = f"{sys.executable} -m service {words} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=files,
        env=environment(PYTHONPATH=str(TREE), ID_SPAM_URL=live.url, IDSPAM_PORT="0"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # What fits into the pipe's buffer was written before it was closed.
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def drawn_at(columns: int, live: RunningService, *words: str, **more: str) -> str:
    with terminal(40, columns) as (end, drawn):
        subprocess.run(
            command(*words),
            cwd=TREE,
            env=environment(ID_SPAM_URL=live.url, **more),
            stdout=end,
            stderr=end,
            timeout=60,
            check=True,
        )
    return drawn.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_forty_columns_show_records_in_place_of_a_table(live: RunningService) -> None:
    wide = ESCAPE.sub("", drawn_at(160, live, "adapters", "list"))
    assert wide.splitlines()[0].split()[:3] == ["name", "state", "revision"]
    narrow = ESCAPE.sub("", drawn_at(40, live, "adapters", "list"))
    lines = narrow.splitlines()
    assert lines[0] == "a-long-name-of-an-adapter-for-tickets"
    assert "  state    ready" in lines
    assert max(map(len, lines)) <= 40
    top = ESCAPE.sub("", drawn_at(40, live, "top", "--once", "--interval", "0.1"))
    assert max(map(len, top.splitlines())) <= 40
    for panel in ("traffic", "latency", "batches", "tiers", "processes"):
        assert any(line.startswith(panel) for line in top.splitlines()), panel
    # What is too wide for a table is said in words, none of which is cut.
    assert "…" not in top
    words = " ".join(top.split())
    assert re.search(r"registered adapters \d+, MiB [\d.]+, loads/s [\d.]+, evictions/s", words)
    # A heading may go over two lines.
    assert re.search(r"restarts of\s*$", top, re.MULTILINE)
    assert "of a core its kind" in words


@pytest.mark.slow
def test_no_color_is_followed(live: RunningService) -> None:
    for words in (("adapters", "list"), ("top", "--once", "--interval", "0.1")):
        assert not COLOUR.search(drawn_at(120, live, *words, NO_COLOR="1"))


def test_control_characters_of_a_table_reach_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(("name", "label"), [("a\x1b[31m", "two\nlines")])
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split() == ["a?[31m", "two", "lines"]
