"""The console: a web page for people, at `/` and `/console`, from the service alone.

Its files hold nothing secret and need no key; what they show comes from the API, which does. All
addresses are relative, so the console also works behind any prefix of a proxy.
"""

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.http.console.files import PAGE, content_policy, static_files
from service.http.etags import is_known
from service.http.openapi.documentation import CONSOLE

router = APIRouter()

PATH = "/console"
_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept by the browser, and asked about each time: after an update no page mixes two versions.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@router.get("/", **CONSOLE)
@router.get(PATH, include_in_schema=False)
async def page(request: Request) -> Response:
    """The page."""
    # `/` is another protocol's route, too, and is counted under its own name.
    request.scope["idspam.route"] = PATH
    return _answer(request, PAGE)


@router.get("/console/{file}", include_in_schema=False)
async def file(request: Request, file: str) -> Response:
    """A script, the style or the icon."""
    return _answer(request, file)


@router.get("/console/{folder}/{file}", include_in_schema=False)
async def file_in_folder(request: Request, folder: str, file: str) -> Response:
    """The script of one page, or of one part of pages."""
    return _answer(request, f"{folder}/{file}")


def _answer(request: Request, name: str) -> Response:
    """
    Raises:
        HTTPException: 404, there is no such file.
    """
    found = static_files().get(name)
    if found is None:
        raise HTTPException(404)
    is_gzipped = _takes_gzip(request.headers.get("accept-encoding", ""))
    tag = f"{found.tag}-gzip" if is_gzipped else found.tag
    headers = {"Content-Security-Policy": content_policy(), **_HEADERS, "ETag": f'"{tag}"'}
    if is_known(request, tag):
        return Response(status_code=304, headers=headers)
    if is_gzipped:
        headers["Content-Encoding"] = "gzip"
    content = found.gzipped if is_gzipped else found.content
    return Response(content, media_type=found.media_type, headers=headers)


def _takes_gzip(accepted: str) -> bool:
    """Whether an `Accept-Encoding` names gzip and does not weigh it with zero."""
    for item in accepted.split(","):
        coding, *parameters = (part.strip().lower() for part in item.split(";"))
        if coding == "gzip":
            weights = (part.removeprefix("q=") for part in parameters if part.startswith("q="))
            return all(weight.strip("0.") for weight in weights)
    return False
