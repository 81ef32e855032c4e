"""The dashboard's files as they are sent: read and compressed once, under an address that changes with them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from lucid_compute.server.page_headers import PAGE_HEADERS, PAGE_POLICY

ADDRESS = "/dashboard"
_INDEX = "index.html"
_MEDIA_TYPES = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "html": "text/html; charset=utf-8",
}
_LOADED_BY_TAG = {"theme.js", "early.js"}


class Asset(NamedTuple):
    """A file as it is sent: plain and compressed."""

    body: bytes
    compressed: bytes
    headers: Mapping[str, str]


class Site:
    """The page and its files in memory: some 340 KB."""

    def __init__(self, root_path: str = "") -> None:
        """`root_path` is the sub-path below which browsers find the service."""
        folder = files("lucid_compute.server.dashboard") / "static"
        contents = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
        template = contents.pop(_INDEX).decode().replace("{{root}}", root_path)
        self.digest = _digest_of({**contents, _INDEX: template.encode()})
        html = template.replace("{{preloads}}", _preloads(contents)).replace(
            "{{assets}}", f"{root_path}{ADDRESS}/assets/{self.digest}"
        )
        self.index = _send(_INDEX, html.encode(), {"Content-Security-Policy": PAGE_POLICY, "ETag": self.etag})
        self._assets = {name: _send(name, body, {}) for name, body in contents.items()}

    @property
    def etag(self) -> str:
        """Identifies this version of the page."""
        return f'"{self.digest}"'

    def find(self, digest: str, name: str) -> Asset | None:
        """Return a file of the page; None when there is none. Browsers may keep it only under the present digest.

        During an update, pages of another version get this version's file, and do not keep it.
        """
        if (asset := self._assets.get(name)) is None:
            return None
        cache_control = "public, max-age=31536000, immutable" if digest == self.digest else "no-store"
        return asset._replace(headers={**asset.headers, "Cache-Control": cache_control})


@cache
def site_below(root_path: str) -> Site:
    """Return the site for browsers that find the service below `root_path`; compressing takes 20 ms, once a process."""
    return Site(root_path)


def _digest_of(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, body in sorted(contents.items()):
        digest.update(f"{name}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.hexdigest()[:16]


def _preloads(contents: Mapping[str, bytes]) -> str:
    """Return links to every module, so that the browser fetches them at once, not import after import."""
    modules = [name for name in contents if name.endswith(".js") and name not in _LOADED_BY_TAG]
    return "\n    ".join(f'<link rel="modulepreload" href="{{{{assets}}}}/{name}">' for name in modules)


def _send(name: str, body: bytes, headers: Mapping[str, str]) -> Asset:
    kind = {"Content-Type": _MEDIA_TYPES[name.rpartition(".")[2]], "Vary": "Accept-Encoding"}
    cached = {"Cache-Control": "no-cache"}
    return Asset(body, gzip.compress(body, mtime=0), {**kind, **cached, **PAGE_HEADERS, **headers})
