"""The virtual tokens of prompt tuning and P-tuning, as an adapter's prompt."""

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import StaticPrompt
from train.peft.saved import SavedModel

# Of the spec.
_MOST_TOKENS = 256


@torch.no_grad()
def prompt_of(saved: SavedModel, backbone: Backbone) -> tuple[StaticPrompt, dict[str, Tensor]]:
    """The prompt and its vectors.

    Virtual tokens take the place of word vectors: they get positions and a norm as tokens do. That
    depends on nothing else, so it is done here, once. PEFT saves what P-tuning's encoder makes.

    Raises:
        PeftError: too many virtual tokens, or vectors of another width than the word vectors.
    """
    vectors = saved.folder.tensors["prompt_embeddings"]
    length, width = vectors.shape
    if width != (words := backbone.embedding_size):
        raise saved.folder.fault(f"token_dim {width}; the base model's word vectors have {words}")
    most = min(_MOST_TOKENS, backbone.max_tokens - 2)
    if length > most:
        raise saved.folder.fault(f"{length} virtual tokens; at most {most} can be served")
    # RoBERTa does not count padding, so the ids in their place are not that.
    ids = torch.full((length,), 0 if backbone.word_embeddings.padding_idx else 1)
    embedded = backbone.embed(ids, torch.zeros_like(ids), torch.arange(length), words=vectors)
    return StaticPrompt(length=length, shifts_text=True), {"prompt.vectors": embedded}
