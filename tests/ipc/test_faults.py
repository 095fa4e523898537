"""An engine or a worker ends or hangs, and junk on the socket: what is noticed, what fails."""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
import zmq

from adapters.backbone.model import Backbone
from adapters.tokenizer import Encoding
from service.engine.interface import AdapterKey, Completion, Entry
from service.engine.observer import Observer
from service.errors import DeadlineExceeded, EngineUnavailable
from service.ipc import remote
from service.ipc.channel import Frames, Outbox
from service.ipc.child import BEAT_SECONDS
from service.ipc.protocol import (
    VERSION,
    Adapter,
    CatalogUpdate,
    EngineDefect,
    Fault,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    InspectDone,
    RequestFailed,
    Retire,
    UnknownWorker,
    encode,
    error_of,
    failed_instead,
)
from service.ipc.remote import Connection, RemoteBackend
from service.ipc.server import GIVE_UP_SECONDS
from tests.support.http_service import Brake
from tests.support.ipc_harness import (
    ANY,
    CODEC,
    MAX_BYTES,
    data,
    engine_with_workers,
    entry,
    receives,
    until,
)

ENTRY = Entry(
    AdapterKey("a", "0" * 64),
    Encoding(np.ones(2, dtype=np.int64), np.zeros(2, dtype=np.int64), False),
    5,
)


async def test_the_engines_end_fails_all_that_wait_at_once(
    tmp_path: Path, backbone: Backbone
) -> None:
    brake = Brake()
    async with engine_with_workers(backbone, tmp_path, load=brake.load) as engine:
        worker = await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        brake.on()
        entries = [entry(worker, "a", "x")] * 2
        tasks = [asyncio.create_task(worker.engine.predict(entries)) for _ in range(5)]
        await until(lambda: brake.holds)
        began = monotonic()
        engine.server.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert monotonic() - began < 1
        brake.off()
        assert {type(item) for item in results} == {EngineUnavailable}
        assert engine.failures.rows == [("unavailable", 10)]
        health = worker.health()
        assert (health.live, health.ready) == (True, False)
        assert health.reason
        with pytest.raises(EngineUnavailable):
            worker.refuse_unless_ready()
        with pytest.raises(EngineUnavailable):
            await worker.engine.predict(entries)
        with pytest.raises(EngineUnavailable):
            await worker.catalog.delete("a", ANY)


