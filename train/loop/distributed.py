"""The processes that train together: one, or several that share each step, each on its device.

`accelerate launch` or `torchrun` starts several. All of them hold the same weights, read the same
rows in the same order, sum their gradients and take the same step. The one with rank 0 writes the
files.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import torch
from torch import Tensor, nn

from adapters.backbone.loading import resolve_device
from train.errors import SettingsError, TrainingError
from train.loop.launch import Launch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProcessGroup:
    """The processes of a run. This base class is a run of one process.

    All processes make the same calls in the same order; all calls but `shard` wait for the others.
    """

    rank = 0
    world_size = 1

    def shard(self, rows: Sequence[int]) -> list[int]:
        """This process's part of some rows; each row is in the part of one process."""
        return list(rows)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes.

        Raises:
            TrainingError: another process is gone.
        """

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes.

        Raises:
            TrainingError: another process is gone.
        """
        return values

    def deferred_interrupts(self) -> AbstractContextManager[None]:
        """In the block, an interrupt of one process waits until all call `raise_if_interrupted`.

        A single process is interrupted at once.
        """
        return nullcontext()

    def raise_if_interrupted(self) -> None:
        """
        Raises:
            KeyboardInterrupt: in all processes, if any of them was interrupted.
            TrainingError: another process is gone.
        """


class LaunchedGroup(ProcessGroup):
    """The processes that a launcher started. They talk through gloo on CPUs, NCCL on GPUs.

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
        self.world_size: int = state.num_processes
        self._device = device
        self._interrupted = False

    def shard(self, rows: Sequence[int]) -> list[int]:
        return list(rows[self.rank :: self.world_size])

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = list(parameters)
        # A process whose shard was empty has no gradients.
        gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in trained]
        flat = self.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def all_reduce(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        # NCCL reduces only tensors on the device.
        on_device = values.to(self._device)
        try:
            summed: Tensor = reduce(on_device, reduction="sum")
        except RuntimeError as error:
            reason, *_ = str(error).splitlines() or [type(error).__name__]
            raise TrainingError(f"another process of this run is gone: {reason}") from error
        return summed.to(values.device)

    @contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self._defer) for number in SIGNALS}
        # After an exception they stay deferred: the process is about to end.
        yield
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if self._interrupted:
            raise KeyboardInterrupt

    def raise_if_interrupted(self) -> None:
        if self.all_reduce(torch.tensor(float(self._interrupted))).item() > 0:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Leave the group. No other process may still wait for this one."""
        torch.distributed.destroy_process_group()

    def _defer(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True


@contextmanager
def process_group(launch: Launch, device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """The group that this process belongs to, and this process's own device.

    Args:
        device: as in the settings.

    Raises:
        SettingsError: the settings name one device for all processes, or a package is missing.
        UnusableBackbone: no such device on this machine.
    """
    if launch.world_size == 1:
        yield ProcessGroup(), device
        return
    own_device = _device_of(launch, device)
    group = LaunchedGroup(own_device)
    # The launcher sends SIGTERM to all processes as soon as one of them is gone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield group, str(own_device)
    except KeyboardInterrupt:
        # After Ctrl-C at a terminal the launcher passes on its own interrupt: ignore that one.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise
    group.close()


def _device_of(launch: Launch, device: str) -> torch.device:
    if device.startswith("cuda:"):
        raise SettingsError(
            [f"--device {device}: a launcher gives each process a device of its own; leave it out"]
        )
    resolved = resolve_device(device)
    return resolve_device(f"cuda:{launch.local_rank}") if resolved.type == "cuda" else resolved
