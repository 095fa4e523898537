"""Vectors: scales and biases in every layer, and no prompt.

y (1 + s) + b at the outputs of query, key, value and the feed-forward part's middle, y + b at its
output; all s and b start at zero. Related: IA3 (Liu et al., NeurIPS 2022) has the scales, BitFit
(Ben Zaken et al., ACL 2022) the biases, RED (Wu et al., ACL 2024) both, elsewhere in the layer.
"""

from adapters.backbone.model import Backbone
from adapters.format.spec import Tuning, VectorTuning
from train.methods.method import AdapterMethod, Design

VECTORS_RATE, HEAD_RATE = 2e-3, 1e-3
# With many labels there is more to learn than the usual epochs teach at the rate for pair tasks.
MANY_LABELS_VECTORS_RATE = 5e-3


class Vectors(AdapterMethod):
    """Vectors and a head."""

    learning_rate = HEAD_RATE
    tuning_rate = VECTORS_RATE
    many_labels_rates = (HEAD_RATE, MANY_LABELS_VECTORS_RATE)

    def tuning_of(self, design: Design) -> Tuning:
        return vector_tuning(design, self.backbone)


def vector_tuning(design: Design, backbone: Backbone) -> VectorTuning:
    """Vectors in the design's layers."""
    return VectorTuning(
        layers=design.tuned_layers or (0, backbone.layers),
        intermediate_size=backbone.intermediate_size,
    )
