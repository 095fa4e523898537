"""Roll-outs on replicas: the benchmark in a short form, and the model of many replicas."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.replicas import Revisions, Tally
from benchmarks.rollout_model import HURRY, LOOK_SECONDS, Steps, play, requests_per_second
from service.replicas import follower, rollouts


def steps(**seconds: float) -> Steps:
    """Every step takes the same time in every play; those that are not named take none."""
    names = ("upload", "create", "put", "read", "fetch", "warm")
    fixed = {name: np.array([seconds.get(name, 0.0)]) for name in names}
    return Steps(**fixed, states={1: np.array([seconds.get("states", 0.0)])})


def test_the_model_has_the_pauses_of_the_service() -> None:
    assert follower._HURRY == HURRY
    assert rollouts._LOOK_SECONDS == LOOK_SECONDS


def test_one_replica_waits_for_its_own_steps_alone() -> None:
    played = play(
        steps(upload=1.0, create=2.0, read=0.1, warm=4.0, put=0.195), 1, follow_seconds=0.5, plays=3
    )
    # It looks every 0.03 s: 4.295 s of reading, trying and saying are seen by 4.32.
    assert played.prepare == pytest.approx([1.0 + 2.0 + 4.32] * 3)
    assert played.commit == pytest.approx([2.0 + 0.3] * 3)


def test_many_replicas_wait_for_the_slowest_and_no_longer() -> None:
    p50 = [play(steps(), count, follow_seconds=0.5).percentile(50) for count in (1, 2, 16, 1000)]
    assert p50 == sorted(p50)
    # Once a whole round, once a hurried one, each seen at the next look.
    assert 0.5 + 0.5 / HURRY < p50[-1] <= 0.5 + 0.5 / HURRY + 2 * LOOK_SECONDS


def test_reading_the_states_of_all_is_interpolated_and_extrapolated() -> None:
    known = replace(steps(), states={1: np.array([0.0]), 100: np.array([1.0])})
    looked = [
        play(known, count, follow_seconds=0.02, plays=1).percentile(50) for count in (1, 50, 100)
    ]
    assert looked[0] < looked[1] < looked[2] < play(known, 400, follow_seconds=0.02).percentile(50)


def test_a_store_that_answers_few_requests_makes_rounds_longer() -> None:
    free = play(steps(), 1000, follow_seconds=0.5)
    slow = play(steps(), 1000, follow_seconds=0.5, store_requests_per_second=500)
    # 1,000 replicas ask once in two seconds at best.
    assert slow.percentile(50) > free.percentile(50) + 2
    assert requests_per_second(1000, follow_seconds=0.5, lease_seconds=5) == 2800
    assert requests_per_second(1000, follow_seconds=0.5, lease_seconds=5, hurry=True) == 20800


def test_an_answer_by_an_older_revision_is_counted() -> None:
    order, tally = Revisions(), Tally()
    numbers = [order.begin(data) for data in (b"a", b"b", b"c")]
    assert [order.number(hashlib.sha256(data).hexdigest()) for data in (b"a", b"b", b"c")] == (
        numbers
    )
    tally.answered(numbers[1], floor=numbers[1], seen=numbers[0])
    # A roll-out on its way may already answer.
    tally.answered(numbers[2], floor=numbers[1], seen=numbers[1])
    assert (tally.stale, tally.backwards) == (0, 0)
    tally.answered(numbers[0], floor=numbers[1], seen=0)
    tally.answered(numbers[1], floor=numbers[1], seen=numbers[2])
    assert (tally.stale, tally.backwards) == (1, 1)


@pytest.mark.slow
def test_replicas_are_measured_on_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--backbone", "tiny", "--replicas", "2", "--stores", "folder", "--rounds", "1"]
    short = ["--rollouts", "4", "--seconds", "0.3", "--follow", "0.1", "--plays", "20"]
    assert main(["replicas", *arguments, *short, "--json", str(path)]) == 0
    (figures,) = json.loads(path.read_text())["figures"]
    (figure,) = figures["measured"]
    assert figure["rollouts"] == 4
    for name in ("rollouts_failed", "failed", "stale", "backwards"):
        assert figure[name] == 0, figure["reasons"]
    assert figure["answers"] > 0
    assert figure["texts_per_second"] > 0
    delays = [figure["p50_s"] for figure in figures["simulated"]]
    assert delays[-1] > delays[0] > 0
