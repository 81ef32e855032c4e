"""The API reference at `/docs`: Swagger UI from the files of a package, so that it needs no network."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from lucid_compute.errors import RouteNotFound
from lucid_compute.server.page_headers import PAGE_HEADERS, PAGE_POLICY
from lucid_compute.server.settings import Settings
from lucid_compute.web.provide import Provided

ADDRESS = "/docs"
_PACKAGE = "fastapi_swagger.resources"  # Swagger UI's released files. The package's own code is not used.
_SCRIPT, _STYLE, _ICON, _START = "swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png", "start.js"
_MEDIA_TYPES = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "png": "image/png",
}
# Keys are not remembered: they would outlive the tab. The badge of an online validator is left out.
_START_JS = b"""\
const place = document.getElementById("reference");
SwaggerUIBundle({
  domNode: place,
  url: place.dataset.document,
  validatorUrl: null,
  deepLinking: true,
  filter: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
"""
_PAGE = """\
<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <title>lucid-compute: API reference</title>
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <link rel="icon" href="{assets}/favicon-32x32.png">
    <link rel="stylesheet" href="{assets}/swagger-ui.css">
  </head>
  <body>
    <div id="reference" data-document="{root}/openapi.json"></div>
    <noscript>This page needs JavaScript. It shows <a href="{root}/openapi.json">this document</a>.</noscript>
    <script src="{assets}/swagger-ui-bundle.js"></script>
    <script src="{assets}/start.js"></script>
  </body>
</html>
"""
_NAMES = (_SCRIPT, _STYLE, _ICON, _START)

router = APIRouter(prefix=ADDRESS, include_in_schema=False)


class PackedFile(NamedTuple):
    """A file of Swagger UI, compressed once."""

    compressed: bytes
    media_type: str


@router.get("")
def get_reference(settings: Provided[Settings]) -> HTMLResponse:
    """Return the page."""
    root = settings.root_path
    page = _PAGE.format(root=root, assets=f"{root}{ADDRESS}/assets/{_digest()}")
    return HTMLResponse(
        page, headers={**PAGE_HEADERS, "Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    )


@router.get("/assets/{digest}/{name}")
def get_file(digest: str, name: str, request: Request) -> Response:
    """Return a file of Swagger UI. Browsers may keep it only under the present digest."""
    if name not in _NAMES:
        message = f"The API reference has no file {name!r}. Load the page anew."
        raise RouteNotFound(message)
    file = _packed(name)
    is_present = digest == _digest()
    kept = "public, max-age=31536000, immutable" if is_present else "no-store"
    headers = {**PAGE_HEADERS, "Cache-Control": kept, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.compressed, media_type=file.media_type, headers={**headers, "Content-Encoding": "gzip"})
    return Response(gzip.decompress(file.compressed), media_type=file.media_type, headers=headers)


@cache
def _packed(name: str) -> PackedFile:
    return PackedFile(gzip.compress(_read(name), mtime=0), _MEDIA_TYPES[name.rpartition(".")[2]])


@cache
def _digest() -> str:
    """Return what changes with the files, for their addresses."""
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(_read(name))
    return digest.hexdigest()[:16]


def _read(name: str) -> bytes:
    return _START_JS if name == _START else (files(_PACKAGE) / name).read_bytes()
