"""Two HTTP workers and an engine process: same answers, and what happens when one dies."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import zmq

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize
from service.access.key_file import write
from service.ipc.protocol import VERSION, Hello, encode
from tests.support.http_service import error_of
from tests.support.key_files import bearer, record
from tests.support.service_process import (
    TEXTS,
    TREE,
    Load,
    ReadyService,
    alone,
    body_of,
    environ,
    ready_service,
    until,
)
from tests.support.tiny_models import make_adapter, make_backbone

# Each test starts processes.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyService]:
    """Shared: every test leaves it ready, even after killing a process."""
    with ready_service(folder, tmp_path_factory.mktemp("s")) as running:
        yield running


def test_every_worker_answers_what_the_texts_alone_get(
    service: ReadyService, saved: Backbone
) -> None:
    adapters = {
        "a": make_adapter(saved, seed=1),
        "b": make_adapter(saved, seed=2, labels=("x", "y", "z"), prompt_length=7),
    }
    with service.clients(2) as clients:
        for name, adapter in adapters.items():
            response = clients[0].put(f"/v1/adapters/{name}", content=serialize(adapter))
            assert response.status_code == 201
        for client in clients:
            inputs = [{"adapter": name, "text": text} for text in TEXTS for name in adapters]
            answer = client.post("/v1/predict", json={"inputs": inputs, "explain": True}).json()
            for sent, result in zip(inputs, answer["results"], strict=True):
                expected = alone(saved, adapters[sent["adapter"]], sent["text"])
                scores = [item["score"] for item in result["scores"]]
                assert scores == pytest.approx(expected, abs=1e-5)
                explained = result["explanation"]
                shares = [item["weight"] for item in explained["words"]]
                assert sum(shares, explained["special_tokens"]["weight"]) == pytest.approx(1)
            listed = client.get("/v1/adapters").json()["adapters"]
            assert [item["name"] for item in listed] == ["a", "b"]
            assert client.get("/v1/adapters/a/file").content == serialize(adapters["a"])
            refused = client.put("/v1/adapters/c", content=b"\x80\x04 a pickle")
            assert error_of(refused)["type"] == "adapter_invalid"
            conflict = client.delete("/v1/adapters/a", headers={"If-Match": '"0"'})
            assert conflict.status_code == 412
        for name in adapters:
            assert clients[1].delete(f"/v1/adapters/{name}").status_code == 204
        assert clients[0].get("/v1/adapters").json()["adapters"] == []


def test_dry_runs_cards_and_events_are_the_same_in_every_worker(
    service: ReadyService, saved: Backbone
) -> None:
    content, other = (serialize(make_adapter(saved, seed=seed)) for seed in (1, 2))
    foreign = serialize(make_adapter(make_backbone(), seed=1))
    path, dry = "/v1/adapters/d", {"dry_run": "true"}
    with service.clients(2) as clients:
        for client in clients:
            report = client.put(path, content=content, params=dry).json()
            assert report["accepted"], report
            assert report["difference"] is None
            assert client.get(path).status_code == 404
        first = clients[0].put(path, content=content).json()["revision"]
        card = clients[1].put(
            f"{path}/card", content="# Ä".encode(), headers={"Content-Type": "text/markdown"}
        )
        assert card.status_code == 204
        for client in clients:
            assert client.get(f"{path}/card").text == "# Ä"
            report = client.put(path, content=other, params=dry).json()
            assert (report["accepted"], report["serving"]) == (True, first)
            assert report["adapter"]["revision"] == hashlib.sha256(other).hexdigest()
            refused = client.put(path, content=foreign, params=dry).json()
            assert refused["error"]["type"] == "adapter_incompatible"
            # The spec of a file that does not fit came through the socket as well.
            assert refused["adapter"]["backbone"] == "tiny-bert-0"
            assert refused["difference"]["fields"]
            broken = client.put(path, content=b"junk", params=dry).json()
            assert broken["error"] | {"status": 422} == broken["error"]
            assert (broken["adapter"]["spec"], broken["difference"]) == (None, None)
            shown = client.get(path).json()
            assert shown["revisions"] == [first]
            assert [event["what"] for event in shown["events"]] == ["publish"]
            assert [item["revision"] for item in shown["versions"]] == [first]
        assert not list((service.adapter_dir / ".uploads").iterdir())
        assert clients[0].delete(path).status_code == 204


def test_some_of_the_metrics_come_from_the_supervisor_alone(service: ReadyService) -> None:
    names = ["idspam_batch_rows", "idspam_processes", "no_such_metric"]
    with service.clients(2) as clients:
        for client in clients:
            text = client.get("/metrics", params={"name[]": names}).text
            found = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
            assert found - {"idspam_batch_rows_created"} == {
                "idspam_batch_rows",
                "idspam_processes",
            }
            assert client.get("/metrics", params={"name[]": "no_such_metric"}).text.strip() == ""


def test_every_worker_abstains_and_it_is_counted_once(
    service: ReadyService, saved: Backbone
) -> None:
    adapter = make_adapter(saved, seed=1, decision={"abstain_below": 1.0})
    with service.clients(2) as clients:
        assert clients[0].put("/v1/adapters/n", content=serialize(adapter)).status_code == 201
        for client in clients:
            for more, expected in (({}, True), ({"abstain_below": 0}, False)):
                answer = client.post("/v1/predict", json=body_of("n", *TEXTS) | more).json()
                assert [result["abstained"] for result in answer["results"]] == [expected] * 4
        key = ("idspam_abstentions_total", frozenset({("adapter", "n")}))
        until(lambda: service.series().get(key) == 2.0 * len(TEXTS))
        assert clients[1].delete("/v1/adapters/n").status_code == 204


def test_a_division_is_the_same_in_every_worker_and_judged_over_all_of_them(
    service: ReadyService, saved: Backbone
) -> None:
    adapter = make_adapter(saved, seed=1)
    tensors = {
        name: -tensor if name.startswith("head.out") else tensor
        for name, tensor in adapter.tensors.items()
    }
    # The other label for every text.
    opposite = Adapter(adapter.spec, tensors)
    inputs = [f"{text} {number}" for number in range(10) for text in TEXTS]

    def revisions(client: httpx.Client) -> list[str]:
        answer = client.post("/v1/predict", json=body_of("t", *inputs)).json()
        return [result["revision"] for result in answer["results"]]

    with service.clients(2) as clients:
        first = clients[0].put("/v1/adapters/t", content=serialize(adapter)).json()["revision"]
        staged = clients[1].put("/v1/adapters/t?stage=true", content=serialize(opposite))
        second = staged.json()["revision"]
        # More texts than one worker sends.
        rule = {"max_disagreement": 0.5, "min_texts": 50}
        body = {"revision": second[:12], "percent": 50, "rule": rule}
        path = "/v1/adapters/t/traffic"
        assert clients[1].put(path, json=body).status_code == 200
        answers = revisions(clients[0])
        assert set(answers) == {first, second}
        assert revisions(clients[1]) == answers
        until(lambda: clients[0].get(path).json()["figures"]["compared"] > 0)

        def ended() -> bool:
            for client in clients:
                assert set(revisions(client)) <= {first, second}
            return bool(clients[1].get(path).json()["state"] == "ended")

        until(ended)
        for client in clients:
            traffic = client.get(path).json()
            assert traffic["ended"]["cause"] == "disagreement"
            assert traffic["figures"]["disagreements"] >= 50
            assert set(revisions(client)) == {first}
        key = ("idspam_traffic_endings_total", frozenset({("cause", "disagreement")}))
        until(lambda: service.series().get(key) == 1.0)
        # It is what a new engine finds, too.
        assert clients[0].put(path, json=body | {"shadow": True}).status_code == 200
        assert set(revisions(clients[1])) == {first}
        os.kill(service.children()["engine"], signal.SIGKILL)
        until(lambda: clients[0].get(path).status_code == 503)
    with service.clients(2) as clients:
        until(lambda: all(client.get("/readyz").status_code == 200 for client in clients))
        traffic = clients[1].get(path).json()
        assert (traffic["shadow"], traffic["percent"]) == (True, 50.0)
        assert clients[0].delete("/v1/adapters/t").status_code == 204


def test_the_way_in_is_the_same_with_workers(service: ReadyService, saved: Backbone) -> None:
    content = serialize(make_adapter(saved, seed=1))
    revision = hashlib.sha256(content).hexdigest()
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    with service.clients(2) as clients:
        assert clients[0].put("/v1/adapters/w", content=content).status_code == 201
        for client in clients:
            answer = client.post("/v1/predict", json=body_of("w", "win"), headers=offer)
            assert answer.status_code == 200, answer.text
            head = client.head("/v1/adapters/w/file")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(content))
            tags = {"If-None-Match": f'W/"{revision}"'}
            assert client.get("/v1/adapters/w/file", headers=tags).status_code == 304
            assert client.put("/v1/adapters/w", files={"file": content}).status_code == 415
            encoded = {"Content-Encoding": "gzip"}
            refused = client.post("/v1/predict", json=body_of("w", "win"), headers=encoded)
            assert refused.status_code == 415
        # A file that has rotted: found by one worker, refused by both.
        (path,) = (service.adapter_dir / "w").glob("*.safetensors")
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for client in clients:
            response = client.get("/v1/adapters/w/file")
            assert error_of(response)["type"] == "adapter_damaged"
        for client in clients:
            assert client.get("/v1/adapters/w").json()["state"] == "damaged"
            assert client.post("/v1/predict", json=body_of("w", "win")).status_code == 500
        assert clients[1].put("/v1/adapters/w", content=content).status_code == 200
        for client in clients:
            assert client.get("/v1/adapters/w/file").content == content
        assert clients[0].delete("/v1/adapters/w").status_code == 204


# The two adapters have different labels.
PUT_FORCED = "/v1/adapters/s?force=true"


def test_a_put_through_one_worker_is_answered_by_all_at_once_under_load(
    service: ReadyService, saved: Backbone
) -> None:
    adapters = [
        make_adapter(saved, seed=1, labels=("ham", "spam")),
        make_adapter(saved, seed=2, labels=("x", "y", "z"), prompt_length=7),
    ]
    with service.clients(2) as clients:
        revisions = [
            str(clients[0].put(PUT_FORCED, content=serialize(adapter)).json()["revision"])
            for adapter in adapters
        ]
        with Load(service.url, "s") as load:
            for turn in range(40):
                put = clients[turn % 2].put(PUT_FORCED, content=serialize(adapters[turn % 2]))
                assert put.status_code == 200
                for client in clients:
                    result = client.post("/v1/predict", json=body_of("s", "win")).json()
                    assert result["results"][0]["revision"] == revisions[turn % 2]
                    shown = client.get("/v1/adapters/s").json()
                    assert shown["revision"] == revisions[turn % 2]
        clients[0].delete("/v1/adapters/s")
    assert load.errors == []
    assert load.statuses() == {200}
    expected = {
        (revision, index): alone(saved, adapter, text)
        for revision, adapter in zip(revisions, adapters, strict=True)
        for index, text in enumerate(TEXTS)
    }
    for index, _, body in load.answers:
        (result,) = body["results"]
        scores = [item["score"] for item in result["scores"]]
        assert scores == pytest.approx(expected[result["revision"], index], abs=1e-5)
    assert len(load.answers) > 100


def test_metrics_are_the_exact_sums_over_all_workers(
    service: ReadyService, saved: Backbone
) -> None:
    def counted() -> dict[str, float]:
        series = service.series()
        route = frozenset({("route", "/v1/predict")})
        success = route | {("outcome", "success")}
        refused = route | {("outcome", "client_error")}
        labels = [frozenset({("adapter", "m"), ("label", label)}) for label in ("ham", "spam")]
        return {
            "success": series["idspam_requests_total", success],
            "refused": series["idspam_requests_total", refused],
            "seconds": series["idspam_request_seconds_count", route],
            "not found": series[
                "idspam_request_errors_total", frozenset({("type", "adapter_not_found")})
            ],
            "predicted": sum(series["idspam_predictions_total", item] for item in labels),
            "tokenized": series["idspam_tokenize_seconds_count", frozenset()],
            "rows": series["idspam_batch_rows_sum", frozenset()],
            "waits": series["idspam_queue_seconds_count", frozenset()],
        }

    with service.clients(2) as clients:
        data = serialize(make_adapter(saved, seed=1))
        clients[0].put("/v1/adapters/m", content=data)
        time.sleep(0.6)
        before = counted()
        for turn in range(50):
            clients[turn % 2].post("/v1/predict", json=body_of("m", "win", "you", "x"))
        for turn in range(7):
            clients[turn % 2].post("/v1/predict", json=body_of("none", "win"))
        expected = {
            "success": 50,
            "refused": 7,
            "seconds": 57,
            "not found": 7,
            "predicted": 150,
            "tokenized": 50,
            "rows": 150,
            "waits": 150,
        }

        def grown() -> dict[str, float]:
            after = counted()
            return {name: after[name] - before[name] for name in after}

        until(lambda: grown() == expected)
        time.sleep(0.6)
        assert grown() == expected
        assert service.metric("idspam_processes", kind="worker") == 2
        assert service.metric("idspam_tier_adapters", tier="active") >= 1
        for name in ("supervisor", "engine", "standby", "worker-0", "worker-1"):
            assert service.metric("idspam_process_resident_bytes", process=name) > 2**20
            assert service.metric("idspam_process_cpu_seconds_total", process=name) > 0
        clients[1].delete("/v1/adapters/m")
        series = service.series()
        assert not [labels for _, labels in series if ("adapter", "m") in labels]


def test_workers_and_supervisor_hold_no_torch(service: ReadyService) -> None:
    children = service.children()
    for name, pid in {**children, "supervisor": service.process.pid}.items():
        loaded = "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        assert loaded == (name in ("engine", "standby"))
    for module in ("worker_process", "supervisor"):
        code = (
            f"import sys, service.ipc.{module}\n"
            "print({'torch', 'transformers'} & set(sys.modules))"
        )
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=True
        )
        assert ended.stdout == "set()\n"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_workers_port_is_taken_for_everybody_else(
    service: ReadyService, folder: Path, tmp_path: Path, workers: str
) -> None:
    port = service.url.rpartition(":")[2]
    ended = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=TREE,
        env=environ(folder, tmp_path, WORKERS=workers, PORT=port),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"service: cannot listen on 127.0.0.1:{port}: ")


def test_junk_on_the_engines_socket_does_no_harm(service: ReadyService, saved: Backbone) -> None:
    folder = service.folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    before = service.children()
    with httpx.Client(base_url=service.url, timeout=20) as client:
        client.put("/v1/adapters/j", content=serialize(make_adapter(saved, seed=1)))
        with zmq.Context() as context:
            for endpoint in ("engine", "supervisor"):
                socket = context.socket(zmq.DEALER)
                socket.linger = 2000
                socket.connect(f"ipc://{folder}/{endpoint}")
                for frame in (b"", b"junk", encode([Hello(50)])[:-1], b"\x07" + b"\x90", bytes(99)):
                    socket.send_multipart([frame])
                    socket.send_multipart([frame, frame])
                socket.send(bytes([VERSION]) + b"\x80\x04\x95 a pickle")
                socket.send(bytes(300 * 2**20))
                socket.close()
        for _ in range(20):
            assert client.post("/v1/predict", json=body_of("j", "x")).status_code == 200
        assert client.get("/metrics").status_code == 200
        client.delete("/v1/adapters/j")
    assert service.children() == before


def test_a_killed_engine_fails_waiters_at_once_and_comes_back_with_everything(
    service: ReadyService, saved: Backbone
) -> None:
    success = {"route": "/v1/predict", "outcome": "success"}
    with service.clients(2) as clients:
        adapter = make_adapter(saved, seed=1)
        published = clients[0].put("/v1/adapters/k", content=serialize(adapter)).json()
        with Load(service.url, "k") as load:
            until(lambda: len(load.answers) > 50)
            # Events that a process has not sent when it is killed are lost.
            time.sleep(0.6)
            before = service.metric("idspam_requests_total", **success)
            restarts = service.metric("idspam_process_restarts_total", kind="engine")
            killed = service.kill("engine")
            began = time.monotonic()
            refused = clients[1].post("/v1/predict", json=body_of("k", "x"))
            while refused.status_code == 200:
                refused = clients[1].post("/v1/predict", json=body_of("k", "x"))
            assert refused.status_code == 503
            assert error_of(refused)["type"] == "unavailable"
            assert "Retry-After" in refused.headers
            assert time.monotonic() - began < 2
            assert clients[0].get("/healthz").status_code == 200
            until(lambda: service.metric("idspam_processes", kind="engine") == 1)
            for client in clients:
                until(lambda client=client: client.get("/readyz").status_code == 200)  # type: ignore[misc]  # bound now
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen + 50)
        assert load.errors == []
        assert load.statuses() == {200, 503}
        assert load.slowest < 5
        assert {status for _, status, _ in load.answers[-20:]} == {200}
        assert service.children()["engine"] != killed
        assert clients[1].get("/v1/adapters/k").json()["revision"] == published["revision"]
        answer = clients[0].post("/v1/predict", json=body_of("k", TEXTS[0])).json()
        scores = [item["score"] for item in answer["results"][0]["scores"]]
        assert scores == pytest.approx(alone(saved, adapter, TEXTS[0]), abs=1e-5)
        assert service.metric("idspam_requests_total", **success) > before
        assert service.metric("idspam_process_restarts_total", kind="engine") == restarts + 1
        clients[0].delete("/v1/adapters/k")


def test_a_killed_worker_is_replaced_and_the_other_goes_on(
    service: ReadyService, saved: Backbone
) -> None:
    restarts = service.metric("idspam_process_restarts_total", kind="worker")
    with service.clients(2) as clients:
        clients[1].put("/v1/adapters/w", content=serialize(make_adapter(saved, seed=1)))
        killed = service.kill("worker-0")
        for _ in range(50):
            assert clients[1].post("/v1/predict", json=body_of("w", "x")).status_code == 200
        # Changes wait for the dead worker only while its lease could still hold.
        began = time.monotonic()
        put = clients[1].put("/v1/adapters/w", content=serialize(make_adapter(saved, seed=2)))
        assert put.status_code == 200
        assert time.monotonic() - began < 5
        until(lambda: service.children().get("worker-0", killed) != killed)
    with service.clients(2) as clients:
        for client in clients:
            answer = client.post("/v1/predict", json=body_of("w", "x")).json()
            assert answer["results"][0]["revision"] == put.json()["revision"]
        assert service.metric("idspam_process_restarts_total", kind="worker") == restarts + 1
        clients[0].delete("/v1/adapters/w")


def test_keys_quotas_and_changes_of_the_file_hold_in_every_worker(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.jsonl"
    all_, all_token = record("all")
    few, few_token = record("few", requests_per_minute=20)
    write(file, [all_.line(), few.line()])
    with ready_service(folder, tmp_path, KEYS_FILE=str(file)) as running:
        assert httpx.get(f"{running.url}/v1/adapters").status_code == 401
        with running.clients(2) as clients:
            # Whichever worker they reach, twenty in all.
            answers = [
                clients[number % 2].get("/v1/adapters", headers=bearer(few_token)).status_code
                for number in range(30)
            ]
            assert 20 <= answers.count(200) <= 22
            assert answers[-1] == 429
            few.revoked = datetime.now(UTC)
            write(file, [all_.line(), few.line()])
            began = time.monotonic()
            for client in clients:
                until(
                    lambda client=client: (
                        client.get(  # type: ignore[misc]
                            "/v1/adapters", headers=bearer(few_token)
                        ).status_code
                        == 401
                    )
                )
            assert time.monotonic() - began < 10
            file.write_text("{")
            time.sleep(2.5)
            for client in clients:
                assert client.get("/v1/adapters", headers=bearer(all_token)).status_code == 200
            until(lambda: running.log.read_text().count("the keys stay as they were") >= 2)
            scraped = clients[0].get("/metrics", headers=bearer(all_token)).text
            assert 'idspam_access_refusals_total{reason="requests_quota"}' in scraped
