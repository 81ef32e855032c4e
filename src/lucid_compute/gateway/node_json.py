"""JSON that nodes send: is it a response of its endpoint, or an error in place of one? Pure."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from lucid_compute.gateway.endpoints import AnswerShape
from lucid_compute.web.strict_json import with_short_numbers, with_whole_characters

PARSED_BYTES = 64 * 1024  # parsing more would delay other requests
_END_BYTES = 64  # of a long text, in which its last bracket stands
_CLIENTS_OWN = frozenset({"400", "413", "422"})
_NO_CONTENT = frozenset({"role"})


def read_object(text: bytes) -> dict[str, Any] | None:
    """Return the JSON object that `text` is, or what its first 64 KiB hold of it; None when it is none."""
    if len(text) > PARSED_BYTES:
        return read_beginning(text) if text[-_END_BYTES:].rstrip().endswith(b"}") else None
    try:
        value = from_json(text, cache_strings="none")
    except ValueError:
        try:
            value = from_json(with_whole_characters(with_short_numbers(text)), cache_strings="none")
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def read_beginning(text: bytes) -> dict[str, Any] | None:
    """Return what the first 64 KiB of a JSON object hold; None if they begin none."""
    try:
        value = from_json(text[:PARSED_BYTES], allow_partial=True, cache_strings="none")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def error_in(value: dict[str, Any]) -> Any:
    """Return the error that a response or an event tells of, in the words of any runtime; None when it tells of none.

    An error deeper inside belongs to the content, such as the failed call of a tool.
    """
    if value.get("error"):
        return value["error"]
    if value.get("object") == "error" or value.get("type") == "error":
        return value
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
            return choice.get("error") or choice
    return None


def clients_own_status(value: dict[str, Any], error: Any) -> int | None:
    """Return 400, 413 or 422 if the error in `value` says that the request is at fault; else None."""
    for each in (error, value):
        code = str(each.get("code")) if isinstance(each, dict) else ""
        if code in _CLIENTS_OWN:
            return int(code)
    return None


def read_answer(shape: AnswerShape, text: bytes) -> dict[str, Any] | None:
    """Return what `read_object` returns; of a list that stands for an answer of this shape, the object around it."""
    value = read_object(text)
    if value is not None or not shape.may_be_list or not text.lstrip().startswith(b"["):
        return value
    return read_object(b'{"%b":%b}' % (shape.names[0].encode(), text))


def is_answer(shape: AnswerShape, value: dict[str, Any], text: bytes) -> bool:
    """Return whether `value`, which `read_object` read from `text`, is an answer of this shape."""
    is_cut = len(text) > PARSED_BYTES
    items = next((value[name] for name in shape.names if value.get(name) is not None), None)
    if items is None:
        return is_cut and any(b'"%b"' % name.encode() in text for name in shape.names)
    if not shape.part:
        return True
    if not isinstance(items, list):
        return False
    if not items:
        return shape.may_be_empty or is_cut
    return isinstance(items[0], dict) and (items[0].get(shape.part) is not None or is_cut)


def has_content(choice: Any) -> bool:
    """Return whether a choice of a stream's event holds anything but a role, or says why it finished."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta") or choice.get("message")
    if isinstance(delta, dict) and any(value for name, value in delta.items() if name not in _NO_CONTENT):
        return True
    return bool(choice.get("text") or choice.get("finish_reason"))
