"""Adapters in host memory: read once however many ask, the least recently used forgotten.

Knows no slots. All calls come from one event loop; files are read in threads.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter

from adapters.format.files import parse
from adapters.format.store import AdapterStore
from service.engine.interface import AdapterKey
from service.engine.observer import EngineObserver
from service.engine.runners.base import Hosted, Runner


@dataclass(slots=True, eq=False)
class _Registered:
    hosted: Hosted
    last_used: float


class HostTier:
    """The tier `registered`.

    Args:
        reading: where files are read, checked and made ready.
        capacity: adapters held.
    """

    def __init__(
        self,
        store: AdapterStore,
        runner: Runner,
        *,
        reading: Executor,
        observer: EngineObserver,
        capacity: int,
    ) -> None:
        self._store = store
        self._runner = runner
        self._reading = reading
        self._observer = observer
        self._capacity = capacity
        # Least recently used first.
        self._registered: OrderedDict[AdapterKey, _Registered] = OrderedDict()
        self._nbytes = 0
        self._under_way: dict[AdapterKey, asyncio.Future[Hosted]] = {}

    def get(self, key: AdapterKey) -> Hosted | None:
        """What is held, from now on the most recently used; None: it must be loaded."""
        held = self._registered.get(key)
        if held is None:
            return None
        held.last_used = monotonic()
        self._registered.move_to_end(key)
        return held.hosted

    def load(self, key: AdapterKey) -> asyncio.Future[Hosted]:
        """Read an adapter that is not held; whoever asks meanwhile waits for the same file."""
        if (under_way := self._under_way.get(key)) is not None:
            return under_way
        started = perf_counter()
        loading = asyncio.get_running_loop().run_in_executor(self._reading, self._read, key)
        self._under_way[key] = loading
        loading.add_done_callback(partial(self._loaded, key, started))
        return loading

    def _read(self, key: AdapterKey) -> Hosted:
        """In a reading thread."""
        # What was stored has been validated, and is the same by its hash.
        return self._runner.adopt(parse(self._store.read(key.name, key.revision)))

    def _loaded(self, key: AdapterKey, started: float, loading: asyncio.Future[Hosted]) -> None:
        del self._under_way[key]
        # Looking at the error also keeps asyncio from reporting it: who waits for it gets it.
        if loading.cancelled() or loading.exception() is not None:
            return
        hosted = loading.result()
        self._observer.adapter_loaded(key, "registered", perf_counter() - started)
        self._registered[key] = _Registered(hosted, monotonic())
        self._nbytes += hosted.nbytes
        if len(self._registered) > self._capacity:
            evicted, held = self._registered.popitem(last=False)
            self._nbytes -= held.hosted.nbytes
            self._observer.adapter_evicted(evicted, "registered", monotonic() - held.last_used)
        self._observer.tier_size("registered", len(self._registered), self._nbytes)
