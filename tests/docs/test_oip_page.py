"""docs/oip.md lists the routes, tensors and parameters that exist."""

import re

from service.http.app import route_paths
from service.http.protocols.oip.tensors import INPUTS, OUTPUTS, RequestParameters
from tests.support.service_process import TREE

PAGE = (TREE / "docs" / "oip.md").read_text()


def test_every_route_is_on_the_page() -> None:
    routes = {path.replace("/versions/{version}", "") for path in route_paths()}
    shown = set(re.findall(r"^\| `(?:GET|POST) (/v2\S*)` \|", PAGE, re.MULTILINE))
    # Cohere's route, not the protocol's: docs/protocols.md.
    assert shown == {path for path in routes if path.startswith("/v2")} - {"/v2/rerank"}


def test_every_tensor_and_parameter_is_on_the_page() -> None:
    for name in (*INPUTS, *OUTPUTS, *RequestParameters.model_fields):
        assert f"| `{name}` |" in PAGE, name
