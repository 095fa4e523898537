"""Runs batches on the device: the engine's only file that touches it. Knows no queue, no request.

Whatever happens on the device ends in one outcome a row: `run` never raises.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from adapters.adapter import (
    Classification,
    PreparedAdapter,
    answer,
    classifications,
    prepare,
    random_adapter,
)
from adapters.backbone import Backbone
from adapters.packing import Row
from adapters.tokenizer import Encoding
from service.errors import InferenceFailure

logger = logging.getLogger(__name__)

# torch's CPU allocator raises a plain RuntimeError, and so do some CUDA libraries.
_OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "can't allocate memory")


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer."""

    reason: InferenceFailure
    message: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a batch. outcomes: one a row, in order. Seconds as in `BatchReport`."""

    outcomes: list[Classification | RowFailure]
    generator_seconds: float = 0.0
    backbone_seconds: float = 0.0
    passes: int = 1


class Runner:
    """A backbone on its device."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def warm_up(self, max_tokens: int) -> None:
        """Run a lone short text and a batch of `max_tokens`: the first requests find all allocated.

        Raises:
            RuntimeError: the device cannot run this backbone.
        """
        adapter = prepare(random_adapter(self._backbone), self._backbone)
        encode = self._backbone.encoder.encode
        short = encode("warm", max_length=adapter.spec.max_length)
        long = encode("warm up " * adapter.spec.max_length, max_length=adapter.spec.max_length)
        rows = max(1, max_tokens // (len(long) + adapter.spec.prompt_length))
        for encodings in ([short], [long] * rows):
            ran = self.run([(encoding, adapter) for encoding in encodings])
            if failures := [item for item in ran.outcomes if isinstance(item, RowFailure)]:
                raise RuntimeError(f"the warm-up failed: {failures[0].message}")
            if ran.passes > 1:
                logger.warning(
                    "a batch of %d tokens does not fit into the device's memory: it took %d passes",
                    max_tokens,
                    ran.passes,
                )

    def run(self, rows: Sequence[tuple[Encoding, PreparedAdapter]]) -> Ran:
        """Classify rows of any mixture of adapters.

        A batch that does not fit into memory is halved until it does; a single row that does not
        fails alone, and so does a row whose scores are not finite. Any other error fails all rows.
        """
        try:
            return self._pass(rows)
        except Exception as error:
            if not _is_out_of_memory(error):
                logger.exception("a batch of %d rows failed", len(rows))
                message = f"the batch failed: {type(error).__name__}"
                return Ran([RowFailure("batch_error", message)] * len(rows))
        # Not inside the handler: the traceback would keep the failed pass's tensors alive.
        if len(rows) == 1:
            logger.error("the device has no memory for a text of %d tokens", len(rows[0][0]))
            return Ran([RowFailure("out_of_memory", "the device has no memory for this text")])
        if self._backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        return _joined(self.run(rows[: len(rows) // 2]), self.run(rows[len(rows) // 2 :]))

    def _pass(self, rows: Sequence[tuple[Encoding, PreparedAdapter]]) -> Ran:
        # By identity: comparing two adapters would compare their tensors.
        places: dict[int, int] = {}
        adapters: list[PreparedAdapter] = []
        for _, adapter in rows:
            if id(adapter) not in places:
                places[id(adapter)] = len(adapters)
                adapters.append(adapter)
        batch = self._backbone.pack(
            [Row(encoding, adapter.spec, places[id(adapter)]) for encoding, adapter in rows]
        )
        started = perf_counter()
        answers = answer(self._backbone, batch, adapters)
        rows_made = classifications(answers, batch, adapters)
        seconds = perf_counter() - started
        return Ran(
            _finite(rows_made), answers.generator_seconds, seconds - answers.generator_seconds
        )


def _finite(rows: list[Classification]) -> list[Classification | RowFailure]:
    # One look at the whole batch; rows are looked at only if it finds something.
    if np.isfinite(np.concatenate([row.scores for row in rows])).all():
        return list(rows)
    failure = RowFailure("not_finite", "the scores are not finite")
    return [row if np.isfinite(row.scores).all() else failure for row in rows]


def _joined(first: Ran, second: Ran) -> Ran:
    return Ran(
        first.outcomes + second.outcomes,
        first.generator_seconds + second.generator_seconds,
        first.backbone_seconds + second.backbone_seconds,
        first.passes + second.passes,
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in _OUT_OF_MEMORY
    )
