"""What an adapter is: the contract between `train`, which makes it, and `service`, which serves it.

Knows no HTTP, no queue and no optimiser. The parts, in the order in which data flows through them:

    tokenizer  text -> Encoding            packing   rows -> index arrays of one unpadded batch
    prompt     the ID-SPAM equation        head      logits and scores
    attention  rows see only themselves    families  how each model family is driven
    backbone   the forward pass            adapter   Adapter, PreparedAdapter, classify
    spec       what a file declares        files     strict reading and atomic writing
    store      versions on disk            loading   name -> Backbone
    durable    files that survive a crash
"""

__version__ = "0.5.0"
