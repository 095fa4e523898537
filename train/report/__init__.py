"""The results of training: metrics, baselines, progress, reports and the model card.

Data, loop and fit import the metrics and data classes from here; `baselines` and `evaluation` run a
model and are imported by `fit` and the commands only. Start at `report.py`.
"""
