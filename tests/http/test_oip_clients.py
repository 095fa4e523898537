"""Clients that other projects wrote, against a real service: Triton's and KServe's, unchanged.

They run in an environment of their own, since they stand on other versions of the same packages.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service_process import TREE, environ, service_process
from tests.support.third_party.environment import python, run_client

pytestmark = pytest.mark.slow

ZOO = TREE / "adapters" / "zoo"
CLIENTS = TREE / "tests" / "support" / "third_party"
SPAM, HAM = "WINNER!! Call now to claim your free prize", "see you at eight"
PAIRS = [{"text": SPAM, "text_pair": HAM}, {"text": HAM, "text_pair": ""}]
KNOWN = "banking77, clinc150, sentiment, sms-spam"
UNLOADED = "adapter 'sms-spam' is unloaded: load it, or publish it again"

Found = dict[str, Any]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("adapters")
    with service_process(environ(Path("all-MiniLM-L6-v2"), folder, ZOO_DIR="tree")) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[1]


@pytest.fixture(scope="module")
def texts(url: str) -> Found:
    """The native route's answer, as the protocol's outputs."""
    return expected(url, [SPAM, HAM])


@pytest.fixture(scope="module")
def pairs(url: str) -> Found:
    return expected(url, PAIRS)


@pytest.fixture(scope="module")
def triton(url: str) -> Found:
    return run_client(
        "triton_client.py", url.removeprefix("http://"), str(ZOO / "sms-spam.safetensors")
    )


@pytest.fixture(scope="module")
def kserve(url: str) -> Found:
    return run_client("kserve_client.py", url)


def expected(url: str, inputs: list[Any]) -> Found:
    body = {"adapter": "sms-spam", "inputs": inputs}
    results = httpx.post(f"{url}/v1/predict", json=body, timeout=60).json()["results"]
    scores = [{item["label"]: item["score"] for item in result["scores"]} for result in results]
    return {
        "label": [result["label"] for result in results],
        # As the spec orders them.
        "probs": pytest.approx(
            [row[label] for row in scores for label in ("ham", "spam")], abs=1e-5
        ),
    }


def same(answer: Found, expected_answer: Found) -> bool:
    flat = [value for row in answer["probs"] for value in row]
    return bool(answer["label"] == expected_answer["label"] and flat == expected_answer["probs"])


def test_both_clients_see_a_live_and_ready_service(triton: Found, kserve: Found) -> None:
    for seen in (triton, kserve):
        assert seen["live"] is True
        assert seen["ready"] is True
        assert seen["model ready"] is True
        assert seen["unknown ready"] is False
    assert triton["server"]["name"] == "id-spam-service"
    assert triton["model"]["name"] == "sms-spam"
    assert [item["name"] for item in triton["index"]] == KNOWN.split(", ")
    assert {item["state"] for item in triton["index"]} == {"READY"}


def test_tritons_client_classifies_singles_and_batches_however_they_travel(
    triton: Found, texts: Found
) -> None:
    forms = ("two", "as JSON", "answered as JSON", "columns", "pinned", "parameters")
    compressed = [f"{one} and {two}" for one in ("gzip", "deflate") for two in ("gzip", "deflate")]
    for name in (*forms, *compressed):
        assert same(triton[name], texts), name
    assert all(same(answer, texts) for answer in triton["asynchronous"])
    assert triton["one"]["label"] == texts["label"][:1] == ["spam"]
    assert triton["many"] == [64, 77]
    response = triton["response"]
    assert response["id"] == "42"
    assert [response["model_version"]] == triton["model"]["versions"]
    assert [item["parameters"] for item in response["outputs"]] == [
        {"binary_data_size": 15},
        {"binary_data_size": 16},
    ]


def test_tritons_client_classifies_pairs(triton: Found, pairs: Found) -> None:
    assert same(triton["pairs"], pairs)
    assert same(triton["pairs in one"], pairs)


def test_tritons_client_learns_of_truncation_and_of_the_best_classes(triton: Found) -> None:
    assert triton["truncated"]["tokens"] == [12, 256]
    assert triton["truncated"]["truncated"] == [False, True]
    assert triton["truncated response"] == {"truncated": 1}
    best = [row[0].split(":") for row in triton["best"]]
    assert [item[1:] for item in best] == [["1", "spam"], ["0", "ham"]]
    probs = [max(row) for row in triton["two"]["probs"]]
    assert [float(item[0]) for item in best] == pytest.approx(probs, abs=1e-6)


def test_tritons_client_raises_what_the_service_says(triton: Found) -> None:
    unknown = ["404", f"no adapter is named 'no-such'; known: {KNOWN}"]
    refused = triton["refused"]
    for name in ("unknown model", "unknown metadata", "unknown load", "unknown unload"):
        assert refused.pop(name) == unknown, name
    status, message = refused.pop("unknown version")
    assert status == "404"
    assert "no revision 'ff00ff'" in message
    assert refused.pop("wrong datatype")[1] == "input 'text': datatype 'FP32', expected 'BYTES'"
    faults = {
        "wrong shape": "ends before element 2 of 3",
        "not UTF-8": "element 0 is not UTF-8",
        "shared memory": "shared memory is not supported",
        "unknown input": "input 'texts': no such input",
        "unknown output": "output 'logits': no such output",
        "no input": "input 'text': missing",
        "no text": "expected at least one text",
        "too many": "at most 1024 texts are allowed",
        "too long": "2002 tokens, adapter 'sms-spam' reads 256",
        "no adapter": "not a valid adapter",
        "a configuration": "parameters.config: an adapter has none",
    }
    assert refused.keys() == faults.keys()
    for name, fault in faults.items():
        assert refused[name][0] == "400", name
        assert fault in refused[name][1], name


def test_tritons_client_unloads_loads_and_publishes(triton: Found, texts: Found) -> None:
    before, unloaded, refusal, loaded, one, both, copied, after = triton["life"]
    assert before == [["READY", ""], True, None]
    assert unloaded == [["UNAVAILABLE", UNLOADED], False, None]
    assert refusal == ["409", UNLOADED]
    assert loaded == before
    assert one["label"] == copied["label"] == texts["label"][:1]
    assert both == [["READY", ""], True, ["READY", ""]]
    assert after[2][0] == "UNAVAILABLE"


def test_kserves_client_classifies_singles_pairs_and_batches(
    kserve: Found, texts: Found, pairs: Found
) -> None:
    for name, expected_answer in (
        ("two", texts),
        ("plain lists", texts),
        ("nested lists", texts),
        ("as JSON", texts),
        ("pairs", pairs),
        ("pairs in one", pairs),
    ):
        for answer in (kserve[name], kserve[f"{name}, binary"]):
            assert same(answer, expected_answer), name
            assert (answer["id"], answer["model"]) == (name, "sms-spam")
    assert kserve["one"]["label"] == ["spam"]
    every = kserve["every output"]
    assert list(every)[:4] == ["truncated", "tokens", "probs", "label"]
    assert (every["truncated"], every["tokens"]) == ([False, False], [12, 6])
    assert same(every, texts)
    assert kserve["many"] == [[64, 77]] * 4


def test_kserves_client_raises_what_the_service_says(kserve: Found) -> None:
    faults = {
        "unknown model": (404, "no adapter is named 'no-such'"),
        "wrong shape": (400, "input 'text': 1 elements, its shape says 3"),
        "wrong datatype": (400, "input 'text': datatype 'INT64', expected 'BYTES'"),
    }
    assert kserve["refused"].keys() == faults.keys()
    for name, (status, fault) in faults.items():
        assert kserve["refused"][name][0] == status, name
        assert kserve["refused"][name][1].startswith(fault), name


def test_the_pages_examples_are_answered_as_shown(url: str) -> None:
    page = (TREE / "docs" / "oip.md").read_text().replace("127.0.0.1:8000", url[7:])
    asked = re.search(r"-d '(\{.*?\})'", page, re.DOTALL)
    shown = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert asked
    assert shown
    example = json.loads(shown[1])
    body = json.loads(asked[1])
    answer = httpx.post(f"{url}/v2/models/sms-spam/infer", json=body, timeout=60).json()
    assert list(answer) == list(example)
    assert answer["model_version"].startswith(example["model_version"].removesuffix("..."))
    assert answer["outputs"][0] == example["outputs"][0]
    # The page shows `auto`, this is float32: the bound is that of docs/exactness.md.
    assert answer["outputs"][1]["data"] == pytest.approx(example["outputs"][1]["data"], abs=0.02)
    with_triton, with_kserve = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    said = python("-c", f"{with_triton}print(answer.as_numpy('label').tolist())")
    assert said.split() == ["[b'spam',", "b'ham']"]
    main = textwrap.indent(with_kserve + "print(answer.outputs[0].data)\n", "    ")
    said = python("-c", f"import asyncio\nasync def main():\n{main}\nasyncio.run(main())")
    assert said.split() == ["['spam',", "'ham']"]
