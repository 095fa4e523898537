"""How long a thread waits for the interpreter: less while adapters are loaded.

Python takes the interpreter away after 5 ms from a thread that does not give it up by itself. A
load has a handful of steps outside of the interpreter, each shorter than a millisecond, and waits
after each of them. While there is a load, Python takes it away after 1 ms: a load then takes half
as long, and batches take as long as before.
"""

import sys

_SECONDS = 0.001
_USUAL_SECONDS = sys.getswitchinterval()


class Promptness:
    """Counts one engine's loads. All calls come from one event loop; the interval is the process's.

    Where a process has several engines, the last one that changed it has set it.
    """

    def __init__(self) -> None:
        self._loads = 0

    def begin(self) -> None:
        """A load begins."""
        self._loads += 1
        if self._loads == 1:
            sys.setswitchinterval(min(_USUAL_SECONDS, _SECONDS))

    def end(self) -> None:
        """A load has ended."""
        self._loads -= 1
        assert self._loads >= 0
        if self._loads == 0:
            sys.setswitchinterval(_USUAL_SECONDS)
