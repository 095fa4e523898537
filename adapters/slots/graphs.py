"""Forward passes over slots, replayed as CUDA graphs where a batch fits one. Knows no request.

A graph costs one launch where the same pass costs hundreds, which is most of a small batch's time
and keeps Python off the device's back in a large one. All graphs share one memory pool: they run
one after the other on one stream, and what one leaves behind the next one may overwrite.
"""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.slots.bank import SlotBank
from adapters.slots.batch import Caps, Plan, Signature, blank
from adapters.slots.buckets import Ladder
from adapters.slots.forward import Inputs, Outputs, Widest, run

logger = logging.getLogger(__name__)

# A rung of a signature that was not captured at the start is, once it was wanted so often.
_WANTED = 16
# Ladders of so many signatures at most: each keeps device memory for its graphs.
_MAX_SIGNATURES = 8


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Inputs
    outputs: Outputs
    graph: torch.cuda.CUDAGraph


class Graphs:
    """The captured rungs of one backbone and bank. Used from one thread, on one stream.

    Args:
        widest: adapters beyond it run eagerly.
        max_positions: of a batch, prompts included.
        longest: positions of the longest row that any adapter takes.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: SlotBank,
        *,
        widest: Widest,
        max_positions: int,
        longest: int,
    ) -> None:
        self._backbone = backbone
        self._bank = bank
        self._widest = widest
        self._max_positions = max_positions
        self._longest = longest
        self._pool = torch.cuda.graph_pool_handle()
        self._ladders: dict[Signature, Ladder] = {}
        self._graphs: dict[tuple[Signature, Caps], _Graph] = {}
        self._wanted: Counter[tuple[Signature, Caps]] = Counter()

    def __len__(self) -> int:
        return len(self._graphs)

    def capture_all(self, signature: Signature) -> None:
        """Capture every rung of a signature, largest first: the small ones reuse its memory."""
        for caps in reversed(self._ladder(signature).rungs):
            self._capture(signature, caps)

    def caps_for(self, plan: Plan, widest: Widest) -> Caps | None:
        """The caps of the graph that `replay` would run; None: there is none for this batch.

        What is asked for often enough is captured here: some tens of milliseconds, once.
        """
        signature = plan.signature
        if not self._widest.holds(widest):
            return None
        if signature not in self._ladders and len(self._ladders) == _MAX_SIGNATURES:
            return None
        caps = self._ladder(signature).cheapest(plan.need)
        if caps is None:
            return None
        if (signature, caps) not in self._graphs:
            self._wanted[signature, caps] += 1
            if self._wanted[signature, caps] < _WANTED:
                return None
            self._capture(signature, caps)
        return caps

    def replay(self, signature: Signature, caps: Caps, array: Tensor) -> Outputs:
        """Run a batch that was written with these caps; the outputs last until the next replay."""
        found = self._graphs[signature, caps]
        found.inputs.array.copy_(array, non_blocking=True)
        found.graph.replay()
        return found.outputs

    def _ladder(self, signature: Signature) -> Ladder:
        if signature not in self._ladders:
            self._ladders[signature] = Ladder(
                signature, max_positions=self._max_positions, longest=self._longest
            )
        return self._ladders[signature]

    def _capture(self, signature: Signature, caps: Caps) -> None:
        array = torch.from_numpy(blank(caps, signature)).to(self._backbone.device)
        inputs = Inputs(array, caps, signature)
        # The first run compiles kernels and makes libraries allocate, which no capture may.
        run(self._backbone, self._bank, inputs, self._widest)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=torch.cuda.current_stream(),
            # Other threads load adapters meanwhile.
            capture_error_mode="thread_local",
        ):
            outputs = run(self._backbone, self._bank, inputs, self._widest)
        self._graphs[signature, caps] = _Graph(inputs, outputs, graph)
        logger.debug("captured signature=%s caps=%s", signature, caps)
