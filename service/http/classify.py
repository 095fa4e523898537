"""From texts to answers, whatever protocol they came in: tokenise, submit, answer."""

from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from time import monotonic, perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from starlette.requests import Request

from adapters.errors import UncuttableText
from adapters.tokenizer import Encoding, End, Steps, TextEncoder, result_of
from service.client.types import Explain
from service.engine.interface import EMBEDDING, Completion, Entry, RowResult, cost_of
from service.engine.observer import NO_LABEL
from service.errors import AdapterLoadFailed, InferenceFailed, InvalidRequest, Overloaded
from service.http.answer_size import AnswerShape, refuse_large_answer
from service.http.bodies import MAX_DETAILS
from service.http.connection import while_connected
from service.http.explanation import Explanations, locate
from service.http.lifecycle import Service, service_of
from service.http.request_log import note_texts
from service.http.texts import Text, trial_of
from service.http.turns import Turn, in_turns
from service.http.uncertain import uncertain_texts
from service.observability.logs import request_id
from service.records.decisions import DecisionLog, decided

# Tokenising fewer characters than this takes less time than the way to a thread and back.
INLINE_CHARACTERS = 2000
# Python sorts fewer scores sooner than numpy.
_FEW_LABELS = 32
# Tokens that are counted for a text that is refused because of its length.
_MOST_COUNTED = 2**14


class Counted:
    """How much of some texts was read."""

    __slots__ = ()
    encodings: Sequence[Encoding]

    @property
    def tokens(self) -> int:
        """Tokens that were read, special tokens included."""
        return sum(map(len, self.encodings))

    @property
    def truncated(self) -> int:
        """Texts that were cut to their maximum length."""
        return sum(encoding.truncated for encoding in self.encodings)


@dataclass(slots=True, eq=False)
class Answers(Counted):
    """The answers to a request's texts, in their order. Seconds are those of the slowest text.

    labels: each text's best label. label_sets: by the text's index, all its labels, where its
    adapter gives several. abstained: by the text's index, whether its best label is no answer,
    where a threshold says when. shared: how many of them took their lower layers from another one
    for the same text. explanations: None unless asked for.
    """

    texts: Sequence[Text]
    encodings: Sequence[Encoding]
    rows: Sequence[RowResult]
    labels: Sequence[str]
    label_sets: Mapping[int, list[str]]
    abstained: Mapping[int, bool]
    tokenize_seconds: float
    queue_seconds: float
    inference_seconds: float
    shared: int = 0
    explanations: Explanations | None = None

    @property
    def revisions(self) -> list[str]:
        """The revisions that answered, in order of their first text: several only while the texts
        of an adapter are divided, or if the request names several adapters."""
        return list(dict.fromkeys([text.key.revision for text in self.texts]))

    @property
    def abstentions(self) -> int:
        """Texts whose best label is no answer."""
        return sum(self.abstained.values())


