"""Other servers' protocols for classification, so that their clients work unchanged.

Each module reads one protocol's requests, calls `service.http.classify`, and writes its answers and
errors. Imported by `service.http.app` and `middleware`; start with `vllm`, the smallest.
"""
