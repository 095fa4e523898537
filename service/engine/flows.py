"""Who is served next: clients share the device by weight, and within a client its adapters do.

    client -> adapter -> urgency -> entries, first come first served

This is hierarchical start-time fair queueing. Every node has a tag, the service that it has
received divided by its weight, and the child with the lowest tag is served. A node that was idle
starts at the tag being served now: it neither saves up service while idle nor pays for it. So
a flow that sends less than its share never waits for those that send more. Each entry costs a few
heap operations, and neighbours in a batch come from different flows.

Requests that name several adapters are one flow of their client (`load.py:flow_of`), with the
weight of all their adapters.

Urgency separates requests that allow a fraction of a second from those that allow a minute. A queue
of patient requests then does not keep impatient ones out, nor the other way round.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from service.engine.load import FlowKey

E = TypeVar("E")

# Idle children that a node keeps at least: most flows come back soon, and making one takes time.
_KEPT_IDLE = 1024


class Node(Generic[E]):
    """A client, an adapter of a client, or a leaf: one urgency of an adapter of a client.

    tag: service received, in tokens by weight. tokens: admitted and not yet taken, of all below.
    active_weight: the weights of the children that have tokens. time: the tag served last among the
    children. entries: of a leaf, in order of arrival. most_children: with more, the idle ones are
    removed.
    """

    __slots__ = (
        "active_weight",
        "children",
        "entries",
        "heap",
        "in_heap",
        "key",
        "most_children",
        "parent",
        "tag",
        "time",
        "tokens",
        "weight",
    )

    def __init__(self, key: str | int, parent: "Node[E] | None", weight: float) -> None:
        self.key, self.parent, self.weight = key, parent, weight
        self.time = 0.0
        self.tag: float = 0.0 if parent is None else parent.time
        self.tokens = 0
        self.active_weight = 0.0
        self.children: dict[str | int, Node[E]] = {}
        self.heap: list[tuple[float, int, Node[E]]] = []
        self.in_heap = False
        self.entries: dict[E, None] = {}
        self.most_children = _KEPT_IDLE


class Position(NamedTuple):
    """Where a flow's next tokens would stand.

    ahead: tokens that the device runs until they are done, themselves included. share: of the
    device that its adapter has beside the flows that wait now. held: tokens of that adapter that
    wait already.
    """

    ahead: float
    share: float
    held: int


class Flows(Generic[E]):
    """All flows, from the root down. Not safe for threads: the scheduler's lock guards it."""

    def __init__(self) -> None:
        self.root: Node[E] = Node("", None, 1.0)
        # Leaves by key, found without a walk from the root.
        self._order = count()

    def reserve(
        self, key: FlowKey, client_weight: float, adapter_weight: float, tokens: int
    ) -> Node[E]:
        """Count tokens that were admitted; returns the leaf of their flow.

        The last weights given for a client or an adapter hold.
        """
        client = self._child(self.root, key.client, client_weight)
        adapter = self._child(client, key.adapter, adapter_weight)
        leaf = node = self._child(adapter, key.urgency, 1.0)
        while (parent := node.parent) is not None:
            if node.tokens == 0:
                parent.active_weight += node.weight
            node.tokens += tokens
            node = parent
        node.tokens += tokens
        return leaf

    def release(self, leaf: Node[E], tokens: int) -> None:
        """Count tokens that were taken or withdrawn."""
        node = leaf
        while (parent := node.parent) is not None:
            node.tokens -= tokens
            assert node.tokens >= 0
            if node.tokens == 0:
                parent.active_weight -= node.weight
                # No rounding errors are carried on.
                node.active_weight = 0.0
                _forget_service(node)
            node = parent
        node.tokens -= tokens
        if node.tokens == 0:
            node.active_weight = 0.0

    def add(self, leaf: Node[E], entries: Sequence[E]) -> None:
        """Queue entries whose tokens are reserved; at least one."""
        leaf.entries.update(dict.fromkeys(entries))
        node = leaf
        while node.parent is not None and not node.in_heap:
            node.tag = max(node.tag, node.parent.time)
            self._push(node)
            node = node.parent

    def first(self) -> Node[E] | None:
        """The leaf that is served next; None if nothing is queued or all was set aside."""
        node = self.root
        while True:
            while node.heap:
                child = node.heap[0][2]
                if child.heap or child.entries:
                    break
                # Its entries were withdrawn, or it is set aside.
                heappop(node.heap)
                child.in_heap = False
                _forget_service(child)
            else:
                if node.parent is None:
                    return None
                # Its parent drops it now.
                node = self.root
                continue
            node = child
            if node.entries:
                return node

    def remove(self, leaf: Node[E], entry: E, cost: int) -> None:
        """Withdraw an entry that is queued."""
        del leaf.entries[entry]
        self.release(leaf, cost)

    def serve(self, leaf: Node[E], entry: E, cost: int) -> None:
        """Take an entry out of the leaf that `first` returned, and charge its cost."""
        del leaf.entries[entry]
        self._charge(leaf, cost, cost)

    def is_alone(self, leaf: Node[E]) -> bool:
        """Whether the leaf that `first` returned will be served again until it has no entries."""
        adapter = leaf.parent
        assert adapter is not None
        client = adapter.parent
        assert client is not None
        return len(self.root.heap) == len(client.heap) == len(adapter.heap) == 1

    def serve_alone(self, leaf: Node[E], entries: Sequence[E], cost: int, last: int) -> None:
        """As `serve` for several entries one after the other, of a leaf that is alone.

        Args:
            cost: of all of them.
            last: of the last one.
        """
        for entry in entries:
            del leaf.entries[entry]
        self._charge(leaf, cost, last)

    def _charge(self, leaf: Node[E], cost: int, last: int) -> None:
        """Charge what was served, of which the last entry cost `last`."""
        before, node = cost - last, leaf
        while (parent := node.parent) is not None:
            served = node.tag + before / node.weight
            if served > parent.time:
                parent.time = served
            node.tag += cost / node.weight
            # As `release`, in the same loop: this runs for every text while others wait.
            node.tokens -= cost
            if node.tokens == 0:
                parent.active_weight -= node.weight
                node.active_weight = 0.0
            if node.entries or node.heap:
                heapreplace(parent.heap, (node.tag, next(self._order), node))
            else:
                heappop(parent.heap)
                node.in_heap = False
                _forget_service(node)
            node = parent
        node.tokens -= cost
        if node.tokens == 0:
            node.active_weight = 0.0

    def queued(self) -> Iterator[Node[E]]:
        """The leaves that may have queued entries, in no order."""
        for _, _, client in self.root.heap:
            for _, _, adapter in client.heap:
                for _, _, leaf in adapter.heap:
                    yield leaf

    def drain(self) -> list[tuple[Node[E], list[E]]]:
        """Take all queued entries, leaf by leaf; the caller releases their tokens.

        Nothing waits afterwards, so nobody was served at another flow's cost: no tag changes.
        """
        drained = []
        for leaf in self.queued():
            leaf.in_heap = False
            if leaf.entries:
                entries = list(leaf.entries)
                leaf.entries.clear()
                drained.append((leaf, entries))
        for _, _, client in self.root.heap:
            client.in_heap = False
            for _, _, adapter in client.heap:
                adapter.in_heap = False
                adapter.heap.clear()
            client.heap.clear()
        self.root.heap.clear()
        return drained

    def set_aside(self, leaf: Node[E]) -> None:
        """Skip the leaf that `first` returned until `restore`; its turn is not lost."""
        assert leaf.parent is not None
        heappop(leaf.parent.heap)
        leaf.in_heap = False

    def restore(self, leaves: list[Node[E]]) -> None:
        """End what `set_aside` did."""
        for leaf in leaves:
            node = leaf
            while node.parent is not None and not node.in_heap and (node.entries or node.heap):
                self._push(node)
                node = node.parent

    def position(
        self, key: FlowKey, client_weight: float, adapter_weight: float, tokens: int
    ) -> Position:
        """Where these tokens would stand, if they were added to a flow. Nothing changes.

        At no level is more ahead of them than all that waits there, nor more than the flow's share
        of that level allows.
        """
        node: Node[E] | None = self.root
        ahead, share, held = float(self.root.tokens + tokens), 1.0, 0
        adapter_share, adapter_held = 1.0, 0
        weights = (client_weight, adapter_weight, 1.0)
        parts: tuple[str | int, ...] = key
        for depth, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            child = None if node is None else node.children.get(part)
            held = 0 if child is None else child.tokens
            if node is not None:
                others = node.active_weight - (child.weight if child is not None and held else 0.0)
                share *= weight / (max(0.0, others) + weight)
            ahead = min(ahead, (held + tokens) / share)
            if depth == 1:
                adapter_share, adapter_held = share, held
            node = child
        return Position(ahead, adapter_share, adapter_held)

    def leaves(self) -> Iterator[tuple[FlowKey, Node[E]]]:
        """All leaves with admitted tokens."""
        for client, below in self.root.children.items():
            for adapter, inner in below.children.items():
                for urgency, leaf in inner.children.items():
                    if leaf.tokens:
                        yield FlowKey(str(client), str(adapter), int(urgency)), leaf

    def _child(self, node: Node[E], key: str | int, weight: float) -> Node[E]:
        child = node.children.get(key)
        if child is None:
            if len(node.children) >= node.most_children:
                _remove_idle_children(node)
            child = node.children[key] = Node(key, node, weight)
        elif child.weight != weight:
            if child.tokens:
                node.active_weight += weight - child.weight
            child.weight = weight
        return child

    def _push(self, node: Node[E]) -> None:
        assert node.parent is not None
        heappush(node.parent.heap, (node.tag, next(self._order), node))
        node.in_heap = True


def _forget_service(node: Node[E]) -> None:
    """A node that is idle does not pay later for what it was served."""
    if node.tokens == 0 and not node.in_heap:
        node.tag = 0.0


def _remove_idle_children(node: Node[E]) -> None:
    """Names that were once asked for take no memory for ever."""
    idle = [key for key, child in node.children.items() if not child.tokens and not child.in_heap]
    for key in idle:
        del node.children[key]
    node.most_children = max(_KEPT_IDLE, 2 * len(node.children))
