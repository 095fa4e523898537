"""`python -m service COMMAND` as it is typed: real processes, asking a real service."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.client.environment import API_KEY_VARIABLE
from service.commands.main import main
from service.settings import InvalidSettings, Settings, read_settings
from tests.support.broken_server import broken, results
from tests.support.http_service import Brake, RunningService, serve, until
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import command, environment, refused, terminal, typed

LINES = ("free win now", "", "the card is not good", "win " * 2000, "hello")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return path


@pytest.mark.slow
def test_a_file_is_answered_line_by_line_in_order(live: RunningService, texts: Path) -> None:
    done = typed("predict", str(texts), "--adapter", "a", "--url", live.url, "--per-request", "2")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    raw = live.predict(adapter="a", inputs=list(LINES))["results"]
    assert [item["label"] for item in answers] == [item["label"] for item in raw]
    assert [item["truncated"] for item in answers] == [False, False, False, True, False]
    # An empty line is a text of special tokens alone.
    assert answers[1]["tokens"] == 2
    assert set(answers[0]) == set(raw[0])


def test_json_lines_come_from_standard_input_with_adapters_of_their_own(
    live: RunningService,
) -> None:
    lines = ['{"text": "free", "adapter": "b", "id": "1"}', '{"text": "free", "text_pair": "win"}']
    done = typed(
        *(
            "predict",
            "--input-format",
            "jsonl",
            "--adapter",
            "a",
            "--url",
            live.url,
            "--top-k",
            "1",
        ),
        "--explain",
        stdin="\n".join(lines),
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(item["adapter"], item["id"]) for item in answers] == [("b", "1"), ("a", None)]
    assert all(len(item["scores"]) == 1 and item["explanation"] for item in answers)


@pytest.mark.slow
def test_texts_before_a_bad_line_are_answered_and_the_line_is_named(
    live: RunningService, tmp_path: Path
) -> None:
    path, output = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    path.write_text('"fine"\n' * 30 + '{"text": 7}\n' + '"fine"\n')
    line = refused(
        *("predict", str(path), "--adapter", "a", "--url", live.url, "--output", str(output)),
        *("--per-request", "8"),
    )
    assert f"{path}, line 31: Expected `str`, got `int`" in line
    assert [json.loads(item)["adapter"] for item in output.read_text().splitlines()] == ["a"] * 30


def test_a_text_that_must_not_be_truncated_is_named_by_its_line(
    live: RunningService, tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text\n"two\nlines"\n' + "fine\n" * 20 + "win " * 500 + "\n")
    line = refused(
        *("predict", str(path), "--adapter", "a", "--url", live.url, "--no-truncate"),
        *("--per-request", "5"),
    )
    assert "422 invalid_request: line 24: 502 tokens" in line


@pytest.mark.slow
def test_mistakes_about_the_service_or_the_files_are_one_line(
    live: RunningService, texts: Path, tmp_path: Path
) -> None:
    file, to = str(texts), ("--url", live.url)
    assert "--adapter is missing" in refused("predict", file, *to)
    assert "no adapter is named 'c'; known: a, b" in refused("predict", file, "--adapter", "c", *to)
    assert "No such file" in refused("predict", "none.txt", "--adapter", "a", *to)
    same = refused("predict", file, "--adapter", "a", *to, "--output", file)
    assert "the file that is read" in same
    nowhere = str(tmp_path / "no" / "x")
    assert nowhere in refused("predict", file, "--adapter", "a", *to, "--output", nowhere)
    began = time.monotonic()
    silent = refused("predict", file, "--adapter", "a", "--url", "http://127.0.0.1:1")
    assert "no service answers: http://127.0.0.1:1" in silent
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["--fast"], "COMMAND"),
        (["predict", "--top-k", "0"], "--top-k"),
        (["predict", "--top-k", "9" * 5000], "--top-k"),
        (["predict", "--retry-seconds", "nan"], "--retry-seconds"),
        (["predict", "a", "b"], "unrecognized arguments: b"),
        (["predict", "-", "--adapter", "a", "--url", "nonsense"], "'nonsense' is no address"),
        (["predict", "-", "--adapter", "a", "--api-key", "ü"], "printable ASCII"),
        (["adapters"], "which action?"),
        (["adapters", "show", "A b"], "adapter name 'A b'"),
        (["adapters", "upload", "none.safetensors"], "none.safetensors: cannot be read"),
        (["adapters", "rollback", "a", "--revision", "xyz"], "revision 'xyz'"),
        (["top", "--url", "http://127.0.0.1:1"], "no terminal"),
        (["top", "--once", "--url", "http://127.0.0.1:1"], "no service answers"),
        (["top", "--interval", "0"], "--interval"),
    ],
)
def test_every_mistake_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("service: ")
    assert line.count("\n") == 1
    assert message in line


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("predict", "adapters", "top", "settings", "metrics", "IDSPAM_*"):
        assert name in shown


def test_a_closed_pipe_ends_the_command_quietly(live: RunningService, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("free\n" * 5000)
    words = command("predict", str(path), "--adapter", "a", "--url", live.url)
    with subprocess.Popen(
        words, cwd=TREE, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["adapter"] == "a"
        running.stdout.close()
        assert running.wait(30) == 141
        assert running.stderr is not None
        assert running.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_ends_the_command_at_once_with_whole_lines(tmp_path: Path) -> None:
    brake, output = Brake(), tmp_path / "out.jsonl"
    with serve(tmp_path / "adapters", load=brake.load) as held:
        held.put("a", make_adapter(make_backbone()))
        words = ("predict", "--adapter", "a", "--url", held.url, "--output", str(output))
        with subprocess.Popen(
            command(*words, "--per-request", "1", "--in-flight", "1"),
            cwd=TREE,
            env=environment(),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running:
            assert running.stdin is not None
            running.stdin.write(b"free\n")
            running.stdin.flush()
            # A slow writer: its line is answered before there is another.
            until(lambda: output.exists() and output.read_bytes().endswith(b"\n"))
            brake.on()
            running.stdin.write(b"win\n")
            running.stdin.flush()
            until(lambda: brake.holds)
            running.send_signal(signal.SIGINT)
            assert running.wait(10) == 130
            assert running.stderr is not None
            assert running.stderr.read() == b""
        brake.off()
    assert len(output.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_service_that_goes_away_is_retried_and_then_reported(tmp_path: Path) -> None:
    path, output = tmp_path / "x.txt", tmp_path / "out.jsonl"
    path.write_text("free\n" * 40)
    health = b'{"status": "ok", "reason": null, "details": {}}'
    ready = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(health) + health
    words = ["predict", str(path), "--adapter", "a", "--per-request", "10", "--in-flight", "1"]
    words += ["--output", str(output)]
    with broken(ready, results(10), None, results(10), None, None) as server:
        line = refused(*words, "--url", server.url, "--retry-seconds", "1")
    assert "the connection broke" in line
    assert len(output.read_text().splitlines()) == 20
    with broken(ready, results(10), None, None, results(10)) as server:
        done = typed(*words, "--url", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(output.read_text().splitlines()) == 40


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_keeps_one_line(live: RunningService, tmp_path: Path) -> None:
    path, output = tmp_path / "x.txt", tmp_path / "out.jsonl"
    path.write_text("free win\n" * 3000)
    words = ("predict", str(path), "--adapter", "a", "--url", live.url, "--output", str(output))
    with terminal(24, 100) as (end, drawn):
        done = subprocess.run(
            command(*words), cwd=TREE, env=environment(), stderr=end, timeout=60, check=False
        )
    assert done.returncode == 0
    shown = drawn.decode()
    assert "texts/s" in shown
    assert " left" in shown
    assert "3,000 texts in 0:0" in shown.split("\x1b")[-1]
    assert len(output.read_text().splitlines()) == 3000


@pytest.mark.slow
def test_an_explanation_is_read_on_a_terminal_and_a_program_gets_json(
    live: RunningService, tmp_path: Path
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("free [win] now\x1b[31m!\n")
    words = ("predict", str(path), "--adapter", "a", "--url", live.url, "--explain", "occlusion")
    with terminal(24, 40) as (end, drawn):
        done = subprocess.run(
            command(*words),
            cwd=TREE,
            env=environment(NO_COLOR="1"),
            stdout=end,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    lines = drawn.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 40
    assert "free [win] now\ufffd[31m!" in lines
    assert any(line.startswith("occlusion: what the score loses") for line in lines)
    assert any(line.split()[0] == "win" for line in lines if line.strip())
    assert "\x1b" not in drawn.decode()
    answers = [json.loads(line) for line in typed(*words).stdout.splitlines()]
    kinds = [answer["explanation"]["kind"] for answer in answers]
    assert kinds == ["occlusion"]


def test_a_file_after_explain_is_not_taken_for_a_kind() -> None:
    line = refused("predict", "--explain", "texts.txt", "--adapter", "a")
    assert "expected attention or occlusion; a file goes before --explain" in line


def test_serving_imports_nothing_of_the_commands() -> None:
    program = (
        "import sys, service.__main__\n"
        "print([name for name in sys.modules if name.startswith(('service.c', 'httpx', 'rich'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_flags_are_refused_before_anything_long_is_imported() -> None:
    program = (
        "import sys\nfrom service.commands.main import main\n"
        "main(['predict', '--top-k', 'x'])\n"
        "print([name for name in ('torch', 'httpx', 'rich', 'starlette') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_commands_run_with_the_packages_of_the_client_image() -> None:
    """The image of the demo has httpx, msgspec and rich, and nothing that serves or computes."""
    absent = [
        "fastapi",
        "numpy",
        "prometheus_client",
        "pydantic",
        "starlette",
        "torch",
        "transformers",
        "uvicorn",
    ]
    program = (
        f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\n"
        "from service.__main__ import main\n"
        "sys.exit(main(['demo', '--url', 'http://127.0.0.1:1', '--patience', '0.1']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("service: waited 0.1 s for a service: no service answers")
    assert done.returncode == 2


def test_the_service_ignores_the_key_of_clients() -> None:
    assert read_settings({API_KEY_VARIABLE: "x"}) == Settings()
    with pytest.raises(InvalidSettings, match="IDSPAM_API_KEY"):
        read_settings({"IDSPAM_API_KEY": "x"})
