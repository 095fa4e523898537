"""Where the README's figures come from: `python -m benchmarks --help` and docs/benchmarks.md.

Nothing imports this package but its tests. Start with `engine`, the shortest complete benchmark.
What is compared is measured in one run, in turns, and each table ends with its conditions.

engine latency adapters           benchmarks of the engine alone, without HTTP
http swap peers shell             benchmarks of real servers (servers, litserve_app)
training                          packed_training beside padded_training, memory
exactness                         scores, not speed
padded rivals ceilings            what the engine is compared with
subject shapes texts stock work   what is run: backbones, texts, adapters, training rows
loop load client turns memory     how it is measured
arguments report sets             commands, their tables, lists of commands
tables page                       a set's files into the tables of docs/benchmarks.md
"""
