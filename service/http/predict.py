"""POST /v1/predict: texts in, labels out."""

from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.view import CatalogView
from service.errors import InvalidRequest, TooLarge
from service.http.answer_size import AnswerShape
from service.http.bodies import MAX_DETAILS, JsonResponse, in_json, read_json, validated
from service.http.classify import Answers, classify, ranked
from service.http.lifecycle import service_of
from service.http.openapi.documentation import PREDICT
from service.http.openapi.schemas import PredictInput, PredictRequest
from service.http.queries import refuse_query_but
from service.http.texts import Text, TextMaker
from service.http.turns import in_turns

# A valid request has at most this many fields beside its inputs and in each of them.
_REQUEST_FIELDS = len(PredictRequest.model_fields)
_INPUT_FIELDS = len(PredictInput.model_fields)

# `{"label":,"score":0.12345678901234567},`
SCORE_BYTES = 44

PATH = "/v1/predict"
router = APIRouter()


@router.post(PATH, **PREDICT)
async def predict(request: Request) -> Response:
    """Classify texts, each by its own adapter or by several.

    All inputs of a request are answered together or not at all. An empty text is classified like
    any other.
    """
    service, started = service_of(request), monotonic()
    refuse_query_but(request)
    content = await read_json(request, service.settings.max_body_bytes)
    body = _validate(content, max_inputs=service.settings.max_inputs)
    inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    timeout_ms = body.timeout_ms or service.settings.default_timeout_ms
    asked = _asked(body, inputs, service.settings.max_inputs)
    answers = await classify(
        request,
        _texts(inputs, asked, service.catalog, TextMaker(request)),
        deadline=started + timeout_ms / 1000,
        cut="tail" if body.truncate else "nothing",
        explain=body.explain or None,
        abstain_below=body.abstain_below,
        shape=AnswerShape(
            SCORE_BYTES,
            labels=True,
            top_k=body.top_k,
            advice="ask for fewer labels with `top_k`, or send fewer inputs",
        ),
    )
    several = _several(body, inputs)

    def result(at: int, index: int) -> dict[str, Any]:
        item = inputs[index]
        id = None if isinstance(item, str) else item.id
        return result_of(answers, at, id, body.top_k) | ({"input": index} if several else {})

    made = (in_json(result(at, index)) for at, (index, _) in enumerate(asked))
    results = await in_turns(made)
    timings_ms: dict[str, float] = {
        "tokenize": round(answers.tokenize_seconds * 1000, 3),
        "queue": round(answers.queue_seconds * 1000, 3),
        "inference": round(answers.inference_seconds * 1000, 3),
    }
    if several:
        timings_ms["shared"] = answers.shared
    return JsonResponse({"results": results, "timings_ms": timings_ms})


def _validate(content: Any, *, max_inputs: int) -> PredictRequest:
    """
    Raises:
        TooLarge: more inputs than allowed; none of them has been looked at.
        InvalidRequest: with every fault and its place.
    """
    if isinstance(content, dict):
        inputs = content.get("inputs")
        items: Iterable[Any] = inputs if isinstance(inputs, list) else (inputs,)
        count = len(inputs) if isinstance(inputs, list) else 1
        if count > max_inputs:
            raise TooLarge(f"{count} inputs in one request, at most {max_inputs} are allowed")
        # A fault is far larger than the field that it names: count the fields first, so that a body
        # of junk fields cannot become a long list of faults.
        fields = len(content) + sum(len(item) for item in items if isinstance(item, dict))
        if fields > 10 * (_REQUEST_FIELDS + count * _INPUT_FIELDS):
            raise InvalidRequest([f"body: {fields} fields, far more than there are"])
    return validated(PredictRequest, content)


def _several(body: PredictRequest, inputs: Sequence[str | PredictInput]) -> bool:
    """Whether an input may have several answers."""
    return body.adapters is not None or any(
        not isinstance(item, str) and item.adapters is not None for item in inputs
    )


def _asked(
    body: PredictRequest, inputs: Sequence[str | PredictInput], most: int
) -> list[tuple[int, str]]:
    """For every answer, the index of its input and what names its adapter; input by input.

    Raises:
        InvalidRequest: inputs that name no adapter while the request names none either, or one and
            several.
        TooLarge: more answers than `most`.
    """
    asked: list[tuple[int, str]] = []
    faults = []
    if body.adapter is not None and body.adapters is not None:
        faults.append("adapters: the request names `adapter`, too")
    for index, item in enumerate(inputs):
        one, several = (None, None) if isinstance(item, str) else (item.adapter, item.adapters)
        if one is not None and several is not None:
            faults.append(f"inputs.{index}.adapters: the input names `adapter`, too")
        if one is None and several is None:
            one, several = body.adapter, body.adapters
        references = several if several is not None else [one] if one is not None else []
        if not references:
            faults.append(f"inputs.{index}.adapter: missing, and the request names none")
        asked += [(index, reference) for reference in references]
    if faults:
        raise InvalidRequest(faults[:MAX_DETAILS])
    if len(asked) > most:
        raise TooLarge(
            f"{len(asked)} answers, one for each adapter of each input: at most {most} are allowed"
        )
    return asked


def _texts(
    inputs: Sequence[str | PredictInput],
    asked: Sequence[tuple[int, str]],
    catalog: CatalogView,
    text_of: TextMaker,
) -> list[Text]:
    """
    Raises:
        UnknownAdapter, UnknownRevision, IncompatibleAdapter, DamagedFile, UnloadedAdapter: the
        adapter of an answer, the first such one.
    """
    texts = []
    for index, reference in asked:
        item = inputs[index]
        text, pair = (item, None) if isinstance(item, str) else (item.text, item.text_pair)
        texts.append(text_of(catalog.resolve(reference), text, pair, f"inputs.{index}"))
    return texts


def result_of(answers: Answers, index: int, id: str | None, top_k: int | None) -> dict[str, Any]:
    """One text's answer in the shape of `schemas.Result`, built as a dict because making the model
    costs time.

    Args:
        id: the input's own.
    """
    text, encoding, row = answers.texts[index], answers.encodings[index], answers.rows[index]
    labels, best = text.spec.labels, ranked(row.scores, top_k)
    result: dict[str, Any] = {
        "id": id,
        "adapter": text.key.name,
        "revision": text.key.revision,
        "label": labels[best[0][0]],
        "score": best[0][1],
        "scores": [{"label": labels[at], "score": score} for at, score in best],
        "tokens": len(encoding),
        "truncated": encoding.truncated,
    }
    if index in answers.label_sets:
        result["labels"] = answers.label_sets[index]
    if index in answers.abstained:
        result["abstained"] = answers.abstained[index]
    if answers.explanations is not None:
        result["explanation"] = answers.explanations.of(index, row)
    return result
