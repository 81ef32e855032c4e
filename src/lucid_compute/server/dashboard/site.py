"""The dashboard's files as they are sent: read once, packed once, under an address that changes with their contents."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

ADDRESS = "/dashboard"
_INDEX = "index.html"
_MEDIA_TYPES = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "html": "text/html; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
}
_IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)
_LOADED_BY_TAG = {"theme.js", "early.js", "vendor/uplot.js"}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Asset(NamedTuple):
    """A file as it is sent: as it is, and packed."""

    body: bytes
    packed: bytes
    headers: Mapping[str, str]


class Site:
    """The page and its files in memory: some 150 KB."""

    def __init__(self) -> None:
        contents = dict(_read(files("lucid_compute.server.dashboard") / "static"))
        template = contents.pop(_INDEX).decode()
        self.digest = _digest_of({**contents, _INDEX: template.encode()})
        html = template.replace("{{preloads}}", _preloads(contents)).replace(
            "{{assets}}", f"{ADDRESS}/assets/{self.digest}"
        )
        self.index = _send(_INDEX, html.encode(), {"Content-Security-Policy": _policy_of(html), "ETag": self.etag})
        self._assets = {name: _send(name, body, {}) for name, body in contents.items()}

    @property
    def etag(self) -> str:
        """Names this very version of the page."""
        return f'"{self.digest}"'

    def find(self, digest: str, name: str) -> Asset | None:
        """Return a file of the page; None when there is none. It is kept for good only under the digest of today.

        During an update a page of another version may ask: it gets what there is, and keeps none of it.
        """
        if (asset := self._assets.get(name)) is None:
            return None
        kept = "public, max-age=31536000, immutable" if digest == self.digest else "no-store"
        return asset._replace(headers={**asset.headers, "Cache-Control": kept})


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        else:
            found.append((f"{prefix}{entry.name}", entry.read_bytes()))
    return found


def _digest_of(contents: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, body in sorted(contents.items()):
        whole.update(f"{name}\0{len(body)}\0".encode())
        whole.update(body)
    return whole.hexdigest()[:16]


def _preloads(contents: Mapping[str, bytes]) -> str:
    """Return links to every module: they are fetched at once, and not one after the other as imports name them."""
    modules = [name for name in contents if name.endswith(".js") and name not in _LOADED_BY_TAG]
    return "\n    ".join(f'<link rel="modulepreload" href="{{{{assets}}}}/{name}">' for name in modules)


def _policy_of(html: str) -> str:
    """Return the content security policy: nothing but our own files, and the one inline import map by its hash."""
    maps = _IMPORT_MAP.findall(html)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in maps)
    return (
        f"default-src 'none'; script-src 'self' {hashes}; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _send(name: str, body: bytes, headers: Mapping[str, str]) -> Asset:
    kind = {"Content-Type": _MEDIA_TYPES[name.rpartition(".")[2]], "Vary": "Accept-Encoding"}
    cached = {"Cache-Control": "no-cache"}
    return Asset(body, gzip.compress(body, mtime=0), {**kind, **cached, **_HEADERS, **headers})
