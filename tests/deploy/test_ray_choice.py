"""Which replicas Ray's router offers a request to."""

import string
from collections import Counter
from random import Random

import pytest

from deploy.ray.choice import Margin, Seen, choose
from deploy.ray.hints import in_body, in_path, pack, unpack

MARGIN = Margin(requests=4, seconds=0.5)


def first(replicas: list[Seen], names: list[str], seed: int = 0) -> set[int]:
    return set(choose(replicas, names, MARGIN, Random(seed))[0])


def has(*names: str, queue: int = 0, wait: float = 0.0, ready: bool = True, id_: str = "") -> Seen:
    return Seen(id_, frozenset(names), ready, queue, wait)


def test_two_replicas_that_have_the_adapter_are_asked_first() -> None:
    replicas = [has(), has("spam"), has("ham"), has("spam"), has("spam", "ham")]
    drawn = [first(replicas, ["spam"], seed) for seed in range(50)]
    assert all(len(rank) == 2 for rank in drawn)
    assert set().union(*drawn) == {1, 3, 4}


def test_most_of_several_adapters_count() -> None:
    replicas = [has("a"), has("b"), has("a", "b"), has("c")]
    assert first(replicas, ["a", "b"]) == {2}


def test_others_take_a_request_when_all_that_have_the_adapter_are_busier() -> None:
    near = [has("spam", queue=MARGIN.requests), has("spam", queue=MARGIN.requests + 3)]
    far = [has(), has(queue=1)]
    assert first(near + far, ["spam"]) == {0, 1}
    far = [has(), has()]
    near = [has("spam", queue=MARGIN.requests + 1), has("spam", queue=MARGIN.requests + 3)]
    assert first(near + far, ["spam"]) == {2, 3}
    # The others are asked last all the same, should those be full.
    ranks = choose(near + far, ["spam"], MARGIN, Random(0))
    assert [set(rank) for rank in ranks] == [{2, 3}, {0, 1}]


def test_waiting_work_makes_a_replica_busy_although_its_requests_are_few() -> None:
    replicas = [has("spam", queue=1, wait=0.6), has(queue=1)]
    assert first(replicas, ["spam"]) == {1}
    assert first([has("spam", queue=1, wait=0.4), has(queue=1)], ["spam"]) == {0}


def test_an_adapter_that_no_replica_has_goes_to_the_same_two() -> None:
    replicas = [has(id_=f"r{number}") for number in range(8)]
    homes = {frozenset(first(replicas, ["new"], seed)) for seed in range(30)}
    assert len(homes) == 1
    (home,) = homes
    assert len(home) == 2
    # One replica less moves no adapter whose replicas are still there.
    lost = next(index for index in range(8) if index not in home)
    left = [replica for index, replica in enumerate(replicas) if index != lost]
    assert {left[index].id for index in first(left, ["new"])} == {
        replicas[index].id for index in home
    }
    # Many adapters are spread.
    counts = Counter(
        index for number in range(400) for index in first(replicas, [f"adapter-{number}"])
    )
    assert len(counts) == 8
    assert min(counts.values()) > 50


@pytest.mark.parametrize("count", [3, 8, 16])
def test_no_replica_has_more_than_its_share_of_new_adapters(count: int) -> None:
    """With ids as Serve gives them. A CRC would give one of eight twice its share, in few pairs."""
    chance = Random(count)
    letters = string.ascii_lowercase + string.digits
    replicas = [has(id_="".join(chance.choices(letters, k=8))) for _ in range(count)]
    shares: Counter[int] = Counter()
    pairs = set()
    for number in range(2000):
        pair = first(replicas, [f"adapter-{number:04}"])
        shares.update(pair)
        pairs.add(frozenset(pair))
    even = 2 * 2000 / count
    assert max(shares.values()) < 1.25 * even
    assert min(shares.values()) > 0.75 * even
    assert len(pairs) == count * (count - 1) // 2


def test_a_replica_that_is_not_ready_gets_nothing_while_another_is() -> None:
    replicas = [has("spam", ready=False), has(), has()]
    ranks = choose(replicas, ["spam"], MARGIN, Random(0))
    assert {index for rank in ranks for index in rank} == {1, 2}
    # Its own answer says why, where there is no other.
    assert choose([has(ready=False)], [], MARGIN, Random(0)) == [[0]]
    assert choose([], ["spam"], MARGIN, Random(0)) == []


def test_without_a_name_any_two_are_drawn() -> None:
    replicas = [has("spam"), has(), has()]
    drawn = [first(replicas, [], seed) for seed in range(50)]
    assert set().union(*drawn) == {0, 1, 2}
    assert all(len(rank) == 2 for rank in drawn)


def test_one_popular_adapter_spreads_until_no_replica_is_much_busier() -> None:
    """A thousand requests that never end: queues differ by the margin at most."""
    adapters = [{"hot"}, set(), set(), set()]
    queues = [0] * 4
    chance = Random(1)
    for _ in range(1000):
        replicas = [
            has(*names, queue=queue, id_=str(index))
            for index, (names, queue) in enumerate(zip(adapters, queues, strict=True))
        ]
        rank = choose(replicas, ["hot"], MARGIN, chance)[0]
        taken = min(rank, key=lambda index: queues[index])
        queues[taken] += 1
        adapters[taken].add("hot")
    assert max(queues) - min(queues) <= 2 * MARGIN.requests


def test_names_are_found_in_bodies_and_paths_of_every_protocol() -> None:
    assert in_body(b'{"adapter": "spam", "inputs": ["x"]}') == ["spam"]
    assert in_body(b'{"inputs":[{"text":"x","adapter":"a@12ab"},{"adapter" : "b"}],"n":1}') == [
        "a",
        "b",
    ]
    assert in_body(b'{"model":"topic","input":"x"}') == ["topic"]
    assert in_body(b'{"adapter": "Not A Name"}') == []
    assert in_body(b"\xff\xfe not json") == []
    assert len(in_body(b",".join(b'{"adapter":"a%d"}' % number for number in range(99)))) == 8
    assert in_path("/v2/models/spam/infer") == ["spam"]
    assert in_path("/v2/models/spam/versions/2/infer") == ["spam"]
    assert in_path("/adapters/spam") == ["spam"]
    assert in_path("/v1/adapters/spam") == []
    assert in_path("/v2/models") == []


def test_a_hint_of_a_client_may_be_anything() -> None:
    assert unpack(pack(["a", "b-2"])) == ["a", "b-2"]
    assert unpack("") == []
    assert unpack("session 12, ,A,ok," + "x" * 500) == ["ok"]
