"""The path of a base URL: what `/chat/completions` is added to. One rule for nodes, upstreams, probes and the agent.

A path that ends in a version (`/v1`, `/api/paas/v4`, `/v1beta/openai`) is used as it is; any other one gets `/v1`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_VERSION = r"/v[0-9]+(?:\.[0-9]+)*(?:-?(?:alpha|beta|preview|rc)[0-9]*)?"
# OpenAI's API below another one's version: /v1beta/openai (Google), /v1/openai, /v1/projects/…/endpoints/openapi.
_VERSIONED = re.compile(rf"{_VERSION}(?:/openai|/openai-compatible|/(?:[^/]+/)*openapi)?$", re.IGNORECASE)
_ENDPOINT = re.compile(
    r"/(?:chat/completions|completions|embeddings|responses|messages|messages/count_tokens|moderations"
    r"|audio/(?:speech|transcriptions|translations)|images/(?:generations|edits|variations)"
    r"|api/(?:chat|generate|embed|tags|ps)|(?:de)?tokenize)$"
    rf"|{_VERSION}(?:/openai)?(/(?:models|chat|rerank|score|files|batches|realtime))$",
    re.IGNORECASE,
)


def base_path_of(path: str) -> str:
    """Return the path to which `/chat/completions` is added; `path` has no slash at its end."""
    return path if _VERSIONED.search(path) else f"{path}/v1"


def root_path_of(path: str) -> str:
    """Return the path without its version: what the server serves beside its API, such as `/metrics`, is below it."""
    version = _VERSIONED.search(path)
    return path[: version.start()] if version else path


def endpoint_in(path: str) -> str | None:
    """Return the endpoint that a path ends in instead of a base, such as `/chat/completions`; None if it ends in none.

    The path may have a slash at its end.
    """
    path = unquote(path.removesuffix("/"))
    if _VERSIONED.search(path) or (endpoint := _ENDPOINT.search(path)) is None:
        return None
    return endpoint[1] or endpoint[0]
