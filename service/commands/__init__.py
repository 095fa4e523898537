"""The commands of `python -m service`; each is a `cli.shell.Command`. Only `main` imports them.

They are clients of a running service, through `service.client`, or print tables. Start with
`predict`. What takes long to import is imported inside `run`: flags are checked without it.
"""
