"""The dashboard's page and files. They hold nothing of anyone: what they show, they ask the API for, with a key."""

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
    """Return a file that the page is made of, by the page's digest and the file's name."""
    digest, _, name = rest.partition("/")
    if (asset := site.find(digest, name)) is None:
        message = f"The dashboard has no file {rest!r}. Load the page anew."
        raise RouteNotFound(message)
    return _answer(request, asset)


@router.api_route("", methods=_METHODS)
@router.api_route("/{path:path}", methods=_METHODS)
async def get_page(request: Request, site: SiteDependency) -> Response:
    """Return the page; the part of it that an address names is for the page itself to show."""
    if request.headers.get("if-none-match") == site.etag:
        return Response(status_code=304, headers=dict(site.index.headers))
    return _answer(request, site.index)


def _answer(request: Request, sent: Asset) -> Response:
    """Return the file, packed for whoever unpacks it."""
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(sent.packed, headers={**sent.headers, "Content-Encoding": "gzip"})
    return Response(sent.body, headers=dict(sent.headers))
