"""Responses that nodes have stored: ids that lead back to the node, and requests that name such an id in their path.

What a client gets as the id of a response is sealed: encrypted, and bound to its owner by a secret that all replicas
share. So any replica finds the node again, nothing has to be remembered, and no other owner can use the id.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import sha256
from urllib.parse import parse_qs
from uuid import UUID

from lucid_compute.errors import InvalidRequest, ResponseNotFound
from lucid_compute.gateway.endpoints import InferenceEndpoint
from lucid_compute.gateway.request_body import InferenceRequest, StoredResponse
from lucid_compute.registry.routing_rules import NO_POLICY

PREFIX = "resp_"
ENDED = frozenset({"completed", "failed", "incomplete", "cancelled"})
"""The states of a response that does not change any more."""
MAX_SETTLED = 10_000  # ids of responses that ended, which are remembered
MAX_QUERY_BYTES = 1024
_OWN_ID = re.compile(r"resp[A-Za-z0-9_.:-]{1,195}")  # also safe in a path
_SEALED = re.compile(r"resp_[A-Za-z0-9_-]{40,340}")
_COMPACT = re.compile(r"resp_((?:[0-9a-f]{2}){8,})")
_QUERY = re.compile(rb"[A-Za-z0-9_.~%=&+\[\]-]*")
_TAG_BYTES, _UUID_BYTES, _BLOCK_BYTES = 16, 16, 32
_UNBILLED, _OF_UPSTREAM, _IS_COMPACT = 1, 2, 4
_YES = frozenset({"true", "1"})

SecretReader = Callable[[], Awaitable[bytes]]
"""Returns the secret that all replicas share."""


class ResponseIds:
    """Seals and opens the ids of responses. `load` must be awaited before, once."""

    def __init__(self, read_secret: SecretReader) -> None:
        self._read_secret = read_secret
        self._sealing = self._binding = b""
        self._settled: OrderedDict[str, None] = OrderedDict()

    @property
    def is_loaded(self) -> bool:
        """Return whether the secret is known."""
        return bool(self._sealing)

    async def load(self) -> None:
        """Read the secret."""
        secret = await self._read_secret()
        self._binding, self._sealing = (hmac.digest(secret, each, "sha256") for each in (b"bind", b"seal"))

    def seal(self, stored: StoredResponse, owner: str) -> str | None:
        """Return the id that the client gets; None if the node's own id is none that can be sent back to it."""
        if _OWN_ID.fullmatch(stored.own_id) is None:
            return None
        compact = _COMPACT.fullmatch(stored.own_id)
        flags = (_UNBILLED if stored.is_background else 0) | (_IS_COMPACT if compact else 0)
        flags |= _OF_UPSTREAM if stored.node_id is None else 0
        content = b"".join(
            (
                bytes((flags,)),
                UUID(stored.model_id).bytes,
                b"" if stored.node_id is None else UUID(stored.node_id).bytes,
                bytes.fromhex(compact[1]) if compact else stored.own_id.encode(),
            )
        )
        tag = self._tag(content, owner)
        return PREFIX + urlsafe_b64encode(tag + self._mask(content, tag)).rstrip(b"=").decode()

    def open(self, sealed: str, owner: str) -> StoredResponse | None:
        """Return where a response is; None if the id is none of ours, or another owner's."""
        if _SEALED.fullmatch(sealed) is None:
            return None
        text = sealed[len(PREFIX) :]
        try:
            whole = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except ValueError:
            return None
        tag, masked = whole[:_TAG_BYTES], whole[_TAG_BYTES:]
        content = self._mask(masked, tag)
        if not content or not hmac.compare_digest(tag, self._tag(content, owner)):
            return None
        flags, at = content[0], 1 + _UUID_BYTES
        model_id, node_id = str(UUID(bytes=content[1:at])), None
        if not flags & _OF_UPSTREAM:
            node_id = str(UUID(bytes=content[at : at + _UUID_BYTES]))
            at += _UUID_BYTES
        own_id = f"{PREFIX}{content[at:].hex()}" if flags & _IS_COMPACT else content[at:].decode()
        return StoredResponse(model_id, node_id, own_id, bool(flags & _UNBILLED))

    def bill_id(self, sealed: str) -> str | None:
        """Return the id of the job that bills a response, the same on each replica; None if it was returned lately."""
        if sealed in self._settled:
            return None
        self._settled[sealed] = None
        if len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)
        return str(UUID(bytes=sha256(sealed.encode()).digest()[:_UUID_BYTES], version=5))

    def _tag(self, content: bytes, owner: str) -> bytes:
        bound = owner.encode("utf-8", "surrogatepass")
        return hmac.digest(self._binding, b"%d:%b%b" % (len(bound), bound, content), "sha256")[:_TAG_BYTES]

    def _mask(self, content: bytes, tag: bytes) -> bytes:
        """Encrypt or decrypt: the tag differs for each content, so no mask is used for two of them."""
        size = len(content)
        blocks = range(-(-size // _BLOCK_BYTES))
        mask = b"".join([hmac.digest(self._sealing, tag + bytes((number,)), "sha256") for number in blocks])[:size]
        return (int.from_bytes(content) ^ int.from_bytes(mask)).to_bytes(size)


class StoredRequest(InferenceRequest):
    """A request that names a stored response in its path. It has no body, and goes to the response's node."""

    __slots__ = ("_resource",)

    def __init__(self, endpoint: InferenceEndpoint, shown_id: str, stored: StoredResponse, query: bytes) -> None:
        """`shown_id` is the id as the client has it.

        Raises:
            InvalidRequest: the query is too long, or has characters that no query has.
        """
        if len(query) > MAX_QUERY_BYTES or _QUERY.fullmatch(query) is None:
            raise InvalidRequest.at("query", f"Send a query of at most {MAX_QUERY_BYTES} bytes, percent-encoded.")
        asked = parse_qs(query.decode()).get("stream", [""])[-1]
        self.endpoint = endpoint
        self.model = stored.model_id
        self.is_stream = asked.lower() in _YES and endpoint.stream is not None
        self.policy = NO_POLICY
        self.session = self.max_tokens_out = None
        self.adds_usage = self._is_plain = False
        self.choice_count = 1
        self.shown_id = shown_id
        self.stored = stored
        self.is_background = stored.is_background
        self._options = None
        self._body = self._rest = b""
        self._bodies = {}
        name = endpoint.name.format(response_id=stored.own_id)
        self._resource = f"{name}?{query.decode()}" if query else name

    @property
    def resource(self) -> str:
        """Where the response is below the node's base URL."""
        return self._resource

    @property
    def refers_to_unseen(self) -> bool:
        """Return True: the request that the response answers is at the node."""
        return True

    def body_for(self, model_id: str, *, asks_usage: bool = True) -> bytes:  # noqa: ARG002 - there is none
        """Return an empty body."""
        return b""


def read_stored(
    ids: ResponseIds, endpoint: InferenceEndpoint, response_id: str, query: bytes, owner: str
) -> StoredRequest:
    """Return the request for a stored response.

    Raises:
        ResponseNotFound: the id is none of ours, or another owner's.
        InvalidRequest: the query is invalid.
    """
    stored = ids.open(response_id, owner)
    if stored is None:
        raise ResponseNotFound(response_id)
    return StoredRequest(endpoint, response_id, stored, query)
