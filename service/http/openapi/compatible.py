"""OpenAPI entries for the routes of other protocols: an example of each body.

Their own projects describe them in full; docs/protocols.md and docs/oip.md say what differs here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from service.http.openapi.documentation import Responses, entry, json_body, response
from service.http.openapi.examples import REVISION

_TEXTS = ["WINNER!! Call now to claim your free prize", "see you at eight"]
_UNKNOWN = {"error": "no adapter is named 'spam'; known: banking77, sms-spam"}
_UNLOADED = "adapter 'sms-spam' is unloaded: load it, or publish it again"
_NO_ADMIN_KEY = {"error": "changing adapters asks for an admin key"}


def _entry(
    tag: str,
    *,
    requests: Mapping[str, Any] | None = None,
    answer: Any = None,
    errors: Mapping[int, Any] | None = None,
) -> dict[str, Any]:
    """
    Args:
        requests: by name; None for a route without a body.
        errors: by status.
    """
    shown: Responses = {
        status: response("An error in the protocol's own shape", error)
        for status, error in (errors or {}).items()
    }
    request = None if requests is None else json_body(requests)
    return entry(tag, request=request, answer=answer, errors=shown)


_tei = partial(_entry, "Text Embeddings Inference")
_oip = partial(_entry, "Open Inference Protocol")

TEI_PREDICT = _tei(
    requests={
        "one text": {"inputs": "WINNER!! Call now"},
        "a pair": {"inputs": ["a premise", "its hypothesis"]},
        "a batch": {"inputs": [["WINNER!! Call now"], ["see you at eight"]], "truncate": True},
    },
    answer=[{"score": 0.99, "label": "spam"}, {"score": 0.01, "label": "ham"}],
    errors={
        400: {"error": "inputs: empty, expected at least one text", "error_type": "Empty"},
        422: {"error": "inputs: 3 strings, expected one or a pair", "error_type": "Validation"},
        424: {"error": "the scores are not finite", "error_type": "Backend"},
        429: {"error": "262000 tokens are waiting", "error_type": "Overloaded"},
        503: {"error": "warming up", "error_type": "Unhealthy"},
    },
)
TEI_INFO = _tei(
    answer={
        "model_id": "all-MiniLM-L6-v2",
        "served_model_name": "sms-spam",
        "model_type": {
            "classifier": {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}
        },
        "max_input_length": 256,
    }
)
TEI_HEALTH = _tei(errors={503: {"error": "unhealthy", "error_type": "unhealthy"}})

VLLM_CLASSIFY = _entry(
    "vLLM",
    requests={"two texts": {"model": "sms-spam", "input": ["WINNER!! Call now", "see you"]}},
    answer={
        "id": "classify-5f2c8a0e4d3b1f6a",
        "object": "list",
        "created": 1790000000,
        "model": "sms-spam",
        "data": [{"index": 0, "label": "spam", "probs": [0.01, 0.99], "num_classes": 2}],
        "usage": {
            "prompt_tokens": 9,
            "total_tokens": 9,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    },
    errors={
        404: {
            "error": {
                "message": "no adapter 'spam'",
                "type": "NotFoundError",
                "param": None,
                "code": 404,
            }
        }
    },
)

OIP_SERVER = _oip(
    answer={
        "name": "id-spam-service",
        "version": "0.5.0",
        "extensions": ["binary_tensor_data", "classification", "model_repository", "parameters"],
    }
)
OIP_LIVE = _oip(answer={"live": True}, errors={503: {"live": False, "error": "it is dead"}})
OIP_READY = _oip(answer={"ready": True}, errors={503: {"ready": False, "error": "warming up"}})
OIP_MODELS = _oip(answer={"models": ["banking77", "sms-spam"]})
OIP_MODEL = _oip(
    answer={
        "name": "sms-spam",
        "versions": [REVISION],
        "platform": "idspam_safetensors",
        "inputs": [
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
            {"name": "text_pair", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "probs", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "truncated", "datatype": "BOOL", "shape": [-1]},
            {"name": "tokens", "datatype": "INT32", "shape": [-1]},
        ],
    },
    errors={404: _UNKNOWN, 409: {"error": _UNLOADED}},
)
OIP_MODEL_READY = _oip(
    answer={"name": "sms-spam", "ready": True},
    errors={400: {"name": "sms-spam", "ready": False, "error": _UNLOADED}, 404: _UNKNOWN},
)
OIP_INFER = _oip(
    requests={
        "two texts": {
            "id": "42",
            "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": _TEXTS}],
        },
        "a pair, by its best class": {
            "inputs": [
                {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a premise"]},
                {"name": "text_pair", "shape": [1], "datatype": "BYTES", "data": ["a hypothesis"]},
            ],
            "outputs": [{"name": "probs", "parameters": {"classification": 1}}],
            "parameters": {"timeout": 2000000, "truncate": False},
        },
    },
    answer={
        "model_name": "sms-spam",
        "model_version": REVISION,
        "id": "42",
        "outputs": [
            {"name": "label", "shape": [2], "datatype": "BYTES", "data": ["spam", "ham"]},
            {"name": "probs", "shape": [2, 2], "datatype": "FP32", "data": [0.3, 0.7, 1.0, 0.0]},
        ],
    },
    errors={
        400: {"error": "input 'text': 3 elements, its shape says 2"},
        404: _UNKNOWN,
        409: {"error": _UNLOADED},
        429: {"error": "262000 tokens are waiting, at most 262144 may"},
        503: {"error": "warming up"},
        504: {"error": "the deadline passed before the answer was there"},
    },
)
OIP_INDEX = _oip(
    requests={"all": {}, "those that can be asked": {"ready": True}},
    answer=[
        {"name": "banking77", "version": REVISION, "state": "READY", "reason": ""},
        {"name": "sms-spam", "version": REVISION, "state": "UNAVAILABLE", "reason": _UNLOADED},
    ],
)
OIP_LOAD = _oip(
    requests={
        "what the store has": {},
        "a file": {"parameters": {"config": "{}", "file:1/adapter.safetensors": "<base64>"}},
    },
    answer={"name": "sms-spam", "load": True},
    errors={
        400: {"error": "not a valid adapter: tensor head.out.bias: missing, expected shape [2]"},
        403: _NO_ADMIN_KEY,
        404: _UNKNOWN,
        409: {"error": "made for another backbone: made for 'roberta-large', ..."},
    },
)
OIP_UNLOAD = _oip(
    requests={"as Triton's client": {"parameters": {"unload_dependents": False}}},
    answer={"name": "sms-spam", "unload": True},
    errors={403: _NO_ADMIN_KEY, 404: _UNKNOWN},
)
