"""A typed client of the service: blocking and awaited. Needs neither torch nor fastapi.

shapes      what crosses                        errors    what a call can fail with
calls       what each method sends              retries   whether and when it is sent again
exchange    one call, without input or output   portions  any number of inputs -> requests
wire        exchanges over httpx                blocking, awaited   Client, AsyncClient
"""

from service.client.aio import AsyncClient
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
from service.client.retrying import Retries
from service.client.sync import Client
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterSummary,
    Answer,
    Health,
    Input,
    Published,
    Result,
    Score,
    Timings,
    TokenWeight,
)

__all__ = [
    "AdapterDetail",
    "AdapterFile",
    "AdapterSummary",
    "Answer",
    "AsyncClient",
    "Busy",
    "Client",
    "ClientError",
    "Closed",
    "Conflict",
    "Failed",
    "Health",
    "Input",
    "InvalidCall",
    "NotAllowed",
    "NotFound",
    "Published",
    "Refused",
    "Rejected",
    "Result",
    "Retries",
    "Score",
    "Timings",
    "TokenWeight",
    "UnexpectedAnswer",
    "Unreachable",
]
