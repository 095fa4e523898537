"""A class head on the frozen backbone: the result without any prompt."""

from torch import Tensor

from adapters.backbone.model import Trunk
from adapters.format.spec import Pooling
from adapters.packed.layout import pool_rows
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import Baseline


class HeadOnly(Baseline):
    """Reads [BOS], or the pooling of the settings."""

    learning_rate = 1e-2

    @property
    def trunk_layers(self) -> int:
        return self.backbone.layers

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        read = self.backbone.final_norm(trunk.hidden.index_select(0, batch.reads))
        return pool_rows(read, batch.read_layout)


class MeanHeadOnly(HeadOnly):
    """Reads the mean of the tokens: on sentence encoders [BOS] alone is a weak control."""

    @property
    def shape(self) -> RowShape:
        return RowShape(pooling=Pooling.MEAN)
