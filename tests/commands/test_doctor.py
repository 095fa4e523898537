"""`doctor`: it finds what keeps a service from starting, says what mends it, and leaves nothing."""

import json
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import StoreUnreachable
from adapters.shared.objects import ObjectStore
from service.commands.diagnosis import CHECKS, findings
from service.settings import read_settings
from tests.support.http_service import serve
from tests.support.service_process import TREE
from tests.support.tiny_models import save_backbone
from tests.support.typed_commands import command, environment, terminal, typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def found(*words: str, **settings: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings by what was looked at."""
    environ: dict[str, Any] = {f"IDSPAM_{key}": value for key, value in settings.items()}
    done = typed("doctor", "--json", *words, **environ)
    by_check: dict[str, list[dict[str, Any]]] = {}
    for item in json.loads(done.stdout):
        by_check.setdefault(item["check"], []).append(item)
    return done.returncode, by_check


def states(check: str, **settings: str) -> list[tuple[str, str, str]]:
    environ = {f"IDSPAM_{key}": value for key, value in settings.items()}
    return [
        (item.state, item.message, item.remedy) for item in findings(check, read_settings(environ))
    ]


@pytest.mark.slow
def test_nothing_is_wrong_with_a_machine_that_can_serve(tmp_path: Path, folder: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, by_check = found(
        BACKBONE=str(folder), ADAPTER_DIR=str(tmp_path / "new"), PORT="0", DEVICE="cpu"
    )
    assert code == 0, by_check
    assert all(item["state"] != "wrong" for items in by_check.values() for item in items)
    (loaded,) = by_check["backbone"]
    assert "layers of width" in loaded["message"]
    assert {"python", "packages", "torch", "device", "dtype", "disk", "address", "clock"} <= {
        *by_check
    }
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_terminal_shows_each_finding_as_it_is_known_at_any_width(tmp_path: Path) -> None:
    for columns in (100, 40):
        with terminal(40, columns) as (end, drawn):
            done = subprocess.run(
                command("doctor", "--quick"),
                cwd=TREE,
                env=environment(IDSPAM_ADAPTER_DIR=str(tmp_path / "x"), IDSPAM_PORT="0"),
                stdout=end,
                stderr=end,
                timeout=60,
                check=False,
            )
        shown = drawn.decode().replace("\r\n", "\n")
        assert done.returncode == 0, shown
        assert "\x1b" not in shown
        assert shown.splitlines()[0].startswith("ok      settings")
        # A path or a command may be longer than the line; words are not cut.
        assert all(len(line) <= columns or " " not in line.strip() for line in shown.splitlines())


@pytest.mark.slow
def test_every_bad_setting_is_a_finding_and_the_others_are_still_looked_at(tmp_path: Path) -> None:
    code, by_check = found("--quick", PORT="x", WORKER="2", ADAPTER_DIR=str(tmp_path), DEVICE="cpu")
    assert code == 1
    assert [item["message"].partition(":")[0] for item in by_check["settings"]] == [
        "IDSPAM_PORT",
        "IDSPAM_WORKER",
    ]
    assert by_check["adapter folder"][0]["state"] == "ok"


def test_a_folder_that_cannot_be_written_and_one_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ((state, message, remedy),) = states("adapter folder", ADAPTER_DIR=str(tmp_path / "file" / "x"))
    assert state == "wrong"
    assert message.endswith(f"{tmp_path / 'file'} is not a folder")
    assert "may write" in remedy
    from adapters.format.ownership import StoreLock

    lock = StoreLock(tmp_path, "service")
    lock.acquire()
    try:
        (state, message, _), _ = states("adapter folder", ADAPTER_DIR=str(tmp_path))
    finally:
        lock.release()
    assert state == "ok"
    assert "used by the service of process " in message


@pytest.mark.slow
def test_a_taken_port_is_wrong_unless_a_service_answers_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.settimeout(0.1)
        port = str(taken.getsockname()[1])
        # Nobody accepts: the service's answer is not waited for longer than a few seconds.
        ((state, message, remedy),) = states("address", PORT=port)
    assert state == "wrong"
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert "IDSPAM_PORT" in remedy
    with serve(tmp_path) as running:
        port = running.url.rpartition(":")[2]
        ((state, message, _),) = states("address", PORT=port)
    assert (state, message) == ("ok", f"127.0.0.1:{port}: a service runs there: ready")


def test_keys_certificates_and_who_may_ask(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    keys.write_text("")
    keys.chmod(0o600)
    ((state, message, remedy),) = states("keys", KEYS_FILE=str(keys))
    assert state == "wrong"
    assert "there are none" in message
    assert " -m service keys create admin --scopes all" in remedy
    keys.write_text("{")
    assert states("keys", KEYS_FILE=str(keys))[0][0] == "wrong"
    assert states("keys")[0][:2] == ("ok", "none; only this machine can ask")
    exposed = states("address", HOST="0.0.0.0", PORT="0")
    assert [state for state, *_ in exposed] == ["ok", "wrong"]
    assert states("certificate", TLS_CERT=str(keys), TLS_KEY=str(keys))[0][0] == "wrong"


def test_a_store_that_cannot_be_reached_and_one_that_can(tmp_path: Path) -> None:
    ((state, message, _),) = states("shared store", ADAPTER_STORE="nosuch://bucket/x")
    assert state == "wrong"
    assert "IDSPAM_ADAPTER_STORE=nosuch://bucket/x" in message
    ((state, message, _),) = states("shared store", ADAPTER_STORE=str(tmp_path / "store"))
    assert state == "ok", message
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", [StoreUnreachable("no answer in time"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["create", "get_all"])
def test_nothing_stays_in_a_store_that_fails(
    tmp_path: Path, method: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(ObjectStore, method)

    def then_fails(store: ObjectStore, *arguments: Any) -> None:
        done(store, *arguments)
        raise fault

    monkeypatch.setattr(ObjectStore, method, lambda *a, **_: then_fails(*a))
    with suppress(KeyboardInterrupt):
        ((state, message, _),) = states("shared store", ADAPTER_STORE=str(tmp_path / "store"))
        assert (state, "no answer in time" in message) == ("wrong", True)
    with pytest.raises(type(fault)):
        ObjectStore(str(tmp_path / "store")).check_conditional()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_device_and_a_backbone_that_are_not_there() -> None:
    assert states("device", DEVICE="cuda:99")[1][::2] == ("wrong", "IDSPAM_DEVICE=auto")
    ((state, message, remedy),) = states("backbone", BACKBONE="/no/such/folder", DEVICE="cpu")
    assert state == "wrong"
    assert message.startswith("IDSPAM_BACKBONE=/no/such/folder: ")
    assert remedy


def test_each_of_several_devices_is_a_finding() -> None:
    both = [each for each in states("device", DEVICE="cpu,cpu") if each[1].startswith("cpu (")]
    assert [state for state, _, _ in both] == ["ok", "ok"]
    missing = states("device", DEVICE="cuda:all")[1]
    assert missing[0] == "wrong" or missing[1].startswith("cuda:0")


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hush@proxy:3128")
    ((state, message, _),) = states("proxies")
    assert state == "ok"
    assert "the hub through the proxy http://proxy:3128 of HTTPS_PROXY" in message
    assert "hush" not in message
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy")
    assert states("proxies")[0][0] == "wrong"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr("service.commands.diagnosis.CHECKS", {**CHECKS, "zoo": broken})
    assert states("zoo") == [("wrong", "cannot be looked at: RuntimeError: out of order", "")]


def test_int8_is_named_with_what_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"architecture": "x86_64", "cpu_name": "Old CPU", "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: old)
    *_, (state, message, remedy) = states("device", DEVICE="cpu", DTYPE="int8")
    assert (state, remedy) == ("wrong", "IDSPAM_DTYPE=auto")
    assert message.startswith("IDSPAM_DTYPE: dtype 'int8': needs a processor with AVX512-VNNI")
    assert message.endswith("Old CPU (x86_64) has AVX2")


def test_float8_is_named_with_what_is_there() -> None:
    *_, (state, message, remedy) = states("device", DEVICE="cpu", DTYPE="float8")
    assert (state, remedy) == ("wrong", "IDSPAM_DTYPE=auto")
    assert message.startswith("IDSPAM_DTYPE: dtype 'float8': needs a GPU with FP8 tensor cores")
    assert "the device is cpu" in message
    assert states("backbone", DEVICE="cpu", DTYPE="float8") == [(state, message, remedy)]
