"""An OpenAI request as the gateway sees it: the few fields it reads, and bytes that go on unchanged but for three.

The model's name becomes the one the node knows, `lucid` is taken out, and `stream_options.include_usage` may be added.
Where that is one replacement it is made in the bytes; else the JSON is read and written again, which keeps its meaning.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from lucid_compute.errors import InvalidRequest
from lucid_compute.field_faults import FieldFault, faults_from
from lucid_compute.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.wire.inference import InferenceBody, RequestPolicy

USAGE_ENDPOINTS = frozenset({"chat/completions", "completions"})
_MODEL_KEY = b'"model"'
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_ASK_FOR_USAGE = b',"stream_options":{"include_usage":true}}'
_NOT_JSON = "json_invalid"


class InferenceRequest:
    """One request. `adds_usage` says that the stream's usage is asked for although the client did not."""

    __slots__ = ("_bodies", "_body", "adds_usage", "endpoint", "is_stream", "model", "policy", "session")

    def __init__(self, endpoint: str, body: bytes) -> None:
        """Read a request's body.

        Raises:
            InvalidRequest: it is not JSON (400), or what the gateway reads of it is not as it must be (422).
        """
        read = _read(body)
        self.endpoint = endpoint
        self.model = read.model
        self.is_stream = read.stream is True
        self.session = next(
            (name for name in (read.user, read.prompt_cache_key) if name and isinstance(name, str)), None
        )
        self.policy = NO_POLICY if read.lucid is None else policy_of(read.lucid)
        options = read.stream_options
        asks = isinstance(options, dict) and options.get("include_usage") is True
        can_be_asked = options is None or isinstance(options, dict)
        self.adds_usage = self.is_stream and not asks and can_be_asked and endpoint in USAGE_ENDPOINTS
        self._body = _without_ours(body, self, has_options="stream_options" in read.model_fields_set, read=read)
        self._bodies: dict[str, bytes] = {self.model: self._body}

    def body_for(self, model_id: str) -> bytes:
        """Answer the body for a node that knows the model as `model_id`."""
        found = self._bodies.get(model_id)
        if found is None:
            found = self._bodies[model_id] = _with_model(self._body, self.model, model_id)
        return found

    def text(self, most: int) -> bytes:
        """Answer the first `most` bytes of the body, to be counted."""
        return self._body[:most]


def policy_of(wire: RequestPolicy) -> RoutingPolicy:
    """Answer the policy that a request's `lucid` stands for."""
    return RoutingPolicy(
        None if wire.allow_regions is None else frozenset(wire.allow_regions),
        wire.max_price_per_1k_tokens,
        wire.max_latency_ms,
        None if wire.node_ids is None else frozenset(wire.node_ids),
        wire.route_stale,
    )


def _read(body: bytes) -> InferenceBody:
    try:
        read = InferenceBody.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        is_json = faults[0]["type"] != _NOT_JSON
        raise InvalidRequest(faults_from(faults), status=422 if is_json else 400) from None
    if body.count(_MODEL_KEY) > 1:
        _load(body)  # perhaps one stands twice, and two readers would choose differently
    return read


def _without_ours(body: bytes, request: InferenceRequest, *, has_options: bool, read: InferenceBody) -> bytes:
    """Answer the body without `lucid`, and asking for usage if it is to be added."""
    if "lucid" not in read.model_fields_set:
        if not request.adds_usage:
            return body
        if not has_options:
            return body.rstrip()[:-1] + _ASK_FOR_USAGE
    whole = _load(body)
    whole.pop("lucid", None)
    if request.adds_usage:
        whole["stream_options"] = {**(whole.get("stream_options") or {}), "include_usage": True}
    return _dump(whole)


def _with_model(body: bytes, former: str, model_id: str) -> bytes:
    found = _MODEL.search(body) if body.count(_MODEL_KEY) == 1 else None
    if found is not None and json.loads(found[1]) == former:
        return b"".join((body[: found.start(1)], json.dumps(model_id).encode(), body[found.end(1) :]))
    return _dump({**_load(body), "model": model_id})


def _load(body: bytes) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads(body, object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest([FieldFault("", f"The body can't be read: {error}.")], status=400) from None
    return whole


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest.at(twice, "This key stands twice in one object. Send it once.")
    return found


def _dump(whole: dict[str, Any]) -> bytes:
    return json.dumps(whole, separators=(",", ":")).encode()
