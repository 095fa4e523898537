"""Messages between the processes arrive as they were sent; anything else is refused."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from adapters.backbone.model import Backbone
from adapters.errors import (
    AdapterError,
    DamagedFile,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidName,
    RevisionConflict,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.format.store import Revision
from adapters.format.uploads import ReceivedFile
from adapters.tokenizer import Encoding, TextEncoder
from service import errors
from service.catalog.entry import (
    CatalogEntry,
    Change,
    ChangeResult,
    Condition,
    Operation,
    Origin,
)
from service.catalog.traffic import Direction, Ending, Figures, Reading, Traffic
from service.drift.interface import Bin, DriftReport, QuantityShift, UncertainText
from service.engine.interface import AdapterKey, Completion, Entry, RowResult
from service.errors import ServiceError
from service.ipc.protocol import (
    VERSION,
    Cancel,
    ChangeDone,
    Codec,
    DriftDone,
    EngineDefect,
    Fault,
    FromEngine,
    FromWorker,
    Heartbeat,
    KeepTexts,
    Malformed,
    Predict,
    RequestFailed,
    UncertainDone,
    Undecodable,
    adapter_of,
    change_of,
    change_request_of,
    completion_of,
    encode,
    entries_of,
    entry_of,
    error_of,
    fault_of,
    predict_done_of,
    predict_of,
)
from tests.support.tiny_models import make_spec

FROM_WORKER: Codec[FromWorker] = Codec(FromWorker)
FROM_ENGINE: Codec[FromEngine] = Codec(FromEngine)

REVISIONS = [character * 64 for character in "0123"]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 255)), min_size=1, max_size=9),
        st.booleans(),
        st.integers(1, 10_000),
    ),
    min_size=1,
    max_size=9,
)


def entry(revision: int, tokens: list[tuple[int, int]], cut: bool, cost: int) -> Entry:
    ids = np.array([item for item, _ in tokens], dtype=np.int64)
    types = np.array([item for _, item in tokens], dtype=np.int64)
    return Entry(AdapterKey("a", REVISIONS[revision]), Encoding(ids, types, cut), cost)


@given(ROWS, st.one_of(st.none(), st.floats(0, 1e9)))
def test_entries_arrive_as_they_were_sent(
    rows: list[tuple[int, list[tuple[int, int]], bool, int]], deadline: float | None
) -> None:
    sent = [entry(*row) for row in rows]
    (message,) = FROM_WORKER.decode(encode([predict_of(7, sent, deadline)]))
    assert isinstance(message, Predict)
    assert (message.id, message.deadline) == (7, deadline)
    arrived = entries_of(message)
    assert len(arrived) == len(sent)
    for before, after in zip(sent, arrived, strict=True):
        assert (after.adapter, after.cost, after.explain) == (before.adapter, before.cost, False)
        assert after.encoding.truncated is before.encoding.truncated
        assert after.encoding.input_ids.dtype == np.int64
        np.testing.assert_array_equal(after.encoding.input_ids, before.encoding.input_ids)
        np.testing.assert_array_equal(after.encoding.token_type_ids, before.encoding.token_type_ids)


@given(ROWS, st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_a_text_of_several_entries_is_sent_once_and_arrives_as_one_object(
    rows: list[tuple[int, list[tuple[int, int]], bool, int]], chosen: list[int]
) -> None:
    texts = [entry(*row).encoding for row in rows]
    sent = [
        Entry(AdapterKey("a", REVISIONS[index % len(REVISIONS)]), texts[each % len(texts)], 1)
        for index, each in enumerate(chosen)
    ]
    (message,) = FROM_WORKER.decode(encode([predict_of(7, sent, None)]))
    assert isinstance(message, Predict)
    assert len(message.lengths) == len({id(each.encoding) for each in sent})
    arrived = entries_of(message)
    for before, after in zip(sent, arrived, strict=True):
        assert after.adapter == before.adapter
        assert after.encoding.truncated is before.encoding.truncated
        np.testing.assert_array_equal(after.encoding.input_ids, before.encoding.input_ids)
    for one, other in combinations(range(len(sent)), 2):
        same = sent[one].encoding is sent[other].encoding
        assert (arrived[one].encoding is arrived[other].encoding) == same


@given(ROWS, st.booleans())
def test_scores_arrive_to_the_bit_and_weights_if_there_are_any(
    rows: list[tuple[int, list[tuple[int, int]], bool, int]], explain: bool
) -> None:
    entries = [entry(*row) for row in rows]
    random = np.random.default_rng(len(rows))
    results = tuple(
        RowResult(
            random.random(1 + item.cost % 5, dtype=np.float32),
            # A prompt that is not made from the text has no weights.
            random.random(len(item.encoding) * (item.cost % 3 > 0), dtype=np.float32)
            if explain
            else None,
        )
        for item in entries
    )
    (message,) = FROM_ENGINE.decode(encode([predict_done_of(3, Completion(results, 0.25, 0.5))]))
    arrived = completion_of(message, entries)  # type: ignore[arg-type]  # the union's one member
    assert (arrived.queue_seconds, arrived.inference_seconds) == (0.25, 0.5)
    for before, after in zip(results, arrived.rows, strict=True):
        assert before.scores.tobytes() == after.scores.tobytes()
        if before.token_weights is None:
            assert after.token_weights is None
        else:
            assert after.token_weights is not None
            assert before.token_weights.tobytes() == after.token_weights.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [0, 0]},
        {"rows": [1]},
        {"rows": [-1]},
        {"lengths": [3]},
        {"lengths": [-2]},
        {"costs": []},
        {"costs": [0]},
        {"costs": [-5]},
        {"input_ids": b"\0" * 7},
        {"token_type_ids": b""},
        {"truncated": b"\0\0"},
        {"texts": [1]},
        {"texts": [-1]},
        {"texts": [0, 0]},
        {"adapters": []},
        {"uncounted": [1]},
        {"uncounted": [-1]},
    ],
)
def test_a_request_whose_parts_contradict_each_other_is_refused(change: dict[str, object]) -> None:
    sound = predict_of(1, [entry(0, [(5, 0), (6, 0)], False, 4)], None)
    entries_of(sound)
    with pytest.raises(Malformed):
        entries_of(msgspec.structs.replace(sound, **change))


def test_whether_a_text_is_counted_arrives() -> None:
    sent = [entry(0, [(5, 0)], False, 4) for _ in range(3)]
    sent[1].counted = False
    (message,) = FROM_WORKER.decode(encode([predict_of(7, sent, None)]))
    assert isinstance(message, Predict)
    assert [item.counted for item in entries_of(message)] == [True, False, True]


def test_drift_and_texts_arrive_as_they_were_sent() -> None:
    bins = (Bin("ham", 0.9, 0.5), Bin("(others)", 0.1, 0.5))
    report = DriftReport(
        adapter="a",
        revision=REVISIONS[0],
        texts=300,
        since="2026-11-27T12:00:00+00:00",
        counting_since="2026-11-27T11:00:00+00:00",
        reference_texts=999,
        quantities=(QuantityShift("label", 0.88, 0.05, "large", bins),),
    )
    text = UncertainText(
        "a",
        REVISIONS[0],
        "東京 🙂",
        None,
        "ham",
        0.51,
        (("ham", 0.51), ("spam", 0.49)),
        "now",
        True,
    )
    done = [DriftDone(1, report), UncertainDone(2, [text], 0)]
    assert FROM_ENGINE.decode(encode(done)) == done
    kept = [KeepTexts([text])]
    assert FROM_WORKER.decode(encode(kept)) == kept


def test_an_answer_to_another_request_is_refused() -> None:
    one = [entry(0, [(5, 0)], False, 4)]
    scores = np.ones(2, dtype=np.float32)
    done = predict_done_of(1, Completion((RowResult(scores, np.ones(1, np.float32)),), 0.0, 0.0))
    completion_of(done, one)
    for change in (
        {"labels": [2, 2]},
        {"labels": [3]},
        {"scores": b""},
        {"weights": b"\0" * 8},
        {"weighed": [0]},
        {"weighed": [2], "weights": b"\0" * 8},
        {"uncertain": [1]},
        {"uncertain": [-1]},
    ):
        with pytest.raises(Malformed):
            completion_of(msgspec.structs.replace(done, **change), one)


ERRORS: list[AdapterError | ServiceError] = [
    errors.InvalidRequest(["one fault", "another"]),
    errors.TooLarge("too large"),
    errors.Overloaded("full", retry_after=2.5),
    errors.DeadlineExceeded("late"),
    errors.InferenceFailed("bad scores", reason="not_finite"),
    errors.AdapterLoadFailed("a", REVISIONS[1], "rotten"),
    errors.NotReady("loading"),
    errors.EngineUnavailable("draining"),
    InvalidAdapter(["no header", "no tensors"]),
    IncompatibleAdapter(["another tokenizer"]),
    UnknownAdapter("a", ["b", "c"]),
    UnknownRevision("a", "00", [REVISIONS[0]]),
    UnknownRevision("a", None, [REVISIONS[0]]),
    RevisionConflict("a", REVISIONS[0], None),
    InvalidName("adapter name"),
    DamagedFile("gone"),
]


def test_an_error_that_quotes_what_is_not_utf8_arrives_with_escapes() -> None:
    error = UnknownAdapter("\udcff", ["\ud800", "b"])
    (message,) = FROM_ENGINE.decode(encode([RequestFailed(1, fault_of(error))]))
    assert isinstance(message, RequestFailed)
    assert vars(error_of(message.fault)) == {"name": "\\udcff", "known": ("\\ud800", "b")}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_with_their_class_their_words_and_their_attributes(
    error: AdapterError | ServiceError,
) -> None:
    fault = msgspec.msgpack.decode(msgspec.msgpack.encode(fault_of(error)), type=Fault)
    arrived = error_of(fault)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_a_defect_crosses_by_its_name_alone_and_no_other_class_can_be_created() -> None:
    fault = fault_of(OSError(28, "secret path"))
    assert "secret" not in str(fault)
    assert isinstance(error_of(fault), EngineDefect)
    for kind in ("OSError", "SystemExit", "Sequence", "__builtins__", ""):
        assert isinstance(error_of(Fault(kind, "x", {"args": "y"})), EngineDefect)


def test_an_entry_of_the_catalog_arrives_as_it_was(backbone: Backbone) -> None:
    specs = {
        REVISIONS[0]: make_spec(backbone),
        REVISIONS[1]: make_spec(backbone, labels=("x", "y")),
    }
    stored = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    refusal = IncompatibleAdapter(["another tokenizer"])
    sent = CatalogEntry(
        "a",
        REVISIONS[2],
        (Revision(REVISIONS[2], stored, 99), Revision(REVISIONS[0], stored, 98)),
        specs,
        {REVISIONS[2]: refusal},
        refusal,
    )
    arrived = entry_of(adapter_of(sent, {}), {})
    assert (arrived.name, arrived.current) == (sent.name, sent.current)
    assert arrived.revisions == sent.revisions
    assert arrived.specs == sent.specs
    assert {key: str(error) for key, error in arrived.unusable.items()} == {
        REVISIONS[2]: str(refusal)
    }
    assert type(arrived.refusal) is IncompatibleAdapter
    assert arrived.refusal.faults == refusal.faults
    # Specs that were sent before are not sent again.
    short = adapter_of(sent, {REVISIONS[0]: specs[REVISIONS[0]]})
    assert [revision for revision, text in short.specs.items() if text is None] == [REVISIONS[0]]
    assert entry_of(short, arrived.specs).specs == sent.specs
    with pytest.raises(Malformed):
        entry_of(short, {})


@pytest.mark.parametrize(
    "condition",
    [Condition(), Condition(match=frozenset({"*"})), Condition(none_match=frozenset({"0", "1"}))],
)
def test_a_change_arrives_as_it_was_sent(condition: Condition) -> None:
    for operation in get_args(Operation):
        file = ReceivedFile("f.part", "0" * 64, 9) if operation == "publish" else None
        traffic = Traffic("0" * 64, "1" * 64, 5.0) if operation == "divide" else None
        ending = Ending("stopped", "by hand", "now") if operation == "end_traffic" else None
        change = Change(
            operation,
            "a",
            condition,
            "0",
            file,
            force=True,
            stage=True,
            traffic=traffic,
            ending=ending,
            card="# A card" if operation == "describe" else None,
            wait="one",
            **Origin("ci", "r1", "::1")._asdict(),
        )
        request = change_request_of(5, change)
        assert FROM_WORKER.decode(encode([request])) == [request]
        assert change_of(request) == change
        other = None if file else ReceivedFile("f.part", "0" * 64, 9)
        with pytest.raises(Malformed, match="without"):
            change_of(change_request_of(5, replace(change, file=other)))
        if traffic is not None:
            with pytest.raises(Malformed, match="divide without"):
                change_of(change_request_of(5, replace(change, traffic=None)))
        nothing = Reading(0, 0, None)
        figures = Figures(
            nothing,
            Reading(5, 1, 2.5),
            nothing,
            0,
            4,
            1,
            0.25,
            0.01,
            0.8,
            0.1,
            (Direction("a", "b", 1),),
        )
        done = ChangeDone(5, ChangeResult("0", created=True, changed=False, figures=figures))
        assert FROM_ENGINE.decode(encode([done])) == [done]
    unknown = msgspec.msgpack.encode(
        [
            [
                "ChangeRequest",
                5,
                "format_disk",
                "a",
                {},
                None,
                None,
                False,
                False,
                None,
                None,
                "all",
                None,
                "",
                "-",
                "",
            ]
        ]
    )
    with pytest.raises(Undecodable, match="format_disk"):
        FROM_WORKER.decode(bytes([VERSION]) + unknown)


def test_the_encoder_that_a_worker_makes_is_the_engines(backbone: Backbone) -> None:
    for encoder in (backbone.encoder, TextEncoder(backbone.encoder._base, read_token="[SEP]")):
        copy = TextEncoder(Tokenizer.from_str(encoder.to_json()))
        assert copy.sha256 == encoder.sha256
        for pair in (None, "the card"):
            ours = encoder.encode("hello you", pair, max_length=9)
            theirs = copy.encode("hello you", pair, max_length=9)
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)


@given(st.binary(max_size=64))
def test_any_bytes_are_messages_or_refused(junk: bytes) -> None:
    for frame in (junk, bytes([VERSION]) + junk):
        try:
            messages = FROM_WORKER.decode(frame)
        except Undecodable:
            continue
        assert isinstance(messages, list)


def test_other_versions_directions_and_kinds_are_refused() -> None:
    frame = encode([Cancel(1)])
    assert FROM_WORKER.decode(frame) == [Cancel(1)]
    body = frame[1:]
    for version in (0, VERSION + 1, 255):
        with pytest.raises(Undecodable, match="version"):
            FROM_WORKER.decode(bytes([version]) + body)
    with pytest.raises(Undecodable):
        FROM_ENGINE.decode(frame)
    with pytest.raises(Undecodable):
        FROM_WORKER.decode(encode([Heartbeat(0.0, True, True, None, {})]))
    pickled = b"\x80\x04\x8c\x02os\x8c\x06getpid\x93)R."
    unknown = msgspec.msgpack.encode([["Nothing", 1]])
    longer = msgspec.msgpack.encode([["Cancel", 1, 2]])
    for content in (b"", pickled, unknown, longer, body + body, body[:-1]):
        with pytest.raises(Undecodable):
            FROM_WORKER.decode(bytes([VERSION]) + content)
    with pytest.raises(Undecodable):
        FROM_WORKER.decode(b"")


def test_counts_of_a_heartbeat_stay_whole_numbers() -> None:
    details: dict[str, int | float | str] = {
        "waiting_entries": 7,
        "batch_seconds": 7.0,
        "phase": "ready",
    }
    sent = Heartbeat(1.0, live=True, ready=True, reason=None, details=details)
    (received,) = FROM_ENGINE.decode(encode([sent]))
    assert isinstance(received, Heartbeat)
    assert [type(value) for value in received.details.values()] == [int, float, str]
