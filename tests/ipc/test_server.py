"""Remote workers get the engine's answers and refusals, and all of them get changes at once."""

import asyncio
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, thread_time

import numpy as np
import pytest
from msgspec import structs

from adapters.adapter import classify, prepare
from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter, RevisionConflict, UnknownAdapter
from adapters.format.files import read_spec, serialize
from adapters.format.spec import AdapterSpec
from adapters.packed.packing import Row, RowShape
from service.catalog.entry import CatalogEntry, Condition
from service.engine.interface import Predictor
from service.engine.load import FlowKey, Load
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from service.ipc import server
from service.ipc.protocol import Adapter, Adapters, adapter_of
from service.ipc.remote import RemoteBackend, RemoteCatalog, RemoteEngine
from tests.support.example_files import ZOO
from tests.support.http_service import Brake
from tests.support.ipc_harness import ANY, data, engine_with_workers, entry, until
from tests.support.tiny_models import make_adapter


async def test_workers_answer_what_the_engine_answers(tmp_path: Path, backbone: Backbone) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        workers = [await engine.worker() for _ in range(2)]
        adapters = [make_adapter(backbone, seed=1), make_adapter(backbone, seed=2)]
        for name, adapter in zip("ab", adapters, strict=True):
            await workers[0].catalog.publish(name, serialize(adapter), ANY)
        texts = [("a", "free win now"), ("b", ""), ("a", "my card is not good"), ("b", "you")]
        for worker in workers:
            entries = [entry(worker, name, text, explain=True) for name, text in texts]
            completion = await worker.engine.predict(entries)
            for (name, _), sent, row in zip(texts, entries, completion.rows, strict=True):
                adapter = adapters["ab".index(name)]
                batch = backbone.pack([Row(sent.encoding, RowShape.of(adapter.spec), 0)])
                (alone,) = classify(backbone, batch, [prepare(adapter, backbone)])
                np.testing.assert_allclose(row.scores, alone.scores, atol=1e-5)
                assert row.token_weights is not None
                np.testing.assert_allclose(row.token_weights, alone.token_weights, atol=1e-5)
            plain = await worker.engine.predict([entry(worker, "a", "x")])
            assert plain.rows[0].token_weights is None
            assert (await worker.engine.predict([])).rows == ()
        predictor: Predictor = workers[0].engine
        await predictor.drain()


