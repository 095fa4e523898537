"""Headers that are between the proxy, the replicas and whoever looks at them."""

# Which replica answered: an answer without it is the proxy's own.
REPLICA = b"x-replica"
