"""POST /v1/predict/stream through a worker: the lines are run by the engine's process."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from tests.support.open_stream import OpenStream
from tests.support.service_process import TEXTS, ReadyService, alone, ready_service
from tests.support.tiny_models import make_adapter

# Each test starts processes.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyService]:
    with ready_service(folder, tmp_path_factory.mktemp("s")) as running:
        yield running


def put(service: ReadyService, content: bytes) -> str:
    response = httpx.put(f"{service.url}/v1/adapters/a", content=content, timeout=30)
    assert response.status_code in (200, 201)
    return str(response.json()["revision"])


def test_lines_are_answered_as_alone_and_by_the_revision_of_their_time(
    service: ReadyService, saved: Backbone
) -> None:
    adapters = [make_adapter(saved, seed=seed) for seed in (1, 2)]
    with OpenStream(service.url) as stream:
        for adapter in adapters:
            revision = put(service, serialize(adapter))
            lines = [{"adapter": "a", "text": text} for text in TEXTS * 20]
            stream.send(*lines)
            for line in lines:
                answer = stream.line()
                assert answer["revision"] == revision
                scores = [item["score"] for item in answer["scores"]]
                assert scores == pytest.approx(alone(saved, adapter, line["text"]), abs=1e-5)
        stream.end()
        assert stream.rest() == []


def test_every_line_has_an_answer_or_an_error_when_the_engine_dies(
    service: ReadyService, saved: Backbone
) -> None:
    put(service, serialize(make_adapter(saved, seed=1)))
    with OpenStream(service.url) as stream:
        lines = [{"adapter": "a", "text": text} for text in TEXTS * 50]
        stream.send(*lines[:10])
        assert "label" in stream.line()
        service.kill("engine")
        stream.send(*lines[10:])
        stream.end()
        answers = stream.rest()
    assert len(answers) == len(lines) - 1
    for answer in answers:
        assert "label" in answer or answer["error"]["type"] == "unavailable", answer
    # A new engine is there, or was the standby.
    assert "label" in answers[-1]
