"""Which texts a further engine asks for, which does not keep them itself."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from adapters.backbone.model import Backbone
from service.drift.further import FurtherMonitor
from service.drift.uncertain import UncertainTexts
from service.engine.interface import AdapterKey
from service.ipc.further_engines import FurtherEngines
from service.ipc.protocol import Forget
from tests.support.tiny_models import make_spec


def test_what_was_forgotten_keeps_no_later_text_from_being_asked_for(backbone: Backbone) -> None:
    uncertain = UncertainTexts(texts=2, max_bytes=2**20, seconds=60.0)
    further = FurtherMonitor(texts=0, uncertain=uncertain)
    spec = make_spec(backbone)

    def asked(*confidences: float) -> list[int]:
        entry: Any = SimpleNamespace(adapter=AdapterKey("n", "r"), counted=True)
        rows: list[Any] = [
            SimpleNamespace(scores=np.array([each, 1 - each], dtype=np.float32))
            for each in confidences
        ]
        return sorted(further.answered([entry] * len(rows), rows))

    further.follow("n", "r", {"r": spec})
    assert asked(0.6, 0.7) == [0, 1]
    assert asked(0.8, 0.9) == []
    # As when a message says so.
    further.uncertain.forget("n")
    assert asked(0.8, 0.9) == [0, 1]
    # As when the first engine has been replaced.
    further.begin()
    assert asked(0.91, 0.92) == [0, 1]


def test_further_engines_are_told_what_was_forgotten() -> None:
    sent: list[Any] = []
    outbox: Any = SimpleNamespace(send=sent.append)
    engines = FurtherEngines()
    for identity in (b"1", b"2"):
        engines.add(identity, outbox)
    engines.forget("n")
    assert sent == [Forget("n"), Forget("n")]
