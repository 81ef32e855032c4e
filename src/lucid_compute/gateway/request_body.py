"""An OpenAI request: the few fields that the gateway reads, and the bytes of its body, with at most three changes.

The model's name becomes the one that the node knows, `lucid` is removed, and `stream_options.include_usage` may be
added. Every other field keeps the client's bytes, including the format of its numbers.

A key that the gateway reads may occur only once, because parsers choose differently between duplicates. Other fields
are not checked for duplicate keys: that would take as long as everything else that the gateway does.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.body_scan import NO_HALVES, BodyScan, Member
from lucid_compute.gateway.endpoints import Billed, InferenceEndpoint
from lucid_compute.gateway.shapes import CompletionBody, InferenceBody, RequestPolicy
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.web.strict_json import fault_of_encoding, with_short_numbers
from lucid_compute.wire import FieldFault, faults_from

_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n")
_READ = ("model", "stream", "stream_options", "user", "prompt_cache_key", "lucid", *_LIMITS)
_OBJECTS = ("stream_options", "lucid")  # the gateway reads their fields too
# Inside JSON text a quote is escaped, so nothing in a prompt looks like a key. This takes a microsecond for 2 KB.
_KEYS = re.compile(rb'"(%b)"\s*:' % "|".join((*_READ, "include_usage")).encode())
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED = re.compile(rb"\\u00[567]")  # how the escape of any letter of these names begins
_SPACE = re.compile(r"[ \t\n\r]*")
_ASK_FOR_USAGE = b',"stream_options":{"include_usage":true}}'
# What a body only refers to, and the node reads all the same: media, and what an earlier request left on the node.
_UNSEEN = re.compile(
    rb'"(?:image_url|input_audio|audio_url|video_url|file_id|file_url)"\s*:'
    rb'|"type"\s*:\s*"(?:(?:input_)?(?:image|audio|video|file)|document|item_reference)"'
    rb'|"(?:previous_response_id|conversation)"\s*:\s*["{]|"prompt"\s*:\s*\{'
)
_NOT_JSON = "json_invalid"
_FIRST_OF_LIST = re.compile(rb'\[[ \t\n\r]*([\["])')
PARSED_BYTES = 64 * 1024  # of a body, or of one field; parsing more at once would delay other requests
_SEARCHED_BYTES = 65_536  # of an invalid body
_COUNTED_BYTES = 1024 * 1024  # of prompts, that are counted at once
_UNSEEN_BYTES = 1024 * 1024  # of a body, in which what it refers to is searched for


class InferenceRequest:
    """One OpenAI request, parsed.

    `adds_usage`: the gateway asks for the stream's usage and the client did not. `max_tokens_out`: how many tokens the
    response may have in all its choices; None if the client does not say. `choice_count`: how many choices it has.
    """

    __slots__ = (
        "_bodies",
        "_body",
        "_is_plain",
        "_options",
        "_rest",
        "adds_usage",
        "choice_count",
        "endpoint",
        "is_stream",
        "max_tokens_out",
        "model",
        "policy",
        "session",
    )

    def __init__(self, endpoint: InferenceEndpoint, body: bytes, *, rest: bytes = b"", prompts: int = 0) -> None:
        """Parse a request's body.

        `rest`: the fields of a large body that the gateway does not read, without brackets; `prompts`: how many there
        are in them, if there are any.

        Raises:
            InvalidRequest: the body is not JSON (400), or a field that the gateway reads is invalid (422).
        """
        read = _parse(endpoint, body)
        _refuse_constants(body)
        self._is_plain = _is_plain(body)
        if not self._is_plain:
            _members(body)  # refuses a duplicate key
        self.endpoint = endpoint
        self.model = read.model
        self.is_stream = read.stream is True and endpoint.stream is not None
        self.session = next(
            (name for name in (read.user, read.prompt_cache_key) if name and isinstance(name, str)), None
        )
        self.policy = NO_POLICY if read.lucid is None else policy_of(read.lucid)
        options = read.stream_options
        asks = isinstance(options, dict) and options.get("include_usage") is True
        can_be_asked = options is None or isinstance(options, dict)
        self.adds_usage = self.is_stream and not asks and can_be_asked and endpoint.asks_usage
        prompts = prompts or _prompt_count(read)
        self.choice_count = _whole(read.n, 1) * prompts
        self.max_tokens_out = _most_tokens(endpoint, read, prompts)
        self._options = options if "stream_options" in read.model_fields_set else _ABSENT
        self._body = _without_ours(body, read, adds_usage=self.adds_usage)
        self._rest = rest
        self._bodies: dict[str, bytes] = {} if rest else {self.model: self._body}

    def body_for(self, model_id: str, *, asks_usage: bool = True) -> bytes:
        """Return the body for a node that knows the model as `model_id`; not `asks_usage`: as the client wrote it."""
        if not asks_usage and self.adds_usage:
            return self._whole(self._without_question(self._with_model(model_id)))
        body = self._bodies.get(model_id)
        if body is None:
            body = self._bodies[model_id] = self._whole(self._with_model(model_id))
        return body

    @property
    def content_type(self) -> bytes:
        """The Content-Type for the node; empty if it is JSON."""
        return b""

    @property
    def refers_to_unseen(self) -> bool:
        """Return whether a node may read more than the body's bytes: it refers to media, or to an earlier response."""
        return any(_UNSEEN.search(part, 0, _UNSEEN_BYTES) for part in self.parts)

    @property
    def parts(self) -> tuple[bytes, bytes]:
        """The body's bytes: the fields that the gateway reads, and the others if there are many."""
        return self._body, self._rest

    @property
    def size(self) -> int:
        """Return the body's length in bytes."""
        return len(self._body) + len(self._rest)

    def text(self, most: int) -> bytes:
        """Return the first `most` bytes of the body, for counting tokens."""
        return (self._rest or self._body)[:most]

    def _whole(self, body: bytes) -> bytes:
        """Return the body with the fields that the gateway does not read."""
        return b"".join((body.rstrip()[:-1], b",", self._rest, b"}")) if self._rest else body

    def _without_question(self, body: bytes) -> bytes:
        if self._options is _ABSENT:
            return body[: -len(_ASK_FOR_USAGE)] + b"}"
        return _rewrite(body, {"stream_options": _dump(self._options)})

    def _with_model(self, model_id: str) -> bytes:
        if model_id == self.model:
            return self._body
        body = self._body
        name = _MODEL.search(body) if self._is_plain else None
        if name is None:
            return _rewrite(body, {"model": _dump(model_id)})
        return b"".join((body[: name.start(1)], _dump(model_id).encode(), body[name.end(1) :]))


