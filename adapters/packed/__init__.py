"""Batches without padding, the prompt generator and the head.

The backbone, the slots and training import it; it imports only `tokenizer` and `format`. Start with
`packing.PackedBatch` and the equation in `prompt`.
"""
