"""What Triton's client gets from a service: `python triton_client.py HOST:PORT ADAPTER_FILE`.

Runs in the environment of .ci/clients.py, without this project. Prints one JSON object, which
tests/http/test_oip_clients.py checks.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import (
    InferenceServerException,
)

SPAM, HAM = "WINNER!! Call now to claim your free prize", "see you at eight"


def main(url: str, file: Path) -> dict[str, Any]:
    with triton.InferenceServerClient(url) as client:
        answers: dict[str, Any] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "server": client.get_server_metadata(),
            "model": client.get_model_metadata("sms-spam"),
            "model ready": client.is_model_ready("sms-spam"),
            "unknown ready": client.is_model_ready("no-such"),
            "index": client.get_model_repository_index(),
        }
        answers |= _answers(client) | _refusals(client)
        answers["asynchronous"] = _together(url)
        answers["life"] = _life(client, file)
        return answers


def _answers(client: Any) -> dict[str, Any]:
    one = [_tensor("text", [SPAM])]
    two = [_tensor("text", [SPAM, HAM])]
    pairs = [_tensor("text", [SPAM, HAM]), _tensor("text_pair", [HAM, ""])]
    answer = client.infer("sms-spam", two, request_id="42")
    (version,) = client.get_model_metadata("sms-spam")["versions"]
    every = [triton.InferRequestedOutput(name) for name in ("tokens", "truncated", "probs")]
    plain = [triton.InferRequestedOutput(name, binary_data=False) for name in ("label", "probs")]
    best = [triton.InferRequestedOutput("probs", class_count=1)]
    long = [_tensor("text", [SPAM, "card " * 2000])]
    return {
        "one": _outputs(client.infer("sms-spam", one)),
        "two": _outputs(answer),
        "response": answer.get_response(),
        "as JSON": _outputs(client.infer("sms-spam", [_tensor("text", [SPAM, HAM], binary=False)])),
        "answered as JSON": _outputs(client.infer("sms-spam", two, outputs=plain)),
        "columns": _outputs(client.infer("sms-spam", [_tensor("text", [[SPAM], [HAM]])])),
        "pairs": _outputs(client.infer("sms-spam", pairs)),
        "pairs in one": _outputs(
            client.infer("sms-spam", [_tensor("text", [[SPAM, HAM], [HAM, ""]])])
        ),
        "pinned": _outputs(client.infer("sms-spam", two, model_version=version[:12])),
        "best": client.infer("sms-spam", two, outputs=best).as_numpy("probs").tolist(),
        "truncated": _outputs(client.infer("sms-spam", long, outputs=every)),
        "truncated response": client.infer("sms-spam", long).get_response().get("parameters"),
        "parameters": _outputs(
            client.infer(
                "sms-spam", two, priority=1, sequence_id=7, timeout=5_000_000, parameters={"x": "y"}
            )
        ),
        "many": client.infer("banking77", [_tensor("text", [HAM] * 64)]).as_numpy("probs").shape,
    } | {
        f"{sent} and {back}": _outputs(
            client.infer(
                "sms-spam",
                two,
                request_compression_algorithm=sent,
                response_compression_algorithm=back,
            )
        )
        for sent in ("gzip", "deflate")
        for back in ("gzip", "deflate")
    }


def _together(url: str) -> list[Any]:
    """Concurrent requests, each on its own connection."""
    with triton.InferenceServerClient(url, concurrency=4) as client:
        tensors = [_tensor("text", [SPAM, HAM])]
        waiting = [client.async_infer("sms-spam", tensors) for _ in range(4)]
        return [_outputs(item.get_result()) for item in waiting]


def _refusals(client: Any) -> dict[str, Any]:
    one = [_tensor("text", [SPAM])]
    wrong = triton.InferInput("text", [1], "FP32")
    wrong.set_data_from_numpy(np.zeros(1, np.float32))
    shared = triton.InferInput("text", [1], "BYTES")
    shared.set_shared_memory("region", 64)
    other = _tensor("text", [SPAM, HAM])
    other.set_shape([3])
    bytes_ = triton.InferInput("text", [1], "BYTES")
    bytes_.set_data_from_numpy(np.array([b"\xff\xfe"], dtype=np.object_))
    unknown = [triton.InferRequestedOutput("logits")]
    cases: dict[str, Callable[[], Any]] = {
        "unknown model": lambda: client.infer("no-such", one),
        "unknown version": lambda: client.infer("sms-spam", one, model_version="ff00ff"),
        "wrong datatype": lambda: client.infer("sms-spam", [wrong]),
        "wrong shape": lambda: client.infer("sms-spam", [other]),
        "not UTF-8": lambda: client.infer("sms-spam", [bytes_]),
        "shared memory": lambda: client.infer("sms-spam", [shared]),
        "unknown input": lambda: client.infer("sms-spam", [_tensor("texts", [SPAM])]),
        "unknown output": lambda: client.infer("sms-spam", one, outputs=unknown),
        "no input": lambda: client.infer("sms-spam", []),
        "no text": lambda: client.infer("sms-spam", [_tensor("text", [])]),
        "too many": lambda: client.infer("sms-spam", [_tensor("text", [""] * 1025)]),
        "too long": lambda: client.infer(
            "sms-spam", [_tensor("text", ["card " * 2000])], parameters={"truncate": False}
        ),
        "unknown metadata": lambda: client.get_model_metadata("no-such"),
        "unknown load": lambda: client.load_model("no-such"),
        "unknown unload": lambda: client.unload_model("no-such"),
        "no adapter": lambda: client.load_model(
            "new", config="{}", files={"file:1/model.onnx": b"\x08\x07"}
        ),
        "a configuration": lambda: client.load_model("sms-spam", config='{"backend": "onnx"}'),
    }
    return {"refused": {name: _refusal(call) for name, call in cases.items()}}


def _life(client: Any, file: Path) -> list[Any]:
    """Unload, load, and publish a file under a new name."""
    one = [_tensor("text", [SPAM])]

    def state() -> Any:
        index = client.get_model_repository_index()
        states = {item["name"]: (item["state"], item["reason"]) for item in index}
        return states.get("sms-spam"), client.is_model_ready("sms-spam"), states.get("copy")

    steps = [state()]
    client.unload_model("sms-spam")
    steps += [state(), _refusal(lambda: client.infer("sms-spam", one))]
    client.load_model("sms-spam")
    steps += [state(), _outputs(client.infer("sms-spam", one))]
    client.load_model("copy", config="{}", files={"file:1/x.safetensors": file.read_bytes()})
    steps += [state(), _outputs(client.infer("copy", one))]
    client.unload_model("copy", unload_dependents=True)
    return [*steps, state()]


def _tensor(name: str, texts: Sequence[Any], *, binary: bool = True) -> Any:
    values = np.array(texts, dtype=np.object_)
    tensor = triton.InferInput(name, list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def _outputs(answer: Any) -> dict[str, Any]:
    """Every output as a list."""
    outputs = {}
    for output in answer.get_response()["outputs"]:
        values = answer.as_numpy(output["name"])
        flat = [item.decode() if isinstance(item, bytes) else item for item in values.ravel()]
        shown = np.array(flat, dtype=object).reshape(values.shape).tolist()
        outputs[output["name"]] = shown if values.dtype == object else values.tolist()
    return outputs


def _refusal(call: Callable[[], Any]) -> tuple[str, str] | None:
    """Status and message."""
    try:
        call()
    except InferenceServerException as error:
        return error.status(), error.message()
    return None


if __name__ == "__main__":
    json.dump(main(sys.argv[1], Path(sys.argv[2])), sys.stdout, default=lambda item: item.decode())
