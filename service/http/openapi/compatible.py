"""The OpenAPI page's entries for the routes of other protocols: an example of each body.

Their full descriptions are those of their own projects; docs/protocols.md says what differs here.
"""

from collections.abc import Mapping
from typing import Any

TEI, VLLM = "Text Embeddings Inference", "vLLM"


def entry(
    tag: str,
    *,
    requests: Mapping[str, Any] | None = None,
    answer: Any = None,
    errors: Mapping[int, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator, from examples.

    Args:
        requests: by name; None for a route without a body.
        answer: None for an empty body.
        errors: by status.
    """
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "As asked"}}
    if answer is not None:
        responses[200]["content"] = {"application/json": {"example": answer}}
    for status, error in (errors or {}).items():
        responses[status] = {
            "description": "An error in the protocol's own shape",
            "content": {"application/json": {"example": error}},
        }
    found: dict[str, Any] = {"tags": [tag], "responses": responses}
    if requests is not None:
        examples = {name: {"value": value} for name, value in requests.items()}
        content = {"schema": {"type": "object"}, "examples": examples}
        body = {"required": True, "content": {"application/json": content}}
        found["openapi_extra"] = {"requestBody": body}
    return found


_SINGLE = [{"score": 0.99, "label": "spam"}, {"score": 0.01, "label": "ham"}]

TEI_PREDICT = entry(
    TEI,
    requests={
        "one text": {"inputs": "WINNER!! Call now"},
        "a pair": {"inputs": ["a premise", "its hypothesis"]},
        "a batch": {"inputs": [["WINNER!! Call now"], ["see you at eight"]], "truncate": True},
    },
    answer=_SINGLE,
    errors={
        400: {"error": "inputs: empty, expected at least one text", "error_type": "Empty"},
        422: {
            "error": "inputs: 3 strings, expected one or a pair",
            "error_type": "Validation",
        },
        424: {"error": "the scores are not finite", "error_type": "Backend"},
        429: {"error": "262000 tokens are waiting", "error_type": "Overloaded"},
        503: {"error": "warming up", "error_type": "Unhealthy"},
    },
)
TEI_INFO = entry(
    TEI,
    answer={
        "model_id": "all-MiniLM-L6-v2",
        "served_model_name": "sms-spam",
        "model_type": {
            "classifier": {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}
        },
        "max_input_length": 256,
    },
)
TEI_HEALTH = entry(TEI, errors={503: {"error": "unhealthy", "error_type": "unhealthy"}})

VLLM_CLASSIFY = entry(
    VLLM,
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
