"""A typed client of the service, `Client`, and its awaitable twin, `AsyncClient`.

Imports nothing else of the service, so `train` and the commands can use it without a server's
packages. Start with `operations` (what each method sends), then `retry` (when it is sent again).
"""

from typing import TYPE_CHECKING

from service.client.errors import (
    Busy,
    ClientError,
    Closed,
    Conflict,
    Failed,
    InvalidCall,
    NotAllowed,
    NotFound,
    Refused,
    Rejected,
    UnexpectedAnswer,
    Unreachable,
)
from service.client.retry import Retries
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterSummary,
    Answer,
    Card,
    Direction,
    Drift,
    DriftBin,
    DriftQuantity,
    Embeddings,
    Ending,
    ErrorContent,
    Event,
    Explanation,
    Figures,
    Health,
    Input,
    Published,
    Ranked,
    Ranking,
    Read,
    Reading,
    Result,
    RevisionDifference,
    Rule,
    Score,
    SpecialTokens,
    Timings,
    TrafficDetail,
    Unanswered,
    UncertainText,
    UploadReport,
    Version,
    Word,
)

if TYPE_CHECKING:
    from service.client.aio import AsyncClient
    from service.client.sync import Client
else:

    def __getattr__(name: str) -> object:
        """Import the clients, and httpx with them, on first use: types and errors do without."""
        modules = {"AsyncClient": "aio", "Client": "sync"}
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{modules[name]}"), name)


__all__ = [
    "AdapterDetail",
    "AdapterFile",
    "AdapterSummary",
    "Answer",
    "AsyncClient",
    "Busy",
    "Card",
    "Client",
    "ClientError",
    "Closed",
    "Conflict",
    "Direction",
    "Drift",
    "DriftBin",
    "DriftQuantity",
    "Embeddings",
    "Ending",
    "ErrorContent",
    "Event",
    "Explanation",
    "Failed",
    "Figures",
    "Health",
    "Input",
    "InvalidCall",
    "NotAllowed",
    "NotFound",
    "Published",
    "Ranked",
    "Ranking",
    "Read",
    "Reading",
    "Refused",
    "Rejected",
    "Result",
    "Retries",
    "RevisionDifference",
    "Rule",
    "Score",
    "SpecialTokens",
    "Timings",
    "TrafficDetail",
    "Unanswered",
    "UncertainText",
    "UnexpectedAnswer",
    "Unreachable",
    "UploadReport",
    "Version",
    "Word",
]
