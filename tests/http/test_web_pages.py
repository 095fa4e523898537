"""A browser that shows another site's page: its forms, its scripts, and names that it made up."""

from collections.abc import Iterator

import pytest

from adapters.format.files import serialize
from service.access.scopes import needs
from tests.support.http_service import RunningService, error_of, serve
from tests.support.tiny_models import make_adapter, make_backbone

APP, EVIL = "https://app.example.org", "https://evil.example"
FILE = serialize(make_adapter(make_backbone()))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), ALLOWED_ORIGINS=APP) as running:
        running.put("a", make_adapter(make_backbone()))
        yield running


def form(live: RunningService, **headers: str) -> int:
    answer = live.client.post(
        "/v1/adapters", data={"name": "a"}, files={"file": FILE}, headers=headers
    )
    return answer.status_code


def test_a_form_of_another_site_replaces_nothing(live: RunningService) -> None:
    assert form(live, Origin=EVIL) == 403
    assert form(live, Origin="null") == 403
    assert form(live) == 200
    assert form(live, Origin=APP) == 200
    assert form(live, Origin=live.url) == 200
    assert live.metric("idspam_access_refusals_total", reason="origin") >= 2


def test_no_route_that_does_more_than_read_answers_another_site(live: RunningService) -> None:
    for method, path in needs():
        if method != "GET":
            asked = path.replace("{name}", "a").replace("{version}", "0")
            answer = live.client.request(method, asked, headers={"Origin": EVIL})
            assert answer.status_code == 403, (method, path)
            assert EVIL in answer.text
    assert live.predict(adapter="a", inputs="x")["results"]


def test_a_name_that_a_page_made_point_here_is_refused(live: RunningService) -> None:
    for path in ("/v1/adapters", "/metrics", "/docs", "/nothing"):
        answer = live.client.get(path, headers={"Host": "evil.example:8000"})
        assert answer.status_code == 403, path
        assert error_of(answer)["type"] == "forbidden"
    for path in ("/healthz", "/readyz", "/health", "/v2/health/ready"):
        assert live.client.get(path, headers={"Host": "anything"}).status_code == 200
    assert live.client.get("/metrics", headers={"Host": "localhost:1"}).status_code == 200


def test_preflights_are_answered_for_allowed_origins_alone(live: RunningService) -> None:
    ask = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x-api-key"}
    fine = live.client.options("/v1/adapters/a", headers=ask | {"Origin": APP})
    assert fine.status_code == 200
    assert fine.headers["access-control-allow-origin"] == APP
    assert "PUT" in fine.headers["access-control-allow-methods"]
    refused = live.client.options("/v1/adapters/a", headers=ask | {"Origin": EVIL})
    assert refused.status_code >= 400
    assert "access-control-allow-origin" not in refused.headers
    answer = live.client.get("/v1/adapters", headers={"Origin": APP})
    assert answer.headers["access-control-allow-origin"] == APP
    assert "access-control-allow-origin" not in live.client.get("/v1/adapters").headers


@pytest.mark.slow
def test_with_keys_a_page_cannot_change_anything_but_may_predict_with_its_key(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    key = {"Authorization": "Bearer admin"}
    with serve(tmp_path_factory.mktemp("adapters"), ADMIN_KEYS="admin") as closed:
        closed.put("a", make_adapter(make_backbone()), **key)
        assert form(closed, Origin=EVIL, **key) == 403
        assert form(closed, **key) == 200
        # A proxy in front may pass on such a request; the key is what lets it in.
        body = {"adapter": "a", "inputs": "x"}
        headers = key | {"Origin": EVIL, "Host": "idspam.example.org"}
        assert closed.client.post("/v1/predict", json=body, headers=headers).status_code == 200
