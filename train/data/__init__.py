"""Labelled texts: from files and hub data sets to examples, splits and known tasks.

Imports no model. `dataset.read_examples` is where every input enters; `task_data.load_task` reads
whole tasks for the experiments.
"""
