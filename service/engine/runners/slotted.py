"""Batches on a CUDA device: slots, kernels, graphs. Knows no queue and no request.

Two streams: one computes, driven by the device's lane; one copies adapters into slots that no
batch uses, driven by loading threads. A slot is used only once `place` has returned, and filled
anew only when nobody leases it any more, so the streams need no events between them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.adapter import classify, prepare, random_adapter, rows_of
from adapters.backbone.attention import VARLEN_DTYPES
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from adapters.slots.bank import Image, Resident, SlotBank, image_of
from adapters.slots.batch import Fact, Plan, Signature, Stop, size_of
from adapters.slots.forward import Inputs, Outputs, Widest, run
from adapters.slots.graphs import Graphs
from service.engine.interface import RowResult
from service.engine.runners.base import (
    NOT_FINITE,
    Asked,
    DeviceLost,
    Flight,
    Hosted,
    Placed,
    Ran,
    RowFailure,
    failed,
    joined,
    require_answers,
    warm_up_batches,
)

logger = logging.getLogger(__name__)

# What graphs are captured for; a batch with an adapter beyond it runs eagerly.
_COMMON_BOTTLENECK = 64
_COMMON_PROMPT = 16
_COMMON_LABELS = 256

# What the start compares slots with the way that any device takes on; the bound is bfloat16's.
_PROBES = (
    "",
    "A first text.",
    "Another one, somewhat longer, with more than one clause in it. " * 8,
)
_PROBE_BOUND = 0.05


@dataclass(frozen=True, slots=True)
class _Airborne:
    """A batch on the device. weights: None where nobody asked. kept: host memory that a copy to the
    device may still be reading."""

    plan: Plan
    rows: Sequence[Asked]
    scores: Tensor
    weights: Tensor | None
    landed: torch.cuda.Event
    started: float
    graphs: int
    kept: Tensor


class SlottedRunner:
    """`service.engine.runners.base.Runner` for a CUDA device.

    Args:
        places: adapters on the device at once.
        max_tokens: of a batch, prompts included.
    """

    ahead = True
    lanes = 1

    def __init__(self, backbone: Backbone, *, places: int, max_tokens: int) -> None:
        self.backbone = backbone
        device, n = backbone.device, backbone.hidden_size
        self._bank = SlotBank(places, hidden_size=n, device=device, dtype=backbone.dtype)
        self._computing = torch.cuda.Stream(device)
        # What it runs is over in microseconds, and somebody waits for it.
        self._loading = torch.cuda.Stream(device, priority=-1)
        self._graphs: Graphs | None = None
        if backbone.dtype in VARLEN_DTYPES:
            self._graphs = Graphs(
                backbone,
                self._bank,
                widest=Widest(_COMMON_BOTTLENECK, _COMMON_PROMPT * n, _COMMON_LABELS, dense=False),
                max_positions=max_tokens,
                longest=min(max_tokens, backbone.max_tokens + _COMMON_PROMPT),
            )

    def enter_lane(self) -> None:
        torch.cuda.set_device(self.backbone.device)
        # Of the calling thread alone, and once: a context around every batch takes longer.
        torch.cuda.set_stream(self._computing)

    def adopt(self, adapter: Adapter) -> Image:
        with torch.inference_mode(), torch.cuda.stream(self._loading):
            return image_of(adapter, self.backbone)

    def place(self, adapters: Sequence[tuple[int, Hosted]]) -> list[Placed]:
        images = [(place, _image(hosted)) for place, hosted in adapters]
        with torch.inference_mode(), torch.cuda.stream(self._loading):
            self._bank.write(images)
            self._loading.synchronize()
        return [Resident(image.spec, place, image.nbytes) for place, image in images]

    def check(self) -> None:
        """Run a few texts through slots and as any device would.

        Raises:
            RuntimeError: the answers differ, or something of it cannot be run here.
        """
        adapter = random_adapter(self.backbone)
        (placed,) = self.place([(0, self.adopt(adapter))])
        limit = adapter.spec.max_length
        texts = [self.backbone.encoder.encode(text, max_length=limit) for text in _PROBES]
        # Not in a lane: the stream brings its device along, on which kernels are launched.
        with torch.cuda.stream(self._computing):
            ran = self.finish(self.launch([Asked(text, placed) for text in texts]))
        prepared = [prepare(adapter, self.backbone)]
        batch = self.backbone.pack(rows_of(prepared, [(0, text) for text in texts]))
        expected = classify(self.backbone, batch, prepared)
        for found, wanted in zip(ran.outcomes, expected, strict=True):
            if isinstance(found, RowFailure):
                raise RuntimeError(found.message)
            difference = float(np.abs(found.scores - wanted.scores).max())
            if not difference <= _PROBE_BOUND:
                raise RuntimeError(f"a score differs by {difference:.3g}")

    def warm_up(self, max_tokens: int) -> None:
        (adapter,) = self.place([(0, self.adopt(random_adapter(self.backbone)))])
        if self._graphs is not None:
            self._capture(self._graphs, adapter.spec)
        for rows in warm_up_batches(self.backbone, adapter, max_tokens):
            require_answers(self.finish(self.launch(rows)), max_tokens)

    def launch(self, rows: Sequence[Asked]) -> Flight:
        try:
            with torch.inference_mode():
                return self._launch(rows)
        except Exception as error:
            _raise_if_lost(error)
            ran = failed(rows, error)
        # Not inside the handler: the traceback would keep the failed pass's tensors alive.
        if ran is not None:
            return ran
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()
        half = len(rows) // 2
        first = self.finish(self.launch(rows[:half]))
        return joined(first, self.finish(self.launch(rows[half:])))

    def landed(self, flight: Flight) -> bool:
        if isinstance(flight, Ran):
            return True
        assert isinstance(flight, _Airborne)
        try:
            return bool(flight.landed.query())
        except RuntimeError:
            # `finish` says what this means.
            return True

    def finish(self, flight: Flight) -> Ran:
        if isinstance(flight, Ran):
            return flight
        assert isinstance(flight, _Airborne)
        try:
            flight.landed.synchronize()
        except RuntimeError as error:
            # What CUDA says here is said of everything that is asked of it afterwards.
            raise DeviceLost(str(error).splitlines()[0]) from error
        return Ran(
            _outcomes(flight),
            backbone_seconds=perf_counter() - flight.started,
            graphs=flight.graphs,
        )

    def _capture(self, graphs: Graphs, spec: AdapterSpec) -> None:
        started = perf_counter()
        stop = Stop(spec.insertion_layer, (spec.generator_input,))
        try:
            with torch.inference_mode():
                graphs.capture_all(Signature((stop,), mean=False))
        except Exception as error:
            _raise_if_lost(error)
            logger.exception("no graphs here: every batch is launched kernel by kernel")
            self._graphs = None
            return
        logger.info("captured graphs=%d seconds=%.1f", len(graphs), perf_counter() - started)

    def _launch(self, rows: Sequence[Asked]) -> _Airborne:
        started = perf_counter()
        slots = np.array([_resident(row.adapter).slot for row in rows])
        plan = Plan(
            [row.encoding for row in rows],
            slots,
            self._bank.facts[slots],
            causal=self.backbone.family.causal,
        )
        widest = Widest.of(plan.facts, hidden_size=self.backbone.hidden_size)
        caps = None if self._graphs is None else self._graphs.caps_for(plan, widest)
        array = torch.empty(
            size_of(caps or plan.need, plan.signature), dtype=torch.int32, pin_memory=True
        )
        plan.write(array.numpy(), caps or plan.need)
        if caps is not None and self._graphs is not None:
            outputs = self._graphs.replay(plan.signature, caps, array)
        else:
            outputs = self._eagerly(plan, array, widest)
        explained = any(row.explain for row in rows)
        landed = torch.cuda.Event()
        scores = _to_host(outputs.scores[: plan.need.rows, : widest.labels])
        weights = _to_host(outputs.weights[: plan.need.tokens]) if explained else None
        landed.record()
        return _Airborne(plan, rows, scores, weights, landed, started, int(caps is not None), array)

    def _eagerly(self, plan: Plan, array: Tensor, widest: Widest) -> Outputs:
        inputs = Inputs(
            array.to(self.backbone.device, non_blocking=True),
            plan.need,
            plan.signature,
            plan.lengths,
        )
        return run(self.backbone, self._bank, inputs, widest)


def _outcomes(flight: _Airborne) -> list[RowResult | RowFailure]:
    """In the order in which the rows were asked for."""
    plan, scores = flight.plan, flight.scores.numpy()
    order, labels = plan.order.tolist(), plan.facts[:, Fact.LABELS].tolist()
    found: list[RowResult | RowFailure] = [NOT_FINITE] * len(order)
    # One look at the whole batch; rows are looked at only if it finds something.
    fine = [True] * len(order)
    if not np.isfinite(scores).all():
        fine = np.isfinite(scores).all(axis=1).tolist()
    for original, row, width, numbers in zip(order, scores, labels, fine, strict=True):
        if numbers:
            found[original] = RowResult(row[:width])
    if flight.weights is not None:
        _explain(found, flight, flight.weights.numpy())
    return found


def _explain(
    found: Sequence[RowResult | RowFailure],
    flight: _Airborne,
    weights: npt.NDArray[np.float32],
) -> None:
    lengths = flight.plan.lengths[0]
    pieces = np.split(weights, np.cumsum(lengths)[:-1])
    for original, piece in zip(flight.plan.order.tolist(), pieces, strict=True):
        outcome = found[original]
        if flight.rows[original].explain and isinstance(outcome, RowResult):
            outcome.token_weights = piece


def _to_host(tensor: Tensor) -> Tensor:
    """Into pinned memory, which PyTorch's host allocator reuses once the copy is through."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _raise_if_lost(error: Exception) -> None:
    """An error that CUDA keeps on giving, whatever is asked of it next, ends the engine."""
    if isinstance(error, torch.AcceleratorError):
        raise DeviceLost(str(error).splitlines()[0]) from error


def _image(hosted: Hosted) -> Image:
    assert isinstance(hosted, Image)
    return hosted


def _resident(placed: Placed) -> Resident:
    assert isinstance(placed, Resident)
    return placed
