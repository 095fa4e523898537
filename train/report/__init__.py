"""The results of training: baselines, progress on a screen, reports and the model card.

`fit`, `experiments` and `commands` import this; what the loop itself needs is below, in
`train.metrics` and `train.loop.progress`. Start at `report.py`.
"""
