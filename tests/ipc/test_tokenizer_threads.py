"""The cores that workers tokenise with are divided among them."""

import os
import subprocess
import sys

import pytest

from service.ipc.supervisor import tokenizer_threads

VARIABLES = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
COUNT = """
import os
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_batch_fast(["a"] * 100)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(("workers", "started"), [(1, 6), (3, 2), (4, 0), (12, 0)])
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_worker_starts_no_more_threads_than_its_share_of_the_cores(
    workers: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    counted = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**os.environ, **tokenizer_threads(workers)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(counted.stdout) == started


def test_what_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert "RAYON_NUM_THREADS" not in tokenizer_threads(2)
