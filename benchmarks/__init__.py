"""Where the figures of README and docs come from: `python -m benchmarks --help`.

Real servers in processes of their own, loaded over loopback by `wrk`; what is compared is measured
in one run, in turns. Imports the service's parts only to make adapters.
"""
