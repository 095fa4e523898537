"""Quotas: exact in one process, and the same when several processes count together."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.access import quotas as quotas_module
from service.access.keys import Key
from service.access.quotas import Quotas
from tests.support.service_process import TREE


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "ci", *, requests: int | None = None, tokens: int | None = None) -> Key:
    number = f"{sum(name.encode()):012x}"
    return Key(name=name, id=number, requests_per_minute=requests, tokens_per_minute=tokens)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("per_minute", [1, 7, 600, 1_000_000])
def test_a_minutes_requests_at_once_and_then_one_at_a_time(
    shared: bool, per_minute: int, tmp_path: Path
) -> None:
    clock = Clock()
    quotas = Quotas(tmp_path / "quotas" if shared else None, clock)
    asked = key(requests=per_minute)
    at_once = min(per_minute, 2000)
    clock.now += 60.0
    assert [quotas.take_request(asked) for _ in range(at_once)] == [0.0] * at_once
    if at_once < per_minute:
        return
    wait = quotas.take_request(asked)
    assert wait == pytest.approx(60 / per_minute)
    clock.now += wait
    assert quotas.take_request(asked) == 0.0
    assert quotas.take_request(asked) > 0.0


def test_over_an_hour_the_rate_is_the_quota() -> None:
    clock = Clock()
    quotas, asked, taken = Quotas(None, clock), key(requests=60), 0
    for _ in range(36_000):
        taken += quotas.take_request(asked) == 0.0
        clock.now += 0.1
    assert 3600 + 60 - 2 <= taken <= 3600 + 60


def test_tokens_may_run_into_debt_that_is_paid_back_first() -> None:
    clock = Clock()
    quotas, asked = Quotas(None, clock), key(tokens=600)
    assert quotas.tokens_wait(asked) == 0.0
    quotas.charge(asked, 599)
    assert quotas.tokens_wait(asked) == 0.0
    quotas.charge(asked, 101)
    assert quotas.tokens_wait(asked) == pytest.approx(10.0)
    clock.now += 10.1
    assert quotas.tokens_wait(asked) == 0.0


def test_a_key_without_quotas_is_never_refused_and_takes_no_slot() -> None:
    quotas = Quotas()
    for _ in range(1000):
        assert quotas.take_request(key()) == quotas.tokens_wait(key()) == 0.0
        quotas.charge(key(), 10**9)
    assert not quotas._slots


def test_keys_do_not_share_buckets_even_when_their_slots_collide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quotas_module, "SLOTS", 8)
    quotas = Quotas()
    keys = [key(f"k{number}", requests=1) for number in range(12)]
    assert [quotas.take_request(item) for item in keys] == [0.0] * 12
    assert all(quotas.take_request(item) > 0 for item in keys)
    assert sorted(quotas._slots.values()) == [-1] * 4 + list(range(8))


COUNTER = """
import sys, time
from pathlib import Path
from service.access.keys import Key
from service.access.quotas import Quotas
quotas, key = Quotas(Path(sys.argv[1])), Key(name="ci", id="0" * 12, requests_per_minute=3000)
print("ready", flush=True)
sys.stdin.readline()
taken, until = 0, time.monotonic() + 1.5
while time.monotonic() < until:
    taken += quotas.take_request(key) == 0.0
print(taken)
"""


@pytest.mark.slow
def test_processes_that_count_together_count_exactly(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTER, str(tmp_path / "quotas")],
            cwd=TREE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    results = []
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        results.append(int(process.communicate(timeout=30)[0]))
    seconds = time.monotonic() - began
    assert sum(taken > 0 for taken in results) > 1
    # A full minute's worth, and 50 a second while they run.
    assert 3000 <= sum(results) <= 3000 + 50 * seconds + 1


def test_a_killed_or_stopped_process_does_not_hold_up_the_others(tmp_path: Path) -> None:
    path = tmp_path / "quotas"
    asked = key(requests=100)
    quotas = Quotas(path)
    assert quotas.take_request(asked) == 0.0
    lock = (
        "import fcntl, os, sys, time\n"
        f"file = os.open({str(path)!r}, os.O_RDWR)\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        began = time.monotonic()
        for _ in range(10):
            quotas.take_request(asked)
        assert time.monotonic() - began < 1.0
        holder.kill()
    assert quotas.take_request(asked) == 0.0
    assert os.stat(path).st_mode & 0o777 == 0o600
