"""The paths that need no key. None of them classifies anything."""

# Answered while the service loads, drains or fails; Triton's clients ask `/v2` too, with a key.
PROBES = frozenset({"/health", "/ping", "/v2/health/live", "/v2/health/ready"})
# Every path that is not named here needs a key, if the service has keys.
OPEN_PATHS = PROBES | {
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/docs/oauth2-redirect",
    "/openapi.json",
}
