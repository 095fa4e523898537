"""Workers hand connections over while another one has fewer; none is lost on the way."""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import trustme

from service.ipc.least_connections import LeastConnections
from tests.support.service_process import ReadyService, ready_service, until

WORKERS = 3


class Worker:
    """One of `WORKERS`, all in this process, and the connections that it took."""

    def __init__(self, folder: Path, number: int, *, joins: bool = True) -> None:
        self.neighbours = LeastConnections(folder, number, WORKERS)
        self.taken: list[socket.socket] = []
        if joins:
            self.neighbours.join(self.serve)

    def serve(self, connection: socket.socket) -> None:
        self.taken.append(connection)

    def offer(self) -> bool:
        """Whether a new connection is handed over."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            return self.neighbours.hand_over(theirs.fileno())

    def offer_all(self) -> int:
        """How many are handed over until one stays."""
        number = 0
        while self.offer():
            number += 1
        return number

    def die(self) -> None:
        """As after a SIGKILL: its row still says that it takes connections."""
        self.neighbours.leave()
        self.neighbours._own[0] = 1


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[list[Worker]]:
    made = [Worker(tmp_path, number) for number in range(WORKERS)]
    yield made
    for worker in made:
        for connection in [*worker.neighbours.leave(), *worker.taken]:
            connection.close()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


async def others_run() -> None:
    await asyncio.sleep(0.05)


@pytest.mark.anyio
async def test_a_connection_goes_to_the_worker_with_the_fewest_and_lives_on(
    workers: list[Worker],
) -> None:
    busy, calm, calmest = workers
    busy.neighbours.opened(9)
    calm.neighbours.opened(4)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert busy.neighbours.hand_over(theirs.fileno())
        await others_run()
        assert (busy.taken, calm.taken) == ([], [])
        (connection,) = calmest.taken
        ours.sendall(b"ping")
        assert connection.recv(9) == b"ping"
        connection.sendall(b"pong")
        assert ours.recv(9) == b"pong"
        connection.close()
        assert ours.recv(9) == b""


@pytest.mark.anyio
@pytest.mark.parametrize(("has", "hands_over"), [(4, False), (5, False), (6, False), (7, True)])
async def test_one_more_stays(workers: list[Worker], has: int, hands_over: bool) -> None:
    first, second, third = workers
    second.neighbours.opened(5)
    third.neighbours.opened(5)
    first.neighbours.opened(has)
    assert first.offer() == hands_over


@pytest.mark.anyio
async def test_what_is_on_its_way_or_in_its_handshake_counts(workers: list[Worker]) -> None:
    busy, second, third = workers
    busy.neighbours.opened(6)
    second.neighbours.starting(5)
    third.neighbours.opened(3)
    assert busy.offer_all() == 2
    # The third has not run yet.
    assert third.taken == []
    await others_run()
    assert len(third.taken) == 2
    third.neighbours.opened(5)
    assert busy.offer_all() == 0
    third.neighbours.opened(3)
    assert busy.offer_all() == 2


@pytest.mark.anyio
async def test_a_dead_worker_is_passed_over_and_its_next_process_takes_some(
    workers: list[Worker], tmp_path: Path
) -> None:
    busy, killed, other = workers
    busy.neighbours.opened(4)
    other.neighbours.opened(2)
    killed.neighbours.starting(1)
    killed.die()
    assert busy.offer()
    await others_run()
    assert len(other.taken) == 1
    other.neighbours.opened(4)
    assert not busy.offer()

    again = Worker(tmp_path, 1, joins=False)
    assert not busy.offer()
    again.neighbours.join(again.serve)
    assert busy.offer_all() == 3
    await others_run()
    assert len(again.taken) == 3
    for connection in [*again.neighbours.leave(), *again.taken]:
        connection.close()


@pytest.mark.anyio
async def test_who_leaves_gets_what_was_on_its_way_and_nothing_later(workers: list[Worker]) -> None:
    busy, leaving, other = workers
    busy.neighbours.opened(4)
    other.neighbours.opened(9)
    assert busy.offer()
    (late,) = leaving.neighbours.leave()
    late.close()
    assert not busy.offer()
    await others_run()
    assert leaving.taken == other.taken == []
    assert leaving.neighbours.leave() == []


@pytest.mark.anyio
async def test_what_does_not_fit_into_a_slow_workers_queue_stays(workers: list[Worker]) -> None:
    busy, slow, other = workers
    other.neighbours.leave()
    busy.neighbours.opened(10_000)
    fits = busy.offer_all()
    assert 0 < fits < 10_000
    await others_run()
    assert len(slow.taken) == fits
    assert busy.offer()


@pytest.mark.anyio
async def test_what_is_no_connection_is_passed_over(workers: list[Worker], tmp_path: Path) -> None:
    busy, calm, _ = workers
    busy.neighbours.opened(4)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as junk:
        for message in (b"", b"junk", b"x" * 10_000):
            junk.sendto(message, str(tmp_path / "worker-1"))
        assert busy.offer()
        await others_run()
    assert len(calm.taken) == 1


@contextmanager
def connected(service: ReadyService, number: int, ca: str = "") -> Iterator[Counter[int]]:
    """How many of so many connections each worker has."""
    with ExitStack() as stack:
        found: Counter[int] = Counter()
        for _ in range(number):
            trusted = ssl.create_default_context(cafile=ca or None)
            client = httpx.Client(base_url=service.url, timeout=30, verify=trusted)
            stack.enter_context(client)
            found[int(client.get("/readyz").json()["details"]["worker"])] += 1
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_worker_has_many_more_connections_than_another(
    folder: Path, tmp_path: Path, scheme: str
) -> None:
    authority = trustme.CA()
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(ca))
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    secure = scheme == "https"
    files = {"TLS_CERT": str(cert), "TLS_KEY": str(key)} if secure else {}
    with ready_service(folder, tmp_path, workers=3, **files) as running:
        trusted = str(ca) if secure else ""
        with connected(running, 24, trusted) as found:
            assert sorted(found) == [0, 1, 2]
            assert max(found.values()) - min(found.values()) <= 2
        running.kill("worker-1")
        # Then the system has closed its sockets, and resets nothing more.
        until(lambda: "worker-1 ended" in running.log.read_text())
        with connected(running, 12, trusted) as found:
            assert found.total() == 12
        until(lambda: _is_even(running, trusted))
        assert "Traceback" not in running.log.read_text()


def _is_even(running: ReadyService, ca: str) -> bool:
    with connected(running, 24, ca) as found:
        return len(found) == 3 and max(found.values()) - min(found.values()) <= 2


@pytest.mark.slow
def test_a_worker_whose_files_cannot_be_used_says_so_in_one_line(
    folder: Path, tmp_path: Path
) -> None:
    with ready_service(folder, tmp_path, workers=1) as running:
        shared = running.folder() / "connections"
        shared.unlink()
        shared.mkdir()
        running.kill("worker-0")
        until(lambda: "worker-0 ended: [Errno 21] Is a directory" in running.log.read_text())
        shared.rmdir()
        until(lambda: running.log.read_text().count("worker-0 is ready") == 2)
        with connected(running, 1) as found:
            assert found == {0: 1}
        assert "Traceback" not in running.log.read_text()
