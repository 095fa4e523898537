"""The settings of a run, and what training chooses where they are left open.

`settings` is the table from which the command line is made and imports no torch. `defaults` and
`recipe` choose values for a method on its data; the loop and everything above it read them.
"""