async def classify(
    request: Request,
    texts: Sequence[Text],
    *,
    deadline: float,
    cut: End | Literal["nothing"] = "tail",
    explain: Explain | None = None,
    abstain_below: float | None = None,
    shape: AnswerShape,
    bulk: bool = False,
) -> Answers:
    """Classify texts, each by its own adapter; all of them or none.

    Args:
        request: the work is cancelled when its client disconnects; its body must have been read.
        deadline: on the clock of `time.monotonic`.
        cut: which end of a too long text is left out; `nothing` refuses such a text.
        explain: also find out which words of the texts the answers come from. Only where texts are
            cut at their tails.
        abstain_below: in place of the adapters' own thresholds.
        shape: what the answer has for every text.
        bulk: part of a job (`service.http.stream`), which reads the body meanwhile and so notices
            itself that its client has gone.

    Raises:
        InvalidRequest: a text is too long and `cut` is `nothing`, or it cannot be cut; or there is
            an `abstain_below`, and an adapter gives several labels.
        TooLarge: the answer would be larger than allowed, or more words were to be hidden.
        ServiceError: as `Predictor.predict`.
        UnknownAdapter, UnknownRevision: deleted since its name was resolved.
        ClientDisconnect: the client has gone.
    """
    service = service_of(request)
    if abstain_below is not None:
        _check_single_labels(texts)
    note_texts(request.scope, [text.key.name for text in texts])
    most = service.settings.max_answer_bytes
    refuse_large_answer(texts, shape, most)
    started = perf_counter()
    encodings = await read_texts(request, texts, deadline=deadline, cut=cut, bulk=bulk)
    tokenize_seconds = perf_counter() - started

    explanations: Explanations | None = None
    if explain is not None:
        explanations = await _explain(request, explain, texts, encodings, deadline, bulk=bulk)

    weighed = explanations is not None and explanations.weighs_tokens
    entries = [
        Entry(text.key, encoding, cost_of(encoding, text.spec), weighed)
        for text, encoding in zip(texts, encodings, strict=True)
    ]
    for text, entry in zip(texts, entries, strict=True):
        if text.tried is not None:
            entry.trial = trial_of(text, entry.encoding, service.metrics)
    tokens = sum(map(len, encodings))
    if explanations is not None:
        hidden = explanations.entries()
        entries += hidden
        tokens += sum(len(entry.encoding) for entry in hidden)
    try:
        completion = await submit(request, entries, deadline=deadline, bulk=bulk)
    except (AdapterLoadFailed, InferenceFailed) as error:
        _count_failures(service, entries[: len(texts)], error)
        raise

    service.guard.charge(tokens)
    if explanations is not None:
        explanations.take(completion.rows[len(texts) :])
        completion = replace(completion, rows=completion.rows[: len(texts)])
    if completion.uncertain:
        service.drift.keep(uncertain_texts(texts, completion))
    label_sets = dict(await in_turns(label_sets_of(texts, completion.rows)))
    answers = answers_of(
        texts, encodings, completion, label_sets, tokenize_seconds, abstain_below=abstain_below
    )
    answers.explanations = explanations
    await _count_answers(service, answers)
    if service.decisions is not None:
        client: str = request.scope.get("idspam.client", "")
        _record(service, service.decisions, answers, client, perf_counter() - started)
    return answers


async def read_texts(
    request: Request,
    texts: Sequence[Text],
    *,
    deadline: float,
    cut: End | Literal["nothing"],
    bulk: bool = False,
) -> list[Encoding]:
    """The tokens of texts, unless the engine would refuse them anyway.

    Raises:
        InvalidRequest: a text is too long and `cut` is `nothing`, or it cannot be cut.
        Overloaded: as `Predictor.foresee`.
        DeadlineExceeded, ClientDisconnect.
    """
    service = service_of(request)
    if not bulk:
        _foresee(request, texts, deadline)
    started = perf_counter()
    end: End = "tail" if cut == "nothing" else cut
    encodings = await _encode(request, texts, end, deadline, bulk=bulk)
    truncated = sum(encoding.truncated for encoding in encodings)
    service.metrics.tokenized(perf_counter() - started, truncated=truncated)
    if truncated and cut == "nothing":
        raise await _too_long(request, texts, encodings, deadline, bulk=bulk)
    return encodings


async def submit(
    request: Request, entries: Sequence[Entry], *, deadline: float, bulk: bool = False
) -> Completion:
    """Ask the engine, unless the client goes away meanwhile.

    Raises:
        ServiceError: as `Predictor.predict`.
        UnknownAdapter, UnknownRevision: deleted since its name was resolved.
        ClientDisconnect: the client has gone.
    """
    work = _predict(request, entries, deadline, bulk=bulk)
    return await (work if bulk else while_connected(request, work))


def answers_of(
    texts: Sequence[Text],
    encodings: Sequence[Encoding],
    completion: Completion,
    label_sets: Mapping[int, list[str]],
    tokenize_seconds: float = 0.0,
    *,
    abstain_below: float | None = None,
) -> Answers:
    """What the scores of texts mean. label_sets: of `label_sets_of`. abstain_below: as of
    `classify`."""
    labels = [
        text.spec.labels[row.scores.argmax()]
        for text, row in zip(texts, completion.rows, strict=True)
    ]
    abstained = {
        index: float(row.scores.max()) < below
        for index, (text, row) in enumerate(zip(texts, completion.rows, strict=True))
        if (below := text.spec.abstain_below if abstain_below is None else abstain_below)
        is not None
    }
    return Answers(
        texts,
        encodings,
        completion.rows,
        labels,
        label_sets,
        abstained,
        tokenize_seconds,
        completion.queue_seconds,
        completion.inference_seconds,
        completion.shared,
    )


def label_sets_of(
    texts: Sequence[Text], rows: Sequence[RowResult]
) -> Iterator[tuple[int, list[str]]]:
    """All labels of those texts whose adapters give several, by the text's index."""
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if text.spec.multi_label:
            yield index, text.spec.label_set(row.scores.tolist())