@pytest.mark.slow
async def test_a_silent_worker_is_not_waited_for_longer_than_it_may_answer(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        silent = engine.raw_worker()
        silent.send(encode([Hello(77)]))
        await asyncio.sleep(0.2)
        began = monotonic()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        assert GIVE_UP_SECONDS - 0.3 < monotonic() - began < GIVE_UP_SECONDS + 2
        assert await receives(silent, UnknownWorker)
        # And again whenever it sends anything but a new hello.
        silent.send(encode([HeartbeatReply()]))
        assert await receives(silent, UnknownWorker)
        began = monotonic()
        await worker.catalog.publish("a", data(backbone, 2), ANY)
        assert monotonic() - began < GIVE_UP_SECONDS
        silent.close()


@pytest.mark.slow
async def test_what_waited_for_a_stopped_worker_does_not_let_it_answer(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads hundreds of messages before it learns what has changed, heartbeats among them."""
    receive, held, stopped = Connection._receive, list[tuple[Connection, list[bytes]]](), False

    def receive_or_hold(connection: Connection, frames: list[bytes]) -> None:
        if stopped:
            held.append((connection, frames))
        else:
            receive(connection, frames)

    monkeypatch.setattr(Connection, "_receive", receive_or_hold)
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker, catalog = await engine.worker(), engine.local.catalog
        await catalog.publish("a", data(backbone, 1), ANY)
        await engine.server.updated_everywhere()
        old = worker.catalog.resolve("a").key.revision
        stopped = True
        await asyncio.sleep(0.75 * GIVE_UP_SECONDS)
        await catalog.publish("a", data(backbone, 2), ANY)
        await engine.server.updated_everywhere()
        stopped = False
        assert len(held) > GIVE_UP_SECONDS / BEAT_SECONDS
        for connection, frames in held:
            receive(connection, frames)
            if not connection._channels:
                # It has learnt that it was given up.
                break
            current = worker.catalog.resolve("a").key.revision != old
            assert current or not worker.health().ready
        await until(lambda: worker.health().ready)
        assert worker.catalog.resolve("a").key.revision == catalog.entry("a").current


@pytest.mark.slow
async def test_a_worker_that_answers_has_its_lease_from_then_on(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        quiet = engine.raw_worker()
        quiet.send(encode([Hello(77)]))
        assert await receives(quiet, Heartbeat)
        # No further heartbeat is due.
        monkeypatch.setattr(engine.server, "beat", lambda: None)
        await asyncio.sleep(0.75 * GIVE_UP_SECONDS)
        while quiet.poll(0):
            quiet.recv()
        quiet.send(encode([HeartbeatReply()]))
        assert await receives(quiet, Heartbeat)
        quiet.close()


async def test_a_worker_that_cannot_use_a_message_is_welcomed_anew(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it lacks now would keep every later change waiting."""
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.05)
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker, catalog = await engine.worker(), engine.local.catalog
        await catalog.publish("a", data(backbone, 1), ANY)
        await engine.server.updated_everywhere()
        with monkeypatch.context() as broken:
            broken.setattr(remote, "entry_of", _raise)
            await catalog.publish("a", data(backbone, 2), ANY)
            await until(lambda: not worker.health().ready)
        async with asyncio.timeout(10):
            await catalog.publish("a", data(backbone, 3), ANY)
            await engine.server.updated_everywhere()
        await until(lambda: worker.health().ready)
        assert worker.catalog.resolve("a").key.revision == catalog.entry("a").current


def _raise(*_: object) -> None:
    raise ValueError("a message of another version")


async def test_a_successor_ends_the_wait_for_a_worker_that_died(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        dead, successor = engine.raw_worker(), engine.raw_worker()
        dead.send(encode([Hello(5)]))
        await asyncio.sleep(0.2)
        change = asyncio.create_task(worker.catalog.publish("a", data(backbone, 1), ANY))
        await until(lambda: "a" in {item.name for item in engine.local.catalog.entries()})
        successor.send(encode([Hello(5)]))
        await asyncio.sleep(0.2)
        successor.send(encode([Goodbye()]))
        began = monotonic()
        await change
        assert monotonic() - began < 1
        dead.close()
        successor.close()


def junk() -> Sequence[list[bytes]]:
    hello = encode([Hello(99)])
    return [
        [b""],
        [b"\0"],
        [bytes([VERSION + 1]) + hello[1:]],
        [bytes([VERSION])],
        [bytes([VERSION]) + b"\x80\x04\x95 a pickle"],
        [bytes([VERSION]) + b"\xdf\xff\xff\xff\xff"],
        [hello, b"more", b"parts"],
        [hello[:-1]],
        [b"", b"", b""],
        [os.urandom(1000)],
        [os.urandom(100_000)],
        [encode([UnknownWorker()])],
        [b"\x01" + b"\x91" * 100_000],
    ]


async def test_junk_on_the_socket_is_refused_and_harms_nobody(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        stranger = engine.raw_worker()
        for _ in range(50):
            for frames in junk():
                stranger.send_multipart(frames)
        # Larger than any message may be: its sender is disconnected.
        huge = engine.raw_worker()
        huge.send(b"\x01" + bytes(MAX_BYTES + 1))
        entries = [entry(worker, "a", "x")]
        for _ in range(20):
            await worker.engine.predict(entries)
        await worker.catalog.publish("a", data(backbone, 2), ANY)
        assert worker.health().ready
        stranger.close()
        huge.close()
    refusals = [message for message in caplog.messages if "refused a message" in message]
    assert 1 <= len(refusals) <= 5
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_request_that_cannot_be_encoded_fails_alone(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        sent = [entry(worker, "a", "x")]
        results = await asyncio.gather(
            worker.engine.predict(sent),
            worker.catalog.rollback("\ud800", None, ANY),
            worker.engine.predict(sent),
            return_exceptions=True,
        )
        assert [type(item) for item in results] == [
            Completion, EngineDefect, Completion,
        ]  # fmt: skip
        assert engine.failures.rows == []


async def test_an_outbox_sends_all_but_the_message_that_cannot_be_encoded() -> None:
    frames: list[bytes] = []

    def send(parts: Frames) -> bool:
        frames.extend(parts)
        return True

    outbox = Outbox(send, max_bytes=1000, instead=failed_instead)
    broken = Fault("InvalidAdapter", "\ud800", {})
    entry_of_a = Adapter("a", None, [], {}, {}, broken)
    for message in (
        Retire("a", "0"),
        RequestFailed(1, broken),
        CatalogUpdate(7, "a", entry_of_a),
        Retire("\ud800", "0"),
        InspectDone(2, None, broken),
        Retire("b", "0"),
    ):
        outbox.send(message)
    outbox.flush()
    (frame,) = frames
    first, failed, update, inspected, last = CODEC.decode(frame)
    assert (first, last) == (Retire("a", "0"), Retire("b", "0"))
    assert update == CatalogUpdate(7, "a", None)
    for number, answer in ((1, failed), (2, inspected)):
        assert isinstance(answer, RequestFailed)
        assert answer.id == number
        assert isinstance(error_of(answer.fault), EngineDefect)


async def test_a_worker_that_sends_nonsense_must_say_hello_again(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        peer = engine.raw_worker()
        peer.send(encode([Hello(3)]))
        await asyncio.sleep(0.2)
        peer.send(bytes([VERSION]) + b"nonsense")
        assert await receives(peer, UnknownWorker)
        peer.close()


async def test_a_worker_that_was_given_up_comes_back_by_itself(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        thief = engine.raw_worker()
        # Takes the worker's number and its place; the worker takes it back.
        thief.send(encode([Hello(0)]))
        assert await receives(thief, UnknownWorker)
        await until(lambda: worker.health().ready)
        assert (await worker.engine.predict([entry(worker, "a", "x")])).rows
        thief.close()


@pytest.mark.slow
async def test_a_worker_whose_engine_falls_silent_does_not_answer_from_its_copy(
    tmp_path: Path, backbone: Backbone
) -> None:
    """The engine's loop is stuck while the worker's goes on: two threads, one connection."""
    block, unblock, done = threading.Event(), threading.Event(), threading.Event()
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run_engine() -> None:
        async with engine_with_workers(backbone, tmp_path) as engine:
            endpoint.get_loop().call_soon_threadsafe(endpoint.set_result, engine.endpoint)
            while not done.is_set():
                await asyncio.sleep(0.01)
                if block.is_set():
                    block.clear()
                    # Blocks this loop, which is the point.
                    unblock.wait(10)

    thread = threading.Thread(target=lambda: asyncio.run(run_engine()))
    thread.start()
    try:
        with zmq.Context() as context:
            backend = RemoteBackend(
                context, await endpoint, 0, store=tmp_path, observer=Observer(), max_bytes=MAX_BYTES
            )
            await backend.start()
            backend.refuse_unless_ready()
            block.set()
            await until(lambda: not backend.health().ready)
            assert backend.health().reason == "the engine has not been heard of lately"
            # And no request waits much longer than its deadline.
            waiting = asyncio.create_task(
                backend.engine.predict([ENTRY], deadline=monotonic() + 0.1)
            )
            await asyncio.sleep(0)

            def expired() -> bool:
                backend.check()
                return waiting.done()

            await until(expired)
            with pytest.raises(DeadlineExceeded):
                await waiting
            with pytest.raises(EngineUnavailable):
                backend.refuse_unless_ready()
            unblock.set()
            await until(lambda: backend.health().ready)
            await backend.stop()
    finally:
        unblock.set()
        done.set()
        await asyncio.to_thread(thread.join)
