"""How busy an engine is, in a form that another process can refuse requests by."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from service.errors import Overloaded

# Promises are corrected by at most this share of a timeout.
MAX_CORRECTION = 0.5
# An older load says nothing about the present.
_VALID_SECONDS = 1.0
_NO_DEADLINE = 16
# No adapter has this name.
MIXED = ""
# No client's name ends like this.
_BULK = "\0bulk"


class FlowKey(NamedTuple):
    """What shares the device: a client's texts for an adapter, of similar urgency.

    adapter: `MIXED` for requests that name several.
    """

    client: str
    adapter: str
    urgency: int


def flow_of(
    client: str, adapters: Collection[str], timeout: float | None, *, bulk: bool = False
) -> FlowKey:
    """The flow in which a request waits. Bulk is as of another client, with its own share.

    A request that names several adapters is answered when the last of its texts is done. In the
    flows of its adapters each text would wait for another turn, and all such requests would be done
    late, and at the same time.
    """
    adapter = next(iter(adapters)) if len(adapters) == 1 else MIXED
    return FlowKey(client + _BULK if bulk else client, adapter, urgency_of(timeout))


def urgency_of(timeout: float | None) -> int:
    """Timeouts within a factor of two have the same urgency: 0 up to 1/8 s, 1 up to 1/4 s, ..."""
    if timeout is None:
        return _NO_DEADLINE
    return min(_NO_DEADLINE - 1, int(max(0.0, timeout) * 8).bit_length())


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's load at one time.

    at: that time, on the clock of `time.monotonic`. limit: tokens that may wait. rate: tokens per
    second of the device; 0 if not measured. correction: how much later than expected requests are
    answered, in seconds. waits: for the busiest flows, in how many seconds a single further token
    would be done, and whether the flow has all the room that it may have. otherwise: the same time
    for any other flow.
    """

    at: float
    limit: int
    rate: float
    correction: float
    waits: Mapping[FlowKey, tuple[float, bool]]
    otherwise: float
    # The longest wait of all; no end if a flow has all its room.
    longest: float = field(init=False)

    def __post_init__(self) -> None:
        waits = [float("inf") if barred else wait for wait, barred in self.waits.values()]
        object.__setattr__(self, "longest", max([self.otherwise, *waits]))

    def is_easy(self, timeout: float, *, sent: float) -> bool:
        """Whether `foresee` refuses no request with this timeout, whatever its flow.

        Args:
            sent: tokens of all flows that were sent to the engine since this load was measured.
        """
        wait = self.longest + (sent / self.rate if self.rate else 0.0)
        return wait < (1 - MAX_CORRECTION) * timeout

    def wait(self, flow: FlowKey, *, sent: float = 0.0) -> float:
        """In how many seconds a further token of a flow would be done; 0 if that is not known.

        Args:
            sent: tokens of all flows that were sent to the engine since this load was measured.
        """
        age = monotonic() - self.at
        if age > _VALID_SECONDS:
            return 0.0
        wait, _ = self.waits.get(flow, (self.otherwise, False))
        return max(0.0, wait - age + (sent / self.rate if self.rate else 0.0))

    def foresee(self, flow: FlowKey, *, timeout: float, sent: float = 0.0) -> None:
        """Refuse what the engine would refuse even if its texts had no tokens.

        Args:
            sent: tokens of this flow that were sent to the engine since this load was measured.

        Raises:
            Overloaded: as `service.engine.interface.Predictor.predict`.
        """
        age = monotonic() - self.at
        if age > _VALID_SECONDS:
            return
        # What was sent adds to the wait, and meanwhile the device works.
        passed = age - (sent / self.rate if self.rate else 0.0)
        wait, barred = self.waits.get(flow, (self.otherwise, False))
        if barred:
            raise Overloaded(
                f"{self.limit} tokens wait", retry_after=max(0.0, wait - passed), reason="share"
            )
        late = wait - passed + min(self.correction, MAX_CORRECTION * timeout) - timeout
        if late > 0:
            raise Overloaded(
                f"it would be answered in {wait - passed:.2g} s, "
                f"its deadline is in {timeout:.2g} s",
                retry_after=late,
                reason="deadline",
            )
