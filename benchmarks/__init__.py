"""Where README's figures come from: `python -m benchmarks --help` and docs/benchmarks.md.

What is compared is measured in one run, in turns; a table ends with its machine and conditions.

engine latency adapters     the engine alone, without HTTP       http swap peers   real servers
packed padded lora rivals   what it is compared with             litserve_app
subject shapes texts stock  what it is run on                    servers
loop turns ceilings memory  how it is measured                   load client caller
training exactness          not about speed of serving           report sets
"""