async def read_in_steps(endpoint: InferenceEndpoint, body: bytes) -> InferenceRequest:
    """Return a request with a large body, of which only the fields that the gateway reads are parsed.

    Other requests are served meanwhile. These fields come first in what a node is sent.

    Raises:
        InvalidRequest: the body is not JSON (400), or a field that the gateway reads is invalid (422).
    """
    scan = BodyScan(body, (*_READ, "best_of", "prompt"))
    for _ in scan.steps():
        await asyncio.sleep(0)
    read: list[bytes] = []
    rest: list[memoryview] = []  # copied once, by the join: a copy of megabytes takes 10 ms and more
    prompts, at = 0, body.index(b"{") + 1
    for member in scan.members:
        if member.name == "prompt":
            prompts = await _most_prompts(body, member)
            continue
        if member.end_at - member.key_at > PARSED_BYTES:
            raise InvalidRequest.at(member.name, f"This field is over {PARSED_BYTES} bytes long. Send a shorter one.")
        read.append(body[member.key_at : member.end_at])
        rest.append(memoryview(body)[at : member.key_at])
        at = member.next_at
    rest.append(memoryview(body)[at : scan.close_at])
    kept = b"".join(rest)
    await asyncio.sleep(0)
    kept = kept.rstrip(b" \t\r\n,")
    await asyncio.sleep(0)
    return InferenceRequest(endpoint, b"{%b}" % b",".join(read), rest=kept, prompts=prompts)


async def _most_prompts(body: bytes, member: Member) -> int:
    """Return how many prompts a large field has at most. They are counted in steps."""
    first = _FIRST_OF_LIST.match(body, member.value_at, member.value_at + _SEARCHED_BYTES)
    if first is None:
        return 1
    count = 0
    for start in range(first.start(1), member.end_at, _COUNTED_BYTES):
        count += body.count(first[1], start, min(start + _COUNTED_BYTES, member.end_at))
        await asyncio.sleep(0)
    return max(1, count // (2 if first[1] == b'"' else 1))


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


def _parse(endpoint: InferenceEndpoint, body: bytes) -> InferenceBody:
    try:
        return (CompletionBody if endpoint.has_prompts else InferenceBody).model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        is_json = faults[0]["type"] != _NOT_JSON
        if is_json:
            _refuse_constants(body)
        if not is_json and (text := with_short_numbers(body)) != body:
            return _parse(endpoint, text)  # the node judges what the gateway does not read
        message = None if is_json else NO_HALVES if "surrogate" in faults[0]["msg"] else fault_of_encoding(body)
        if message is not None:
            raise InvalidRequest([FieldFault("", message)], status=400) from None
        raise InvalidRequest(faults_from(faults), status=422 if is_json else 400) from None


def _prompt_count(read: InferenceBody) -> int:
    """Return how many prompts a completion has: a list is one of prompts, unless it is one of tokens."""
    prompt = read.prompt if isinstance(read, CompletionBody) else None
    return len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1


def _most_tokens(endpoint: InferenceEndpoint, read: InferenceBody, prompts: int) -> int | None:
    """Return how many tokens a response may have; None if the client does not say."""
    if endpoint.billed in {Billed.INPUT, Billed.NOTHING}:
        return 0
    limits = (read.max_completion_tokens, read.max_tokens, read.max_output_tokens)
    most = max(_whole(limit, -1, least=0) for limit in limits)
    if most < 0:
        return None
    tries = max(_whole(read.n, 1), _whole(read.best_of, 1) if isinstance(read, CompletionBody) else 1)
    return max(most, 1) * tries * prompts


def _whole(value: Any, otherwise: int, *, least: int = 1) -> int:
    """Return a whole number of at least `least` as nodes read it, `3.0` too; `otherwise` for any other value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value >= least else otherwise


def _refuse_constants(body: bytes) -> None:
    """Refuse NaN and infinities as numbers: Pydantic accepts them, JSON does not.

    Raises:
        InvalidRequest: a number is NaN or infinite.
    """
    if not ((b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body)):  # one letter is found faster
        return
    try:
        from_json(with_short_numbers(body), allow_inf_nan=False, cache_strings="none")
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
        seen: set[str] = set()
        raise _twice(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    return fields


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest.at(name, "This key stands twice in one object. Send it once.")


_ABSENT = object()
# Python converts no integer of thousands of digits, and only names and positions are used.
_decode = json.JSONDecoder(parse_int=str).raw_decode
_decode_strictly = json.JSONDecoder(parse_int=str, object_pairs_hook=_refuse_twice).raw_decode


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
