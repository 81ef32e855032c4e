"""A request as a form in several parts, such as a recording: the few parts that the gateway reads, the rest as bytes.

A part that the gateway reads may occur only once. What parsers could read differently is refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Generator
from typing import NamedTuple

from pydantic import ValidationError

from lucid_compute.errors import InvalidRequest, UnsupportedMediaType
from lucid_compute.gateway.endpoints import InferenceEndpoint
from lucid_compute.gateway.request_body import InferenceRequest, policy_of
from lucid_compute.gateway.shapes import MAX_MODEL_ID, RequestPolicy
from lucid_compute.registry.routing_rules import NO_POLICY
from lucid_compute.wire import FieldFault, faults_from

STEP_BYTES = 1024 * 1024  # searched at once: a millisecond
MAX_PARTS = 100
MAX_HEAD_BYTES = 2048  # of a part
_MAX_VALUE_BYTES = 32 * 1024  # of a part that the gateway reads
_BYTES_OF_A_TOKEN = 16  # of a recording, at least: 50 tokens a second, of the worst quality that is in use
_READ = ("model", "stream", "lucid", "prompt")
_BOUNDARY = re.compile(
    rb"""boundary=(?:"([ !#-\[\]-~]{1,70})"|([A-Za-z0-9'+_.:=?/-]{1,70}))\s*(?:;|$)""", re.IGNORECASE
)
_DISPOSITION = re.compile(
    rb"""^content-disposition:[ \t]*form-data((?:[ \t]*;[ \t]*[\w*-]+=(?:"[^"\r\n]*"|[^\s;"]+))+)[ \t]*$""",
    re.IGNORECASE | re.MULTILINE,
)
_NAME = re.compile(rb"""[ \t]*;[ \t]*([\w*-]+)=(?:"([^"\r\n]*)"|([^\s;"]+))""")
_TOKEN = re.compile(rb"[\w'+.-]+")
_YES = frozenset({b"true", b"1", b"on", b"yes"})


class _Part(NamedTuple):
    """A part by its positions: of its delimiter, its value, and the value's end."""

    name: bytes
    begins_at: int
    value_at: int
    end_at: int


class FormRequest(InferenceRequest):
    """A request whose body is a form."""

    __slots__ = ("_content_type", "_cuts", "_prompt")

    def __init__(self, endpoint: InferenceEndpoint, body: bytes, boundary: bytes, parts: list[_Part]) -> None:
        """Read the parts of `body`.

        Raises:
            InvalidRequest: a part that the gateway reads is missing, repeated or invalid.
        """
        read = _read_parts(body, parts)
        model = read["model"]
        self.endpoint = endpoint
        self.model = _text_of(body, model)
        if not 1 <= len(self.model) <= MAX_MODEL_ID:
            raise InvalidRequest.at("model", f"Send the model's name, of 1 to {MAX_MODEL_ID} characters.")
        stream, lucid, prompt = read.get("stream"), read.get("lucid"), read.get("prompt")
        says_stream = stream is not None and _text_of(body, stream).strip().lower().encode() in _YES
        self.is_stream = says_stream and endpoint.stream is not None
        self.policy = NO_POLICY if lucid is None else policy_of(_policy_in(_text_of(body, lucid)))
        self.session = self.max_tokens_out = None
        self.adds_usage = self._is_plain = False
        self.choice_count = 1
        self.shown_id, self.stored, self.is_background = "", None, False
        self._options = None
        self._rest = b""
        self._bodies = {}
        self._body = body
        self._prompt = b"" if prompt is None else body[prompt.value_at : prompt.end_at]
        quoted = boundary if _TOKEN.fullmatch(boundary) else b'"%b"' % boundary
        self._content_type = b"multipart/form-data; boundary=%b" % quoted
        cuts = [(model.value_at, model.end_at, True)]
        if lucid is not None:
            cuts.append((lucid.begins_at, lucid.end_at + 2, False))  # up to the next delimiter
        self._cuts = sorted(cuts)

    @property
    def content_type(self) -> bytes:
        """The Content-Type for the node."""
        return self._content_type

    @property
    def refers_to_unseen(self) -> bool:
        """Return False: a form holds what it is about."""
        return False

    @property
    def size(self) -> int:
        """The bytes that a node may read a token for each of: the prompt's, and a few of the recording's."""
        return len(self._prompt) + len(self._body) // _BYTES_OF_A_TOKEN

    @property
    def parts(self) -> tuple[bytes, bytes]:
        """Nothing that could name what a node has stored."""
        return b"", b""

    def text(self, most: int) -> bytes:
        """Return the prompt: a recording has no text to count."""
        return self._prompt[:most]

    def body_for(self, model_id: str, *, asks_usage: bool = True) -> bytes:  # noqa: ARG002 - a form asks for none
        """Return the form for a node that knows the model as `model_id`."""
        if model_id == self.model and len(self._cuts) == 1:
            return self._body
        pieces, at = [], 0
        for begins_at, ends_at, is_model in self._cuts:
            pieces += [self._body[at:begins_at], model_id.encode() if is_model else b""]
            at = ends_at
        return b"".join([*pieces, self._body[at:]])


async def read_form(endpoint: InferenceEndpoint, body: bytes, content_type: bytes) -> FormRequest:
    """Return the request of a form. It is searched in steps, between which other requests are served.

    Raises:
        UnsupportedMediaType: the Content-Type is not that of a form.
        InvalidRequest: the form is broken, or a part that the gateway reads is invalid.
    """
    boundary = _boundary_in(content_type)
    steps = _scan(body, b"--" + boundary)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            parts: list[_Part] = end.value
            return FormRequest(endpoint, body, boundary, parts)
        await asyncio.sleep(0)


def _boundary_in(content_type: bytes) -> bytes:
    found = _BOUNDARY.search(content_type)
    if found is None or not content_type.lstrip().lower().startswith(b"multipart/form-data"):
        message = "Send a form: Content-Type: multipart/form-data with its boundary, and the model in the part `model`."
        raise UnsupportedMediaType(message, details={"types": ["multipart/form-data"]})
    return found[1] or found[2]


def _scan(body: bytes, delimiter: bytes) -> Generator[None, None, list[_Part]]:
    """Return the parts of a form."""
    parts: list[_Part] = []
    if not body.startswith(delimiter):
        raise _broken("it does not begin with its boundary")
    begins_at, at = 0, len(delimiter)
    while (line_end := body[at : at + 2]) == b"\r\n":
        head_end = body.find(b"\r\n\r\n", at, at + MAX_HEAD_BYTES)
        if head_end < 0 or len(parts) >= MAX_PARTS:
            raise _broken(f"a part has no headers, or over {MAX_HEAD_BYTES} bytes, or there are over {MAX_PARTS} parts")
        end_at = yield from _find(body, b"\r\n" + delimiter, head_end + 4)
        parts.append(_Part(_name_in(body[at + 2 : head_end]), begins_at, head_end + 4, end_at))
        begins_at = end_at + 2
        at = begins_at + len(delimiter)
    if line_end != b"--":
        raise _broken("a boundary is neither followed by a part nor the last")
    return parts


def _find(body: bytes, needle: bytes, start: int) -> Generator[None, None, int]:
    while start < len(body):
        found = body.find(needle, start, start + STEP_BYTES + len(needle))
        if found >= 0:
            return found
        start += STEP_BYTES
        yield
    raise _broken("it ends within a part")


def _name_in(head: bytes) -> bytes:
    """Return the name in a part's headers, which parsers must not be able to read in two ways."""
    found = _DISPOSITION.findall(head.replace(b"\r\n", b"\n"))
    named = [quoted or plain for name, quoted, plain in _NAME.findall(found[0]) if name == b"name"] if found else []
    if len(found) != 1 or len(named) != 1:
        raise _broken("a part's Content-Disposition does not say one name")
    return bytes(named[0])


def _read_parts(body: bytes, parts: list[_Part]) -> dict[str, _Part]:
    """Return the parts that the gateway reads, by name."""
    read: dict[str, _Part] = {}
    for part in parts:
        name = part.name.decode("latin-1")
        if name not in _READ:
            continue
        if name in read:
            raise InvalidRequest.at(name, "This part stands twice in the form. Send it once.")
        if part.end_at - part.value_at > _MAX_VALUE_BYTES:
            raise InvalidRequest.at(name, f"This part is over {_MAX_VALUE_BYTES} bytes long. Send a shorter one.")
        read[name] = part
    if "model" not in read:
        raise InvalidRequest.at("model", "Send the model's name in a part called model.")
    return read


def _text_of(body: bytes, part: _Part) -> str:
    try:
        return body[part.value_at : part.end_at].decode()
    except UnicodeDecodeError:
        raise InvalidRequest.at(part.name.decode("latin-1"), "This part is not UTF-8.") from None


def _policy_in(text: str) -> RequestPolicy:
    try:
        return RequestPolicy.model_validate_json(text)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidRequest(faults_from(faults, "lucid")) from None


def _broken(why: str) -> InvalidRequest:
    return InvalidRequest([FieldFault("", f"The form can't be read: {why}. Send it again.")], status=400)
