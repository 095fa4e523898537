"""Who trains: one process alone, or several, one a device, that take a share of every step each.

Knows no model. Several processes are started by `accelerate launch` (or `torchrun`); all of them
hold the same weights, read the same rows in the same order, add up their gradients and make the
same step. Files are written by the first one.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.backbone.loading import resolve_device
from train.errors import SettingsError, TrainingError
from train.loop.launch import Launch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Team(Protocol):
    """The processes of one run; `rank` counts from 0.

    All of them make the same calls in the same order; but for `share`, each waits for the others.
    """

    rank: int
    size: int

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's part of some rows; together the parts are all of them."""

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes.

        Raises:
            TrainingError: another process is gone.
        """

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes.

        Raises:
            TrainingError: another process is gone.
        """

    def holding_interrupts(self) -> AbstractContextManager[None]:
        """Inside, an interruption of one process waits until all `stop_if_interrupted`."""

    def stop_if_interrupted(self) -> None:
        """
        Raises:
            KeyboardInterrupt: in all processes, if one of them was told to end.
            TrainingError: another process is gone.
        """


class Alone:
    """One process, which an interruption ends where it is."""

    rank, size = 0, 1

    def share(self, items: Sequence[int]) -> list[int]:
        return list(items)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def total(self, values: Tensor) -> Tensor:
        return values

    def holding_interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stop_if_interrupted(self) -> None:
        pass


class Launched:
    """The processes that a launcher started: gloo on CPUs, NCCL on GPUs.

    Raises:
        SettingsError: accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from accelerate import PartialState
        except ImportError:
            raise SettingsError(
                ["several processes need a package: pip install accelerate"]
            ) from None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        state = PartialState(cpu=device.type == "cpu")
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self._device = device
        self._interrupted = False

    def share(self, items: Sequence[int]) -> list[int]:
        return list(items[self.rank :: self.size])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = list(parameters)
        # A process whose share was empty has none.
        gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in trained]
        flat = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def total(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        # NCCL reduces what stands on the device and nothing else.
        placed = values.to(self._device)
        try:
            summed: Tensor = reduce(placed, reduction="sum")
        except RuntimeError as error:
            reason, *_ = str(error).splitlines() or [type(error).__name__]
            raise TrainingError(f"another process of this run is gone: {reason}") from error
        return summed.to(values.device)

    @contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        earlier = {number: signal.signal(number, self._hold) for number in SIGNALS}
        # After an exception they stay held: the process is about to end.
        yield
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if self._interrupted:
            raise KeyboardInterrupt

    def stop_if_interrupted(self) -> None:
        if self.total(torch.tensor(float(self._interrupted))).item() > 0:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Leave the others; none of them may still wait for this process."""
        torch.distributed.destroy_process_group()

    def _hold(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True


@contextmanager
def joined(launch: Launch, device: str) -> Iterator[tuple[Team, str]]:
    """The team that a process belongs to, and the device that is its own.

    Args:
        device: as the settings have it.

    Raises:
        SettingsError: a device for all processes together, or a package is missing.
        UnusableBackbone: no such device on this machine.
    """
    if launch.size == 1:
        yield Alone(), device
        return
    own = _device_of(launch, device)
    team = Launched(own)
    # The launcher ends all processes by this as soon as one of them is gone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield team, str(own)
    except KeyboardInterrupt:
        # At a terminal this was its Ctrl-C, and the launcher's, which it passes on, is to come.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise
    team.close()


def _device_of(launch: Launch, device: str) -> torch.device:
    if device.startswith("cuda:"):
        raise SettingsError(
            [f"--device {device}: a launcher gives each process a device of its own; leave it out"]
        )
    found = resolve_device(device)
    return resolve_device(f"cuda:{launch.local_rank}") if found.type == "cuda" else found
