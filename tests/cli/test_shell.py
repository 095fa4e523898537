"""The shell around commands: exit codes, and one harmless line for every mistake."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.shell import Command, CommandFailed, exit_code, one_line, parser_of

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

    parser = parser_of({"a": Command("help", lambda _: 0, add)}, prog="p", description="")
    assert parser.parse_args(["a", "deep", "--long-flag", "x"]).long_flag == "x"
    with pytest.raises(CommandFailed, match=r"unrecognized arguments: --long x \(see p"):
        parser.parse_args(["a", "deep", "--long", "x"])


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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["café €", "日本 🙂", "a\udcffb", "plain"])
def test_output_escapes_what_its_encoding_lacks_and_stays_json(encoding: str, text: str) -> None:
    printed = _printed(WRITE.format(text=json.dumps(text, ensure_ascii=False)), encoding)
    assert json.loads(printed.decode(encoding)) == text


def test_escapes_are_readable() -> None:
    assert _printed(WRITE.format(text="ab é €"), "ascii") == rb"ab \u00e9 \u20ac"
