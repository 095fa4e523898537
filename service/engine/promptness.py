"""How long a thread waits for the interpreter: less while that would hold up the device.

Python takes the interpreter away after 5 ms from a thread that does not give it up by itself. A
thread whose work is many short steps outside of the interpreter may wait so long after each step.
There are two such threads:

- One that loads an adapter. With turns of 1 ms a load takes half as long, and batches take as long
  as before.
- One that runs a batch, where the event loop of the same process answers HTTP. Under a flood of
  requests each operation of a layer waited: with turns of 5 ms a batch took ten times as long, and
  requests that had been admitted missed their deadlines (docs/processes.md).

The interval is the process's, so the shortest one that is asked for now counts.
"""

import sys
from collections import Counter
from threading import Lock

LOADING_SECONDS = 0.001
BESIDE_HTTP_SECONDS = 0.0002

_usual_seconds = sys.getswitchinterval()
_asked: Counter[float] = Counter()
_lock = Lock()


def shorten_turns(seconds: float) -> None:
    """Take the interpreter away after at most so long, until `restore_turns` is called with it."""
    with _lock:
        _asked[seconds] += 1
        _apply()


def restore_turns(seconds: float) -> None:
    """One caller of `shorten_turns` needs it no longer."""
    with _lock:
        _asked[seconds] -= 1
        assert _asked[seconds] >= 0
        _apply()


def _apply() -> None:
    sys.setswitchinterval(min([_usual_seconds, *+_asked]))
