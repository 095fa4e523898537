"""The Open Inference Protocol V2, which KServe and Triton speak: `routes` classifies, `repository`
loads and unloads, `tensors` reads and writes the bodies of both.

Imported by `service.http.app` and `middleware`; start with `routes.infer`.
"""
