"""Where the engine and the catalog are: in this process or in another. Knows no HTTP.

`service.local` has both here; `service.ipc.remote` reaches them through a socket.
"""

from typing import Protocol

from service.catalog.view import Directory
from service.engine.interface import EngineHealth, Predictor


class Backend(Protocol):
    """What a service stands on. All methods are called from one event loop."""

    @property
    def engine(self) -> Predictor: ...

    @property
    def catalog(self) -> Directory:
        """Only once `start` has returned."""

    async def start(self) -> None:
        """Return when requests can be answered.

        Raises:
            adapters.errors.AdapterError, OSError: the settings or the machine do not allow it.
            RuntimeError: the device cannot run the backbone.
        """

    async def stop(self) -> None:
        """Fail whoever waits, and end. Stopping twice is fine."""

    def health(self) -> EngineHealth:
        """Cheap enough for every probe."""

    def refuse_unless_ready(self) -> None:
        """
        Raises:
            NotReady: loading or warming up.
            EngineUnavailable: stopped, dead or out of reach.
        """
