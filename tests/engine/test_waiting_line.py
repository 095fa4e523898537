"""Turns of clients: who stands where, however many others there are."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.turns import Client
from service.engine.waiting_line import WaitingLine


def served(line: WaitingLine[str]) -> str:
    """Serve all, in their order."""
    order = ""
    while line:
        first = line[0]
        assert line.remove(first) == 0
        assert first not in line
        order += first
    return order


def line_of(*clients: Client, each: str) -> WaitingLine[str]:
    """A line in which one client after the other has put some waiters with names of one letter."""
    line: WaitingLine[str] = WaitingLine()
    for client, names in zip(clients, each.split(), strict=True):
        for name in names:
            line.add(name, client)
    return line


def test_a_client_with_one_request_stands_before_all_but_the_first_of_a_client_with_many() -> None:
    line = line_of(Client("noisy", 1.0), each="abcdefghijklmnop")
    assert line.add("Q", Client("quiet", 1.0)) == 1
    assert served(line) == "aQbcdefghijklmnop"


def test_clients_take_turns_and_keep_their_own_order() -> None:
    line = line_of(Client("x", 1.0), Client("y", 1.0), Client("z", 1.0), each="abc AB 123")
    assert served(line) == "aA1bB2c3"


def test_turns_are_by_weight() -> None:
    line = line_of(Client("heavy", 3.0), Client("light", 1.0), each="abcdef AB")
    assert served(line) == "aAbcdBef"


def test_turns_are_by_the_adapters_that_a_request_wants() -> None:
    line: WaitingLine[str] = WaitingLine()
    for name in "abc":
        line.add(name, Client("wide", 1.0), adapters=3)
    for name in "ABCD":
        line.add(name, Client("narrow", 1.0))
    assert served(line) == "aABCbDc"


def test_nobody_comes_before_what_has_reached_the_front() -> None:
    line = line_of(Client("x", 1.0), each="abc")
    line.remove("a")
    for number in range(100):
        line.add(f"{number}", Client(f"new {number}", 1000.0))
    assert line[0] == "b"


def test_what_another_client_wants_takes_that_ones_turn_if_it_comes_sooner() -> None:
    line = line_of(Client("noisy", 1.0), Client("busy", 1.0), each="abcdefgh ABCD")
    line.advance("g", Client("quiet", 1.0))
    # It would be later, or is its own.
    line.advance("B", Client("noisy", 1.0))
    line.advance("h", Client("noisy", 1.0))
    assert served(line) == "aAgbBcCdDefh"


def test_a_client_that_has_left_does_not_pay_for_what_it_was_served() -> None:
    line = line_of(Client("x", 1.0), Client("y", 1.0), each="abcd AB")
    for name in "abcd":
        line.remove(name)
    line.add("e", Client("x", 1.0))
    assert served(line) == "AeB"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=60),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=4, max_size=4),
)
def test_while_two_clients_wait_neither_gets_ahead_of_the_other_by_more_than_one_request_of_each(
    requests: list[tuple[int, int]], weights: list[float]
) -> None:
    """The bound of start-time fair queueing."""
    line: WaitingLine[tuple[int, int, int]] = WaitingLine()
    largest, left, got = [0.0] * 4, [0] * 4, [0.0] * 4
    for number, (client, size) in enumerate(requests):
        line.add((number, client, size), Client(str(client), weights[client]), adapters=size)
        largest[client] = max(largest[client], size / weights[client])
        left[client] += 1
    for client in range(4):
        numbers = [number for number, of, _ in line if of == client]
        assert numbers == sorted(numbers)
    while line:
        _, client, size = first = line[0]
        line.remove(first)
        left[client] -= 1
        got[client] += size / weights[client]
        waiting = [other for other in range(4) if left[other]]
        for one, other in permutations(waiting, 2):
            assert got[one] - got[other] <= largest[one] + largest[other] + 1e-9


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_those_that_give_up_leave_all_others_in_their_order(
    clients: list[int], data: st.DataObject
) -> None:
    line: WaitingLine[int] = WaitingLine()
    for number, client in enumerate(clients):
        line.add(number, Client(str(client), 1.0))
    while line:
        before = list(line)
        gone = data.draw(st.sampled_from(before))
        assert line.remove(gone) == before.index(gone)
        before.remove(gone)
        assert list(line) == before
        assert [line[index] for index in range(len(line))] == before