def ranked(
    scores: npt.NDArray[np.floating[Any]], top_k: int | None = None
) -> list[tuple[int, float]]:
    """Index and score of the best labels, of all without `top_k`. The best come first, of equal
    scores the label that its spec has first."""
    if len(scores) < _FEW_LABELS:
        values = scores.tolist()
        # The sort is stable in reverse as well.
        return sorted(enumerate(values), key=itemgetter(1), reverse=True)[:top_k]
    beyond = max(0, len(scores) - (top_k or len(scores)))
    # Only what may be among the best is sorted: a tie with the last of them, too.
    among = np.flatnonzero(scores >= np.partition(scores, beyond)[beyond])
    order = among[np.argsort(-scores[among], kind="stable")[:top_k]]
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


def note_headers(answers: Answers) -> dict[str, str]:
    """For protocols without a place for it: the revisions that answered, and how many texts got a
    label that is no answer, if anything says when to abstain."""
    headers = {"x-adapter-revision": ", ".join(answers.revisions)}
    if answers.abstained:
        headers["x-abstained-inputs"] = str(answers.abstentions)
    return headers


def _foresee(request: Request, texts: Sequence[Text], deadline: float) -> None:
    """Under overload most requests end here, before they cost anything.

    Raises:
        Overloaded: as `Predictor.foresee`.
    """
    service = service_of(request)
    try:
        service.engine.foresee(
            tuple({text.key.name: None for text in texts}),
            timeout=deadline - monotonic(),
            client=request.scope.get("idspam.client", ""),
            weight=request.scope.get("idspam.weight", 1.0),
        )
    except Overloaded as error:
        service.metrics.overload_refused(error.reason)
        raise


def _check_single_labels(texts: Sequence[Text]) -> None:
    """
    Raises:
        InvalidRequest: adapters for several labels a text, which do not abstain.
    """
    faults = [
        f"{text.place}: adapter {text.key.name!r} gives several labels a text, abstain_below is "
        "for one"
        for text in texts
        if text.spec.multi_label
    ]
    if faults:
        raise InvalidRequest(faults[:MAX_DETAILS])


async def _encode(
    request: Request, texts: Sequence[Text], cut: End, deadline: float, *, bulk: bool
) -> list[Encoding]:
    """Encode the texts; equal ones once, so that several adapters of a text get one object.

    Raises:
        InvalidRequest: a text of which the part that is read cannot be told without the rest.
        DeadlineExceeded, ClientDisconnect.
    """
    service = service_of(request)
    encoder = service.engine.info.encoder
    wanted = [(item.text, item.text_pair, item.spec.max_length) for item in texts]
    if len(wanted) == 1 and len(wanted[0][0]) + len(wanted[0][1] or "") < INLINE_CHARACTERS:
        ((text, pair, most),) = wanted
        return [encoder.encode(text, pair, max_length=most, cut=cut)]
    distinct: dict[tuple[str, str | None, int], int] = {}
    for index, each in enumerate(wanted):
        distinct.setdefault(each, index)
    characters = sum(len(text) + len(pair or "") for text, pair, _ in distinct)
    if characters < INLINE_CHARACTERS:
        encoded = [
            encoder.encode(text, pair, max_length=most, cut=cut) for text, pair, most in distinct
        ]
    else:
        work = service.step_pool.run(encoder.steps(list(distinct), cut=cut), deadline=deadline)
        try:
            encoded = await (work if bulk else while_connected(request, work))
        except UncuttableText as error:
            place = texts[list(distinct.values())[error.index]].place
            raise InvalidRequest([f"{place}: {error}"]) from None
    encodings = dict(zip(distinct, encoded, strict=True))
    return [encodings[each] for each in wanted]


async def _explain(
    request: Request,
    kind: Explain,
    texts: Sequence[Text],
    encodings: Sequence[Encoding],
    deadline: float,
    *,
    bulk: bool,
) -> Explanations:
    """
    Raises:
        TooLarge: as of `Explanations`.
        InvalidRequest: this service hides no words.
        DeadlineExceeded, ClientDisconnect.
    """
    service = service_of(request)
    if kind == "occlusion" and not service.settings.max_hidden_words:
        raise InvalidRequest(
            ["explain: this service hides no words (IDSPAM_MAX_HIDDEN_WORDS): ask for attention"]
        )
    steps = locate(service.engine.info.encoder, texts, encodings)
    if sum(len(item.text) + len(item.text_pair or "") for item in texts) < INLINE_CHARACTERS:
        located = result_of(steps)
    else:
        work = service.step_pool.run(steps, deadline=deadline)
        located = await (work if bulk else while_connected(request, work))
    settings = service.settings
    return Explanations(
        kind,
        texts,
        encodings,
        located,
        most_hidden=settings.max_hidden_words,
        most_bytes=settings.max_answer_bytes,
    )


