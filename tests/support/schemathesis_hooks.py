"""What a JSON Schema cannot say, for schemathesis: files that are adapters, tensors that agree.

Loaded by schemathesis.toml. Every hook changes requests that are meant to be valid, and says which
rule of the service it follows; requests that are meant to be invalid stay as they are.
"""

import base64
import hashlib
import os
from pathlib import Path
from typing import Any, TypeAlias

import schemathesis
from hypothesis import strategies as st

Case: TypeAlias = schemathesis.Case[Any]
Context: TypeAlias = schemathesis.HookContext

# The test writes these files, and publishes the first two under their names.
NAMES = ("sms-spam", "other", "third")
FILES = [
    (Path(os.environ["API_FUZZ_FILES"]) / f"{name}.safetensors").read_bytes() for name in NAMES
]
REVISIONS = [hashlib.sha256(file).hexdigest() for file in FILES]
# Of those adapters.
MAX_LENGTH = 128
# Of the test's backbone.
HIDDEN_SIZE = 32

# Lines of a stream are no JSON document.
_LINES = [
    b'{"text": "see you at eight", "id": "1", "adapter": "sms-spam", "top_k": 1}',
    b'{"text": "", "text_pair": "a pair", "adapter": "other", "explain": true}',
    b'"a text"',
    b'{"text": 1}',
    b"",
    b"{",
]
schemathesis.openapi.media_type(
    "application/x-ndjson", st.lists(st.sampled_from(_LINES), max_size=5).map(b"\n".join)
)
# A schema says that an upload is bytes, but not which bytes are an adapter.
schemathesis.openapi.format("binary", st.sampled_from(FILES))


@schemathesis.hook
def before_add_examples(_: Context, examples: list[Case]) -> None:
    """The document's own example of a file is no adapter: that would be a long example. Those of
    reranking have a label of their own."""
    for case in examples:
        if case.operation.path.endswith("/load"):
            _real_file(case.body)
        if case.operation.path.endswith("/rerank") and isinstance(case.body, dict):
            case.body["label"] = "spam"


@schemathesis.hook
def before_call(_: Context, case: Case, __: dict[str, Any]) -> None:
    """Each request is of another client behind a proxy, which the service trusts. The check of
    wrong keys sends so many that one address would get 429 for most of them."""
    digest = hashlib.sha256(case.id.encode()).digest()
    case.headers["X-Forwarded-For"] = f"10.{digest[0]}.{digest[1]}.{digest[2]}"


@schemathesis.hook
def map_case(_: Context, case: Case) -> Case:
    """Requests that reach an adapter, and whose parts agree."""
    if _is_valid(case):
        # In a chain of requests each one names what those before it have made.
        if case.meta is not None and case.meta.phase.name != "stateful":
            _existing(case)
        if case.operation.path.endswith("/infer"):
            _agreeing(case.body)
        if case.operation.path.endswith("/load"):
            _real_file(case.body)
        if case.operation.path.endswith("/rerank") and isinstance(case.body, dict):
            # A label that the adapters of the test have.
            case.body["label"] = "spam"
        body: Any = case.body
        if isinstance(body, dict) and isinstance(body.get("dimensions"), (int, float)):
            body["dimensions"] = 1 + int(body["dimensions"]) % HIDDEN_SIZE
    return case


@schemathesis.hook
def filter_case(_: Context, case: Case) -> bool:
    """Leave out what depends on the adapter that is asked."""
    body: Any = case.body
    if not _is_valid(case) or not isinstance(body, dict):
        return True
    # Adapters of the test answer by softmax, from which no sigmoid can be computed.
    if (body.get("parameters") or {}).get("function_to_apply") == "sigmoid":
        return False
    # Cutting a text before the end that the adapter reads would give other answers.
    limit = body.get("truncate_prompt_tokens")
    return limit is None or limit == -1 or limit >= MAX_LENGTH


def _is_valid(case: Case) -> bool:
    """Whether a case was made to be accepted."""
    return case.meta is not None and case.meta.generation.mode.is_positive


def _existing(case: Case) -> None:
    """Half of the names, versions and conditions: those of the adapters at the start."""
    for parameters in (case.path_parameters, case.headers):
        for name, value in list(parameters.items()):
            if _coin(value):
                continue
            if name == "version":
                parameters[name] = REVISIONS[len(value) % 2]
            if name == "name" and case.method == "GET":
                parameters[name] = NAMES[len(value) % 2]
            if name == "If-Match":
                parameters[name] = "*"
    if "version" in case.path_parameters and case.path_parameters["version"] in REVISIONS:
        revision = case.path_parameters["version"]
        case.path_parameters["name"] = NAMES[REVISIONS.index(revision)]


def _agreeing(body: Any) -> None:
    """Tensors whose shape is that of their data, all of as many rows; each output once."""
    rows = min(len(tensor["data"]) for tensor in body["inputs"])
    for tensor in body["inputs"]:
        columns = tensor["shape"][1:] or [1]
        flat = [item if isinstance(item, str) else item[0] for item in tensor["data"][:rows]]
        tensor["data"] = [[text] * 2 for text in flat] if columns == [2] else flat
        tensor["shape"] = [rows, *tensor["shape"][1:]]
    if not body.get("outputs"):
        return
    outputs = {output["name"]: output for output in body["outputs"]}
    for name, output in outputs.items():
        if name != "probs" and output.get("parameters"):
            output["parameters"].pop("classification", None)
    body["outputs"] = list(outputs.values())


def _real_file(body: Any) -> None:
    """An adapter where the schema says base64."""
    parameters = (body.get("parameters") or {}) if isinstance(body, dict) else {}
    for name in parameters:
        if name.startswith("file:"):
            parameters[name] = base64.b64encode(FILES[len(parameters) % 3]).decode()


def _coin(value: object) -> bool:
    """The same side for the same value, so that a seed repeats its run."""
    return hashlib.sha256(str(value).encode()).digest()[0] < 128
