"""Memory that is lent in pieces: no two overlap, and what nobody refers to can be lent again."""

import gc
from threading import Thread

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.slots.staging import Staging

BLOCK = 64 * 4096


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20 * 4096)), max_size=60))
def test_pieces_never_overlap_and_all_of_them_come_back(steps: list[tuple[int, int]]) -> None:
    staging = Staging(BLOCK, pinned=False)
    held: dict[int, tuple[int, Tensor]] = {}
    piece: Tensor | None
    other: Tensor | None
    for number, (name, nbytes) in enumerate(steps):
        held.pop(name, None)
        piece = staging.take(nbytes)
        if piece is None:
            assert staging.nbytes_free < BLOCK
            continue
        assert len(piece) == nbytes
        held[name] = (number % 251, piece.fill_(number % 251))
        for value, other in held.values():
            assert bool((other == value).all())
    held.clear()
    piece = other = None
    assert staging.nbytes_free == BLOCK
    assert staging.take(BLOCK) is not None


def test_a_view_keeps_the_piece_that_it_is_of() -> None:
    staging = Staging(BLOCK, pinned=False)
    piece = staging.take(BLOCK)
    assert piece is not None
    view = piece[64:128].view(torch.float32)
    array = view.numpy()
    del piece
    assert staging.take(1) is None
    del view
    assert staging.take(1) is None
    del array
    assert staging.take(BLOCK) is not None


def test_a_piece_in_a_cycle_comes_back_with_the_cycle() -> None:
    staging = Staging(BLOCK, pinned=False)
    cycle: list[object] = [staging.take(BLOCK)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert staging.nbytes_free == BLOCK


def test_it_knows_what_lies_in_it() -> None:
    staging = Staging(BLOCK, pinned=False)
    piece = staging.take(10_000)
    assert piece is not None
    assert piece in staging
    assert piece[5000:] in staging
    assert torch.empty(10) not in staging
    assert Staging(0, pinned=False).take(1) is None
    assert torch.empty(0) not in Staging(0, pinned=False)


def test_threads_may_borrow_and_return_at_once() -> None:
    staging, wrong = Staging(BLOCK, pinned=False), []

    def borrow(value: int) -> None:
        random = np.random.default_rng(value)
        for _ in range(300):
            piece = staging.take(int(random.integers(1, 12 * 4096)))
            if piece is not None:
                piece.fill_(value)
                if not bool((piece == value).all()):
                    wrong.append(value)

    threads = [Thread(target=borrow, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert staging.nbytes_free == BLOCK
