"""The frozen transformer: the supported families, loading by name, and the forward pass.

`adapters.adapter`, `adapters.slots` and everything outside may import it; it imports `layers`,
`packed` and `format`. Start with `model.Backbone.forward`.
"""
