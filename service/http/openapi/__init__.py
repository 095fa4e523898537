"""The OpenAPI document: `schemas` has the models of this project's JSON, `examples` its examples,
`documentation` and `compatible` the entries of the routes.

Imported by the routes. Start with `documentation.entry`.
"""
