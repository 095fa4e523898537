"""A load that is easy for a timeout refuses no request that has it."""

from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.load import FlowKey, Load
from service.errors import Overloaded

SECONDS = st.floats(0, 20)
FLOWS = st.dictionaries(
    st.builds(FlowKey, st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 3)),
    st.tuples(SECONDS, st.booleans()),
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=400)
@given(
    waits=FLOWS,
    otherwise=SECONDS,
    correction=SECONDS,
    rate=st.sampled_from([0.0, 100.0, 50_000.0]),
    age=SECONDS,
    timeout=SECONDS,
    sent=st.integers(0, 10**6),
    own=st.floats(0, 1),
)
def test_what_is_easy_is_not_refused(
    waits: dict[FlowKey, tuple[float, bool]],
    otherwise: float,
    correction: float,
    rate: float,
    age: float,
    timeout: float,
    sent: int,
    own: float,
) -> None:
    load = Load(monotonic() - age, 1000, rate, correction, waits, otherwise)
    if not load.is_easy(timeout, sent=sent):
        return
    for flow in (*waits, FlowKey("other", "z", 0)):
        try:
            # What this flow has sent is a part of what all have.
            load.foresee(flow, timeout=timeout, sent=own * sent)
        except Overloaded as error:
            raise AssertionError(str(error)) from None


def test_an_idle_engine_is_easy_and_a_busy_one_is_not() -> None:
    idle = Load(monotonic(), 1000, 1000.0, 0.0, {}, 0.01)
    assert idle.is_easy(1.0, sent=0)
    assert not idle.is_easy(1.0, sent=1000)
    assert not Load(monotonic(), 1000, 1000.0, 0.0, {}, 2.0).is_easy(1.0, sent=0)
    flow = FlowKey("a", "x", 0)
    assert not Load(monotonic(), 1000, 1000.0, 0.0, {flow: (0.0, True)}, 0.0).is_easy(100.0, sent=0)
