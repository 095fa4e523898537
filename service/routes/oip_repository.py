"""Open Inference Protocol V2: which models there are, load and unload. Knows no tensor."""

from fastapi import APIRouter

router = APIRouter()
