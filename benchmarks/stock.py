"""Fills adapter stores quickly: the layout of `adapters.format.store` without its syncs.

Names may share files by hard links. To the engine an adapter is a name and a revision, so each is
read, prepared and given its own slot.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adapters.backbone.model import Backbone, random_adapter, random_of
from adapters.format.files import Adapter, serialize
from adapters.format.spec import AdapterSpec
from service.engine.interface import AdapterKey

# For making random adapters: drawing random numbers releases the GIL.
_THREADS = 8


def stock(root: Path, backbone: Backbone, *, names: int, distinct: int) -> list[AdapterKey]:
    """Store `names` adapters of the shape that `train fit` gives by default.

    Args:
        distinct: how many different files there are; the names use them in turns.
    """
    return stock_of(root, [random_adapter(backbone).spec], names=names, distinct=distinct)


def stock_of(
    root: Path, specs: Sequence[AdapterSpec], *, names: int, distinct: int
) -> list[AdapterKey]:
    """The same with random adapters of other specs, in turns."""

    def make(index: int) -> Adapter:
        return random_of(specs[index % len(specs)], seed=index)

    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool, _one_thread_each():
        firsts = list(pool.map(lambda seed: _write(root, make, seed), range(min(names, distinct))))
    keys = list(firsts)
    for index in range(len(firsts), names):
        first = firsts[index % len(firsts)]
        key = AdapterKey(_name(index), first.revision)
        folder = root / key.name
        folder.mkdir()
        os.link(_file(root, first), _file(root, key))
        (folder / "current").write_text(f"{key.revision}\n")
        keys.append(key)
    return keys


@contextmanager
def stocked(
    backbone: Backbone, *, names: int, distinct: int
) -> Iterator[tuple[Path, list[AdapterKey]]]:
    """A filled store, removed after the block."""
    with TemporaryDirectory(prefix="idspam-store-") as folder:
        yield Path(folder), stock(Path(folder), backbone, names=names, distinct=distinct)


@contextmanager
def stocked_of(
    specs: Sequence[AdapterSpec], *, names: int, distinct: int
) -> Iterator[tuple[Path, list[AdapterKey]]]:
    """The same with random adapters of other specs, in turns."""
    with TemporaryDirectory(prefix="idspam-store-") as folder:
        yield Path(folder), stock_of(Path(folder), specs, names=names, distinct=distinct)


def _write(root: Path, make: Callable[[int], Adapter], seed: int) -> AdapterKey:
    data = serialize(make(seed))
    key = AdapterKey(_name(seed), hashlib.sha256(data).hexdigest())
    (root / key.name).mkdir()
    _file(root, key).write_bytes(data)
    (root / key.name / "current").write_text(f"{key.revision}\n")
    return key


def _file(root: Path, key: AdapterKey) -> Path:
    return root / key.name / f"{key.revision}.safetensors"


def _name(index: int) -> str:
    return f"task-{index:05d}"


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
