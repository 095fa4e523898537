"""Open Inference Protocol V2: server, metadata, ready, infer. Knows no tensor's bytes."""

from fastapi import APIRouter
from starlette.responses import Response

from service.routes.errors import Refusal

router = APIRouter()


def shape(refusal: Refusal) -> Response:
    """The protocol's errors are one sentence; what the details list is part of it."""
    return refusal.response({"error": refusal.message})
