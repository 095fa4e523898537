"""How adapters are served: HTTP routes over an engine that answers mixed batches.

Imports `adapters`, never `train`. A request enters at `http`; `__main__` starts it all.

    http           routes of all protocols        engine     queue, batches, device: the hot path
    catalog        what adapter names mean        ipc        the same with several processes
    observability  metrics, logs, traces          client     the Python client
    commands       `python -m service COMMAND`    settings   the environment as one frozen table
    local, ipc.remote   `backend`: engine and catalog in this process or in another
    errors         what can be refused            start      the end of a start
"""
