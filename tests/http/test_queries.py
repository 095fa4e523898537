"""Query parameters that a changing route does not have are refused: nothing is changed."""

from pathlib import Path

import pytest

from adapters.format.files import serialize
from tests.support.http_service import error_of, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.mark.slow
def test_a_misspelt_parameter_changes_nothing(tmp_path: Path) -> None:
    one, two = (serialize(make_adapter(make_backbone(), seed=seed)) for seed in (1, 2))
    form = {"data": {"name": "form"}, "files": {"file": two}}
    with serve(tmp_path) as live:
        client = live.client
        revision = client.put("/v1/adapters/a", content=one).json()["revision"]
        for query in ("dry-run=true", "dryrun=1", "Stage=true", "dry_run=true&dry_run=false"):
            for response in (
                client.put(f"/v1/adapters/a?{query}", content=two),
                client.put(f"/v1/adapters/new?{query}", content=two),
                client.post(f"/v1/adapters?{query}", **form),  # type: ignore[arg-type]
                client.post(f"/v1/adapters/a/rollback?{query}", json={}),
                client.put(f"/v1/adapters/a/traffic?{query}", json={"revision": "x", "percent": 5}),
                client.post(f"/v1/adapters/a/traffic/promote?{query}"),
                client.put(f"/v1/adapters/a/card?{query}", content="# a"),
                client.delete(f"/v1/adapters/a?{query}"),
                client.delete(f"/v1/adapters/a/revisions/{revision}?{query}"),
                client.delete(f"/v1/adapters/a/uncertain?{query}"),
            ):
                assert response.status_code == 422, response.request.url
                error = error_of(response)
                assert error["type"] == "invalid_request"
                assert query.partition("=")[0] in error["message"]
        assert [item["name"] for item in client.get("/v1/adapters").json()["adapters"]] == ["a"]
        assert client.get("/v1/adapters/a").json()["revision"] == revision
        # What only reads goes on as before.
        assert client.get("/v1/adapters/a?anything=1").status_code == 200
        assert client.put("/v1/adapters/a?dry_run=true&force=true", content=two).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("query", ["top_k=1", "adapter=a"])
def test_a_prediction_has_no_parameters(tmp_path: Path, query: str) -> None:
    with serve(tmp_path) as live:
        live.put("a", make_adapter(make_backbone()))
        response = live.client.post(f"/v1/predict?{query}", json={"adapter": "a", "inputs": "x"})
        assert response.status_code == 422
        assert "there are none here" in error_of(response)["message"]
