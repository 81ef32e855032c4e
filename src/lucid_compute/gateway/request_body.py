"""An OpenAI request: the few fields that the gateway reads, and the bytes of its body, with at most three changes.

The model's name becomes the one that the node knows, `lucid` is removed, and `stream_options.include_usage` may be
added. Every other field keeps the client's bytes, including the format of its numbers.

A key that the gateway reads may occur only once, because parsers choose differently between duplicates. Other fields
are not checked for duplicate keys: that would take as long as everything else that the gateway does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.shapes import InferenceBody, RequestPolicy
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.wire import FieldFault, faults_from

USAGE_ENDPOINTS = frozenset({"chat/completions", "completions"})
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n")
_READ = ("model", "stream", "stream_options", "user", "prompt_cache_key", "lucid", *_LIMITS)
_OBJECTS = ("stream_options", "lucid")  # the gateway reads their fields too
# Inside JSON text a quote is escaped, so nothing in a prompt looks like a key. This takes a microsecond for 2 KB.
_KEYS = re.compile(rb'"(%b)"\s*:' % "|".join((*_READ, "include_usage")).encode())
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED = re.compile(rb"\\u00[567]")  # how the escape of any letter of these names begins
_SPACE = re.compile(r"[ \t\n\r]*")
_ASK_FOR_USAGE = b',"stream_options":{"include_usage":true}}'
_NOT_JSON = "json_invalid"
_SEARCHED_BYTES = 65_536  # of an invalid body


class InferenceRequest:
    """One OpenAI request, parsed.

    `adds_usage`: the gateway asks for the stream's usage and the client did not. `max_tokens_out`: how many tokens the
    response may have in all its choices; None if the client does not say.
    """

    __slots__ = (
        "_bodies",
        "_body",
        "_is_plain",
        "adds_usage",
        "endpoint",
        "is_stream",
        "max_tokens_out",
        "model",
        "policy",
        "session",
    )

    def __init__(self, endpoint: str, body: bytes) -> None:
        """Parse a request's body.

        Raises:
            InvalidRequest: the body is not JSON (400), or a field that the gateway reads is invalid (422).
        """
        read = _parse(body)
        if (b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body):  # one letter is found faster
            _refuse_constants(body)
        self._is_plain = _is_plain(body)
        if not self._is_plain:
            _members(body)  # refuses a duplicate key
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
        self.max_tokens_out = _most_tokens(endpoint, read)
        self._body = _without_ours(body, read, adds_usage=self.adds_usage)
        self._bodies: dict[str, bytes] = {self.model: self._body}

    def body_for(self, model_id: str) -> bytes:
        """Return the body for a node that knows the model as `model_id`."""
        body = self._bodies.get(model_id)
        if body is None:
            body = self._bodies[model_id] = self._with_model(model_id)
        return body

    @property
    def size(self) -> int:
        """Return the body's length in bytes."""
        return len(self._body)

    def text(self, most: int) -> bytes:
        """Return the first `most` bytes of the body, for counting tokens."""
        return self._body[:most]

    def _with_model(self, model_id: str) -> bytes:
        body = self._body
        name = _MODEL.search(body) if self._is_plain else None
        if name is None:
            return _rewrite(body, {"model": _dump(model_id)})
        return b"".join((body[: name.start(1)], _dump(model_id).encode(), body[name.end(1) :]))


def model_named_in(body: bytes) -> str:
    """Return the model that an invalid body seems to name; empty when it seems to name none."""
    name = _MODEL.search(body, 0, _SEARCHED_BYTES)
    if name is None:
        return ""
    try:
        return str(json.loads(name[1]))
    except ValueError:
        return ""


def policy_of(wire: RequestPolicy) -> RoutingPolicy:
    """Return the routing policy of a request's `lucid`."""
    return RoutingPolicy(
        None if wire.allow_regions is None else frozenset(wire.allow_regions),
        wire.max_price_per_1k_tokens,
        wire.max_latency_ms,
        None if wire.node_ids is None else frozenset(wire.node_ids),
        wire.route_stale,
    )


def _parse(body: bytes) -> InferenceBody:
    try:
        return InferenceBody.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        is_json = faults[0]["type"] != _NOT_JSON
        raise InvalidRequest(faults_from(faults), status=422 if is_json else 400) from None


def _most_tokens(endpoint: str, read: InferenceBody) -> int | None:
    """Return how many tokens a response may have; None for completions, which may have several prompts."""
    if endpoint == "completions":
        return None
    limits = (read.max_completion_tokens, read.max_tokens, read.max_output_tokens)
    most = max((limit for limit in limits if type(limit) is int and limit > 0), default=None)
    return None if most is None else most * (read.n if type(read.n) is int and read.n > 1 else 1)


def _refuse_constants(body: bytes) -> None:
    """Refuse NaN and infinities as numbers: Pydantic accepts them, JSON does not.

    Raises:
        InvalidRequest: a number is NaN or infinite.
    """
    try:
        from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        message = f"NaN and Infinity are no JSON numbers ({error}). Send a finite number, or null."
        raise InvalidRequest([FieldFault("", message)], status=400) from None


def _is_plain(body: bytes) -> bool:
    """Return whether each key that the gateway reads occurs at most once, and none is hidden in an escape."""
    keys = _KEYS.findall(body)
    return len(keys) == len(set(keys)) and (b"\\" not in body or _ESCAPED.search(body) is None)


def _without_ours(body: bytes, read: InferenceBody, *, adds_usage: bool) -> bytes:
    """Return the body without `lucid`, and with a request for usage if `adds_usage`."""
    has_options = "stream_options" in read.model_fields_set
    values: dict[str, str | None] = {"lucid": None} if "lucid" in read.model_fields_set else {}
    if adds_usage and has_options:
        values["stream_options"] = _dump({**(read.stream_options or {}), "include_usage": True})
    if values:
        body = _rewrite(body, values)
    return body.rstrip()[:-1] + _ASK_FOR_USAGE if adds_usage and not has_options else body


def _rewrite(body: bytes, values: Mapping[str, str | None]) -> bytes:
    """Return the body with these values replaced; a field whose value is None is removed."""
    text, members = _members(body)
    kept = []
    for name, key_at, value_at, end_at in members:
        value = values.get(name, text[value_at:end_at])
        if value is not None:
            kept.append(text[key_at:value_at] + value)
    return f"{{{','.join(kept)}}}".encode()


def _members(body: bytes) -> tuple[str, list[tuple[str, int, int, int]]]:
    """Return the body's text, and each field's name and the positions of its key, its value and its end.

    Raises:
        InvalidRequest: a key that the gateway reads occurs twice.
    """
    members: list[tuple[str, int, int, int]] = []
    read: set[str] = set()
    try:
        text = body.decode()
        at = text.index("{")
        while text[at] != "}":
            key_at = _skip_space(text, at + 1)
            name, at = _decode(text, key_at)
            value_at = _skip_space(text, text.index(":", at) + 1)
            _, end_at = (_decode_strictly if name in _OBJECTS else _decode)(text, value_at)
            if name in read:
                raise _twice(name)
            if name in _READ:
                read.add(name)
            members.append((name, key_at, value_at, end_at))
            at = _skip_space(text, end_at)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest([FieldFault("", f"The body can't be read: {error}.")], status=400) from None
    return text, members


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return fields


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest.at(name, "This key stands twice in one object. Send it once.")


_decode = json.JSONDecoder().raw_decode
_decode_strictly = json.JSONDecoder(object_pairs_hook=_refuse_twice).raw_decode


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
