"""A copy of the catalog in a worker: read here, changed by the engine's process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from adapters.store import Published
from service.directory import Directory
from service.entry import Condition
from service.processes.messages import Adapter
from service.processes.values import entry_of


class Changes(Protocol):
    """Asks the engine's process; errors are those of `Directory`, or EngineUnavailable."""

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published: ...
    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str: ...
    async def delete(self, name: str, condition: Condition) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def reload(self, name: str) -> str: ...
    async def settled(self, name: str) -> None: ...


class Replica(Directory):
    """As new as the last message: the engine answers a change only when every replica has it."""

    def __init__(self, root: Path, changes: Changes) -> None:
        super().__init__(root)
        self._changes = changes

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published:
        return await self._changes.publish(name, data, condition)

    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str:
        return await self._changes.rollback(name, prefix, condition)

    async def delete(self, name: str, condition: Condition) -> None:
        await self._changes.delete(name, condition)

    async def unload(self, name: str) -> None:
        await self._changes.unload(name)

    async def reload(self, name: str) -> str:
        return await self._changes.reload(name)

    async def settled(self, name: str) -> None:
        await self._changes.settled(name)

    def reset(self, adapters: Sequence[Adapter]) -> None:
        """All there is."""
        self._entries = {item.name: entry_of(item, {}) for item in adapters}

    def put(self, adapter: Adapter) -> None:
        before = self._entries.get(adapter.name)
        self._entries[adapter.name] = entry_of(adapter, before.specs if before else {})

    def remove(self, name: str) -> None:
        self._entries.pop(name, None)
