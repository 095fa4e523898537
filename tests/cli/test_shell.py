"""The shell around commands: exit codes, and one harmless line for every mistake."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.shell import (
    Command,
    CommandFailed,
    NothingChosen,
    exit_code,
    one_line,
    parser_of,
    plain_lines,
)

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def explain(error: Exception) -> str | None:
    return str(error) if isinstance(error, CommandFailed) else None


def test_a_mistake_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = raising(CommandFailed("two\nlines \x1b[31m"))
    assert exit_code(work, explain=explain, prefix="error") == 2
    assert capsys.readouterr().err == "error: two lines ?[31m\n"
    assert one_line("\u202eevil") == "?evil"


def test_an_empty_explanation_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(OSError("x")), explain=lambda _: "", prefix="error") == 2
    assert capsys.readouterr().err == ""


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), explain=explain, prefix="error")


def test_codes_are_those_of_the_work_and_of_signals() -> None:
    assert exit_code(lambda: 1, explain=explain, prefix="error") == 1
    assert exit_code(raising(KeyboardInterrupt()), explain=explain, prefix="error") == 130


def test_a_closed_pipe_is_code_141_and_silent() -> None:
    script = (
        "import sys, time; from cli.shell import exit_code; time.sleep(0.3);"
        "sys.exit(exit_code(lambda: sys.stdout.write('x' * 100_000) and 0,"
        " explain=lambda _: None, prefix='error'))"
    )
    line = f'{sys.executable} -c "{script}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_flags_are_not_abbreviated_at_any_depth() -> None:
    def add(parser: ArgumentParser) -> None:
        actions = parser.add_subparsers(required=True)
        actions.add_parser("deep").add_argument("--long-flag")

    parser = parser_of({"a": Command("help", lambda _: 0, add)}, module="p", description="")
    assert parser.parse_args(["a", "deep", "--long-flag", "x"]).long_flag == "x"
    # The help that is named is that of the command, not the program's.
    own = r"unrecognized arguments: --long x \(see .* -m p a deep --help\)"
    with pytest.raises(CommandFailed, match=own):
        parser.parse_args(["a", "deep", "--long", "x"])


def _listed(columns: int) -> str:
    def add(parser: ArgumentParser) -> None:
        parser.add_subparsers(required=True, metavar="ACTION").add_parser("deep", help="go down")

    long = "what it does, told in more words than a narrow terminal has room for"
    commands = {"fit": Command(long, lambda _: 0), "keys": Command("keys", lambda _: 0, add)}
    parser = parser_of(commands, module="p", description="")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        for words in ([], ["keys"]):
            with pytest.raises(NothingChosen) as caught:
                parser.parse_args(words)
            found.append(f"{caught.value.listing}{caught.value}")
    assert " ".join(found[1].split()).startswith("deep go down which action? (see ")
    assert found[1].endswith(" -m p keys --help)")
    return found[0]


def test_a_program_without_a_command_lists_them_a_line_each() -> None:
    first, second, question = _listed(100).splitlines()
    assert first.startswith("fit   what it does, told in more words")
    assert second == "keys  keys"
    assert question.startswith("which command? (see ")


@pytest.mark.parametrize("columns", [40, 24])
def test_a_list_fits_a_narrow_terminal(columns: int) -> None:
    *lines, _ = _listed(columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(" ".join(lines).split()).startswith("fit what it does, told in more words than")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["service", "train"])
@pytest.mark.parametrize("words", ["", "--help", "nonsense"])
def test_a_reader_that_closes_the_pipe_sees_no_traceback(program: str, words: str) -> None:
    line = f"{sys.executable} -m {program} {words} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode in (0, 2, 141)


def test_a_process_without_standard_output_ends_well() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m service >&- 2>&-"], cwd=ROOT, check=False
    )
    assert done.returncode == 2


def _printed(script: str, encoding: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from cli.shell import exit_code\n{script}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={"PATH": "", "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


WRITE = (
    "sys.exit(exit_code(lambda: sys.stdout.write({text!a}) and 0, "
    "explain=lambda _: None, prefix='error'))"
)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["café €", "日本 🙂", "a\udcffb", "plain"])
def test_output_escapes_what_its_encoding_lacks_and_stays_json(encoding: str, text: str) -> None:
    printed = _printed(WRITE.format(text=json.dumps(text, ensure_ascii=False)), encoding)
    assert json.loads(printed.decode(encoding)) == text


def test_escapes_are_readable() -> None:
    assert _printed(WRITE.format(text="ab é €"), "ascii") == rb"ab \u00e9 \u20ac"


def test_lines_and_tabs_stay_and_nothing_that_a_terminal_obeys() -> None:
    assert plain_lines("# ü 🙂\r\n\ta\u00a0b\x1b[31m\n\n\x07") == "# ü 🙂\n\ta b?[31m\n\n?"
    assert plain_lines("") == ""
