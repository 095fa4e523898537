"""The vector of a text: the mean of the frozen backbone's last states, without any adapter.

In a batch it is a row like any other, whose adapter has no prompt, no tuning and no head.
"""

from adapters.adapter import PreparedAdapter
from adapters.backbone.model import Backbone
from adapters.format.spec import embedding_spec
from adapters.packed.packing import RowShape


def embedder(backbone: Backbone) -> PreparedAdapter:
    """The adapter of rows whose answer is their vector, float32 [n]."""
    spec = embedding_spec(
        backbone.identity,
        backbone.encoder.sha256,
        hidden_size=backbone.hidden_size,
        max_tokens=backbone.max_tokens,
    )
    return PreparedAdapter(spec, None, None, None, RowShape.of(spec))
