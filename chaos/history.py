"""Checks that a history of concurrent operations on one adapter name is linearizable.

An adapter name is a register: it has no revision or one, and that one is served or unloaded. Every
operation seems to happen at one moment between its call and its answer. A history is linearizable
if there is an order of its operations that respects real time (what was answered before another was
called comes first) and in which every answer is what the register held. The search is that of Wing
and Gong with Lowe's memory of visited states ("Testing for linearizability", 2016).

An operation whose outcome is unknown (no answer, or an error 5xx) may have happened at any time
after its call, or not at all: its `ended` is infinite.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["put", "delete", "rollback", "unload", "load", "restart", "read"]

# What a read answers when the name does not exist, and when it is unloaded.
ABSENT = ""
UNLOADED = "(unloaded)"

# States that one search visits at most. Some thousand operations need some thousand.
MAX_STATES = 2_000_000


class Undecided(Exception):
    """The search visited `MAX_STATES` states and found neither an order nor that there is none."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as its client saw it.

    name: the adapter's. began, ended: on one clock; ended is infinite if the outcome is unknown.
    revision: what a put or a rollback made current, or what a read answered.
    """

    name: str
    kind: Kind
    began: float
    ended: float
    revision: str = ABSENT

    @property
    def known(self) -> bool:
        return math.isfinite(self.ended)

    def __str__(self) -> str:
        end = f"{self.ended:.3f}" if self.known else "no answer"
        revision = self.revision[:8] or "absent"
        shown = f" {revision}" if self.kind in ("put", "rollback", "read") else ""
        return f"{self.kind} {self.name}{shown} [{self.began:.3f} .. {end}]"


class State(NamedTuple):
    """What a name holds. loaded: whether it is served."""

    revision: str = ABSENT
    loaded: bool = True


def step(state: State, operation: Operation) -> State | None:
    """The state after an operation; None if it cannot have happened in this one."""
    exists = state.revision != ABSENT
    match operation.kind:
        case "put":
            return State(operation.revision)
        case "read":
            seen = state.revision if state.loaded or not exists else UNLOADED
            return state if operation.revision == seen else None
        case "restart":
            # Which adapters are unloaded is not stored.
            return State(state.revision)
    if not exists:
        # An operation that was answered found the name; one that was not may have failed.
        return None if operation.known else state
    match operation.kind:
        case "delete":
            return State()
        case "rollback":
            if not state.loaded:
                return None if operation.known else state
            return State(operation.revision)
        case "unload":
            return State(state.revision, loaded=False)
        case "load":
            return State(state.revision)


@dataclass(frozen=True, slots=True)
class Violation:
    """A name's history that no order explains. explained: how many operations the longest order
    has. stuck: the first answer after it that does not fit. before: the last operations of it."""

    name: str
    operations: int
    explained: int
    stuck: Operation
    before: tuple[Operation, ...]

    def __str__(self) -> str:
        before = "; ".join(str(operation) for operation in self.before)
        return (
            f"{self.name}: {self.explained} of {self.operations} operations have an order; "
            f"then {self.stuck} does not fit after: {before}"
        )


def check(history: Iterable[Operation]) -> list[Violation]:
    """The names whose operations are not linearizable. Every name begins absent.

    Raises:
        Undecided: a history has too many concurrent operations.
    """
    by_name: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_name[operation.name].append(operation)
    found = (check_name(name, operations) for name, operations in sorted(by_name.items()))
    return [violation for violation in found if violation is not None]


class _Event:
    """A call or an answer in a doubly linked list by time. answer: of a call, its answer."""

    __slots__ = ("answer", "following", "number", "previous")

    def __init__(self, number: int) -> None:
        self.number = number
        self.answer: _Event | None = None
        self.previous: _Event | None = None
        self.following: _Event | None = None

    def remove(self) -> None:
        """Take a call and its answer out of the list."""
        for event in (self, self.answer):
            assert event is not None
            assert event.previous is not None
            event.previous.following = event.following
            if event.following is not None:
                event.following.previous = event.previous

    def restore(self) -> None:
        """Undo `remove`; the last one removed is the first one restored."""
        for event in (self.answer, self):
            assert event is not None
            assert event.previous is not None
            event.previous.following = event
            if event.following is not None:
                event.following.previous = event


class _Frame(NamedTuple):
    """A point of the search. done: the operations before it, as bits. state: after them. taken: the
    last of them. choices: what may come next and was not tried yet."""

    done: int
    state: State
    taken: _Event | None
    choices: list[_Event]


def check_name(name: str, operations: Sequence[Operation]) -> Violation | None:
    """
    Raises:
        Undecided: as `check`.
    """
    # Mostly, writes that nobody answered and nobody read never happened. Each of them doubles the
    # search, so an order is first looked for without them. One that is found explains them, too:
    # they may come last.
    likely = [operation for operation in operations if _matters(operation, operations)]
    if len(likely) < len(operations):
        try:
            if _search(name, likely) is None:
                return None
        except Undecided:
            pass
    return _search(name, operations)


def _matters(operation: Operation, operations: Sequence[Operation]) -> bool:
    """Whether it was answered, or a read shows what it would have written."""
    if operation.known:
        return True
    written = {"delete": ABSENT, "unload": UNLOADED}.get(operation.kind, operation.revision)
    return operation.kind == "load" or any(
        each.kind == "read" and each.revision == written and each.ended > operation.began
        for each in operations
    )


def _search(name: str, operations: Sequence[Operation]) -> Violation | None:
    head = _linked(operations)
    read = {operation.revision for operation in operations if operation.kind == "read"}
    visited: set[tuple[int, State]] = set()
    frames = [_Frame(0, State(), None, _choices(head, operations, read))]
    longest: list[int] = []
    stuck = 0
    while head.following is not None:
        done, state, taken, choices = frames[-1]
        if not choices:
            if len(frames) > len(longest):
                longest = [frame.taken.number for frame in frames if frame.taken is not None]
                stuck = _first_answer(head)
            if taken is None:
                before = tuple(operations[number] for number in longest[-6:])
                return Violation(name, len(operations), len(longest), operations[stuck], before)
            frames.pop()
            taken.restore()
            continue
        call = choices.pop()
        following = step(state, operations[call.number])
        if following is None or (done | 1 << call.number, following) in visited:
            continue
        done |= 1 << call.number
        visited.add((done, following))
        if len(visited) > MAX_STATES:
            raise Undecided(f"{name}: {len(operations)} operations")
        call.remove()
        frames.append(_Frame(done, following, call, _choices(head, operations, read)))
    return None


def _choices(head: _Event, operations: Sequence[Operation], read: set[str]) -> list[_Event]:
    """The calls that came before the first answer, the most promising one last.

    An operation whose outcome is unknown is tried after the others, and last of all if nobody read
    what it wrote: mostly it never happened, or it does not matter when.
    """
    calls: list[_Event] = []
    event = head.following
    while event is not None and event.answer is not None:
        calls.append(event)
        event = event.following

    def promise(call: _Event) -> int:
        operation = operations[call.number]
        return 2 if operation.known else int(operation.revision in read)

    calls.reverse()
    calls.sort(key=promise)
    return calls


def _first_answer(head: _Event) -> int:
    event = head.following
    while event is not None and event.answer is not None:
        event = event.following
    return -1 if event is None else event.number


def _linked(operations: Sequence[Operation]) -> _Event:
    events: list[tuple[float, int, _Event]] = []
    for number, operation in enumerate(operations):
        call, answer = _Event(number), _Event(number)
        call.answer = answer
        # At the same moment a call comes first: the two may have overlapped.
        events.append((operation.began, 0, call))
        events.append((operation.ended, 1, answer))
    events.sort(key=lambda item: item[:2])
    head = last = _Event(-1)
    for _, _, event in events:
        last.following, event.previous = event, last
        last = event
    return head
