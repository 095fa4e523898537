"""The container's health check: exit status 0 if the service is live.

In Python, because a slim image has no curl. Liveness, not readiness: a service that is still
loading is healthy. It asks the address that the service listens on, by the same variables.
"""

import http.client
import os
import re
import ssl
import sys

TIMEOUT_SECONDS = 4
# Listening on every address includes the loopback one. `::` includes that of IPv4, but the machine
# may have none.
_EVERYWHERE = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "127.0.0.1")}
# What Kubernetes sets for a service called `idspam`; the service ignores it too.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+")


def main() -> int:
    host = os.environ.get("IDSPAM_HOST", "").strip() or "127.0.0.1"
    port = os.environ.get("IDSPAM_PORT", "").strip()
    port = "8000" if not port or _SERVICE_LINK.fullmatch(port) else port.replace("_", "")
    if not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) <= 65535:
        sys.stdout.write(f"IDSPAM_PORT: {port[:64]!r}: a health check needs a fixed port\n")
        return 1
    for address in _EVERYWHERE.get(host, (host,)):
        connection = _connection(address, int(port))
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            # Docker keeps the output: `docker inspect` shows it.
            sys.stdout.write(answer.read(4096).decode(errors="replace"))
            return 0 if answer.status == 200 else 1
        except (OSError, http.client.HTTPException) as error:
            sys.stdout.write(f"no answer on port {port} of {address}: {error!r}\n")
        finally:
            connection.close()
    return 1


def _connection(address: str, port: int) -> http.client.HTTPConnection:
    if not os.environ.get("IDSPAM_TLS_CERT", "").strip():
        return http.client.HTTPConnection(address, port, timeout=TIMEOUT_SECONDS)
    # It asks its own container, whose certificate is for another name.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(address, port, timeout=TIMEOUT_SECONDS, context=context)


if __name__ == "__main__":
    sys.exit(main())
