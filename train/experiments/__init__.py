"""Many training runs combined into one result: comparisons, ablations, transfers.

    tasks, methods, seeds -> cells -> pool of worker processes -> store -> results.csv, report.md

A cell is one run. Finished cells are stored, so a killed experiment continues where it stopped.
Only `train.commands` imports this package. Start at `compare.py`, then `session.py`.
"""
