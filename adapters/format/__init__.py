"""Adapter files and their versioned store: the ground floor, which imports only `errors`.

Everything may import it. Modules that HTTP workers use (`spec`, `store`, `durable`) do not import
torch. Start with `spec.AdapterSpec`, then `files.validate` and `store.AdapterStore`.
"""
