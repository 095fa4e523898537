"""How adapters are served: HTTP routes over an engine that answers mixed batches.

Knows no training. The parts:

    settings    the environment -> one frozen table     errors     what can be refused, as a tree
    engine      the hot path: queue, batches, device    catalog    which adapter a name means now
    metrics     what Prometheus sees                    routes     one file per HTTP surface
    lifecycle   loading, ready, draining, stopped       server     the process around it
    backend     where engine and catalog are            local      in this process
    directory   what adapter names mean, to read        processes  in several: workers, engine
"""
