"""What an adapter is and how a batch of them runs on a frozen backbone.

`train` makes adapters and `service` serves them; both import this package, which imports neither.
Start with `adapter` (prepare, classify) and `format.spec` (what an adapter file declares). Below
`adapter`, each room imports only those after it:

    slots       batches on CUDA, over adapters in numbered slots
    backbone    the frozen model and its forward pass
    layers      faster code for transformer layers
    packed      batches without padding, the prompt generator and the head
    tokenizer   text -> token ids
    format      adapter files and the versioned store
"""

__version__ = "0.6.0"
