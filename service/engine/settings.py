"""The engine's limits. `service.settings` reads them from environment variables."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Tokens include the positions of soft prompts.

    max_batch_tokens: budget of one batch; a longer text still runs, alone.
    max_waiting_tokens: what may wait at once; a request that does not fit is refused as a whole.
    None: a few seconds of work at the measured rate.
    max_active_adapters: adapters on the device, and so the most in one batch or request.
    max_active_bytes: of their weights; None: no limit. Adapters in use may exceed it.
    active_share: instead of that limit, a share of the device's memory that is free at the start.
    max_registered_adapters: adapters in host memory, validated and ready to be activated.
    max_registered_bytes: of their weights; None: no limit.
    max_image_bytes: of images on disk; None: none are made.
    writes_images: whether this engine makes images, or only reads those of another one.
    lanes: batches that a CPU runs side by side, each on its share of the cores.
    stall_seconds: when a batch runs longer than this, the engine is not live.
    adapter_weights: shares of the device by adapter name, 1 for all others.
    sharing: whether rows of a batch with the same text share their lower layers.
    one_core: whether the event loop and the lane stay on one core. The event loop's process must do
    little else.
    beside_http: whether the event loop answers HTTP, too.
    """

    max_batch_tokens: int = 16384
    max_waiting_tokens: int | None = None
    max_active_adapters: int = 64
    max_active_bytes: int | None = None
    active_share: float | None = None
    max_registered_adapters: int = 256
    max_registered_bytes: int | None = None
    max_image_bytes: int | None = None
    writes_images: bool = True
    lanes: int = 1
    stall_seconds: float = 60.0
    adapter_weights: Mapping[str, float] = field(default_factory=dict)
    sharing: bool = True
    one_core: bool = False
    beside_http: bool = False

    def __post_init__(self) -> None:
        if self.stall_seconds <= 0:
            raise ValueError(f"stall_seconds must be positive, not {self.stall_seconds}")
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
