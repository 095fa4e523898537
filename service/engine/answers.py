"""What the engine tells of every request that it has answered."""

from collections.abc import Sequence

from service.engine.interface import Entry, RowResult


class AnswerListener:
    """Hears of answers; this class ignores them.

    Called on the event loop while a request waits: it takes microseconds and never raises.
    """

    def answered(
        self,
        entries: Sequence[Entry],  # noqa: ARG002
        rows: Sequence[RowResult],  # noqa: ARG002
    ) -> tuple[int, ...]:
        """A request's texts were answered. Returns the indices of those that shall be kept, which
        only the HTTP side can do: the engine has no texts, only tokens."""
        return ()
