"""The store that replicas share: objects, one log of changes, and each replica's cache.

Any store that fsspec reaches and that can create an object only if it does not exist: a folder, S3,
Google Cloud Storage, Azure Blob Storage. docs/replicas.md has the layout and the guarantees. Start
with `log.SharedLog`; HTTP workers may import all of it, so it must not import torch.
"""
