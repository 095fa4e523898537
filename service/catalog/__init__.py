"""Which adapter a name means: entries, a view of all names, and the catalog that changes them.

Routes read a `CatalogView`, and the engine's process keeps the one `Catalog`; start reading at
`service.catalog.view`. It may import `service.engine` and `adapters`, and neither HTTP nor sockets.
"""
