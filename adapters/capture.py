"""Capturing a CUDA graph while the rest of the process goes on.

An earlier graph that is freed meanwhile is reset, and a reset ends the capture. Who drops a graph
by hand knows when; the garbage collector does not, and runs in any thread. So nothing is collected
while a graph is captured.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_captures = 0
_was_enabled = False


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, *, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Capture what the block launches on the stream. Other threads may use the device meanwhile.

    Args:
        pool: `torch.cuda.graph_pool_handle()` of the graphs whose memory this one may use, too.
    """
    with (
        garbage_kept(),
        torch.cuda.graph(
            graph,
            pool=pool,
            stream=stream,
            # Only of the thread that captures; autograd's and those that load adapters go on.
            capture_error_mode="thread_local",
        ),
    ):
        yield


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No thread's garbage is collected in the block, unless `gc.collect` is called."""
    global _captures, _was_enabled
    with _lock:
        if _captures == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _lock:
            _captures -= 1
            if _captures == 0 and _was_enabled:
                gc.enable()
