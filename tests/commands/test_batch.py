"""`python -m service batch`, as processes that are killed and as a call, over real services."""

import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.client import Input, Result
from service.client.types import Score
from service.commands.batch import SOME_FAILED
from service.commands.journal import COLUMNS, FORMATS, open_journal
from service.commands.main import main
from service.commands.reading import Record
from tests.support.cut_off import CutOff
from tests.support.http_service import RunningService, serve
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("a", make_adapter(make_backbone(), labels=("ham", "spam")))
        yield running


@pytest.fixture
def batch(live: RunningService, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command on two URLs of one service; its code and what it printed to stderr."""

    def run(
        *arguments: object, urls: Sequence[str] = (live.url, f"{live.url}/")
    ) -> tuple[int, str]:
        flags = [flag for url in urls for flag in ("--url", url)]
        code = main(["batch", *map(str, arguments), *flags])
        return code, capfd.readouterr().err

    return run


def write_inputs(path: Path, number: int) -> list[dict[str, str]]:
    inputs = [{"text": "free win " * (index % 7), "id": str(index)} for index in range(number)]
    path.write_text("".join(json.dumps(line) + "\n" for line in inputs))
    return inputs


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [line["id"] for line in read(path)]


@pytest.mark.slow
def test_every_input_has_its_answer_in_order(batch: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_inputs(source, 2000)
    code, err = batch(source, target, "--adapter", "a", "--top-k", "1")
    assert code == 0, err
    assert "2,000 answers" in err
    assert ids(target) == [str(index) for index in range(2000)]
    assert all(len(line["scores"]) == 1 for line in read(target))
    before = target.read_bytes()
    code, err = batch(source, target, "--adapter", "a")
    assert (code, target.read_bytes()) == (0, before)
    assert "goes on after 2,000 answers" in err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_goes_on_wherever_the_last_one_was_cut(
    batch: Run, tmp_path: Path, form: str, seed: int
) -> None:
    source, target = tmp_path / f"in.{form}", tmp_path / f"out.{form}"
    odd = [f'{index},"x"\n' if index % 3 == 0 else str(index) for index in range(60)]
    rows = [(f"free {index}", id) for index, id in enumerate(odd)]
    if form == "jsonl":
        lines = [json.dumps({"text": text, "id": id}) + "\n" for text, id in rows]
        source.write_text("".join(lines))
    elif form == "csv":
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "id"), *rows])
    else:
        cells = [("text", "id"), *((text, id.strip()) for text, id in rows)]
        source.write_text("".join("\t".join(row) + "\n" for row in cells))
    assert batch(source, target, "--adapter", "a")[0] == 0
    whole = target.read_bytes()
    assert whole.count(b"\n") >= 60
    rng = random.Random(seed)
    for cut in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))]:
        target.write_bytes(whole[:cut])
        code, err = batch(source, target, "--adapter", "a")
        assert code == 0, err
        assert _plain(target.read_bytes(), form) == _plain(whole, form)


def _plain(content: bytes, form: str) -> list[Any]:
    """Without scores, which may differ in their last digit with the batch."""
    if form == "jsonl":
        return [(line["id"], line["label"]) for line in map(json.loads, content.splitlines())]
    delimiter = "," if form == "csv" else "\t"
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""), delimiter=delimiter)
    return [(row["line"], row["id"], row["label"]) for row in rows]


@pytest.mark.slow
def test_a_run_that_is_killed_loses_and_repeats_nothing(
    live: RunningService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_inputs(source, 20_000)
    command = [sys.executable, "-m", "service", "batch", str(source), str(target)]
    command += ["--adapter", "a", "--url", live.url]
    kills = 0
    for _ in range(20):
        with subprocess.Popen(command, cwd=TREE, stderr=subprocess.DEVNULL) as process:
            before = target.stat().st_size if target.exists() else 0
            while process.poll() is None:
                grown = target.stat().st_size - before if target.exists() else 0
                if kills < 3 and grown > 400_000:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        if process.returncode == 0:
            break
    assert kills == 3
    assert ids(target) == [str(index) for index in range(20_000)]


@pytest.mark.slow
def test_other_replicas_go_on_for_one_that_fails(
    live: RunningService, batch: Run, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_inputs(source, 3000)
    with CutOff(live.url, every=30_000) as failing:
        urls = (failing.url, "http://127.0.0.1:9", live.url)
        code, err = batch(source, target, "--adapter", "a", urls=urls)
        assert failing.cuts > 0
    assert code == 0, err
    assert "http://127.0.0.1:9" in err
    assert ids(target) == [str(index) for index in range(3000)]


def test_bad_lines_have_errors_in_their_place(batch: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ['{"text": "x", "id": "1"}', "{", "", '{"text": 3}', '{"text": "x", "adapter": "no"}']
    source.write_text("\n".join([*lines, '"last"']))
    code, err = batch(source, target, "--adapter", "a")
    assert code == SOME_FAILED
    assert "5 answers, 3 of them without a result" in err
    answers = read(target)
    assert [(line.get("line"), line.get("error", {}).get("type")) for line in answers] == [
        (None, None),
        (2, "malformed_request"),
        (4, "malformed_request"),
        (5, "adapter_not_found"),
        (None, None),
    ]
    # The second run counts them, too.
    assert batch(source, target, "--adapter", "a")[0] == SOME_FAILED


def test_other_fields_and_compressed_inputs_are_read(batch: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    lines = [{"message": "free", "answer": "win", "label": 3}, {"message": "", "answer": ""}]
    with gzip.open(source, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    fields = ("--text-field", "message", "--text-pair-field", "answer")
    code, err = batch(source, target, "--adapter", "a", *fields)
    assert code == 0, err
    assert [line["tokens"] for line in read(target)] == [5, 3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("IN", "OUT", "--adapter", "none"), "none"),
        (("IN", "OUT"), "line 1: the text names no adapter, and there is no --adapter"),
        (("no.jsonl", "OUT", "--adapter", "a"), "no.jsonl: cannot be read"),
        (("IN", "IN", "--adapter", "a"), "this is the file that is read"),
        (("IN", "out.jsonl.gz", "--adapter", "a"), "not compressed"),
        (("IN", "no/out.jsonl", "--adapter", "a"), "No such file"),
        (("in.txt", "OUT"), "plain text names no adapter"),
        (("IN", "OTHER", "--adapter", "a"), "its id is 'x', but line 1 of the input has '0'"),
        (("IN", "LONG", "--adapter", "a"), "more answers than there are inputs"),
        (("IN", "JUNK", "--adapter", "a"), "answer 1: this is no answer"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    batch: Run, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    names = ("IN", "OUT", "OTHER", "LONG", "JUNK")
    files = {name: tmp_path / f"{name.lower()}.jsonl" for name in names}
    write_inputs(files["IN"], 3)
    files["OTHER"].write_text('{"id": "x", "label": "ham"}\n')
    files["LONG"].write_text("".join(f'{{"id": "{index}"}}\n' for index in range(4)))
    files["JUNK"].write_text("junk\n")
    kept = {name: files[name].read_bytes() for name in ("OTHER", "LONG", "JUNK")}
    code, err = batch(*(files.get(argument, argument) for argument in arguments))
    assert code == 2, err
    assert complaint in err.splitlines()[-1]
    assert {name: files[name].read_bytes() for name in kept} == kept


def test_no_service_at_all_is_an_error_at_once(batch: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_inputs(source, 3)
    began = time.monotonic()
    code, err = batch(source, tmp_path / "out", "--adapter", "a", urls=("http://127.0.0.1:9",))
    assert code == 2
    assert "no service answers" in err
    assert time.monotonic() - began < 10


def test_two_runs_do_not_write_to_one_output(batch: Run, tmp_path: Path) -> None:
    import fcntl

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_inputs(source, 3)
    with target.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, err = batch(source, target, "--adapter", "a")
    assert code == 2
    assert "another run writes to it" in err


def piped(live: RunningService, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "service", "batch", "-", "-", "--input-format", "text"]
    return subprocess.Popen(
        [*command, "--adapter", "a", "--url", live.url],
        cwd=TREE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_answers_come_through_a_pipe_while_it_is_open(live: RunningService) -> None:
    with piped(live) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in (b"free win\n", b"\n", b"hello\n"):
            process.stdin.write(text)
            process.stdin.flush()
            assert b'"label"' in process.stdout.readline()
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_table_goes_on_after_any_id_and_after_cells_of_any_length(
    form: str, tmp_path: Path
) -> None:
    rows = FORMATS[form]
    label = "x" * 200_000
    answer = Result('m\r1\n"', "a", "f" * 64, label, 1.0, (Score(label, 1.0),), 3, False)
    content = rows.head + rows.write(answer, 1) + rows.write(answer, 2)
    target = tmp_path / f"out.{form}"
    target.write_bytes(content)
    records = iter([Record(line, 0, Input("x", id=answer.id)) for line in (1, 2, 3)])
    with open_journal(str(target), rows, records, anew=False) as journal:
        assert journal.done == 2
    assert (next(records).line, target.read_bytes()) == (3, content)
    if form == "csv":
        # For every other reader, too.
        table = list(csv.reader(io.StringIO(content.decode(), newline="")))
        assert [row[1] for row in table] == ["id", answer.id, answer.id]


def test_a_pipe_by_name_gets_the_header_of_a_table(batch: Run, tmp_path: Path) -> None:
    source, pipe = tmp_path / "in.txt", tmp_path / "out.csv"
    source.write_text("free win\nhello\n")
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_text)
        assert batch(source, pipe, "--adapter", "a")[0] == 0
        lines = reading.result().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert len(lines) == 3


@pytest.mark.slow
def test_a_closed_pipe_and_an_interrupt_end_it_quietly(live: RunningService) -> None:
    ends: Mapping[str, int] = {"pipe": 141, "interrupt": 130}
    for how, code in ends.items():
        with piped(live) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write(b"free win\n")
            process.stdin.flush()
            process.stdout.readline()
            if how == "pipe":
                process.stdout.close()
                process.stdin.write(b"free win\n" * 100)
                process.stdin.flush()
            else:
                # It waits for a line that does not come.
                os.kill(process.pid, signal.SIGINT)
            assert process.wait(20) == code, how
            assert b"Traceback" not in process.stderr.read()
