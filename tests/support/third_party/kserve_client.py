"""What KServe's SDK gets from a service: `python kserve_client.py URL`.

Runs in the environment of .ci/clients.py, without this project. Prints one JSON object, which
tests/http/test_oip_clients.py checks.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Sequence
from typing import Any

import httpx
import numpy as np
from kserve import (
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.infer_type import (
    RequestedOutput,
)

SPAM, HAM = "WINNER!! Call now to claim your free prize", "see you at eight"


async def main(url: str) -> dict[str, Any]:
    config = RESTConfig(protocol="v2", retries=0)
    async with InferenceRESTClient(config) as client:
        texts = [_tensor("text", [SPAM, HAM])]
        answers: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model ready": await client.is_model_ready(url, "sms-spam"),
            "unknown ready": await client.is_model_ready(url, "no-such"),
        }
        cases = {
            "one": [_tensor("text", [SPAM])],
            "two": texts,
            "plain lists": [InferInput("text", [2], "BYTES", data=[SPAM, HAM])],
            "nested lists": [InferInput("text", [2, 1], "BYTES", data=[[SPAM], [HAM]])],
            "as JSON": [_tensor("text", [SPAM, HAM], binary=False)],
            "pairs": [_tensor("text", [SPAM, HAM]), _tensor("text_pair", [HAM, ""])],
            "pairs in one": [_tensor("text", [[SPAM, HAM], [HAM, ""]])],
        }
        for name, inputs in cases.items():
            request = InferRequest("sms-spam", inputs, request_id=name)
            answers[name] = _outputs(await client.infer(url, request, model_name="sms-spam"))
            binary = InferRequest(
                "sms-spam", inputs, request_id=name, parameters={"binary_data_output": True}
            )
            answers[f"{name}, binary"] = _outputs(
                await client.infer(url, binary, model_name="sms-spam")
            )
        every = [
            RequestedOutput(name, {"binary_data": name != "tokens"})
            for name in ("truncated", "tokens", "probs", "label")
        ]
        request = InferRequest("sms-spam", texts, request_outputs=every)
        answers["every output"] = _outputs(await client.infer(url, request, model_name="sms-spam"))
        many = InferRequest("banking77", [_tensor("text", [HAM] * 64)])
        replies = await asyncio.gather(
            *(client.infer(url, many, model_name="banking77") for _ in range(4))
        )
        answers["many"] = [reply.get_output_by_name("probs").shape for reply in replies]
        answers["refused"] = {
            "unknown model": await _refusal(client.infer(url, request, model_name="no-such")),
            "wrong shape": await _refusal(
                client.infer(
                    url,
                    InferRequest("sms-spam", [InferInput("text", [3], "BYTES", data=[SPAM])]),
                    model_name="sms-spam",
                )
            ),
            "wrong datatype": await _refusal(
                client.infer(
                    url,
                    InferRequest("sms-spam", [InferInput("text", [1], "INT64", data=[1])]),
                    model_name="sms-spam",
                )
            ),
        }
        return answers


def _tensor(name: str, texts: Sequence[Any], *, binary: bool = True) -> Any:
    values = np.array(texts, dtype=np.object_)
    tensor = InferInput(name, list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def _outputs(answer: Any) -> dict[str, Any]:
    """Every output as a list, and the request's id."""
    outputs: dict[str, Any] = {
        item.name: np.array(item.data).reshape(item.shape).tolist() for item in answer.outputs
    }
    return outputs | {"id": answer.id, "model": answer.model_name}


async def _refusal(call: Awaitable[Any]) -> tuple[int, str] | None:
    """Status and message."""
    try:
        await call
    except httpx.HTTPStatusError as error:
        return error.response.status_code, str(error)
    return None


if __name__ == "__main__":
    json.dump(asyncio.run(main(sys.argv[1])), sys.stdout)
