"""Many runs made one result: comparisons, ablations, transfers, their tables and plots.

    tasks, methods, seeds -> cells -> pool of worker processes -> store -> results.csv, report.md

A cell is one run of `train.experiments.cells`. Finished ones are kept, so that a killed experiment goes on.
"""
