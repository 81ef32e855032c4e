"""Token usage: found in a response's bytes without parsing all of it, checked, counted where missing, and priced."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any, NamedTuple

from lucid_compute.accounting.jobs import Job
from lucid_compute.accounting.payouts.revenue import is_billable
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.registry.domain.prices import TokenPrice

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_USAGE_BYTES = 4096  # of one usage, in which its numbers stand
_MAX_USAGES = 4  # objects called usage that are read
_MAX_KEYS = 1000  # keys called usage that are looked at: streams say null on every chunk
# Whole numbers of up to eight digits. Null counts as absent; anything else under the key is invalid.
_NUMBER = rb'"(?!\s*:\s*null)\s*:\s*(?:(\d{1,8})(?:\.0+)?(?![\d.eE]))?'
_TOKENS_IN = re.compile(rb'"(?:prompt|input)_tokens' + _NUMBER)
_TOKENS_OUT = re.compile(rb'"(?:completion|output)_tokens' + _NUMBER)
_CACHED = re.compile(rb'"cache_(?:read|creation)_input_tokens' + _NUMBER)
_WORD = re.compile(rb"[A-Za-z0-9\x80-\xff]{1,6}|[^\sA-Za-z0-9\x80-\xff]")


class Usage(NamedTuple):
    """Tokens in and out; None where the response does not say."""

    tokens_in: int | None
    tokens_out: int | None


def find_usage(response: bytes, *, counts_cached: bool = False) -> Usage | None:
    """Return the last `usage` of a JSON response or of a stream's event; None when there is no valid one.

    An invalid number of tokens (negative, a fraction, text, over eight digits) makes all of it invalid. A quote inside
    a JSON string is escaped, so `"usage":{` can only be a key. The work is bounded: a node may write the key a million
    times. `counts_cached`: the cached input is told apart, and belongs to the tokens in.
    """
    at, left = len(response), _MAX_USAGES
    for _ in range(_MAX_KEYS):
        at = response.rfind(b'"usage"', 0, at)
        if at < 0 or not left:
            return None
        end = at + _USAGE_BYTES
        if _USAGE.match(response, at, end):
            left -= 1
            tokens_in, tokens_out = _TOKENS_IN.search(response, at, end), _TOKENS_OUT.search(response, at, end)
            if (tokens_in and tokens_in[1] is None) or (tokens_out and tokens_out[1] is None):
                return None
            if tokens_in or tokens_out:
                cached = _cached_in(response[at:end]) if counts_cached else 0
                if cached is None:
                    return None
                return Usage(int(tokens_in[1]) + cached if tokens_in else None, int(tokens_out[1]) if tokens_out else 0)
    return None


def _cached_in(usage: bytes) -> int | None:
    """Return the cached tokens of an input; None if a number is invalid."""
    counts = [each[1] for each in _CACHED.finditer(usage)]
    return None if None in counts else sum(map(int, counts))


def count_tokens(text: bytes) -> int:
    """Return an estimate of a text's tokens without its tokenizer: runs of up to six letters, and signs.

    Of a long text four parts are counted: counting all of it would delay other requests.
    """
    size = len(text)
    if size <= _PARTS * _PART_BYTES:
        return len(_WORD.findall(text))
    starts = (size * number // _PARTS for number in range(_PARTS))
    counted = sum(len(_WORD.findall(text, start, start + _PART_BYTES)) for start in starts)
    return counted * size // (_PARTS * _PART_BYTES)


COUNTED_BYTES = 1024 * 1024  # of a request or a response
_PARTS, _PART_BYTES = 4, 64 * 1024
UNSEEN_TOKENS = 1_000_000  # of a request, beyond its bytes: what is given as a URL or an id, such as a picture
TEMPLATE_TOKENS = 256  # of a chat, beyond its bytes: what the model's chat template adds


def charge(job: Job, price: TokenPrice | None) -> Decimal | None:
    """Return the job's exact price in USD; None without a price per token, or when the job is not billable."""
    tokens_out = job.tokens_out or 0
    if price is None or not is_billable(job.outcome, tokens_out):
        return None
    return price.of(job.tokens_in or 0, tokens_out)


def plausible_usage(usage: Usage | None, request: InferenceRequest, delivered_bytes: int) -> Usage | None:
    """Return a node's usage if it is plausible; else None, and the tokens are counted here.

    A token has at least one byte, of the request or of the `delivered_bytes`. Beyond that, input may have what a chat
    template adds, and what the request only refers to, such as pictures. Output is bound by the request's limit too,
    and embeddings have none.
    """
    if usage is None or not _may_have_read(usage.tokens_in or 0, request):
        return None
    tokens_out, most_out = usage.tokens_out or 0, request.max_tokens_out
    if tokens_out > delivered_bytes or (most_out is not None and tokens_out > most_out):
        return None
    return usage


def _may_have_read(tokens_in: int, request: InferenceRequest) -> bool:
    beyond = tokens_in - request.size
    if beyond <= 0:
        return True
    if beyond <= TEMPLATE_TOKENS and request.endpoint.has_template:
        return True
    return beyond <= UNSEEN_TOKENS and request.refers_to_unseen


def count_request(request: InferenceRequest) -> int:
    """Return an estimate of the tokens of a request's text."""
    return count_tokens(request.text(COUNTED_BYTES))


def count_response(body: bytes) -> int:
    """Return an estimate of the tokens of a complete response's text; 0 without text, as for embeddings."""
    if len(body) > _PARTS * _PART_BYTES:
        return count_tokens(body[:COUNTED_BYTES])
    try:
        return sum(count_tokens(text.encode("utf-8", "replace")) for text in _texts_of(json.loads(body)))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 0


def _texts_of(answer: Any) -> list[str]:
    """Return the texts of an answer: of its choices, its content, its output, or its one text."""
    found = [
        choice.get("text") or (choice.get("message") or {}).get("content") for choice in answer.get("choices") or ()
    ]
    for holder in (answer, *(answer.get("output") or ())):
        found += [part.get("text") for part in holder.get("content") or ()]
    found.append(answer.get("text"))
    return [text for text in found if text and isinstance(text, str)]
