"""What ends or hangs on either side of the hub, and junk on its socket: who notices, who waits."""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import zmq

from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding
from service.engine.interface import AdapterKey, Entry
from service.errors import DeadlineExceeded, EngineUnavailable
from service.ipc.protocol import VERSION, Alive, Goodbye, Hello, Stranger, encode
from service.ipc.remote import RemoteBackend
from service.ipc.server import GIVE_UP_SECONDS
from tests.support.engine_harness import run
from tests.support.http_service import Brake
from tests.support.ipc_harness import ANY, MAX_BYTES, data, entry, heard, until, wired


def test_the_engines_end_fails_all_that_wait_at_once(tmp_path: Path, backbone: Backbone) -> None:
    async def test() -> None:
        brake = Brake()
        async with wired(backbone, tmp_path, load=brake.load) as house:
            worker = await house.worker()
            await worker.catalog.publish("a", data(backbone, 1), ANY)
            brake.on()
            asked = [entry(worker, "a", "x")] * 2
            tasks = [asyncio.create_task(worker.engine.predict(asked)) for _ in range(5)]
            await until(lambda: house.local.health().details["batch_seconds"] != 0)
            began = monotonic()
            house.hub.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert monotonic() - began < 1
            brake.off()
            assert {type(item) for item in results} == {EngineUnavailable}
            assert house.failures.rows == [("unavailable", 10)]
            health = worker.health()
            assert (health.live, health.ready) == (True, False)
            assert health.reason
            with pytest.raises(EngineUnavailable):
                worker.refuse_unless_ready()
            with pytest.raises(EngineUnavailable):
                await worker.engine.predict(asked)
            with pytest.raises(EngineUnavailable):
                await worker.catalog.delete("a", ANY)

    run(test())


def test_a_silent_worker_is_not_waited_for_longer_than_it_may_answer(
    tmp_path: Path, backbone: Backbone
) -> None:
    async def test() -> None:
        async with wired(backbone, tmp_path) as house:
            worker = await house.worker()
            silent = house.stranger()
            silent.send(encode([Hello(77)]))
            await asyncio.sleep(0.2)
            began = monotonic()
            await worker.catalog.publish("a", data(backbone, 1), ANY)
            assert GIVE_UP_SECONDS - 0.3 < monotonic() - began < GIVE_UP_SECONDS + 2
            assert await heard(silent, Stranger)
            # It is told so again whenever it speaks without a new hello.
            silent.send(encode([Alive()]))
            assert await heard(silent, Stranger)
            began = monotonic()
            await worker.catalog.publish("a", data(backbone, 2), ANY)
            assert monotonic() - began < GIVE_UP_SECONDS
            silent.close()

    run(test())


def test_a_successor_ends_the_wait_for_a_worker_that_died(
    tmp_path: Path, backbone: Backbone
) -> None:
    async def test() -> None:
        async with wired(backbone, tmp_path) as house:
            worker = await house.worker()
            dead, successor = house.stranger(), house.stranger()
            dead.send(encode([Hello(5)]))
            await asyncio.sleep(0.2)
            change = asyncio.create_task(worker.catalog.publish("a", data(backbone, 1), ANY))
            await until(lambda: "a" in {item.name for item in house.local.catalog.entries()})
            successor.send(encode([Hello(5)]))
            await asyncio.sleep(0.2)
            successor.send(encode([Goodbye()]))
            began = monotonic()
            await change
            assert monotonic() - began < 1
            dead.close()
            successor.close()

    run(test())


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
        [encode([Stranger()])],
        [b"\x01" + b"\x91" * 100_000],
    ]


