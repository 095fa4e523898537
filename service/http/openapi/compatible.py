"""OpenAPI entries for the routes of other protocols; `compatible.json` has an example of each body.

Their own projects describe them in full; docs/protocols.md and docs/oip.md say what differs here.
"""

import json
from pathlib import Path
from typing import Any

from service.http.openapi.documentation import Responses, entry, json_body, response

_EXAMPLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def _entry(name: str) -> dict[str, Any]:
    """A route's entry. Its example has a tag, and as far as the route has them: requests by name,
    an answer, errors by status."""
    example = _EXAMPLES[name]
    errors: Responses = {
        int(status): response("An error in the protocol's own shape", body)
        for status, body in example.get("errors", {}).items()
    }
    request = json_body(example["requests"]) if "requests" in example else None
    return entry(example["tag"], request=request, answer=example.get("answer"), errors=errors)


TEI_PREDICT = _entry("tei_predict")
TEI_INFO = _entry("tei_info")
TEI_HEALTH = _entry("tei_health")
VLLM_CLASSIFY = _entry("vllm_classify")
OIP_SERVER = _entry("oip_server")
OIP_LIVE = _entry("oip_live")
OIP_READY = _entry("oip_ready")
OIP_MODELS = _entry("oip_models")
OIP_MODEL = _entry("oip_model")
OIP_MODEL_READY = _entry("oip_model_ready")
OIP_INFER = _entry("oip_infer")
OIP_INDEX = _entry("oip_index")
OIP_LOAD = _entry("oip_load")
OIP_UNLOAD = _entry("oip_unload")
