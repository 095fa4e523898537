"""A service whose disk does not answer ends when it is told to."""

import os
import re
import signal
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest

from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from service.http.server import ENDING_SECONDS
from tests.support.service_process import environ, service_process, until
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "signals"), [(0, 1), (0, 2), (2, 2)])
def test_a_start_that_hangs_in_a_read_ends_on_signals(
    workers: int, signals: int, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    store.put("a", serialize(make_adapter(make_backbone())))
    # Whoever opens it waits for a writer, as for a file system that hangs.
    (tmp_path / "store" / "a" / "current").unlink()
    os.mkfifo(tmp_path / "store" / "a" / "current")
    environment = environ(save_backbone(tmp_path / "backbone"), tmp_path / "store")
    environment |= {"IDSPAM_WORKERS": str(workers), "IDSPAM_ZOO_DIR": "off"}
    with (tmp_path / "log").open("w") as log, service_process(environment, stderr=log) as running:

        def hangs() -> bool:
            found = re.search(r"starting url=(\S+)", (tmp_path / "log").read_text())
            try:
                answer = httpx.get(f"{found[1]}/readyz").json() if found else {}
            except httpx.TransportError:
                return False
            return "reading the adapters" in (answer.get("reason") or "")

        until(hangs)
        began = monotonic()
        for _ in range(signals):
            running.send_signal(signal.SIGTERM)
            # Two of them at once would be one.
            sleep(0.5)
        running.wait(ENDING_SECONDS + 10)
        if signals == 2:
            assert monotonic() - began < 6
