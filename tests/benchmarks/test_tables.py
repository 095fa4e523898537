"""A set's files and the tables that they become. One real set of short steps serves all tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sets
from benchmarks.__main__ import COMMANDS, main
from benchmarks.page import changed_by_hand, places_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
SHORT = "--backbone tiny --device cpu --dtype float32"
STEPS = {
    "latency": f"latency {SHORT} --calls 5 --sizes 1 2",
    "peers": "peers --python no/such/python",
}
WRITTEN = """# Figures

<!-- table cpu/latency -->

by hand

<!-- end of table cpu/latency -->

Between them.

<!-- table cpu/peers -->
| by hand |
<!-- end of table cpu/peers -->

<!-- new tables of cpu -->
| another table |
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """What a set with a step that fails exits with, and the folder with its files."""
    folder = tmp_path_factory.mktemp("benchmarks")
    stale = folder / "cpu" / "peers.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "SETS", {"cpu": STEPS})
        # It says which code runs where there is no git.
        patch.setenv("BENCH_COMMIT", "0a1b2c3d4e5f")
        return main(["sets", "cpu", "--folder", str(folder)]), folder / "cpu"


@pytest.fixture
def files(whole: tuple[int, Path], tmp_path: Path) -> Path:
    """A copy of the set's files."""
    return Path(shutil.copytree(whole[1], tmp_path / "cpu"))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(WRITTEN)
    return path


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_set_keeps_what_each_step_took_and_fails_if_one_has_no_figures(
    whole: tuple[int, Path],
) -> None:
    code, folder = whole
    assert code == 1
    # A file of an earlier run would be taken for one of this run.
    assert sorted(path.name for path in folder.iterdir()) == ["latency.json", "set.json"]
    figures = content_of(folder / "set.json")["figures"]
    assert figures["latency"]["outcome"] == "done"
    assert figures["latency"]["seconds"] > 0
    assert figures["peers"]["outcome"] == "failed (2)"


@pytest.mark.slow
def test_a_file_says_which_code_and_which_command_gave_its_figures(files: Path) -> None:
    content = content_of(files / "latency.json")
    assert content["command"][:4] == ["python", "-m", "benchmarks", "latency"]
    assert len(content["table"]["rows"]) == len(content["figures"]) == 2
    assert content["commit"]


