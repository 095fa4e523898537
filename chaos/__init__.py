"""Real faults in a running service, and what its clients see: docs/reliability.md.

`python -m chaos` injects every fault under load and prints a table; `python -m chaos.soak` runs for
ten minutes and samples memory, descriptors, threads and latency. A chaos run starts its services
itself, on loopback and in a temporary folder.
"""
