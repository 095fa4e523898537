"""Batches on CUDA: active adapters in slots, one int32 array for each batch, kernels, CUDA graphs.

Only the engine's CUDA runner imports it. Start with `forward.run`; `batch` defines the array
that it reads, and `bank` the table of the slots. `kernels`, `forward` and `graphs` need Triton.
"""
