"""JSON that nodes send: is it a response of its endpoint, or an error in place of one? Pure."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from lucid_compute.web.strict_json import with_short_numbers, with_whole_characters

PARSED_BYTES = 64 * 1024  # parsing more would delay other requests
_END_BYTES = 64  # of a long text, in which its last bracket stands
_CLIENTS_OWN = frozenset({"400", "413", "422"})
# Where the response of an endpoint stands, and what each of its items has.
_ITEMS = {
    "chat/completions": ("choices", "message"),
    "completions": ("choices", "text"),
    "embeddings": ("data", "embedding"),
    "responses": ("output", "type"),
}
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


def is_response(endpoint: str, value: dict[str, Any], text: bytes) -> bool:
    """Return whether `value`, which `read_object` read from `text`, is a response of the endpoint."""
    if endpoint not in _ITEMS:
        return True
    name, part = _ITEMS[endpoint]
    items = value.get(name)
    if items is None and len(text) > PARSED_BYTES:
        return b'"%b"' % name.encode() in text
    if not isinstance(items, list):
        return False
    if not items:
        return endpoint == "responses" or len(text) > PARSED_BYTES
    return isinstance(items[0], dict) and (items[0].get(part) is not None or len(text) > PARSED_BYTES)


def has_content(choice: Any) -> bool:
    """Return whether a choice of a stream's event holds anything but a role, or says why it finished."""
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta") or choice.get("message")
    if isinstance(delta, dict) and any(value for name, value in delta.items() if name not in _NO_CONTENT):
        return True
    return bool(choice.get("text") or choice.get("finish_reason"))
