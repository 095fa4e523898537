"""/docs and /openapi.json: the API for people and for programs, from the service alone.

The page is Swagger UI. Its script and style come from the package fastapi-swagger and are sent by
this service, so that the page works without the internet and no other server's code runs in it. All
of its addresses are relative, so it also works behind any prefix of a proxy.
"""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from service.http.bodies import JsonResponse
from service.http.etags import is_known
from service.http.proxies import root_path_of

router = APIRouter(include_in_schema=False)

_ASSETS = Path(str(files("fastapi_swagger.resources")))
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ID-SPAM service</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>Without JavaScript, read <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# No validator: that would send the document to another server.
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""
# Swagger UI sets styles inline and has its icons in data URLs.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/docs")
async def page() -> Response:
    """The page."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)


@router.get("/docs/start.js")
async def start() -> Response:
    """Shows the document in the page."""
    return Response(_START, media_type="text/javascript", headers=_HEADERS)


@router.get("/docs/swagger-ui-bundle.js")
async def script(request: Request) -> Response:
    """Swagger UI."""
    return _asset(request, "swagger-ui-bundle.js", "text/javascript")


@router.get("/docs/swagger-ui.css")
async def style(request: Request) -> Response:
    """The style of Swagger UI."""
    return _asset(request, "swagger-ui.css", "text/css")


@router.get("/docs/favicon.png")
async def icon(request: Request) -> Response:
    """The page's icon."""
    return _asset(request, "favicon-32x32.png", "image/png")


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """The OpenAPI document; its server is the prefix under which the caller sees the service."""
    content = request.app.openapi()
    root_path = root_path_of(request.scope)
    return JsonResponse(content | {"servers": [{"url": root_path}]} if root_path else content)


def _asset(request: Request, name: str, media_type: str) -> Response:
    path = _ASSETS / name
    response = FileResponse(path, media_type=media_type, headers=_HEADERS, stat_result=path.stat())
    if is_known(request, response.headers["etag"].strip('"')):
        return Response(status_code=304, headers=_HEADERS | {"ETag": response.headers["etag"]})
    return response
