"""The stores that replicas share in a benchmark, and how long each call to one takes."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from adapters.shared.log import SharedLog, entry_key
from adapters.shared.objects import ObjectStore, object_key
from adapters.shared.records import ReplicaState
from benchmarks.rollout_model import Seconds, Steps
from tests.support.s3_server import BUCKET, environment, s3_server

STORES = ("folder", "s3")
# How many replicas' states are read.
STATES = (1, 4, 16, 64, 256, 1000)


@contextmanager
def shared_store(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty store. For `s3` this process and its children find the server through the
    environment, as they would find Amazon's."""
    if kind == "folder":
        (folder / "shared").mkdir()
        yield str(folder / "shared")
        return
    # The server of the tests: its conditional writes are atomic, as those of S3 are.
    with s3_server() as endpoint:
        before = dict(os.environ)
        os.environ.update(environment(endpoint))
        try:
            yield f"s3://{BUCKET}/adapters"
        finally:
            os.environ.clear()
            os.environ.update(before)


def measured(url: str, content: bytes, warm: Seconds, *, samples: int = 50) -> Steps:
    """Time every call that a roll-out makes, one after the other on a store that is otherwise idle.

    Args:
        url: of a store that no service uses.
        content: an adapter's file.
        warm: seconds of checking and trying it, measured elsewhere.
    """
    store = ObjectStore(url, timeout=60.0)
    log = SharedLog(store)

    def timed(call: Callable[[int], object], count: int = samples) -> Seconds:
        # The first call opens connections.
        call(-1)
        seconds = []
        for index in range(count):
            began = time.perf_counter()
            call(index)
            seconds.append(time.perf_counter() - began)
        return np.array(seconds)

    revisions = [secrets.token_hex(32) for _ in range(samples + 1)]
    entry = b'{"format":1,"name":"measured"}' + b" " * 1000
    upload = timed(lambda index: store.create(object_key(revisions[index]), content))
    fetch = timed(lambda index: store.get(object_key(revisions[index]), size=len(content)))
    create = timed(lambda _: store.create(f"log/{secrets.token_hex(6)}.json", entry))
    # Where nothing is new, the next number does not exist.
    read = timed(lambda index: store.get(entry_key(10**9 + index)))
    put = timed(lambda _: log.write_state(ReplicaState("measured", beat=1, applied=1)))
    states: dict[int, Seconds] = {}
    log.remove_state("measured")
    written = 0
    for count in STATES:
        for number in range(written, count):
            log.write_state(ReplicaState(f"replica-{number}", beat=1, applied=1))
        written = count
        states[count] = timed(lambda _: log.states(), max(5, samples // count))
    return Steps(upload, create, put, read, fetch, warm, states)
