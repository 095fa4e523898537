"""What the command lines of `service` and `train` share. Imports neither of them, nor `adapters`.

Start with `shell`: it turns a command line into an exit code. `text_files` reads lines and tables.
"""
