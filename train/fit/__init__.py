"""`fit`: from data sets to an adapter file, its model card and its report.

The commands import this, and the experiments train their methods through `fit.set_up`. Start at
`fit.fit`.
"""
