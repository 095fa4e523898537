"""The service as replicas behind Ray Serve's proxy: docs/ray.md.

`make ray` starts it on one machine; `serve deploy` takes the same file, serve.yaml, to a cluster.
"""
