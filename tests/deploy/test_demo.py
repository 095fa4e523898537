"""The demo's load: what it does to a service, that it cleans up, and when it refuses to run."""

import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from service.commands.demo import (
    BURST_EVERY_SECONDS,
    BURST_TIMES,
    LONG_WORDS,
    WAVE_SECONDS,
    Mixture,
    load_factor,
)
from tests.support.http_service import serve
from tests.support.service_process import TREE
from tests.support.tiny_models import make_adapter, make_backbone


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", "demo", *arguments],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.slow
def test_it_asks_every_adapter_and_leaves_nothing_behind(tmp_path: Path) -> None:
    backbone = make_backbone()
    with serve(tmp_path) as live:
        for seed, name in enumerate(("first", "second")):
            live.put(name, make_adapter(backbone, seed=seed))
        done = demo("--url", live.url, "--seconds", "8", "--rate", "30")
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        names = [item["name"] for item in live.client.get("/v1/adapters").json()["adapters"]]
        assert names == ["first", "second"]
        series = live.series()
        asked = Counter[str]()
        for (metric, labels), value in series.items():
            if metric == "idspam_predictions_total":
                asked[dict(labels)["adapter"]] += int(value)
        assert asked["first"] > asked["second"] > 0
        # Two from here, one is the demo's copy.
        assert live.metric("idspam_uploads_total", outcome="created") == 3
        assert live.metric("idspam_uploads_total", outcome="staged") >= 1
        assert live.metric("idspam_truncated_inputs_total") > 0
    assert done.stdout.startswith("demo: asking first, second\n")
    assert " answered, " in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_only_the_adapters_that_are_named_are_asked(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        for name in ("asked", "other"):
            live.put(name, make_adapter(make_backbone()))
        flags = ("--seconds", "2", "--rate", "30", "--no-changes")
        assert demo("--url", live.url, "--adapters", "asked", *flags).returncode == 0
        for (metric, labels), value in live.series().items():
            if metric == "idspam_predictions_total" and value:
                assert dict(labels)["adapter"] == "asked"
        assert live.metric("idspam_uploads_total", outcome="created") == 2


@pytest.mark.slow
def test_a_key_that_may_not_change_adapters_still_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, API_KEYS="reads", ADMIN_KEYS="writes") as live:
        live.client.headers["X-API-Key"] = "writes"
        live.put("a", make_adapter(make_backbone()))
        monkeypatch.setenv("ID_SPAM_API_KEY", "reads")
        done = demo("--url", live.url, "--seconds", "3")
        assert done.returncode == 0
        assert "this key may not change adapters: nothing is uploaded" in done.stdout
        assert live.metric("idspam_requests_total", route="/v1/predict", outcome="success") > 0
        monkeypatch.setenv("ID_SPAM_API_KEY", "wrong")
        refused = demo("--url", live.url, "--seconds", "3")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "401 unauthorized" in refused.stderr


@pytest.mark.slow
def test_without_an_adapter_or_with_an_unknown_one_it_ends_in_a_line(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        none = demo("--url", live.url)
        live.put("there", make_adapter(make_backbone()))
        unknown = demo("--url", live.url, "--adapters", "there", "elsewhere")
    assert none.returncode == unknown.returncode == 2
    assert none.stderr == ("service: no adapter is ready: upload one, or serve the zoo\n")
    assert unknown.stderr == (
        "service: --adapters: not ready or not there: elsewhere; there are there\n"
    )


@pytest.mark.slow
def test_it_waits_for_a_service_but_not_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = demo("--url", url, "--patience", "1")
    assert done.returncode == 2
    assert done.stdout.startswith("demo: waiting for a service: no service answers")
    assert done.stderr.startswith("service: waited 1 s for a service: no service answers")
    assert done.stderr.count("\n") == 1


def test_the_mixture_is_zipfs_with_pairs_and_texts_that_are_too_long() -> None:
    mixture = Mixture(["a", "b", "c"], random.Random(7))
    requests = [mixture.inputs() for _ in range(2000)]
    assert {len(inputs) for inputs in requests} == {1, 2, 3, 4, 8, 16, 32}
    inputs = [item for request in requests for item in request]
    asked = Counter(item.adapter for item in inputs)
    assert asked["a"] / asked["b"] == pytest.approx(2, rel=0.1)
    assert asked["a"] / asked["c"] == pytest.approx(3, rel=0.1)
    pairs = sum(item.text_pair is not None for item in inputs)
    assert pairs / len(inputs) == pytest.approx(0.1, rel=0.2)
    long = sum(item.text.count(" ") >= LONG_WORDS for item in inputs)
    assert long / len(inputs) == pytest.approx(0.01, rel=0.3)


def test_the_rate_is_a_wave_with_bursts() -> None:
    calm = [load_factor(second) for second in range(int(WAVE_SECONDS)) if second % 20 < 17]
    assert min(calm) == pytest.approx(0.4, abs=0.02)
    assert max(calm) < 1.7
    before, within = load_factor(BURST_EVERY_SECONDS - 3.1), load_factor(BURST_EVERY_SECONDS - 2.9)
    assert within / before == pytest.approx(BURST_TIMES, rel=0.05)
