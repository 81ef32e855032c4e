"""The dashboard's page and files. They contain no data: the page requests it from the API, with a key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from lucid_compute.errors import RouteNotFound
from lucid_compute.server.dashboard.site import ADDRESS, Asset, Site

router = APIRouter(prefix=ADDRESS, include_in_schema=False)
_METHODS = ["GET", "HEAD"]


async def get_site(request: Request) -> Site:
    """Return the dashboard's files."""
    site: Site = request.app.state.site
    return site


SiteDependency = Annotated[Site, Depends(get_site)]


@router.api_route("/assets/{rest:path}", methods=_METHODS)
async def get_asset(rest: str, request: Request, site: SiteDependency) -> Response:
    """Return a file of the page, by the page's digest and the file's name."""
    digest, _, name = rest.partition("/")
    if (asset := site.find(digest, name)) is None:
        message = f"The dashboard has no file {rest!r}. Load the page anew."
        raise RouteNotFound(message)
    return _respond(request, asset)


@router.api_route("", methods=_METHODS)
@router.api_route("/{path:path}", methods=_METHODS)
async def get_page(request: Request, site: SiteDependency) -> Response:
    """Return the page, for any path: the page itself shows the part that the path names."""
    if request.headers.get("if-none-match") == site.etag:
        return Response(status_code=304, headers=dict(site.index.headers))
    return _respond(request, site.index)


def _respond(request: Request, asset: Asset) -> Response:
    """Return the file, compressed if the browser accepts that."""
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.compressed, headers={**asset.headers, "Content-Encoding": "gzip"})
    return Response(asset.body, headers=dict(asset.headers))