async def test_a_change_is_in_every_worker_when_it_returns(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        workers = [await engine.worker() for _ in range(3)]
        first = await workers[0].catalog.publish("a", data(backbone, 1), ANY)
        assert (first.created, first.changed) == (True, True)
        revisions = [first.revision]
        for turn in range(2, 12):
            published = await workers[turn % 3].catalog.publish("a", data(backbone, turn), ANY)
            revisions.append(published.revision)
            for worker in workers:
                assert worker.catalog.entry("a") == engine.local.catalog.entry("a")
                assert worker.catalog.resolve("a").key.revision == published.revision
                assert worker.catalog.path("a")[1].is_file()
        back = await workers[1].catalog.rollback("a", revisions[0][:12], ANY)
        assert back == revisions[0]
        assert {worker.catalog.resolve("a").key.revision for worker in workers} == {back}
        late = await engine.worker()
        assert late.catalog.entries() == workers[0].catalog.entries()
        await workers[2].catalog.settled("a")
        await workers[2].catalog.delete("a", ANY)
        assert [len(worker.catalog) for worker in (*workers, late)] == [0, 0, 0, 0]


async def test_refusals_arrive_as_what_they_are(tmp_path: Path, backbone: Backbone) -> None:
    async with engine_with_workers(
        backbone, tmp_path, max_waiting_tokens=64, max_active_adapters=1
    ) as engine:
        worker = await engine.worker()
        catalog = worker.catalog
        for name in "ab":
            await catalog.publish(name, data(backbone, 1), ANY)
        with pytest.raises(InvalidAdapter, match="pickle"):
            await catalog.publish("a", b"\x80\x04 a pickle", ANY)
        with pytest.raises(InvalidAdapter):
            await catalog.publish("a", b"", ANY)
        with pytest.raises(RevisionConflict):
            await catalog.publish("a", data(backbone, 2), Condition(match=frozenset({"0"})))
        with pytest.raises(RevisionConflict):
            await catalog.delete("a", Condition(none_match=frozenset({"*"})))
        with pytest.raises(UnknownAdapter) as caught:
            await catalog.rollback("c", None, ANY)
        assert caught.value.known == ("a", "b")
        many = [entry(worker, name, "x") for name in "ab"]
        with pytest.raises(InvalidRequest, match="can be active"):
            await worker.engine.predict(many)
        with pytest.raises(DeadlineExceeded):
            await worker.engine.predict(many[:1], deadline=monotonic() - 1)
        results = await asyncio.gather(
            *(worker.engine.predict(many[:1]) for _ in range(40)), return_exceptions=True
        )
        refused = [item for item in results if isinstance(item, BaseException)]
        assert refused
        assert len(refused) < 40
        assert all(isinstance(item, Overloaded) and item.retry_after > 0 for item in refused)


COST = 6


async def test_clients_share_the_engine_and_workers_refuse_what_it_would_refuse(
    tmp_path: Path, backbone: Backbone
) -> None:
    brake = Brake()
    async with engine_with_workers(
        backbone, tmp_path, load=brake.load, max_waiting_tokens=10 * COST
    ) as engine:
        first, second = await engine.worker(), await engine.worker()
        for name in "ab":
            await first.catalog.publish(name, data(backbone, 1), ANY)
        assert entry(first, "a", "x").cost == COST
        patient = monotonic() + 700
        brake.on()
        held = asyncio.ensure_future(first.engine.predict([entry(first, "b", "x")]))
        await until(lambda: brake.holds)
        flood = [
            asyncio.ensure_future(
                first.engine.predict(
                    [entry(first, "a", "x")], deadline=patient, client="flood", weight=3.0
                )
            )
            for _ in range(40)
        ]

        def is_full(worker: RemoteBackend) -> bool:
            load = worker.engine.load
            return load is not None and any(barred for _, barred in load.waits.values())

        await until(lambda: is_full(second))
        with pytest.raises(Overloaded) as caught:
            second.engine.foresee(["a"], timeout=700, client="flood")
        assert caught.value.reason == "share"
        # Another client has its share of the queue, however full it is.
        second.engine.foresee(["a"], timeout=700, client="calm")
        calm = asyncio.ensure_future(
            second.engine.predict([entry(second, "a", "x")], client="calm")
        )
        await asyncio.sleep(0.05)
        assert not calm.done()
        brake.off()
        await asyncio.gather(held, calm)
        results = await asyncio.gather(*flood, return_exceptions=True)
        assert any(isinstance(item, Overloaded) for item in results)


async def test_what_one_flow_has_sent_makes_no_other_flow_wait(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        for name in "ab":
            await worker.catalog.publish(name, data(backbone, 1), ANY)
        remote = worker.engine
        assert isinstance(remote, RemoteEngine)
        # A device that runs a token a second, and has nothing to do.
        remote.set_load(Load(monotonic(), 100, 1.0, 0.0, {}, 0.0), workers=2)
        flood = asyncio.ensure_future(
            remote.predict([entry(worker, "a", "x")], deadline=monotonic() + 11, client="flood")
        )
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            remote.foresee(["a"], timeout=11, client="flood")
        # Another worker will have sent as much.
        assert caught.value.retry_after == pytest.approx(2 * COST - 11, abs=0.5)
        for adapter, client in (("b", "flood"), ("a", "calm")):
            remote.foresee([adapter], timeout=11, client=client)
        # Which device is asked depends on all that they were sent.
        assert remote.wait(FlowKey("calm", "b", 0)) == pytest.approx(2 * COST, abs=0.5)
        await flood


def least_time(work: Callable[[], None]) -> float:
    """Seconds of this thread for `work`, at best of five, without a collection of garbage in it.

    One of all objects of a long test run takes longer than what is measured here.
    """
    times = []
    gc.disable()
    try:
        for _ in range(5):
            began = thread_time()
            work()
            times.append(thread_time() - began)
    finally:
        gc.enable()
    return min(times)


@pytest.mark.slow
async def test_thousands_of_adapters_do_not_keep_a_worker_from_its_heartbeats(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker = await engine.worker()
        assert isinstance(worker.catalog, RemoteCatalog)
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        (sent,) = [adapter_of(item, {}) for item in engine.local.catalog.entries()]
        assert sent.current is not None
        spec = read_spec(ZOO / "banking77.safetensors").to_json()
        names = [f"a{number}" for number in range(1000)]
        adapters = [structs.replace(sent, name=name, specs={sent.current: spec}) for name in names]
        parsed = [AdapterSpec.model_validate_json(spec) for _ in names]

        def parse() -> None:
            for _ in names:
                AdapterSpec.model_validate_json(spec)

        def receive() -> None:
            assert isinstance(worker.catalog, RemoteCatalog)
            worker.catalog.begin()
            worker.catalog.add(Adapters(adapters, last=True))

        assert least_time(receive) < 0.3 * least_time(parse)
        # They are as if they had been parsed, which happens once.
        specs = [worker.catalog.resolve(name).spec for name in names]
        assert specs == parsed
        assert worker.catalog.resolve("a7").spec is specs[7]


async def test_a_cancelled_request_leaves_the_engines_queue(
    tmp_path: Path, backbone: Backbone
) -> None:
    brake = Brake()
    async with engine_with_workers(backbone, tmp_path, load=brake.load) as engine:
        worker = await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        entries = [entry(worker, "a", "hello you")]
        brake.on()
        try:
            running = asyncio.create_task(worker.engine.predict(entries))
            await until(lambda: brake.holds)
            waiting = asyncio.create_task(worker.engine.predict(entries))
            await until(lambda: engine.local.health().details["waiting_entries"] == 1)
            waiting.cancel()
            await until(lambda: engine.local.health().details["waiting_entries"] == 0)
        finally:
            brake.off()
        await running
        assert waiting.cancelled()


async def test_an_upload_that_nobody_waits_for_any_more_is_done_whole(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        worker, other = await engine.worker(), await engine.worker()
        await worker.catalog.publish("a", data(backbone, 1), ANY)
        for delay in (0.0, 0.001, 0.005, 0.02):
            task = asyncio.create_task(worker.catalog.publish("a", data(backbone, 2), ANY))
            await asyncio.sleep(delay)
            task.cancel()
        await other.catalog.settled("a")
        # One that is refused meanwhile is no error that nobody has handled.
        for delay in (0.0, 0.001, 0.005, 0.02):
            task = asyncio.create_task(worker.catalog.publish("b", b"\0" * 64, ANY))
            await asyncio.sleep(delay)
            task.cancel()
        await asyncio.sleep(0.1)
        gc.collect()
        assert engine.local.catalog.find("b") is None
        stored = engine.local.catalog.entry("a").current
        await until(lambda: other.catalog.entry("a").current == stored)
        await until(lambda: worker.catalog.entry("a").current == stored)


async def test_the_catalog_comes_in_parts_and_what_is_changed_meanwhile_is_in_it(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_PART", 2)
    async with engine_with_workers(backbone, tmp_path) as engine:
        first = await engine.worker()
        for number in range(9):
            await first.catalog.publish(f"a{number}", data(backbone, number), ANY)
        catalog, whole_of, sent = engine.local.catalog, engine.server._whole_of, list[str]()

        def change_meanwhile(item: CatalogEntry) -> Adapter:
            sent.append(item.name)
            if len(sent) == 4:
                # One that was sent, and one that was not; the same of two that are deleted.
                other = catalog.entry("a4")
                for name in ("a0", "a8", "new"):
                    catalog._set(replace(other, name=name))
                for name in ("a1", "a7"):
                    catalog._forget(name)
            return whole_of(item)

        monkeypatch.setattr(engine.server, "_whole_of", change_meanwhile)
        late = await engine.worker()
        monkeypatch.undo()
        await engine.server.updated_everywhere()
        names = [item.name for item in late.catalog.entries()]
        assert names == ["a0", "a2", "a3", "a4", "a5", "a6", "a8", "new"]
        assert late.catalog.entries() == first.catalog.entries() == catalog.entries()
        assert late.catalog.entry("a0").current == catalog.entry("a4").current


@pytest.mark.slow
async def test_requests_are_answered_while_a_worker_gets_a_large_catalog(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        first = await engine.worker()
        await first.catalog.publish("a", data(backbone, 1), ANY)
        (stored,) = engine.local.catalog.entries()
        for number in range(20_000):
            name = f"b{number}"
            engine.local.catalog._entries[name] = replace(stored, name=name)
        welcomed = asyncio.create_task(engine.worker())
        answers, counted = 0, len(engine.server._workers)
        await until(lambda: len(engine.server._workers) > counted)
        while not welcomed.done():
            await first.engine.predict([entry(first, "a", "hello you")])
            answers += 1
        late = await welcomed
        assert len(late.catalog) == 20_001
        # In one part, one request would have waited for all of it.
        assert answers > 3
