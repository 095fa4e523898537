"""Drift and uncertain texts where the engine is in this process."""

from collections.abc import Sequence

from service.drift.interface import DriftReport, UncertainText
from service.drift.monitor import DriftMonitor
from service.engine.interface import AdapterKey


class LocalDrift:
    """`service.drift.interface.DriftView` of a monitor in this process."""

    def __init__(self, monitor: DriftMonitor) -> None:
        self._monitor = monitor

    async def report(self, name: str, revision: str) -> DriftReport:
        return self._monitor.report(name, revision)

    def keep(self, texts: Sequence[UncertainText]) -> None:
        for text in texts:
            # Its adapter may have been deleted or replaced meanwhile.
            if self._monitor.follows(AdapterKey(text.adapter, text.revision)):
                self._monitor.uncertain.add(text)

    async def uncertain(self, name: str) -> list[UncertainText]:
        return self._monitor.uncertain.texts(name)

    async def forget(self, name: str) -> int:
        return self._monitor.uncertain.forget(name)
