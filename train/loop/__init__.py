"""The training loop over packed batches, and what it runs on: data sets as encodings, states of
the frozen layers kept between epochs, checkpoints and several processes.

`fit` and `report` import this, the command line only `launch`, which needs no torch. Start at
`loop.py`.
"""
