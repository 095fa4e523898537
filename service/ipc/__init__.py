"""Several processes: N HTTP workers in front of one engine process, under a supervisor.

Start reading at `supervisor`; `protocol` has every message between workers and engine, `remote` and
`server` its two sides. This package is at the top of the service: only `service.__main__` imports
it. Supervisor and workers import neither torch nor transformers. See docs/processes.md.
"""
