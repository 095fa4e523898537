"""Every benchmark that needs no other project's server, in a short form on a tiny backbone.

The tests check that a benchmark measures what it says, not how large the figure is.
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone, random_adapter
from adapters.format.store import AdapterStore
from benchmarks.__main__ import COMMANDS, main, parse
from benchmarks.ceilings import PackedForward, flops_of, measure_ceilings
from benchmarks.load import load, write_bodies
from benchmarks.memory import Sample, Samples
from benchmarks.padded import PaddedAdapters, plain_model
from benchmarks.page import table_lines
from benchmarks.report import BenchmarkFailed
from benchmarks.rivals import MixedLora
from benchmarks.sets import SETS
from benchmarks.shapes import SHAPES, Shape, located
from benchmarks.stock import stock
from benchmarks.texts import make_encodings, make_texts, words_of
from tests.support.service_process import TREE

# Sums in another order: docs/exactness.md.
SAME = 1e-5
# PEFT asks transformers for an attribute by its former name.
peft_is_behind = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny shape."""
    return located("tiny", tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def tiny(source: str) -> Backbone:
    return load_backbone(source, device="cpu")


def run(command: str, folder: Path, *arguments: str) -> Any:
    """The figures in the JSON file of a command."""
    path = folder / "figures.json"
    assert main([command, *arguments, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["machine"]["cores"]
    assert content["versions"]["torch"]
    assert "random weights" in content["conditions"]["backbone"]
    rows = [line for line in table_lines(content) if line.startswith("|")]
    assert len(rows) == 2 + len(content["table"]["rows"])
    return content["figures"]


TINY = ("--backbone", "tiny", "--device", "cpu", "--dtype", "float32")


@pytest.mark.slow
@peft_is_behind
def test_engine_is_compared_with_the_packed_forward_and_with_rivals_that_agree(
    tmp_path: Path,
) -> None:
    short = ("--adapters", "1,4", "--rivals", "4", "--texts", "128", "--per-request", "8")
    figures = run("engine", tmp_path, *TINY, *short, "--seconds", "0.2", "--rounds", "1")
    by_name = {figure["name"]: figure for figure in figures}
    assert len(by_name) == 6
    for figure in figures:
        assert figure["texts_per_second"]["median"] > 0
        assert figure["over_packed_forward"] > 0
    for name in ("padded transformers, one batch per adapter", "PEFT LoRA, adapter_names"):
        assert by_name[name]["engine_is_times_faster"] > 0
        assert by_name[name]["checked_difference"] < 1e-4


@pytest.mark.slow
def test_latency_is_reported_by_percentile_and_stage(tmp_path: Path) -> None:
    figures = run("latency", tmp_path, *TINY, "--calls", "20", "--sizes", "1", "4")
    assert [figure["texts"] for figure in figures] == [1, 4]
    for figure in figures:
        assert 0 < figure["p50_ms"] <= figure["p90_ms"] <= figure["p99_ms"]
        assert 0 < figure["inference_ms"] < figure["p50_ms"]


@pytest.mark.slow
def test_types_are_compared_with_the_first_one(tmp_path: Path) -> None:
    short = ("--adapters", "8", "--distinct", "1", "--texts", "64", "--per-request", "4")
    quick = ("--seconds", "0.1", "--rounds", "1", "--calls", "3")
    tiny, types = TINY[:4], ("--types", "float32", "bfloat16")
    figures = run("types", tmp_path, *tiny, *types, *short, *quick)
    names = [figure["name"] for figure in figures]
    assert names == [
        f"{dtype}, {what}"
        for what in ("1 adapter", "8 adapters", "8 of all kinds")
        for dtype in ("float32", "bfloat16")
    ] + ["float32, one text", "bfloat16, one text"]
    assert [figure.get("over_first_type") for figure in figures[:6:2]] == [1.0, 1.0, 1.0]
    assert all(figure["p50_ms"] > 0 for figure in figures[6:])
    content = json.loads((tmp_path / "figures.json").read_text())
    mean, largest = re.findall(r"0\.\d+", content["conditions"]["changed scores"]["bfloat16"])
    assert 0 < float(mean) < float(largest) < 0.1


@pytest.mark.slow
@pytest.mark.alone
def test_sharing_is_measured_under_load_and_alone(tmp_path: Path) -> None:
    short = ("--texts", "64", "--tokens", "30,60", "--calls", "5", "--seconds", "0.3")
    figures = run("sharing", tmp_path, *TINY, *short, "--rounds", "1")
    by_name = {figure["name"]: figure for figure in figures}
    assert len(by_name) == len(figures) == 4 + 4 * 2
    for name, figure in by_name.items():
        ways = figure.get("answers_per_second") or figure["milliseconds"]
        assert ("one text, sharing off" in ways) == name.startswith("prompt at 2/3")
        assert figure["work"] > 0
    # Eight heads of one text do the work of one.
    assert by_name["head, answers/s under load"]["work"] < 0.8


@pytest.mark.slow
def test_stored_adapters_are_loaded_and_evicted(tmp_path: Path) -> None:
    short = ("--stored", "60", "--slots", "6", "--distinct", "4", "--cold", "5", "--rounds", "1")
    quick = ("--seconds", "0.4", "--per-request", "4", "--in-flight", "1,2")
    figures = run("adapters", tmp_path, *TINY, *short, *quick)
    for way in ("images", "files"):
        of_way = figures[way]
        assert of_way["loads_per_second_alone"]["median"] > 0
        assert of_way["cold_idle"]["p50_ms"] > 0
        one, two = (of_way["in_flight"][batches] for batches in "12")
        assert abs(two["clients"] - 2 * one["clients"]) <= 1
        for under in (one, two):
            assert under["over_all_resident"] > 0
            assert under["moved"]["loads, active a second"] > 0
            assert under["moved"]["evictions, active a second"] > 0
            # The parts make up the whole.
            parts = [part["p50_ms"] for part in under["cold_parts"].values()]
            assert min(parts) > -1.0
            assert 0 < max(parts) < under["cold"]["p50_ms"] <= 5 * sum(parts)
    assert figures["images"]["images"]["images, used"] > 0
    assert figures["images"]["images"]["images, made"] == 4
    assert figures["files"]["images"] == {}
    assert figures["memory_mib"]["in the end"]["host"] > 0


@pytest.mark.slow
def test_http_is_measured_with_a_real_service(tmp_path: Path) -> None:
    short = ("--adapters", "2", "--texts", "64", "--seconds", "0.5", "--connections", "4")
    figures = run("http", tmp_path, *TINY, *short, "--workers", "1")
    assert [figure["texts_per_request"] for figure in figures] == [32, 1, 1]
    for figure in figures:
        used = figure["processor_us_per_request"]
        assert used["engine"] > 0 < used["worker"]
        assert figure["texts_per_second"] > 0
        assert 0 < figure["p50_ms"] <= figure["p99_ms"]


@pytest.mark.slow
def test_devices_are_measured_in_turns_and_one_is_killed(tmp_path: Path) -> None:
    """With two engines on the CPU."""
    short = ("--devices", "cpu,cpu", "--workers", "1", "--adapters", "2", "--texts", "64")
    loads = ("--seconds", "0.5", "--rounds", "1", "--connections", "4", "--bulk-connections", "4")
    arguments = ("--backbone", "tiny", "--dtype", "float32", *short, *loads, "--kill")
    figures = run("devices", tmp_path, *arguments)
    measured = [(figure["devices"], figure.get("texts_per_request")) for figure in figures]
    assert measured == [("cpu", 32), ("cpu,cpu", 32), ("cpu", 1), ("cpu,cpu", 1), ("cpu,cpu", None)]
    assert figures[0]["times_one_device"] == 1.0
    assert figures[1]["times_one_device"] > 0
    assert figures[-1]["seconds_missing"] > 0
    assert figures[-1]["figures"]["requests"] > 0


@pytest.mark.slow
def test_swap_counts_answers_and_samples_memory(tmp_path: Path) -> None:
    short = ("--uploads", "12", "--clients", "2", "--quiet", "0.3")
    figures = run("swap", tmp_path, *TINY, *short)
    for figure in figures["loads"]:
        assert figure["answers"] > 0
        assert figure["failed"] == figure["not_their_revisions"] == figure["stale"] == 0
    assert figures["p99_over_without_uploads"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False], ids=["no padding", "padding"])
def test_padded_rival_answers_what_the_packed_batch_does(
    tiny: Backbone, source: str, equal: bool
) -> None:
    words = words_of(source)
    texts = make_encodings(tiny.encoder, words, count=12, mean_tokens=20)
    if equal:
        texts = [texts[0]] * 3
    adapters = [random_adapter(tiny, seed=seed) for seed in range(3)]
    inputs = [(index % 3, encoding) for index, encoding in enumerate(texts)]
    model = plain_model(source, device=torch.device("cpu"), dtype=torch.float32)
    padded = PaddedAdapters(model, adapters).classify(inputs)
    assert len({round(float(scores[0]), 3) for scores in padded}) >= len(adapters)
    prepared = [prepare(adapter, tiny) for adapter in adapters]
    answers = classify(tiny, tiny.pack(rows_of(prepared, inputs)), prepared)
    for scores, answer in zip(padded, answers, strict=True):
        np.testing.assert_allclose(scores, answer.scores, rtol=0, atol=SAME)


@pytest.mark.slow
@peft_is_behind
def test_mixed_lora_batch_is_each_row_under_its_own_adapter(tiny: Backbone, source: str) -> None:
    texts = make_encodings(tiny.encoder, words_of(source), count=6, mean_tokens=20)
    inputs = [(index % 3, encoding) for index, encoding in enumerate(texts)]
    model = plain_model(source, device=torch.device("cpu"), dtype=torch.float32)
    mixed = MixedLora(model, 3, max_tokens=100)
    for state, text in zip(mixed.classify(inputs), inputs, strict=True):
        torch.testing.assert_close(state, mixed.alone(text), rtol=0, atol=1e-4)
    first, second = mixed.alone((0, texts[0])), mixed.alone((1, texts[0]))
    assert (first - second).norm() > 1e-2 * first.norm()


async def test_packed_forward_and_ceilings_are_positive(tiny: Backbone, source: str) -> None:
    texts = make_encodings(tiny.encoder, words_of(source), count=40, mean_tokens=39)
    assert await PackedForward(tiny, texts, max_tokens=256).texts_per_second(0.1) > 0
    ceilings = measure_ceilings(tiny, tokens=64, seconds=0.02)
    assert ceilings.flops > 0
    assert ceilings.copy > 0


def test_useful_operations_are_those_of_the_layers(tiny: Backbone, source: str) -> None:
    (text,) = make_encodings(tiny.encoder, words_of(source), count=1, mean_tokens=39)
    n, layers, inner, length = 64, 4, 128, len(text)
    expected = layers * (2 * length * (4 * n * n + 2 * n * inner) + 4 * n * length * length)
    assert flops_of(tiny, [text]) == expected


def test_texts_have_the_wanted_lengths(tiny: Backbone, source: str) -> None:
    words = words_of(source)
    texts = make_texts(words, count=4000, mean_tokens=39)
    lengths = [len(tiny.encoder.encode(text, max_length=256)) for text in texts]
    assert lengths == [len(text.split()) + 2 for text in texts]
    assert mean(lengths) == pytest.approx(39, rel=0.05)
    assert 200 <= max(lengths) <= 250


def test_stocked_store_is_one_that_the_service_reads(tiny: Backbone, tmp_path: Path) -> None:
    keys = stock(tmp_path, tiny, names=5, distinct=2)
    assert len(set(keys)) == 5
    assert len({key.revision for key in keys}) == 2
    store = AdapterStore(tmp_path)
    assert store.names() == [key.name for key in keys]
    for key in keys:
        assert store.current(key.name) == key.revision
        store.read(key.name, key.revision)


def test_true_shapes_are_those_of_roberta() -> None:
    assert SHAPES["roberta-base"] == Shape(12, 768, 12, 3072, vocabulary=50265)
    assert SHAPES["roberta-large"] == Shape(24, 1024, 16, 4096, vocabulary=50265)


def test_memory_growth_is_the_slope_after_the_start() -> None:
    taken = [Sample(0, 10, 0), *(Sample(step, 50 + step / 10, 7) for step in range(100, 1100, 100))]
    growth = Samples(taken).growth(100)
    assert growth["host_mib_per_100"] == pytest.approx(10)
    assert growth["device_mib_per_100"] == pytest.approx(0)
    assert growth["host_mib_first"] == 60


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", "503"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "Content-Length"),
        (b"", "closed"),
    ],
    ids=["refused", "of unknown length", "cut off"],
)
def test_a_load_with_failures_gives_no_figures(
    tmp_path: Path, response: bytes, reason: str
) -> None:
    bodies = write_bodies(tmp_path / "bodies", [{"inputs": "a"}])
    with answering(response) as url, pytest.raises(BenchmarkFailed, match=reason):
        load(url, bodies, texts_per_request=1, connections=2, seconds=0.2)


