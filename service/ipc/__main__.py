"""`python -m service.ipc KIND CONTEXT`: a process under the supervisor, started by it alone."""

import sys
from importlib import import_module

from cli.imports import importing

if __name__ == "__main__":
    with importing():
        process = import_module(f"service.ipc.{sys.argv[1]}_process")
    sys.exit(process.main())