def test_junk_on_the_socket_is_refused_and_harms_nobody(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with wired(backbone, tmp_path) as house:
            worker = await house.worker()
            await worker.catalog.publish("a", data(backbone, 1), ANY)
            stranger = house.stranger()
            for _ in range(50):
                for frames in junk():
                    stranger.send_multipart(frames)
            # Larger than any message may be: whoever sends it is cut off.
            huge = house.stranger()
            huge.send(b"\x01" + bytes(MAX_BYTES + 1))
            asked = [entry(worker, "a", "x")]
            for _ in range(20):
                await worker.engine.predict(asked)
            await worker.catalog.publish("a", data(backbone, 2), ANY)
            assert worker.health().ready
            stranger.close()
            huge.close()

    with caplog.at_level(logging.WARNING):
        run(test())
    refusals = [item for item in caplog.messages if "refused a message" in item]
    assert 1 <= len(refusals) <= 5
    assert not [item for item in caplog.records if item.exc_info]


def test_a_worker_that_sends_nonsense_must_say_hello_again(
    tmp_path: Path, backbone: Backbone
) -> None:
    async def test() -> None:
        async with wired(backbone, tmp_path) as house:
            peer = house.stranger()
            peer.send(encode([Hello(3)]))
            await asyncio.sleep(0.2)
            peer.send(bytes([VERSION]) + b"nonsense")
            assert await heard(peer, Stranger)
            peer.close()

    run(test())


def test_a_worker_that_was_given_up_comes_back_by_itself(
    tmp_path: Path, backbone: Backbone
) -> None:
    async def test() -> None:
        async with wired(backbone, tmp_path) as house:
            worker = await house.worker()
            await worker.catalog.publish("a", data(backbone, 1), ANY)
            thief = house.stranger()
            # Takes the worker's number, and so its place; the worker takes it back.
            thief.send(encode([Hello(0)]))
            assert await heard(thief, Stranger)
            await until(lambda: worker.health().ready)
            assert (await worker.engine.predict([entry(worker, "a", "x")])).rows
            thief.close()

    run(test())


def test_a_worker_whose_engine_falls_silent_does_not_answer_from_its_replica(
    tmp_path: Path, backbone: Backbone
) -> None:
    """The engine's loop stands still while the worker's goes on: two threads, one connection."""
    stand_still, stood = threading.Event(), threading.Event()
    found: list[str | None] = []

    async def engine(ready: "asyncio.Future[str]", done: threading.Event) -> None:
        async with wired(backbone, tmp_path) as house:
            ready.get_loop().call_soon_threadsafe(ready.set_result, house.endpoint)
            while not done.is_set():
                await asyncio.sleep(0.01)
                if stand_still.is_set():
                    stand_still.clear()
                    # Blocks this loop, which is the point.
                    stood.wait(10)

    async def worker() -> None:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        done = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(engine(ready, done)))
        thread.start()
        try:
            with zmq.Context() as context:
                backend = RemoteBackend(
                    context,
                    await ready,
                    0,
                    store=tmp_path,
                    observer=_Nobody(),
                    max_bytes=MAX_BYTES,
                )
                await backend.start()
                backend.refuse_unless_ready()
                stand_still.set()
                await until(lambda: not backend.health().ready)
                found.append(backend.health().reason)
                # Nor does anybody wait for it beyond a deadline.
                waiting = asyncio.create_task(
                    backend.engine.predict([ASKED], deadline=monotonic() + 0.1)
                )
                await asyncio.sleep(0)

                def given_up(waiting: "asyncio.Task[Any]" = waiting) -> bool:
                    backend.check()
                    return waiting.done()

                await until(given_up)
                with pytest.raises(DeadlineExceeded):
                    await waiting
                with pytest.raises(EngineUnavailable):
                    backend.refuse_unless_ready()
                stood.set()
                await until(lambda: backend.health().ready)
                await backend.stop()
        finally:
            stood.set()
            done.set()
            await asyncio.to_thread(thread.join)

    run(worker())
    assert found == ["the engine has not been heard of lately"]


ASKED = Entry(
    AdapterKey("a", "0" * 64),
    Encoding(np.ones(2, dtype=np.int64), np.zeros(2, dtype=np.int64), False),
    5,
)


class _Nobody:
    def failed(self, reason: object, rows: int) -> None:
        pass
