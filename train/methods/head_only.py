"""A class head on the frozen backbone: the result without any prompt."""

from dataclasses import replace

from adapters.format.spec import Head, Pooling
from train.methods.method import AdapterMethod, Design


class HeadOnly(AdapterMethod):
    """Reads [BOS], or the pooling of the settings."""

    learning_rate = 1e-2


class MeanHeadOnly(HeadOnly):
    """Reads the mean of the tokens: on sentence encoders [BOS] alone is a weak control."""

    def head_of(self, design: Design) -> Head:
        return super().head_of(replace(design, pooling=Pooling.MEAN))
