"""An OpenAI request as the gateway sees it: the few fields it reads, and bytes that go on unchanged but for three.

The model's name becomes the one the node knows, `lucid` is taken out, and `stream_options.include_usage` may be added.
Every other field keeps the bytes that the client wrote, down to the way that its numbers are written.

What the gateway reads may stand once: a key twice there, or inside of it, would be read differently by two readers. All
else is the node's to read; to look for keys that stand twice in it would take as long as all that the gateway does.
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
_OBJECTS = ("stream_options", "lucid")  # of these, what is in them is read too
# Inside JSON text a quote is escaped, so nothing in a prompt looks like a key. This takes a microsecond for 2 KB.
_KEYS = re.compile(rb'"(%b)"\s*:' % "|".join((*_READ, "include_usage")).encode())
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED = re.compile(rb"\\u00[567]")  # how an escape of each sign of these names begins
_SPACE = re.compile(r"[ \t\n\r]*")
_ASK_FOR_USAGE = b',"stream_options":{"include_usage":true}}'
_NOT_JSON = "json_invalid"
_LOOKED_AT_BYTES = 65_536  # of what can't be understood


class InferenceRequest:
    """One request. `adds_usage` says that the stream's usage is asked for although the client did not.

    `max_tokens_out` is how many tokens the answer may have in all its choices; None where the client does not say.
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
        """Read a request's body.

        Raises:
            InvalidRequest: it is not JSON (400), or what the gateway reads of it is not as it must be (422).
        """
        read = _read(body)
        if (b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body):  # one sign is soon looked for
            _refuse_constants(body)
        self._is_plain = _is_plain(body)
        if not self._is_plain:
            _members(body)  # perhaps a key stands twice, and two readers would choose differently
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
        found = self._bodies.get(model_id)
        if found is None:
            found = self._bodies[model_id] = self._with_model(model_id)
        return found

    @property
    def names_stored(self) -> bool:
        """Return whether it may name an answer that a node has stored, which others answer 404 for."""
        return self.endpoint == "responses" and b"previous_response_id" in self._body

    @property
    def size(self) -> int:
        """Return how many bytes the body has."""
        return len(self._body)

    def text(self, most: int) -> bytes:
        """Return the first `most` bytes of the body, to be counted."""
        return self._body[:most]

    def _with_model(self, model_id: str) -> bytes:
        body = self._body
        found = _MODEL.search(body) if self._is_plain else None
        if found is None:
            return _rewrite(body, {"model": _dump(model_id)})
        return b"".join((body[: found.start(1)], _dump(model_id).encode(), body[found.end(1) :]))


def model_named_in(body: bytes) -> str:
    """Return the model that a body seems to name which can't be understood; empty when it seems to name none."""
    found = _MODEL.search(body, 0, _LOOKED_AT_BYTES)
    if found is None:
        return ""
    try:
        return str(json.loads(found[1]))
    except ValueError:
        return ""


def policy_of(wire: RequestPolicy) -> RoutingPolicy:
    """Return the policy that a request's `lucid` stands for."""
    return RoutingPolicy(
        None if wire.allow_regions is None else frozenset(wire.allow_regions),
        wire.max_price_per_1k_tokens,
        wire.max_latency_ms,
        None if wire.node_ids is None else frozenset(wire.node_ids),
        wire.route_stale,
    )


def _read(body: bytes) -> InferenceBody:
    try:
        return InferenceBody.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        is_json = faults[0]["type"] != _NOT_JSON
        raise InvalidRequest(faults_from(faults), status=422 if is_json else 400) from None


def _most_tokens(endpoint: str, read: InferenceBody) -> int | None:
    """Return how many tokens an answer may have; of completions it depends on how many prompts there are."""
    if endpoint == "completions":
        return None
    limits = (read.max_completion_tokens, read.max_tokens, read.max_output_tokens)
    most = max((limit for limit in limits if type(limit) is int and limit > 0), default=None)
    return None if most is None else most * (read.n if type(read.n) is int and read.n > 1 else 1)


def _refuse_constants(body: bytes) -> None:
    """Refuse NaN and infinities wherever they stand as numbers: Pydantic takes them, and JSON has none.

    Raises:
        InvalidRequest: as named.
    """
    try:
        from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        message = f"NaN and Infinity are no JSON numbers ({error}). Send a finite number, or null."
        raise InvalidRequest([FieldFault("", message)], status=400) from None


def _is_plain(body: bytes) -> bool:
    """Return whether each key that the gateway reads is there at most once, and no escape hides another."""
    keys = _KEYS.findall(body)
    return len(keys) == len(set(keys)) and (b"\\" not in body or _ESCAPED.search(body) is None)


def _without_ours(body: bytes, read: InferenceBody, *, adds_usage: bool) -> bytes:
    """Return the body without `lucid`, and asking for usage if it is to be added."""
    has_options = "stream_options" in read.model_fields_set
    values: dict[str, str | None] = {"lucid": None} if "lucid" in read.model_fields_set else {}
    if adds_usage and has_options:
        values["stream_options"] = _dump({**(read.stream_options or {}), "include_usage": True})
    if values:
        body = _rewrite(body, values)
    return body.rstrip()[:-1] + _ASK_FOR_USAGE if adds_usage and not has_options else body


def _rewrite(body: bytes, values: Mapping[str, str | None]) -> bytes:
    """Return the body with these values in place of the former, or without the field where the value is None."""
    text, members = _members(body)
    kept = []
    for name, key_at, value_at, end_at in members:
        value = values.get(name, text[value_at:end_at])
        if value is not None:
            kept.append(text[key_at:value_at] + value)
    return f"{{{','.join(kept)}}}".encode()


def _members(body: bytes) -> tuple[str, list[tuple[str, int, int, int]]]:
    """Return the body's text, and of each of its fields the name, where it begins, where its value begins, and the end.

    Raises:
        InvalidRequest: what the gateway reads stands there twice.
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
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return found


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest.at(name, "This key stands twice in one object. Send it once.")


_decode = json.JSONDecoder().raw_decode
_decode_strictly = json.JSONDecoder(object_pairs_hook=_refuse_twice).raw_decode


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
