"""The API reference at `/docs`, from the files of a package, and the built documentation at `/help`."""

from __future__ import annotations

import gzip
import hashlib
import re
from base64 import b64encode
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from lucid_compute.errors import RouteNotFound
from lucid_compute.server.page_headers import PAGE_HEADERS, PAGE_POLICY
from lucid_compute.server.settings import Settings
from lucid_compute.web.provide import Provided

ADDRESS = "/docs"
HELP = "/help"
_WITHOUT_HELP = (
    "The documentation is in the folder docs of the repository. `make docs` builds it as a site, and "
    "LUCID_HELP_DIR=build/site serves it here. The reference of the API is at /docs.\n"
)
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
# The theme writes styles into its pages.
_HELP_POLICY = (
    "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
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

router = APIRouter(include_in_schema=False)


@router.get(HELP)
def lead_to_help(settings: Provided[Settings]) -> Response:
    """Lead to the documentation, or say where it is."""
    if settings.help_dir is None:
        return PlainTextResponse(_WITHOUT_HELP)
    return RedirectResponse(f"{settings.root_path}{HELP}/")


class HelpSite(StaticFiles):
    """The files of the built documentation. Only the scripts that its pages have by themselves may run."""

    def __init__(self, folder: Path) -> None:
        """Read the pages once, to know their scripts."""
        super().__init__(directory=folder, html=True)
        pages = (page.read_bytes() for page in folder.rglob("*.html"))
        inline = {script for page in pages for script in _INLINE_SCRIPT.findall(page)}
        hashes = sorted(f"'sha256-{b64encode(hashlib.sha256(script).digest()).decode()}'" for script in inline)
        self._headers = {**PAGE_HEADERS, "Content-Security-Policy": _HELP_POLICY.format(hashes=" ".join(hashes))}

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Return a file, with the headers of our pages."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(self._headers)
        return response


class PackedFile(NamedTuple):
    """A file of Swagger UI, compressed once."""

    compressed: bytes
    media_type: str


@router.get(ADDRESS)
def get_reference(settings: Provided[Settings]) -> HTMLResponse:
    """Return the page."""
    root = settings.root_path
    page = _PAGE.format(root=root, assets=f"{root}{ADDRESS}/assets/{_digest()}")
    return HTMLResponse(
        page, headers={**PAGE_HEADERS, "Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    )


@router.get(f"{ADDRESS}/assets/{{digest}}/{{name}}")
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
