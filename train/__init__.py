"""Training adapters and comparing training methods: `python -m train COMMAND`.

Floors, each importing only what is below: commands, experiments, fit, report, loop, config, then
methods and data. Start at `fit/fit.py`. Nothing of `service` is imported but its client.
"""