def test_every_answered_request_is_counted_once(tmp_path: Path) -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    bodies = write_bodies(tmp_path / "bodies", [{"inputs": "a"}, {"inputs": "b"}])
    with answering(ok) as url:
        figures = load(
            url, bodies, texts_per_request=2, connections=3, seconds=0.5, warm_up=0.1, processes=2
        )
    assert figures.requests_per_second * 0.5 == pytest.approx(figures.requests, rel=0.05)
    assert figures.texts_per_second == 2 * figures.requests_per_second


@pytest.mark.parametrize("command", ["peers", "vllm"])
def test_rivals_without_their_environment_say_how_to_make_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--python", str(tmp_path / "python")]) == 2
    assert f"make bench-{command}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [step for steps in SETS.values() for step in steps.values()], ids=str
)
def test_every_step_of_a_set_is_a_command_that_exists(command: str) -> None:
    name, *arguments = shlex.split(command)
    assert name in COMMANDS
    assert "json" in parse(name, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("latency", "--calls", "0"),
        ("engine", "--adapters", "1,,2"),
        ("http", "--seconds", "-1"),
        ("http", "--seconds", "nan"),
        ("devices", "--devices", "cuda:0"),
        ("devices", "--devices", "cuda:0,cuda:0"),
    ],
    ids=" ".join,
)
def test_arguments_out_of_range_are_refused_before_measuring(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments[0], arguments[1:])


def test_more_slots_than_stored_adapters_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--stored", "10", "--slots", "8", "--cold", "2")
    assert main(["adapters", *TINY, *few, "--json", str(tmp_path / "none")]) == 2
    assert "fewer adapters are stored" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_set_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sets", "gpu", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in SETS["gpu"].values())


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "benchmarks", "sets", "gpu", "--list"]
    done = subprocess.run(
        words, cwd=TREE, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@contextmanager
def answering(response: bytes) -> Iterator[str]:
    """A server that gives every request this response; if it is empty, it closes the connection."""
    ready, over = Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    ports: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(2**16):
            writer.write(response)
            if not response:
                break
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await over.wait()
        server.close()

    thread = Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}/"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()
