"""The decision log: every answer of every protocol, texts only as keyed hashes, never a delay."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.engine.interface import AdapterKey
from service.records import decisions
from service.records.decisions import (
    Decision,
    DecisionLog,
    check_decision_log,
    decision_log,
    input_hash,
)
from service.records.line_file import LineFile
from service.settings import read_settings
from tests.support.http_service import RunningService, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

SECRET = "a secret text"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    log = str(tmp_path / "log")
    with serve(tmp_path / "adapters", DECISION_LOG=log, DEFAULT_ADAPTER="a") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        yield live


@pytest.mark.slow
def test_answers_of_every_protocol_are_recorded_without_their_texts(
    live: RunningService, tmp_path: Path
) -> None:
    client = live.client
    client.headers["X-Request-ID"] = "r-7"
    answer = live.predict(adapter="a", inputs=[SECRET, {"text": SECRET, "text_pair": "b"}])
    oip = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [SECRET]}]}
    for path, body in (
        ("/predict", {"inputs": SECRET}),
        ("/classify", {"model": "a", "input": SECRET}),
        ("/v2/models/a/infer", oip),
    ):
        assert client.post(path, json=body).status_code == 200, path
    log = tmp_path / "log"
    until(lambda: len(records(log)) == 5)
    first, pair, *others = records(log)
    result = answer["results"][0]
    key = (tmp_path / "log.key").read_bytes()
    assert first | {"time": "", "ms": 0} == {
        "time": "",
        "request_id": "r-7",
        "client": "",
        "index": 0,
        "adapter": "a",
        "revision": result["revision"],
        "backbone": "tiny-bert-0",
        "input": input_hash(key, SECRET, None),
        "label": result["label"],
        "score": pytest.approx(result["score"], abs=1e-6),
        "ms": 0,
    }
    assert first["ms"] > 0
    assert pair["index"] == 1
    assert pair["input"] == input_hash(key, SECRET, "b")
    assert {item["input"] for item in others} == {first["input"]}
    assert SECRET not in log.read_text()
    assert (log.stat().st_mode | (tmp_path / "log.key").stat().st_mode) & 0o077 == 0


@pytest.mark.slow
def test_texts_are_written_only_if_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serve(tmp_path / "adapters", DECISION_LOG=str(log), DECISION_LOG_TEXTS="yes") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        live.predict(adapter="a", inputs=SECRET)
    # The end of the service writes what waits.
    (record,) = records(log)
    assert (record["text"], record["text_pair"]) == (SECRET, None)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_fails_no_request_and_is_counted(
    live: RunningService, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.unlink()
    log.mkdir()
    assert live.predict(adapter="a", inputs="x")["results"]
    until(lambda: live.metric("idspam_records_dropped_total", log="decisions") == 1)
    assert live.predict(adapter="a", inputs="x")["results"]


def decision(text: str) -> Decision:
    item: Any = SimpleNamespace(text=text, text_pair=None, key=AdapterKey("a", "0"))
    return decisions.decided("r", "", "b", [item], ["spam"], [0.5], 0.001, abstained={})


def test_what_does_not_fit_the_queue_is_dropped_and_counted(tmp_path: Path) -> None:
    dropped: list[int] = []
    file = LineFile(tmp_path / "log", max_bytes=10**9, kept=1)
    log = DecisionLog(file, lambda: b"k" * 32, texts=False, dropped=dropped.append)
    for _ in range(40):
        log.offer(decision("x" * 2**20))
    log.close()
    written = len(records(tmp_path / "log"))
    assert written + sum(dropped) == 40
    assert 15 <= written < 40


def test_a_text_that_is_not_utf8_is_recorded_with_the_others_of_its_time(tmp_path: Path) -> None:
    dropped: list[int] = []
    file = LineFile(tmp_path / "log", max_bytes=10**9, kept=1)
    log = DecisionLog(file, lambda: b"k" * 32, texts=True, dropped=dropped.append)
    for text in ("one", "\ud800", "two"):
        log.offer(decision(text))
    log.close()
    assert [record["text"] for record in records(tmp_path / "log")] == ["one", "?", "two"]
    assert dropped == []


def test_a_record_that_cannot_be_made_is_dropped_alone(tmp_path: Path) -> None:
    dropped: list[int] = []
    file = LineFile(tmp_path / "log", max_bytes=10**9, kept=1)
    log = DecisionLog(file, lambda: b"k" * 32, texts=True, dropped=dropped.append)
    for text in ("one", "two"):
        log.offer(decision(text))
        log.offer(replace(decision(text), labels=[]))
    log.close()
    assert [record["text"] for record in records(tmp_path / "log")] == ["one", "two"]
    assert sum(dropped) == 2


def test_a_process_starts_while_the_log_cannot_be_opened_and_records_once_it_can(
    tmp_path: Path,
) -> None:
    log = tmp_path / "gone" / "log"
    dropped: list[int] = []
    settings = read_settings({"IDSPAM_DECISION_LOG": str(log)})
    (tmp_path / "gone").write_text("not a folder")
    with pytest.raises(OSError, match="gone"):
        check_decision_log(settings)
    started = decision_log(settings, dropped.append)
    assert started is not None
    started.offer(decision("lost"))
    until(lambda: dropped == [1])
    (tmp_path / "gone").unlink()
    started.offer(decision("kept"))
    started.close()
    key = (tmp_path / "gone" / "log.key").read_bytes()
    assert [record["input"] for record in records(log)] == [input_hash(key, "kept", None)]


def test_old_decisions_are_removed_while_nothing_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for old in (path, path.with_name("log.20200101T000000.000000Z")):
        old.write_text('{"time":"2020-01-01T00:00:00.000+00:00"}\n')
        os.utime(old, (0, 0))
    file = LineFile(path, max_bytes=10**9, kept=1, days=30)
    log = DecisionLog(file, lambda: b"k" * 32, texts=False, dropped=lambda _: None)
    until(lambda: not list(tmp_path.iterdir()))
    log.close()


def test_a_text_that_is_not_utf8_is_hashed_too() -> None:
    hashes = {
        input_hash(b"k", "\ud800", None),
        input_hash(b"k", "a", None),
        input_hash(b"k", "a", ""),
        input_hash(b"k", "", "a"),
        input_hash(b"other", "a", None),
    }
    assert len(hashes) == 5
    assert {len(item) for item in hashes} == {32}
