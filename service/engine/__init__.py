"""The hot path: from an encoded text to its scores. Knows no HTTP.

interface  what routes see               engine     its life, and its requests' way
scheduler  decides the next batch        inflight   requests from admission to answer
queue      the scheduler, shared         device     the one thread that runs batches
residency  which adapters are where      runner     the only file that touches the device
requests   one request's state           observer   what can be measured
settings   the limits
"""
