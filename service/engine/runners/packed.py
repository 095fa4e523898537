"""Batches on a CPU, or any device without kernels for slots. Knows no queue and no request."""

from collections.abc import Sequence
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
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.packed.packing import Row
from service.engine.interface import RowResult
from service.engine.runners.base import (
    NOT_FINITE,
    Asked,
    Hosted,
    Placed,
    Ran,
    RowFailure,
    failed,
    joined,
    require_answers,
    warm_up_batches,
)


class PackedRunner:
    """`service.engine.runners.base.Runner` whose batches are over when they are launched.

    Args:
        lanes: batches that run side by side, each on its share of the threads that torch has.
    """

    ahead = False

    def __init__(self, backbone: Backbone, *, lanes: int = 1) -> None:
        self.backbone = backbone
        self.lanes = lanes
        self._threads = max(1, torch.get_num_threads() // lanes)

    def enter_lane(self) -> None:
        # Of the calling thread alone.
        torch.set_num_threads(self._threads)

    def adopt(self, adapter: Adapter) -> PreparedAdapter:
        return prepare(adapter, self.backbone)

    def place(self, adapters: Sequence[tuple[int, Hosted]]) -> list[Placed]:
        # Host memory is where a CPU wants them.
        return [_prepared(adapter) for _, adapter in adapters]

    def warm_up(self, max_tokens: int) -> None:
        (adapter,) = self.place([(0, self.adopt(random_adapter(self.backbone)))])
        for rows in warm_up_batches(self.backbone, adapter, max_tokens):
            require_answers(self.finish(self.launch(rows)), max_tokens)

    def launch(self, rows: Sequence[Asked]) -> Ran:
        try:
            return self._pass(rows)
        except Exception as error:
            ran = failed(rows, error)
        # Not inside the handler: the traceback would keep the failed pass's tensors alive.
        if ran is not None:
            return ran
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return joined(self.launch(rows[:half]), self.launch(rows[half:]))

    def landed(self, flight: object) -> bool:
        return isinstance(flight, Ran)

    def finish(self, flight: object) -> Ran:
        assert isinstance(flight, Ran)
        return flight

    def _pass(self, rows: Sequence[Asked]) -> Ran:
        # By identity: comparing two adapters would compare their tensors.
        places: dict[int, int] = {}
        adapters: list[PreparedAdapter] = []
        for _, adapter, _ in rows:
            if id(adapter) not in places:
                places[id(adapter)] = len(adapters)
                adapters.append(_prepared(adapter))
        batch = self.backbone.pack(
            [Row(encoding, adapter.spec, places[id(adapter)]) for encoding, adapter, _ in rows]
        )
        started = perf_counter()
        answers = answer(self.backbone, batch, adapters)
        made = classifications(answers, batch, adapters)
        seconds = perf_counter() - started
        outcomes = [_outcome(row, answered) for row, answered in zip(rows, made, strict=True)]
        return Ran(outcomes, answers.generator_seconds, seconds - answers.generator_seconds)


def _outcome(row: Asked, answered: Classification) -> RowResult | RowFailure:
    if not np.isfinite(answered.scores).all():
        return NOT_FINITE
    return RowResult(answered.scores, answered.token_weights if row.explain else None)


def _prepared(adapter: Hosted | Placed) -> PreparedAdapter:
    assert isinstance(adapter, PreparedAdapter)
    return adapter
