"""The commands of `python -m service`; each is a `cli.shell.Command`. Only `main` imports them.

They are clients of a running service, through `service.client`, or print tables. Start with
`predict`. Slow imports are inside `run`, so that flags are checked without them.
"""
