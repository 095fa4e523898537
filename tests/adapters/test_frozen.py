"""Training through a frozen layer with changes inside it: answers and gradients of the handwritten
code are those of autograd over the same layer written out (`adapters.layers.plain`).
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.format.spec import LoraTuning, Site, Tuning, VectorTuning
from adapters.layers import frozen, plain
from adapters.layers.bert import BertLayer
from adapters.packed.layout import Layout
from adapters.packed.tuning import UniformTuning, tuning_weights
from tests.support.families import HIDDEN, backbone_of

BOUND = 1e-5
LENGTHS = (1, 3, 3, 7)
WIDE = 40
LINEAR = tuple(site for site in Site if site is not Site.ACTIVATED)
FIELDS = {"layers": (0, 2), "intermediate_size": WIDE}
LORA = FIELDS | {"rank": 3, "scaling": 0.7}
TUNINGS: dict[str, Tuning] = {
    "vectors": VectorTuning(**FIELDS),
    "vectors, also after the activation": VectorTuning(**FIELDS, activated=True),
    "LoRA of queries and values": LoraTuning(**LORA, sites=(Site.QUERY, Site.VALUE)),
    "LoRA after attention": LoraTuning(**LORA, sites=(Site.DENSE, Site.DOWN)),
    "LoRA everywhere": LoraTuning(**LORA, sites=LINEAR),
}


def outcome(
    tuning: Tuning | None,
    *,
    by_hand: bool,
    dtype: torch.dtype = torch.float32,
    read: bool = False,
    hidden_dropout: float = 0.0,
    lengths: tuple[int, ...] = LENGTHS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of two layers, and the gradients of their input and of the tuning's tensors."""
    random = torch.Generator().manual_seed(3)
    backbone = backbone_of("bert").to(dtype=dtype)
    layout = Layout(np.array(lengths))
    states = torch.randn(layout.tokens, HIDDEN, generator=random).to(dtype).requires_grad_()
    tensors = {
        name: (torch.randn(shape, generator=random) * 0.3).requires_grad_()
        for name, shape in ({} if tuning is None else tuning.shapes(HIDDEN)).items()
    }
    changes = UniformTuning(
        None if tuning is None else tuning_weights(tuning, dict(tensors)),
        hidden_dropout=hidden_dropout,
    )
    output: Tensor = states
    torch.manual_seed(4)
    for index in range(2):
        layer = backbone._layers[index]
        assert isinstance(layer, BertLayer)
        change = changes.at(index, layout)
        assert change is not None
        positions = torch.from_numpy(layout.starts) if read and index else None
        code = frozen.FrozenLayer(layer.layer)
        if by_hand and positions is not None:
            output = code.read_tuned(output, positions, layout, change)
        elif by_hand:
            output = code.forward_tuned(output, layout, change)
        elif positions is not None:
            output = plain.read(layer.parts, output, positions, layout, change)
        else:
            output = plain.forward(layer.parts, output, layout, change)
    weights = torch.randn(output.shape, generator=random).to(dtype)
    (output * weights).sum().backward()
    gradients = {"states": states, **tensors}
    return output.detach(), {
        name: tensor.grad for name, tensor in gradients.items() if tensor.grad is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TUNINGS)
def test_answers_and_gradients_are_autograds(name: str, dtype: torch.dtype, read: bool) -> None:
    ours, gradients = outcome(TUNINGS[name], by_hand=True, dtype=dtype, read=read)
    expected, autograds = outcome(TUNINGS[name], by_hand=False, dtype=dtype, read=read)
    assert gradients.keys() == autograds.keys() == {"states", *TUNINGS[name].shapes(HIDDEN)}
    assert_same(ours, expected, gradients, autograds)


def assert_same(
    ours: Tensor,
    expected: Tensor,
    gradients: dict[str, Tensor],
    autograds: dict[str, Tensor],
) -> None:
    # The tensors of a tuning and their gradients are float32.
    torch.testing.assert_close(ours, expected, rtol=BOUND, atol=BOUND)
    for key, gradient in gradients.items():
        apart = float((gradient - autograds[key]).norm() / autograds[key].norm())
        assert apart < BOUND, (key, apart)


@pytest.mark.parametrize("name", [None, *TUNINGS])
def test_what_is_dropped_has_no_gradient(name: str | None) -> None:
    tuning = None if name is None else TUNINGS[name]
    # As many positions as no padding follows: the same values are then drawn.
    lengths = (1, 3, 5, 7)
    ours, gradients = outcome(tuning, by_hand=True, hidden_dropout=0.3, lengths=lengths)
    expected, autograds = outcome(tuning, by_hand=False, hidden_dropout=0.3, lengths=lengths)
    whole, _ = outcome(tuning, by_hand=False, hidden_dropout=0.01, lengths=lengths)
    assert float((ours - whole).abs().max()) > 0.1
    assert_same(ours, expected, gradients, autograds)


def test_long_rows_have_the_same_gradients() -> None:
    """Their softmax is computed again."""
    lengths = (2, frozen.KEPT_LENGTH + 1)
    ours, gradients = outcome(TUNINGS["vectors"], by_hand=True, lengths=lengths)
    expected, autograds = outcome(TUNINGS["vectors"], by_hand=False, lengths=lengths)
    assert_same(ours, expected, gradients, autograds)


def test_training_runs_the_handwritten_code() -> None:
    layer = backbone_of("bert")._layers[0]
    assert isinstance(layer, BertLayer)
    assert isinstance(layer._fast(torch.zeros(1, HIDDEN)), frozen.FrozenLayer)
    with torch.no_grad():
        assert not isinstance(layer._fast(torch.zeros(1, HIDDEN)), frozen.FrozenLayer)
