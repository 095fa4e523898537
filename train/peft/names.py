"""Where a family's model for sequence classification has its layers' linear maps and its head."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.format.spec import HiddenActivation, Pooling, Site


@dataclass(frozen=True, slots=True)
class Names:
    """Modules of a `...ForSequenceClassification` of `transformers`.

    layers: the list of layers. sites: what each linear map of a layer computes; one module if
    queries, keys and values are joined. dense, out: the head; dense is None if it has one layer.
    hidden: its activation. pooling: what it reads. token_types: whether its tokenizer tells the two
    texts of a pair apart. layer_list: the last part of `layers`.
    """

    layers: str
    sites: Mapping[str, tuple[Site, ...]]
    dense: str | None
    out: str
    hidden: HiddenActivation = HiddenActivation.TANH
    pooling: Pooling = Pooling.ANSWER
    token_types: bool = False

    @property
    def layer_list(self) -> str:
        return self.layers.rsplit(".", 1)[-1]

    @property
    def other_head_modules(self) -> tuple[str, ...]:
        """What belongs into `modules_to_save` besides the names that PEFT adds itself."""
        if self.dense is None or self.dense.startswith("classifier."):
            return ()
        return (self.dense.removesuffix(".dense").rsplit(".", 1)[-1],)

    @property
    def head(self) -> tuple[str, ...]:
        """The head's modules."""
        return (self.out,) if self.dense is None else (self.dense, self.out)

    def place(self, module: str) -> tuple[int, str] | None:
        """Layer and name within it of one of the linear maps; None for any other module."""
        index, _, rest = module.removeprefix(f"{self.layers}.").partition(".")
        if not module.startswith(f"{self.layers}.") or rest not in self.sites:
            return None
        return int(index), rest


_BERT_SITES = {
    "attention.self.query": (Site.QUERY,),
    "attention.self.key": (Site.KEY,),
    "attention.self.value": (Site.VALUE,),
    "attention.output.dense": (Site.DENSE,),
    "intermediate.dense": (Site.UP,),
    "output.dense": (Site.DOWN,),
}
_ROBERTA = Names(
    layers="roberta.encoder.layer",
    sites=_BERT_SITES,
    dense="classifier.dense",
    out="classifier.out_proj",
)

NAMES: Mapping[str, Names] = {
    "bert": Names(
        layers="bert.encoder.layer",
        sites=_BERT_SITES,
        dense="bert.pooler.dense",
        out="classifier",
        token_types=True,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": Names(
        layers="electra.encoder.layer",
        sites=_BERT_SITES,
        dense="classifier.dense",
        out="classifier.out_proj",
        hidden=HiddenActivation.GELU,
        token_types=True,
    ),
    "distilbert": Names(
        layers="distilbert.transformer.layer",
        sites={
            "attention.q_lin": (Site.QUERY,),
            "attention.k_lin": (Site.KEY,),
            "attention.v_lin": (Site.VALUE,),
            "attention.out_lin": (Site.DENSE,),
            "ffn.lin1": (Site.UP,),
            "ffn.lin2": (Site.DOWN,),
        },
        dense="pre_classifier",
        out="classifier",
        hidden=HiddenActivation.RELU,
    ),
    "gpt2": Names(
        layers="transformer.h",
        sites={
            "attn.c_attn": (Site.QUERY, Site.KEY, Site.VALUE),
            "attn.c_proj": (Site.DENSE,),
            "mlp.c_fc": (Site.UP,),
            "mlp.c_proj": (Site.DOWN,),
        },
        dense=None,
        out="score",
        pooling=Pooling.BEFORE_LAST,
    ),
}
