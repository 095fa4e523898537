"""While a CUDA graph is captured, nothing is collected that would end the capture."""

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from adapters.capture import capturing, garbage_kept


class Cycle:
    """Garbage that only the collector finds, with what it keeps."""

    def __init__(self, kept: object = None) -> None:
        self.kept, self.itself = kept, self


@pytest.fixture(autouse=True)
def eager_collector() -> Iterator[None]:
    """The collector runs as often as it can, and nothing is left for it from before."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*thresholds)


def dropped(make: Callable[[], Cycle]) -> Callable[[], bool]:
    """Make a cycle and drop it; tells whether it has been collected."""
    garbage = weakref.ref(make())
    return lambda: garbage() is None


def allocate() -> list[Cycle]:
    return [Cycle() for _ in range(100)]


def test_garbage_waits_for_the_end_of_the_last_block() -> None:
    with garbage_kept():
        collected = dropped(Cycle)
        with garbage_kept():
            allocate()
        allocate()
        assert not collected()
    allocate()
    assert collected()


def test_a_block_that_fails_gives_the_collector_back() -> None:
    with pytest.raises(ValueError, match="x"), garbage_kept():
        raise ValueError("x")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with garbage_kept():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.gpu
def test_an_earlier_graph_that_is_garbage_does_not_end_a_capture() -> None:
    numbers = torch.zeros(4, device="cuda")
    earlier, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with capturing(earlier, stream=torch.cuda.Stream()):
        numbers.add_(1)
    with capturing(graph, stream=torch.cuda.Stream()):
        collected = dropped(partial(Cycle, earlier))
        del earlier
        allocate()
        numbers.add_(1)
        assert not collected()
    allocate()
    assert collected()
    graph.replay()
    assert numbers.tolist() == [1, 1, 1, 1]
