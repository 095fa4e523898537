"""Bodies of the Open Inference Protocol: bytes behind JSON, compressed ones, and other kinds."""

import gzip
import json
import zlib
from collections.abc import Iterator

import httpx
import orjson
import pytest

from service.http.protocols.oip.tensors import pack_strings
from tests.support.http_service import RunningService, serve
from tests.support.oip_requests import (
    INFER_PATH,
    TEXTS,
    infer,
    outputs_of,
    refusal_of,
    text_tensor,
)
from tests.support.tiny_models import make_adapter, make_backbone

HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), MAX_BODY_BYTES="20000") as running:
        running.put("a", make_adapter(make_backbone()))
        yield running


def raw(live: RunningService, content: bytes, **headers: str) -> httpx.Response:
    return live.client.post(INFER_PATH, content=content, headers=headers)


def test_binary_tensors_travel_behind_the_json_both_ways(live: RunningService) -> None:
    data = pack_strings(TEXTS)
    tensor = {"name": "text", "shape": [3], "datatype": "BYTES"}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    mark = {HEADER: str(len(head))}
    expected = outputs_of(infer(live, text_tensor(*TEXTS)))
    bodies = {
        None: head + data,
        "gzip": gzip.compress(head + data),
        "deflate": zlib.compress(head + data),
    }
    for encoding, body in bodies.items():
        headers = mark if encoding is None else mark | {"Content-Encoding": encoding}
        answer = raw(live, body, **headers)
        assert answer.status_code == 200, answer.text
        length = int(answer.headers[HEADER])
        sizes = [
            item["parameters"]["binary_data_size"]
            for item in orjson.loads(answer.content[:length])["outputs"]
        ]
        behind = answer.content[length:]
        assert behind[: sizes[0]] == pack_strings(expected["label"])
        assert len(behind) == sum(sizes)
        assert sizes[1] == 4 * len(expected["probs"])
    for content, headers, fault in (
        (head + data[:-1], mark, "body has"),
        (head + data + b"x", mark, "1 bytes after the JSON belong to no input"),
        (head + data, {}, "not JSON"),
        (head, {}, "body has 0 bytes left"),
        (head + data, {HEADER: "99999"}, "Inference-Header-Content-Length is '99999'"),
        (head + data, {HEADER: "-1"}, "Inference-Header-Content-Length is '-1'"),
        (head + data, {HEADER: "9" * 5000}, "Inference-Header-Content-Length is '999"),
        (head + data, {HEADER: "0"}, "the body is empty"),
        (b"", {}, "the body is empty"),
        (b"x" + head, {"Content-Encoding": "gzip"}, "the body is not gzip"),
        (gzip.compress(head)[:-5], {"Content-Encoding": "gzip"}, "is cut off"),
        (gzip.compress(head) * 2, {"Content-Encoding": "gzip"}, "bytes after its end"),
    ):
        assert fault in refusal_of(raw(live, content, **headers)), fault


def test_bodies_of_other_kinds_and_sizes_are_refused(live: RunningService) -> None:
    good = orjson.dumps({"inputs": [text_tensor("x")]})
    assert raw(live, good).status_code == 200
    assert raw(live, good, **{"Content-Type": "application/json; charset=utf-8"}).is_success
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        # A page of the same origin names its type, too.
        {"Origin": live.url},
        {"Content-Encoding": "br"},
    ):
        assert "expected" in refusal_of(raw(live, good, **headers), 415)
    assert "may not do this" in refusal_of(raw(live, good, Origin="http://elsewhere"), 403)
    bomb = gzip.compress(b" " * 10_000_000)
    assert len(bomb) < 20_000
    assert "when decompressed" in refusal_of(raw(live, bomb, **{"Content-Encoding": "gzip"}), 413)
    assert "larger than" in refusal_of(raw(live, b" " * 30_000), 413)
