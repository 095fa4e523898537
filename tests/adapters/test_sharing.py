"""Adapters that read the same text share its lower layers, and answer as if they were alone."""

from collections.abc import Sequence

import numpy as np
import pytest

from adapters.adapter import Classification, PreparedAdapter, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.packed.packing import Row, RowShape
from adapters.packed.sharing import shared_rows
from tests.support.families import FAMILY_NAMES, backbone_from, model_of, tokenizer_of
from tests.support.kinds import adapters_of_all_kinds

TEXTS = (("is the card free", None), ("a good film", "a bad plot"), ("money " * 30, None))


def answers(
    backbone: Backbone, adapters: Sequence[PreparedAdapter], rows: Sequence[tuple[int, int]]
) -> list[Classification]:
    """rows: (adapter, text)."""
    inputs = [
        (
            adapter,
            backbone.encoder.encode(*TEXTS[text], max_length=adapters[adapter].spec.max_length),
        )
        for adapter, text in rows
    ]
    return classify(backbone, backbone.pack(rows_of(adapters, inputs)), adapters)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_adapters_of_all_kinds_read_one_text_as_if_alone(family: str) -> None:
    backbone = backbone_from(model_of(family), tokenizer_of(family))
    adapters = {
        kind: prepare(adapter, backbone)
        for kind, adapter in adapters_of_all_kinds(backbone).items()
        if adapter.spec.prompt is None or adapter.spec.prompt.layer > 0
    }
    assert len(adapters) > 5
    prepared = list(adapters.values())
    rows = [(adapter, text) for text in range(len(TEXTS)) for adapter in range(len(prepared))]
    # One text twice under one adapter: tuned ones share with themselves.
    rows += [(adapter, 0) for adapter in range(len(prepared))]
    together = answers(backbone, prepared, rows)
    for row, answer in zip(rows, together, strict=True):
        (alone,) = answers(backbone, prepared, [row])
        np.testing.assert_allclose(answer.scores, alone.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(answer.token_weights, alone.token_weights, rtol=0, atol=1e-5)
        assert alone.shared_layers == 0
    shared = [answer.shared_layers for answer in together]
    # The lowest prompt of these kinds is inserted before layer 1.
    assert set(shared) == {0, 1}
    # The repeated rows at the end run no layer of their own; nor do those of untuned adapters.
    assert shared.count(1) > len(prepared)


def test_only_texts_that_are_equal_are_shared(backbone: Backbone) -> None:
    def row(text: str, adapter: int, pair: str | None = None) -> Row:
        return Row(backbone.encoder.encode(text, pair, max_length=16), RowShape(2, 1), adapter)

    rows = [row("free win", 0), row("win free", 1), row("free", 2, "win"), row("free win now", 3)]
    assert shared_rows(backbone.pack(rows), ()) is None
    rows += [row("free win", each) for each in range(4, 9)]
    shared = shared_rows(backbone.pack(rows), ())
    assert shared is not None
    assert len(shared.batch.rows) == 4
    assert sum(shared.copies) == 5
    # Adapters with lower layers of their own share with themselves alone.
    assert shared_rows(backbone.pack(rows), range(9)) is None
    own = shared_rows(backbone.pack([*rows, *rows[:3]]), range(9))
    assert own is not None
    assert len(own.batch.rows) == 9


def test_positions_that_a_prompt_shifts_are_not_shared(backbone: Backbone) -> None:
    encoding = backbone.encoder.encode("free win", max_length=16)
    shapes = [RowShape(2, 1, shifts_text=True), RowShape(4, 1, shifts_text=True)]
    rows = [Row(encoding, shape, index) for index, shape in enumerate(shapes)]
    assert shared_rows(backbone.pack(rows), ()) is None
