"""The HTTP side: routes of all protocols over an engine and a catalog, wherever these are.

`service.ipc` may import it, and so may the start of the service; it reaches the engine only through
`service.backend` and imports no torch. Start with `middleware.Gate`, then `predict.predict` and
`classify.classify`: the way of a request.
"""
