"""What the HTTP side needs of the engine and the catalog, in this process or in another.

`service.local` has both in this process; `service.ipc.remote` reaches them over a socket.
"""

from typing import Protocol

from service.catalog.view import CatalogView
from service.drift.interface import DriftView
from service.engine.interface import EngineHealth, Predictor


class Backend(Protocol):
    """The engine and the catalog of a service. All methods are called from one event loop."""

    @property
    def engine(self) -> Predictor: ...

    @property
    def drift(self) -> DriftView: ...

    @property
    def catalog(self) -> CatalogView:
        """Available once `start` has returned."""

    async def start(self) -> None:
        """Return when requests can be answered.

        Raises:
            adapters.errors.AdapterError, OSError: the settings or the machine do not allow it.
            RuntimeError: the device cannot run the backbone.
        """

    async def stop(self) -> None:
        """Fail all waiting requests, and end. Stopping twice is fine."""

    def health(self) -> EngineHealth:
        """Cheap enough for every probe."""

    def refuse_unless_ready(self) -> None:
        """
        Raises:
            NotReady: loading or warming up.
            EngineUnavailable: stopped, dead or not reachable.
        """
