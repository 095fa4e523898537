"""A plain LitServe server around a text classifier: `litserve_app.py MODEL DTYPE PORT`.

Runs in LitServe's own environment, so it imports nothing from this tree. A request is a list of
texts; LitServe batches the requests that arrive within its time-out.
"""

import sys
from typing import Any

import torch
from litserve import LitAPI, LitServer  # type: ignore[import-not-found]  # not installed here
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# As many requests as there are connections; LitServe's own guide uses this time-out.
MAX_BATCH_SIZE = 32
BATCH_SECONDS = 0.01


class Classifier(LitAPI):  # type: ignore[misc]  # untyped where LitServe is not installed
    """Takes texts, returns the probability of each label."""

    def __init__(self, model: str, dtype: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_SECONDS)
        self._name, self._dtype = model, dtype

    def setup(self, device: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(self._name)
        model = AutoModelForSequenceClassification.from_pretrained(
            self._name, dtype=getattr(torch, self._dtype)
        )
        self._model = model.eval().to(device)

    def decode_request(self, request: dict[str, Any]) -> list[str]:
        return list(request["input"])

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    @torch.inference_mode()
    def predict(self, requests: list[list[str]]) -> list[list[dict[str, float]]]:
        texts = [text for request in requests for text in request]
        encoded = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        probabilities = self._model(**encoded.to(self._model.device)).logits.float().softmax(-1)
        labels = self._model.config.id2label
        answers = iter(
            {labels[index]: value for index, value in enumerate(row)}
            for row in probabilities.tolist()
        )
        return [[next(answers) for _ in request] for request in requests]

    def unbatch(self, output: list[list[dict[str, float]]]) -> list[list[dict[str, float]]]:
        return output

    def encode_response(self, output: list[dict[str, float]]) -> dict[str, Any]:
        return {"data": output}


if __name__ == "__main__":
    server = LitServer(Classifier(sys.argv[1], sys.argv[2]), accelerator="cpu", timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[3]), generate_client_file=False, log_level="error"
    )
