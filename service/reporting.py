"""What the HTTP side reports of itself, whoever counts it. Knows no metrics library.

`service.metrics.Metrics` counts it in this process; in a worker `service.processes.relay.Relay`
passes it on to the process that does.
"""

from typing import Literal, Protocol

Outcome = Literal[
    "success",
    "client_error",
    "overloaded",
    "deadline",
    "unavailable",
    "server_error",
    "disconnected",
]
UploadOutcome = Literal["created", "replaced", "unchanged", "refused", "failed"]


class Reporter(Protocol):
    """Told by the routes, on the way of every request: takes microseconds and never raises."""

    def request_done(
        self, route: str, outcome: Outcome, *, seconds: float, error: str | None = None
    ) -> None:
        """A request was answered or given up; called exactly once for each."""

    def tokenized(self, seconds: float, *, truncated: int) -> None:
        """A request's texts were turned into tokens; so many of them had to be cut."""

    def predicted(self, adapter: str, label: str, count: int = 1) -> None:
        """Texts were answered; not counted if their adapter was deleted meanwhile."""

    def adapter_failed(self, adapter: str, count: int) -> None:
        """Texts of an adapter got an error that is not the caller's; as `predicted` otherwise."""

    def uploaded(self, outcome: UploadOutcome) -> None:
        """An upload came to an end."""

    async def scrape(self) -> bytes:
        """Everything counted anywhere in the service, in Prometheus' text format.

        Raises:
            Unavailable: who counts does not answer.
        """
