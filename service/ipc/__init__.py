"""N HTTP workers, one engine process, and a supervisor over them. Knows no route and no device.

    supervisor  starts, replaces, ends      worker    HTTP over a remote engine
    child       one process and its pipe    remote    the engine, as a worker has it
    counting    the one metrics registry    replica   the catalog, as a worker has it
    usage       memory and processor time   link      a worker's connection, and its loss

    engine      the engine's process        part      what every child is started with, and watches
    hub         workers, as it sees them    relay     what a child measures, on its way

    messages, events    what crosses        values    entries, errors, adapters as messages
    channel     a ZeroMQ socket on an event loop

The supervisor and the workers import neither torch nor transformers. docs/processes.md tells what
happens when each part ends.
"""
