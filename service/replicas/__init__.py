"""Several services that behave as one: each follows the log of a store that they share.

docs/replicas.md says what is guaranteed and why. Start reading at `service.replicas.catalog`. It
may import `service.catalog`, `service.engine` and `adapters`, and neither HTTP nor sockets.
"""
