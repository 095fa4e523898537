"""The engines of a host's other devices, as the catalog beside the first one sees them.

They have no catalog. The first engine's catalog tells them what to load and what to give back, and
asks which revisions they still need.
"""

from service.engine.interface import AdapterKey


class OtherEngines:
    """What a catalog asks of the other engines; this class is for a service of one device."""

    async def preload(self, key: AdapterKey) -> None:
        """Return once each has tried to activate an adapter, if that evicts no other, or has
        ended."""

    def retire(self, key: AdapterKey) -> None:
        """An adapter is no longer served, as of `service.engine.interface.Engine.retire`."""

    async def in_use(self, name: str) -> frozenset[str]:  # noqa: ARG002
        """The revisions of a name that their requests hold or wait for."""
        return frozenset()
