"""The engine: from encoded texts to their scores, and the adapters that this needs on the device.

Routes and `service.ipc` see `interface`; only `service.local` and benchmarks build the engine. It
imports no web framework. Start with `engine.LocalEngine.predict`, then follow `requests` (from
admission to answer), `scheduler` (the next batch), `residency` (adapters and leases), `device` (the
threads that run batches) and `runners` (the forward pass).
"""
