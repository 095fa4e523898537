"""The OpenAPI page's entries for the routes of the Open Inference Protocol: an example of each."""

from service.http.openapi.compatible import entry
from service.http.openapi.examples import REVISION

_SPAM = "WINNER!! Call now to claim your free prize"
OIP = "Open Inference Protocol"

_NOT_FOUND = {"error": "no adapter is named 'spam'; known: banking77, sms-spam"}
_UNLOADED = "adapter 'sms-spam' is unloaded: load it, or publish it again"

SERVER = entry(
    OIP,
    answer={
        "name": "id-spam-service",
        "version": "0.5.0",
        "extensions": ["binary_tensor_data", "classification", "model_repository", "parameters"],
    },
)
LIVE = entry(OIP, answer={"live": True}, errors={503: {"live": False, "error": "it is dead"}})
READY = entry(OIP, answer={"ready": True}, errors={503: {"ready": False, "error": "warming up"}})
MODELS = entry(OIP, answer={"models": ["banking77", "sms-spam"]})
MODEL = entry(
    OIP,
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
    errors={404: _NOT_FOUND, 409: {"error": _UNLOADED}},
)
MODEL_READY = entry(
    OIP,
    answer={"name": "sms-spam", "ready": True},
    errors={400: {"name": "sms-spam", "ready": False, "error": _UNLOADED}, 404: _NOT_FOUND},
)
INFER = entry(
    OIP,
    requests={
        "two texts": {
            "id": "42",
            "inputs": [
                {
                    "name": "text",
                    "shape": [2],
                    "datatype": "BYTES",
                    "data": [_SPAM, "see you at eight"],
                }
            ],
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
        404: _NOT_FOUND,
        409: {"error": _UNLOADED},
        429: {"error": "262000 tokens are waiting, at most 262144 may"},
        503: {"error": "warming up"},
        504: {"error": "the deadline passed before the answer was there"},
    },
)
INDEX = entry(
    OIP,
    requests={"all": {}, "those that can be asked": {"ready": True}},
    answer=[
        {"name": "banking77", "version": REVISION, "state": "READY", "reason": ""},
        {"name": "sms-spam", "version": REVISION, "state": "UNAVAILABLE", "reason": _UNLOADED},
    ],
)
LOAD = entry(
    OIP,
    requests={
        "what the store has": {},
        "a file": {"parameters": {"config": "{}", "file:1/adapter.safetensors": "<base64>"}},
    },
    answer={"name": "sms-spam", "load": True},
    errors={
        400: {"error": "not a valid adapter: tensor head.out.bias: missing, expected shape [2]"},
        403: {"error": "changing adapters asks for an admin key"},
        404: _NOT_FOUND,
        409: {"error": "made for another backbone: made for 'roberta-large', ..."},
    },
)
UNLOAD = entry(
    OIP,
    requests={"as Triton's client": {"parameters": {"unload_dependents": False}}},
    answer={"name": "sms-spam", "unload": True},
    errors={403: {"error": "changing adapters asks for an admin key"}, 404: _NOT_FOUND},
)
