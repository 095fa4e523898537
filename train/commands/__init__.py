"""The commands of `python -m train`; each is a `cli.shell.Command`. Only `train.cli` imports them.

Start with `fit`. A command imports torch inside `run`: flags and files are checked without it.
"""
