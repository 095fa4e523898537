"""vLLM's routes of classification and reranking, for its clients: `model` names the adapter.

Its reranking is that of Jina and Cohere.
"""

from time import monotonic, time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, NoInputs, TooLarge
from service.http.answer_size import AnswerShape
from service.http.bodies import JsonResponse, in_json, read_as
from service.http.classify import classify, note_headers
from service.http.lifecycle import Service, service_of
from service.http.openapi.compatible import VLLM_CLASSIFY, VLLM_RERANK
from service.http.openapi.schemas import MAX_INTEGER, Lenient, Whole
from service.http.protocols.reranking import rerank
from service.http.protocols.tei import default_adapter
from service.http.protocols.truncation import check_limit
from service.http.texts import Text, TextMaker
from service.http.turns import in_turns
from service.observability.logs import request_id

router = APIRouter()

# `0.12345678901234567,`
SCORE_BYTES = 24
_NO_LOGITS = "use_activation: only scores are kept, not the logits before them"


class VllmClassifyRequest(Lenient):
    """Fields that mean nothing here (`priority`, `user`, ...) are ignored.

    truncate_prompt_tokens: null refuses a text that is too long; -1, or any number from the
    adapter's maximum length up, cuts it.
    """

    model: str | None = None
    input: str | list[str]
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INTEGER), Whole] | None = None
    add_special_tokens: bool = True
    use_activation: bool | None = None


class _Document(Lenient):
    text: str


class VllmRerankRequest(Lenient):
    """top_n: how many documents to return; 0: all. return_documents: their texts, too.

    label: not of vLLM, whose rerankers have one score: the label that documents are sorted by.
    """

    model: str | None = None
    query: str
    documents: str | list[str | _Document]
    top_n: Annotated[int, Field(ge=0, le=MAX_INTEGER), Whole] = 0
    return_documents: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INTEGER), Whole] | None = None
    use_activation: bool | None = None
    label: str | None = None


@router.post("/classify", **VLLM_CLASSIFY)
async def classify_texts(request: Request) -> Response:
    """Classify texts by the adapter that `model` names, or by the default one."""
    started, service = monotonic(), service_of(request)
    body = await read_as(VllmClassifyRequest, request)
    _refuse_options(body)
    texts = _texts(body, service, TextMaker(request))
    answers = await classify(
        request,
        texts,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut="nothing" if body.truncate_prompt_tokens is None else "tail",
        shape=AnswerShape(SCORE_BYTES, labels=False),
    )
    made = (
        in_json({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
        for index, (label, row) in enumerate(zip(answers.labels, answers.rows, strict=True))
        for probs in (row.scores.tolist(),)
    )
    return JsonResponse(
        {
            "id": f"classify-{request_id.get()}",
            "object": "list",
            "created": int(time()),
            "model": body.model or texts[0].key.name,
            "data": await in_turns(made),
            "usage": {
                "prompt_tokens": answers.tokens,
                "total_tokens": answers.tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        },
        headers=note_headers(answers),
    )


@router.post("/v1/rerank", **VLLM_RERANK)
@router.post("/v2/rerank", **VLLM_RERANK)
async def rerank_documents(request: Request) -> Response:
    """Sort documents by how well they fit a query, by the adapter that `model` names."""
    started, service = monotonic(), service_of(request)
    body = await read_as(VllmRerankRequest, request)
    if body.use_activation is False:
        raise InvalidRequest([_NO_LOGITS])
    adapter = (
        default_adapter(service) if body.model is None else service.catalog.resolve(body.model)
    )
    check_limit(body.truncate_prompt_tokens, reads=adapter.spec.max_length, reader="adapter")
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    texts = [each if isinstance(each, str) else each.text for each in documents]
    ranking = await rerank(
        request,
        adapter,
        body.query,
        texts,
        label=body.label,
        deadline=started + service.settings.default_timeout_ms / 1000,
        cut="nothing" if body.truncate_prompt_tokens is None else "tail",
        place="documents",
    )
    results = []
    for index in ranking.order[: body.top_n or None]:
        result: dict[str, Any] = {"index": index}
        if body.return_documents:
            result["document"] = {"text": texts[index], "multi_modal": None}
        results.append(result | {"relevance_score": ranking.scores[index]})
    tokens = ranking.answers.tokens
    return JsonResponse(
        {
            "id": f"rerank-{request_id.get()}",
            "model": body.model or adapter.key.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results,
        },
        headers=note_headers(ranking.answers),
    )


def _refuse_options(body: VllmClassifyRequest) -> None:
    """
    Raises:
        InvalidRequest: options that change the answer and that this service does not have.
    """
    faults = []
    if not body.add_special_tokens:
        faults.append("add_special_tokens: adapters are trained with special tokens")
    if body.use_activation is False:
        faults.append(_NO_LOGITS)
    if faults:
        raise InvalidRequest(faults)


def _texts(body: VllmClassifyRequest, service: Service, text_of: TextMaker) -> list[Text]:
    """
    Raises:
        InvalidRequest, NoInputs, TooLarge: the inputs.
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile, UnloadedAdapter: the
        adapter.
    """
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if not inputs:
        raise NoInputs
    if len(inputs) > service.settings.max_inputs:
        raise TooLarge(f"{len(inputs)} inputs, at most {service.settings.max_inputs} are allowed")
    adapter = (
        default_adapter(service) if body.model is None else service.catalog.resolve(body.model)
    )
    texts = [text_of(adapter, text, None, f"input.{index}") for index, text in enumerate(inputs)]
    reads = max(text.spec.max_length for text in texts)
    check_limit(body.truncate_prompt_tokens, reads=reads, reader="adapter")
    return texts
