"""The middleware in Ray's proxy: hints for the router, errors in the service's shape."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from deploy.ray.edge import Edge
from deploy.ray.headers import REPLICA

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def ask(app: App, method: str, path: str, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(Edge(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


async def body_of(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """As a replica that answers with the hint and the body."""
    hint = dict(scope["headers"]).get(b"x-session-id", b"").decode()
    content = json.dumps({"hint": hint, "body": (await body_of(receive)).decode()}).encode()
    headers = [(REPLICA, b"r1"), (b"x-request-id", b"a"), (b"X-Request-ID", b"a")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def fails(status: int, headers: list[tuple[bytes, bytes]]) -> App:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"plain"})

    return app


async def nothing(_: Scope, receive: Receive, __: Send) -> None:
    """As Ray's proxy when a replica dies before it has answered."""
    await body_of(receive)


async def test_the_adapters_of_a_body_become_the_hint_and_the_body_arrives_whole() -> None:
    body = {"inputs": [{"text": "x", "adapter": "b"}, {"text": "y" * 50_000}], "adapter": "a"}
    answer = (await ask(echo, "POST", "/v1/predict", json=body)).json()
    assert answer["hint"] == "b"
    assert json.loads(answer["body"]) == body


async def test_a_path_names_the_adapter_and_a_client_may_say_it_itself() -> None:
    answer = await ask(echo, "POST", "/v2/models/spam/infer", json={"adapter": "other"})
    assert answer.json()["hint"] == "spam"
    headers = {"X-Session-Id": "mine"}
    answer = await ask(echo, "POST", "/v1/predict", json={"adapter": "a"}, headers=headers)
    assert answer.json()["hint"] == "mine"
    assert (await ask(echo, "GET", "/v1/adapters")).json()["hint"] == ""


async def test_the_request_id_is_answered_once() -> None:
    answer = await ask(echo, "GET", "/readyz")
    assert answer.headers.get_list("x-request-id") == ["a"]


async def test_a_body_that_comes_late_is_passed_on_without_a_hint() -> None:
    messages = iter([b'{"adapter":', b'"a"}'])
    answer: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0.1)
        part = next(messages)
        return {"type": "http.request", "body": part, "more_body": not part.endswith(b"}")}

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    await Edge(echo)(scope, receive, send)
    assert json.loads(answer[1]["body"]) == {"hint": "", "body": '{"adapter":"a"}'}


@pytest.mark.slow
@pytest.mark.parametrize("app", [nothing, fails(500, []), fails(503, []), fails(429, [])])
async def test_an_error_of_the_proxy_is_503_in_the_shape_of_the_path(app: App) -> None:
    answer = await ask(app, "POST", "/v1/predict", json={"adapter": "a"})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    answer = await ask(app, "POST", "/v2/models/spam/infer", json={})
    assert (answer.status_code, list(answer.json())) == (503, ["error"])
    answer = await ask(app, "POST", "/adapters/spam", json={})
    assert answer.json()["error_type"] == "Unhealthy"


async def test_an_error_of_a_replica_and_other_answers_pass() -> None:
    answer = await ask(fails(500, [(REPLICA, b"r1")]), "POST", "/v1/predict", json={})
    assert (answer.status_code, answer.text) == (500, "plain")
    answer = await ask(fails(404, []), "GET", "/nowhere")
    assert (answer.status_code, answer.text) == (404, "plain")
    # The proxy's own health is not the service's.
    answer = await ask(fails(503, []), "GET", "/-/healthz")
    assert answer.text == "plain"


def dies(times: int, seen: list[bytes]) -> App:
    """Dies without an answer so many times, then answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if len(seen) < times:
            seen.append(await body_of(receive))
            return
        seen.append(b"")
        await echo(scope, receive, send)

    return app


async def test_a_prediction_is_sent_again_when_its_replica_ends() -> None:
    seen: list[bytes] = []
    body = {"adapter": "a", "inputs": ["x"]}
    answer = await ask(dies(2, seen), "POST", "/v1/predict", json=body)
    assert json.loads(answer.json()["body"]) == body
    assert [json.loads(item) for item in seen[:2]] == [body, body]
    # Not for ever.
    assert (await ask(dies(3, []), "POST", "/v1/predict", json=body)).status_code == 503


def silent(limits: list[bytes]) -> App:
    """As Ray's proxy when a replica's node is gone: after the limit it gives up."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limits.append(dict(scope["headers"]).get(b"x-request-timeout-seconds", b""))
        await fails(408, [])(scope, receive, send)

    return app


@pytest.mark.parametrize(
    ("path", "body", "seconds"),
    [
        ("/v1/predict", {"adapter": "a", "inputs": "x", "timeout_ms": 2500}, 2.5),
        ("/v2/models/a/infer", {"parameters": {"timeout": 2_500_000}}, 2.5),
        # Somebody writes about it.
        ("/v1/predict", {"inputs": '{"timeout_ms": 1}', "timeout_ms": 2500}, 2.5),
    ],
)
async def test_a_prediction_ends_soon_after_its_time_limit(
    path: str, body: Any, seconds: float
) -> None:
    limits: list[bytes] = []
    answer = await ask(silent(limits), "POST", path, json=body)
    assert answer.status_code == 504
    assert "no answer in time" in answer.text
    # Its time is over: nobody else is asked.
    (limit,) = limits
    assert seconds + 4 < float(limit) <= seconds + 5


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        # The service's own limit is not known here.
        ("POST", "/v1/predict", {"inputs": "x"}, 504),
        ("POST", "/v2/models/a/infer", {"parameters": {"timeout": 0}}, 504),
        # It may have been made.
        ("PUT", "/v1/adapters/a", {"timeout_ms": 2500}, 503),
    ],
)
async def test_what_sets_no_limit_has_none(method: str, path: str, body: Any, status: int) -> None:
    limits: list[bytes] = []
    assert (await ask(silent(limits), method, path, json=body)).status_code == status
    assert limits == [b""]


def drains(times: int, seen: list[str]) -> App:
    """Replicas that may not answer now, so many times, and then one that does."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        answers = echo if len(seen) > times else fails(503, [(REPLICA, b"r1")])
        await answers(scope, receive, send)

    return app


async def test_a_prediction_is_sent_again_when_its_replica_may_not_answer_now() -> None:
    seen: list[str] = []
    body = {"adapter": "a", "inputs": ["x"]}
    answer = await ask(drains(2, seen), "POST", "/v1/predict", json=body)
    assert json.loads(answer.json()["body"]) == body
    assert len(seen) == 3
    # The last one's own answer says why.
    answer = await ask(drains(3, []), "POST", "/v1/predict", json=body)
    assert (answer.status_code, answer.text) == (503, "plain")


async def test_a_change_that_a_replica_refuses_is_not_sent_again() -> None:
    seen: list[str] = []
    answer = await ask(drains(1, seen), "PUT", "/v1/adapters/a", content=b"x")
    assert (answer.status_code, len(seen)) == (503, 1)


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/adapters/a"), ("POST", "/v1/adapters/a/rollback")]
)
async def test_a_change_is_never_sent_twice(method: str, path: str) -> None:
    seen: list[bytes] = []
    answer = await ask(dies(1, seen), method, path, content=b"x")
    assert (answer.status_code, seen) == (503, [b"x"])


async def test_nothing_is_sent_again_for_a_client_that_is_gone() -> None:
    seen: list[bytes] = []
    sent: list[Message] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    messages = iter(sent)
    answer: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        answer.append(message)

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        seen.append(await body_of(receive))
        await receive()

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    await Edge(app)(scope, receive, send)
    assert (seen, answer) == ([b"{}"], [])
