"""The container's health check: exit status 0 if the service is live.

In Python, because a slim image has no curl. Liveness, not readiness: a service that is still
loading is healthy.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4


def main() -> int:
    port = int(os.environ.get("IDSPAM_PORT", "8000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        # Docker keeps the output: `docker inspect` shows it.
        sys.stdout.write(answer.read(4096).decode(errors="replace"))
        return 0 if answer.status == 200 else 1
    except OSError as error:
        sys.stdout.write(f"no answer on port {port}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
