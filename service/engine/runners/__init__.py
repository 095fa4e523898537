"""Runners: a backbone and its adapters on one device, the only code that computes.

`base` is their contract; `packed` runs on any device, adapter by adapter; `slotted` runs on CUDA.
Only the engine and its parts import them. Start with `base.Runner`.
"""
