"""`python -m service keys`: what it writes, what it prints once, and what it refuses."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.access.key_file import read
from service.access.keyring import Keyring
from service.commands.main import main
from tests.support.service_process import TREE
from tests.support.typed_commands import typed


def created(path: Path, name: str, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The token of a new key."""
    assert main(["keys", "create", name, "--file", str(path), *words]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    return shown.out.strip()


def keyring(path: Path) -> Keyring:
    return Keyring({item.key.id: item for item in read(path)})


def test_a_created_key_is_in_the_file_as_a_hash_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.jsonl"
    words = ("--scopes", "predict,adapters:read", "--adapters", "team-*,x", "--weight", "2.5")
    more = ("--expires", "2099-01-31", "--requests-per-minute", "60", "--tokens-per-minute", "9")
    token = created(path, "ci", *words, *more, capsys=capsys)
    assert path.stat().st_mode & 0o777 == 0o600
    assert token.split("_", 2)[2] not in path.read_text()
    key = keyring(path).by_token(token)
    assert key is not None
    assert (key.name, set(key.scopes)) == ("ci", {"predict", "adapters:read"})
    assert (key.adapters, key.weight) == (("team-*", "x"), 2.5)
    assert (key.requests_per_minute, key.tokens_per_minute) == (60, 9)
    assert key.expires == 4073500800.0


def test_a_revoked_key_leaves_its_line_and_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.jsonl"
    old = created(path, "ci", capsys=capsys)
    path.write_text("# ours\n\n" + path.read_text())
    assert main(["keys", "revoke", "ci", "--file", str(path)]) == 0
    assert capsys.readouterr().out.startswith("ci ")
    new = created(path, "ci", "--scopes", "all", capsys=capsys)
    assert path.read_text().startswith("# ours\n\n{")
    was, now = (keyring(path).by_token(token) for token in (old, new))
    assert was is not None
    assert was.revoked is not None
    assert now is not None
    assert now.revoked is None
    assert main(["keys", "list", "--file", str(path), "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["name"] for item in listed] == ["ci", "ci"]
    assert not any("hash" in item for item in listed)
    assert main(["keys", "list", "--file", str(path)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[2] for line in table.splitlines()] == ["state", "revoked", "valid"]
    # By its id, too.
    assert main(["keys", "revoke", now.id, "--file", str(path)]) == 0


def test_a_line_for_the_environment_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "ci", "--line"]) == 0
    token, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["id"] == token.split("_")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create"], "required: name"),
        (["create", "two words"], "name 'two words'"),
        (["create", "a", "--scopes", "write"], "scope 'write': expected some of predict,"),
        (["create", "a", "--scopes", ","], "scopes: none"),
        (["create", "a", "--adapters", "A*"], "adapters: 'A*'"),
        (["create", "a", "--scopes", "all", "--adapters", "x"], "metrics name every adapter"),
        (["create", "a", "--expires", "soon"], "'soon': expected a time"),
        (["create", "a", "--expires", "2001-01-01"], "is over"),
        (["create", "a", "--weight", "0"], "weight 0"),
        (["create", "a", "--weight", "nan"], "weight nan"),
        (["create", "a", "--requests-per-minute", "0"], "requests_per_minute 0"),
        (["create", "a", "--tokens-per-minute", "x"], "'x': expected a whole number"),
        (["create", "taken"], "keys.jsonl: line 1: the name 'taken' is taken"),
        (["revoke", "nobody"], "no key 'nobody' that could be revoked; taken"),
        (["create", "a", "--file", "/nowhere/keys"], "/nowhere: No such file"),
        (["list", "--file", "/nowhere/keys"], "/nowhere/keys: cannot be read"),
    ],
)
def test_every_mistake_is_one_line_and_changes_nothing(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.jsonl"
    created(path, "taken", capsys=capsys)
    before = path.read_bytes()
    assert main(["keys", *words, *([] if "--file" in words else ["--file", str(path)])]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert path.read_bytes() == before


def test_a_file_that_the_service_would_refuse_is_not_added_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text("{\n")
    path.chmod(0o600)
    for words in (["create", "a"], ["list"], ["revoke", "a"]):
        assert main(["keys", *words, "--file", str(path)]) == 2
        assert f"{path}: line 1: " in capsys.readouterr().err
    path.chmod(0o644)
    assert main(["keys", "create", "a", "--file", str(path)]) == 2
    assert "chmod 600" in capsys.readouterr().err


def test_keys_created_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    with ThreadPoolExecutor(4) as pool:
        codes = pool.map(
            lambda number: main(["keys", "create", f"key-{number}", "--file", str(path)]),
            range(20),
        )
    assert set(codes) == {0}
    assert len(read(path)) == 20


def test_the_file_is_named_by_the_services_own_variable(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    done = typed("keys", "create", "ci", IDSPAM_KEYS_FILE=str(path))
    assert (done.returncode, len(done.stdout.split("_", 2))) == (0, 3)
    assert len(read(path)) == 1
    assert "which file? give --file" in typed("keys", "list").stderr


def test_the_commands_need_neither_a_model_nor_a_web_framework(tmp_path: Path) -> None:
    absent = ("fastapi", "numpy", "opentelemetry", "orjson", "prometheus_client", "pydantic")
    program = (
        f"import sys\nfor name in {(*absent, 'starlette', 'torch', 'uvicorn')}:\n"
        "    sys.modules[name] = None\n"
        "from service.__main__ import main\n"
        "for words in (['create', 'a'], ['list'], ['revoke', 'a']):\n"
        "    assert main(['keys', *words]) == 0\n"
    )
    environment = os.environ | {"IDSPAM_KEYS_FILE": str(tmp_path / "keys.jsonl")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TREE, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0
