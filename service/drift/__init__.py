"""Whether the texts of an adapter still look as in its training, and which of them to label next.

`monitor` counts, in the process that has the engine; `interface` is what the routes see of it.
Counts and texts are in memory alone: they begin anew with the engine.
"""
