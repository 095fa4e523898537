"""Log lines, traces and metrics.

All of the service may import `logs` and `tracing`. Only a process that counts creates the `Metrics`
of `metrics`; everything else reports to a `service.engine.observer.Observer`.
"""
