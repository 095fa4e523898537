"""OpenAPI entries for the routes of other protocols.

`compatible.json` has, for each entry, an example of each body and the schemas of request and
answer. Their own projects describe them in full; docs/protocols.md and docs/oip.md say what differs
here.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from service.http.error_shapes import ErrorShape, oip_shape, tei_shape, vllm_shape
from service.http.errors import INTERNAL
from service.http.openapi.documentation import REQUEST_KEY, entry, json_body, response
from service.http.openapi.refusals import (
    CHANGE,
    DEFAULT,
    FILE,
    GATE,
    INFERENCE,
    JSON_BODY,
    KEY,
    ROLLOUT,
    SERVED,
    Responses,
    refusals,
)

_ENTRIES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def _entry(name: str, *errors: str, shape: ErrorShape) -> dict[str, Any]:
    """A route's entry.

    Args:
        errors: the types of its errors.
    """
    described = _ENTRIES[name]
    # Answers that say no, without being errors.
    noes: Responses = {
        int(status): response("No, and why", body)
        for status, body in described.get("noes", {}).items()
    }
    request = None
    if "requests" in described:
        request = json_body(described["requests"], schema=described["request_schema"])
    route = entry(
        described["tag"],
        request=request,
        optional=described.get("optional", False),
        # What is classified may be divided between two revisions.
        parameters=(REQUEST_KEY,) if "adapter_load_failed" in errors else (),
        answer=described.get("answer"),
        schema=described.get("answer_schema"),
        errors=_merged(refusals(*errors, shape=shape), noes),
    )
    if described.get("binary"):
        # The same JSON, then the bytes of its tensors.
        content = route["responses"][200]["content"]
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return route


def _merged(errors: Responses, noes: Responses) -> Responses:
    """Both; where they share a status, its body is of either shape."""
    for status in errors.keys() & noes.keys():
        described = f"{noes[status]['description']}. {errors[status]['description']}"
        del errors[status]["model"]
        errors[status]["description"] = described
    return noes | errors


_tei = partial(_entry, shape=tei_shape)
_oip = partial(_entry, shape=oip_shape)

TEI_PREDICT_DEFAULT = _tei("tei_predict", *GATE, *JSON_BODY, *DEFAULT, *INFERENCE)
TEI_PREDICT = _tei("tei_predict", *GATE, *JSON_BODY, *SERVED, *INFERENCE)
TEI_EMBED = _tei("tei_embed", *GATE, *JSON_BODY, "inference_failed", "deadline_exceeded")
TEI_RERANK_DEFAULT = _tei("tei_rerank", *GATE, *JSON_BODY, *DEFAULT, *INFERENCE)
TEI_RERANK = _tei("tei_rerank", *GATE, *JSON_BODY, *SERVED, *INFERENCE)
TEI_INFO_DEFAULT = _tei("tei_info", *GATE, *DEFAULT)
TEI_INFO = _tei("tei_info", *GATE, *SERVED)
TEI_HEALTH = _tei("tei_health")
TEI_ADAPTER_HEALTH = _tei("tei_adapter_health", *GATE, *SERVED)
VLLM_CLASSIFY = _entry("vllm_classify", *GATE, *JSON_BODY, *DEFAULT, *INFERENCE, shape=vllm_shape)
VLLM_RERANK = _entry("vllm_rerank", *GATE, *JSON_BODY, *DEFAULT, *INFERENCE, shape=vllm_shape)
OPENAI_EMBEDDINGS = _entry(
    "openai_embeddings",
    *GATE,
    *JSON_BODY,
    "not_found",
    "inference_failed",
    "deadline_exceeded",
    shape=vllm_shape,
)
OIP_SERVER = _oip("oip_server", *KEY, "quota_exceeded", INTERNAL.type)
OIP_LIVE = _oip("oip_live")
OIP_READY = _oip("oip_ready")
OIP_MODELS = _oip("oip_models", *GATE)
OIP_MODEL = _oip("oip_model", *GATE, *SERVED)
OIP_MODEL_READY = _oip("oip_model_ready", *GATE, *SERVED)
OIP_INFER = _oip("oip_infer", *GATE, *JSON_BODY, *SERVED, *INFERENCE)
OIP_INDEX = _oip("oip_index", *GATE, *JSON_BODY)
OIP_LOAD = _oip("oip_load", *GATE, *JSON_BODY, *SERVED, *FILE, *CHANGE, *ROLLOUT)
OIP_UNLOAD = _oip("oip_unload", *GATE, *JSON_BODY, *SERVED, *CHANGE)