async def _too_long(
    request: Request,
    texts: Sequence[Text],
    encodings: Sequence[Encoding],
    deadline: float,
    *,
    bulk: bool,
) -> InvalidRequest:
    """Names each text that is too long, its number of tokens and its adapter's limit."""
    service = service_of(request)
    long = [text for text, encoding in zip(texts, encodings, strict=True) if encoding.truncated]
    long = long[:MAX_DETAILS]
    # Counted as far as the most that any adapter reads in all, so that a long list costs no more
    # than one text.
    limit = max(_MOST_COUNTED // len(long), *(text.spec.max_length for text in long))
    steps = _count(service.engine.info.encoder, long, limit)
    work = service.step_pool.run(steps, deadline=deadline)
    counts = await (work if bulk else while_connected(request, work))
    return InvalidRequest(
        [
            f"{text.place}: {count if count <= limit else f'more than {limit}'} tokens, "
            f"{_reader(text)} reads {text.spec.max_length} and truncate is false"
            for text, count in zip(long, counts, strict=True)
        ]
    )


def _reader(text: Text) -> str:
    return "the backbone" if text.key == EMBEDDING else f"adapter {text.key.name!r}"


def _count(encoder: TextEncoder, texts: Sequence[Text], limit: int) -> Steps[list[int]]:
    counts = []
    for text in texts:
        try:
            counts.append((yield from encoder.count(text.text, text.text_pair, limit=limit)))
        except UncuttableText:
            counts.append(limit + 1)
    return counts


async def _predict(
    request: Request, entries: Sequence[Entry], deadline: float, *, bulk: bool
) -> Completion:
    service = service_of(request)

    def predict() -> Awaitable[Completion]:
        return service.engine.predict(
            entries,
            deadline=deadline,
            client=request.scope.get("idspam.client", ""),
            weight=request.scope.get("idspam.weight", 1.0),
            bulk=bulk,
        )

    try:
        return await predict()
    except AdapterLoadFailed as error:
        # Deleted since its name was resolved? Then `resolve` says so, once the deletion is done.
        # Published again meanwhile? Then it loads now. A file that is really lost fails again.
        await service.catalog.settled(error.name)
        service.catalog.resolve(f"{error.name}@{error.revision}")
    return await predict()


async def _count_answers(service: Service, answers: Answers) -> None:
    if service.tracing.is_on:
        service.tracing.classified(
            tokenize=answers.tokenize_seconds,
            queue=answers.queue_seconds,
            inference=answers.inference_seconds,
            texts=len(answers.texts),
            tokens=answers.tokens,
            adapters=len({text.key for text in answers.texts}),
        )
    names = (text.key.name for text in answers.texts)
    for (name, label), count in Counter(zip(names, answers.labels, strict=True)).items():
        service.metrics.predicted(name, label, count)
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    turn = Turn()
    for index, labels in answers.label_sets.items():
        given[answers.texts[index].key.name].update(labels or (NO_LABEL,))
        if turn.is_over():
            await turn.give()
    for name, counts in given.items():
        for label, count in counts.items():
            service.metrics.label_given(name, label, count)
    if answers.abstained:
        silent = (answers.texts[index].key.name for index, no in answers.abstained.items() if no)
        for name, count in Counter(silent).items():
            service.metrics.abstained(name, count)


def _record(
    service: Service, decisions: DecisionLog, answers: Answers, client: str, seconds: float
) -> None:
    """Into the decision log: each text's label, or its set, with the score of the best label, and
    whether that is no answer."""
    labels = [answers.label_sets.get(index, label) for index, label in enumerate(answers.labels)]
    scores = [float(row.scores.max()) for row in answers.rows]
    backbone = service.engine.info.identity.name
    decisions.offer(
        decided(
            request_id.get(),
            client,
            backbone,
            answers.texts,
            labels,
            scores,
            seconds,
            abstained=answers.abstained,
        )
    )


def _count_failures(
    service: Service, entries: Sequence[Entry], error: AdapterLoadFailed | InferenceFailed
) -> None:
    # If one adapter cannot be loaded, the others of its request have not failed.
    names = Counter(
        entry.adapter.name
        for entry in entries
        if isinstance(error, InferenceFailed) or entry.adapter.name == error.name
    )
    for name, count in names.items():
        service.metrics.adapter_failed(name, count)
