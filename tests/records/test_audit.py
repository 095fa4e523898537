"""The audit log: every change has two lines, every refused request one; what cannot be recorded is
not done."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreFull
from adapters.format.files import serialize
from service.access.events import AccessRefused, KeysChanged
from service.errors import AuditFailed
from service.records.audit import AccessRecords, AuditLog
from service.records.line_file import LineFile
from tests.support.hostile_files import join
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.small_disk import fill, small_disk
from tests.support.tiny_models import make_adapter, make_backbone


def data(seed: int, **fields: Any) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed, **fields))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ended(path: Path) -> list[dict[str, Any]]:
    return [record for record in records(path) if record.get("stage") == "ended"]


def log_of(live: RunningService) -> Path:
    return live.adapter_dir / ".audit" / "audit.jsonl"


def test_every_change_is_recorded_with_who_what_and_its_outcome(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        client = live.client
        client.headers["X-Request-ID"] = "r-1"
        one = client.put("/v1/adapters/a", content=data(1)).json()["revision"]
        two = client.put("/v1/adapters/a", content=data(2)).json()["revision"]
        client.put("/v1/adapters/a", content=data(2))
        client.put("/v1/adapters/a", content=b"nonsense")
        client.put("/v1/adapters/a", content=data(3, labels=("x", "y")))
        client.post("/v1/adapters/a/rollback", json={})
        client.delete(f"/v1/adapters/a/revisions/{two}")
        client.delete(f"/v1/adapters/a/revisions/{one}")
        client.post("/v2/repository/models/a/unload")
        client.post("/v2/repository/models/a/load")
        client.delete("/v1/adapters/a")
        client.delete("/v1/adapters/a")
        lines = records(log_of(live))
    assert log_of(live).stat().st_mode & 0o777 == 0o600
    assert {line["request_id"] for line in lines} == {"r-1"}
    assert {line["address"] for line in lines} == {"127.0.0.1"}
    assert {line["adapter"] for line in lines} == {"a"}
    told = [
        (line["event"], line["outcome"], line["old"], line["new"], line["removed"])
        for line in lines
        if line["stage"] == "ended"
    ]
    assert told == [
        ("adapter.publish", "done", None, one, []),
        ("adapter.publish", "done", one, two, []),
        ("adapter.publish", "unchanged", two, two, []),
        ("adapter.publish", "refused", None, two, []),
        ("adapter.publish", "refused", two, two, []),
        ("adapter.rollback", "done", two, one, []),
        ("adapter.delete_revision", "done", one, one, [two]),
        ("adapter.delete_revision", "refused", one, one, []),
        ("adapter.unload", "done", one, one, []),
        ("adapter.reload", "done", one, one, []),
        ("adapter.delete", "done", one, None, [one]),
        ("adapter.delete", "refused", None, None, []),
    ]
    # What was refused as a file never began; all else began before it ended.
    begun = [line["change"] for line in lines if line["stage"] == "begun"]
    done = [line["change"] for line in lines if line["stage"] == "ended"]
    assert len(set(done)) == len(done)
    assert [change for change in done if change in begun] == begun
    assert len(done) - len(begun) == 1
    for change in begun:
        stages = [line["stage"] for line in lines if line["change"] == change]
        assert stages == ["begun", "ended"]


def test_a_change_that_cannot_be_recorded_is_not_made(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serve(tmp_path / "adapters", AUDIT_LOG=str(log)) as live:
        revision = live.put("a", make_adapter(make_backbone(), seed=1))
        log.unlink()
        log.mkdir()
        for response in (
            live.client.put("/v1/adapters/a", content=data(2)),
            live.client.delete("/v1/adapters/a"),
        ):
            assert response.status_code == 503
            assert error_of(response)["type"] == "audit_failed"
        assert live.client.get("/v1/adapters/a").json()["revision"] == revision
        assert live.metric("idspam_audit_failures_total") >= 2
        log.rmdir()
        live.put("a", make_adapter(make_backbone(), seed=2))
        assert [line["outcome"] for line in ended(log)] == ["done"]


def test_on_a_full_disk_deletions_go_on_and_are_recorded_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, serve(disk / "adapters") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        live.put("b", make_adapter(make_backbone(), seed=1))
        log = log_of(live)
        # The rest of the log's last page is room.
        log.write_bytes(log.read_bytes() + b" " * (4095 - log.stat().st_size % 4096) + b"\n")
        fill(disk)
        refused = live.client.post("/v2/repository/models/b/load")
        assert refused.status_code == 507
        assert refused.json()["error"].startswith("the adapter store cannot record the change")
        assert live.client.delete("/v1/adapters/a").status_code == 204
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["event"], last["outcome"]) == ("adapter.delete", "done")


def test_a_log_that_is_off_records_nothing(tmp_path: Path) -> None:
    with serve(tmp_path, AUDIT_LOG="off") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        assert not (tmp_path / ".audit").exists()


def test_the_log_itself_says_what_failed(tmp_path: Path) -> None:
    class Full(LineFile):
        def append(self, lines: bytes, *, sync: bool) -> None:  # noqa: ARG002
            raise OSError(28, "No space left on device")

    file = Full(tmp_path / "log", max_bytes=10, kept=1)
    failures: list[None] = []
    elsewhere = AuditLog(file, failed=lambda: failures.append(None))
    with pytest.raises(AuditFailed, match="No space left"):
        elsewhere.begun("adapter.publish", {})
    assert elsewhere.begun("adapter.delete", {}, makes_room=True)
    with pytest.raises(StoreFull, match="cannot record the change"):
        AuditLog(file, store=tmp_path).begun("adapter.publish", {})
    elsewhere.ended("adapter.publish", "0", {}, "done")
    assert len(failures) == 3


def test_a_file_that_repeats_a_lone_surrogate_is_refused_and_recorded(tmp_path: Path) -> None:
    lone_surrogate = join(r'{"\ud800": 1, "\ud800": 2}', b"")
    with serve(tmp_path) as live:
        response = live.client.put("/v1/adapters/a", content=lone_surrogate)
        assert response.status_code == 422
        assert error_of(response)["details"] == ["header: repeated keys: \\ud800"]
        (line,) = records(log_of(live))
    assert (line["outcome"], line["reason"]) == ("refused", error_of(response)["message"])


def test_what_is_not_utf8_is_recorded_as_a_question_mark(tmp_path: Path) -> None:
    log = AuditLog(LineFile(tmp_path / "log", max_bytes=10**7, kept=1))
    log.ended("adapter.publish", "1", {"adapter": "\ud800"}, "refused", 'says "\udcff" ä')
    (line,) = records(tmp_path / "log")
    assert (line["adapter"], line["reason"]) == ("?", 'says "?" ä')
    assert list(line)[:2] == ["time", "event"]


def refusal(number: int) -> AccessRefused:
    return AccessRefused("unknown_key", "", "k1", "::1", "GET", "/metrics", f"r{number}")


def test_refused_requests_are_recorded_by_a_thread_and_beyond_a_bound_counted(
    tmp_path: Path,
) -> None:
    dropped: list[int] = []
    access = AccessRecords(LineFile(tmp_path / "log", max_bytes=10**7, kept=1), dropped.append)
    for number in range(1500):
        access.listen(refusal(number))
    access.close()
    lines = records(tmp_path / "log-refused")
    assert len(lines) + sum(dropped) == 1500
    assert len(lines) >= 1000
    assert lines[0] | {"time": "", "process": 0} == {
        "time": "",
        "event": "request.refused",
        "reason": "unknown_key",
        "who": "",
        "key_id": "k1",
        "address": "::1",
        "method": "GET",
        "path": "/metrics",
        "request_id": "r0",
        "process": 0,
    }
    assert [line["request_id"] for line in lines[:1000]] == [f"r{n}" for n in range(1000)]


def test_refused_requests_rotate_no_change_away_and_delay_no_record_of_keys(
    tmp_path: Path,
) -> None:
    file = LineFile(tmp_path / "audit.jsonl", max_bytes=4096, kept=2)
    log = AuditLog(file)
    log.ended("adapter.delete", log.begun("adapter.delete", {"who": "a"}), {"who": "a"}, "done")
    dropped: list[int] = []
    for _ in range(3):
        access = AccessRecords(file, dropped.append)
        for number in range(2000):
            access.listen(refusal(number))
        access.listen(KeysChanged("keys", ("b",), (), (), ()))
        access.close()
    assert sum(dropped) > 0
    events = [line["event"] for line in records(file.path)]
    assert events == ["adapter.delete"] * 2 + ["keys.changed"] * 3
    assert len(list(tmp_path.glob("audit-refused.jsonl*"))) == 3


@pytest.mark.slow
def test_a_wrong_key_is_in_the_log_and_is_not_the_key(tmp_path: Path) -> None:
    with serve(tmp_path, API_KEYS="right-key-of-thirty-two-letters-x") as live:
        wrong = {"X-API-Key": "wrong-key-wrong-key-wrong-key-wrong"}
        assert live.client.get("/v1/adapters", headers=wrong).status_code == 401
        log = log_of(live).with_name("audit-refused.jsonl")
        until(lambda: log.exists() and bool(log.read_text()))
        (line,) = records(log)
        assert (line["event"], line["reason"]) == ("request.refused", "unknown_key")
        assert (line["method"], line["path"]) == ("GET", "/v1/adapters")
        assert "wrong-key" not in log.read_text()