@pytest.mark.slow
def test_tables_are_written_into_their_places_and_all_else_stays(
    files: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tables", str(files), "--into", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"left as it is: no {files / 'peers.json'}" in said
    assert f"not in the page: no {files / 'engine.json'}" in said
    text = page.read_text()
    content = content_of(files / "latency.json")
    for row in content["table"]["rows"]:
        assert f"| {' | '.join(row)} |" in text
    assert f"`python -m benchmarks latency {SHORT} --calls 5 --sizes 1 2`" in text
    for part in (content["commit"], content["machine"]["cpu"], content["versions"]["torch"]):
        assert part in text
    for name in content["conditions"]:
        assert f"*{name.capitalize()}*" in text
    assert str(files) not in text
    lines, old = text.split("\n"), WRITTEN.split("\n")
    places = places_of(lines)
    assert list(places) == ["cpu/latency", "cpu/peers", "cpu/set"]
    latency, new = places["cpu/latency"], places["cpu/set"]
    # The new table and the empty line after it.
    rest = lines[: latency.first] + lines[latency.last + 1 : new.first] + lines[new.last + 2 :]
    assert rest == old[:2] + old[7:]


@pytest.mark.slow
def test_a_page_is_checked_and_written_once(
    files: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tables", str(files), "--into", str(page)]
    assert main([*command, "--check"]) == 1
    assert page.read_text() == WRITTEN
    assert "not what the files say: cpu/latency, cpu/set" in capsys.readouterr().err
    assert main(command) == 0
    written = page.read_text()
    assert main([*command, "--check"]) == main(command) == 0
    assert page.read_text() == written


@pytest.mark.slow
def test_a_change_by_hand_is_found_with_the_file_and_without_it(
    files: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tables", str(files), "--into", str(page)]
    assert main(command) == 0
    written = page.read_text()
    row = "| latency | "
    page.write_text(written.replace(row, "| Latency | "))
    assert changed_by_hand(page.read_text().split("\n")) == ["cpu/set"]
    assert main([*command, "--check"]) == 1
    assert "cpu/set" in capsys.readouterr().err
    (files / "set.json").unlink()
    assert main(command) == 1
    assert f"{page}: changed by hand: cpu/set" in capsys.readouterr().err
    assert "| Latency | " in page.read_text()


@pytest.mark.slow
def test_a_file_without_a_place_is_named(
    files: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(WRITTEN.replace("<!-- new tables of cpu -->\n", ""))
    assert main(["tables", str(files), "--into", str(page)]) == 1
    error = capsys.readouterr().err
    assert "no place for cpu/set: add a line `<!-- new tables of cpu -->`" in error
    assert places_of(page.read_text().split("\n"))["cpu/latency"].checksum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks command, commit"),
        ('{"title": "latency", "figures": []}', "lacks command, commit"),
    ],
    ids=["cut off", "a list", "of an older version"],
)
def test_a_file_that_no_benchmark_of_today_wrote_is_named_and_changes_nothing(
    files: Path, page: Path, data: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "engine.json").write_text(data)
    assert main(["tables", str(files), "--into", str(page)]) == 2
    assert f"{files / 'engine.json'} {reason}" in capsys.readouterr().err
    assert page.read_text() == WRITTEN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- table cpu/http -->\n", "line 1: the table cpu/http has no end"),
        ("\n<!-- end of table cpu/http -->\n", "line 2: "),
        ("<!-- table cpu/http -->\n<!-- table cpu/swap -->\n", "cpu/http before it has no end"),
        ("<!-- table CPU/http -->\n", "expected `<!-- table SET/STEP -->`"),
        ("<!-- end of table cpu/http, 12 -->\n", "expected `<!-- table SET/STEP -->`"),
        (2 * "<!-- table a/b -->\n<!-- end of table a/b -->\n", "has this table already"),
    ],
    ids=["no end", "no start", "nested", "another name", "half a checksum", "twice"],
)
def test_comments_that_make_no_pair_are_named(
    files: Path, page: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(text)
    assert main(["tables", str(files), "--into", str(page)]) == 2
    error = capsys.readouterr().err
    assert str(page) in error
    assert reason in error
    assert page.read_text() == text


def test_without_files_it_says_what_writes_them(
    tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tables", str(tmp_path / "cpu"), "--into", str(page)]) == 2
    assert "python -m benchmarks sets" in capsys.readouterr().err


@pytest.mark.slow
def test_a_set_that_takes_too_long_is_stopped_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"latency": f"latency {SHORT} --calls 100000", "http": f"http {SHORT}"}
    monkeypatch.setattr(sets, "SETS", {"cpu": steps})
    command = ["sets", "cpu", "--folder", str(tmp_path), "--minutes", "0.02"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "set cpu: 2 steps, at most 0.02 minutes" in error
    assert "stopped after 0.02 minutes, without figures of latency, http" in error
    assert "--only latency http" in error
    figures = content_of(tmp_path / "cpu" / "set.json")["figures"]
    assert figures["latency"]["outcome"] == "stopped: the set's time was over"
    assert figures["http"]["outcome"] == "not run: the set's time was over"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "many", "601"])
def test_minutes_out_of_range_are_refused(minutes: str) -> None:
    with pytest.raises(SystemExit):
        main(["sets", "cpu", "--minutes", minutes])


def test_a_step_that_a_set_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sets", "cpu", "--only", "engin"]) == 2
    assert "set cpu has no step engin; it has engine, " in capsys.readouterr().err


def test_places_in_the_page_are_of_steps_or_commands_and_no_written_table_was_changed() -> None:
    lines = PAGE.read_text().split("\n")
    # A command that no set has is run by itself, and some are run on a lesser processor, too.
    steps = {
        f"{which}/{step}"
        for which, names in sets.SETS.items()
        for step in (*names, *COMMANDS, *(f"{name}-avx2" for name in COMMANDS), sets.OWN)
    }
    assert set(places_of(lines)) <= steps
    assert changed_by_hand(lines) == []
    for which in sets.SETS:
        assert f"<!-- new tables of {which} -->" in lines
