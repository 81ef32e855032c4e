"""What an answer says of the tokens it took, found in its bytes without reading the whole of it."""

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
# Whole numbers of up to eight digits; null says nothing, and anything else under the key is no number of tokens.
_NUMBER = rb'"(?!\s*:\s*null)\s*:\s*(?:(\d{1,8})(?:\.0+)?(?![\d.eE]))?'
_TOKENS_IN = re.compile(rb'"(?:prompt|input)_tokens' + _NUMBER)
_TOKENS_OUT = re.compile(rb'"(?:completion|output)_tokens' + _NUMBER)
_WORD = re.compile(rb"[A-Za-z0-9\x80-\xff]{1,6}|[^\sA-Za-z0-9\x80-\xff]")


class Usage(NamedTuple):
    """Tokens in and out; None where the answer does not say."""

    tokens_in: int | None
    tokens_out: int | None


def find_usage(answer: bytes) -> Usage | None:
    """Return what the last `usage` of a JSON answer or of a stream's event says; None when there is none to be read.

    What is no number of tokens (negative, a fraction, text, over eight digits) spoils all of it. A quote inside a JSON
    string is escaped, so `"usage":{` can only be a key.
    """
    at = answer.rfind(b'"usage"')
    while at >= 0:
        if _USAGE.match(answer, at):
            tokens_in, tokens_out = _TOKENS_IN.search(answer, at), _TOKENS_OUT.search(answer, at)
            if (tokens_in and tokens_in[1] is None) or (tokens_out and tokens_out[1] is None):
                return None
            if tokens_in or tokens_out:
                return Usage(int(tokens_in[1]) if tokens_in else None, int(tokens_out[1]) if tokens_out else 0)
        at = answer.rfind(b'"usage"', 0, at)
    return None


def count_tokens(text: bytes) -> int:
    """Return about how many tokens a text is, for want of its tokenizer: runs of up to six letters, and signs."""
    return sum(1 for _ in _WORD.finditer(text))


COUNTED_BYTES = 1024 * 1024  # of a request or an answer; counting what is longer would hold others up
UNSEEN_TOKENS = 1_000_000  # of a request, beyond its bytes: what stands behind the URLs of pictures


def charge(job: Job, price: TokenPrice | None) -> Decimal | None:
    """Return the job's price in USD: its tokens, in and out, exactly; None without a price or anything to bill."""
    tokens_out = job.tokens_out or 0
    if price is None or not is_billable(job.outcome, tokens_out):
        return None
    return price.of(job.tokens_in or 0, tokens_out)


def believe(usage: Usage | None, request: InferenceRequest) -> Usage | None:
    """Return what a node says of the tokens, and None when it can't be so: they are counted then.

    No token in is shorter than a byte, but for pictures and a template; none out is beyond what was asked for.
    """
    if usage is None or (usage.tokens_in or 0) > request.size + UNSEEN_TOKENS:
        return None
    most_out = request.max_tokens_out
    return None if most_out is not None and (usage.tokens_out or 0) > most_out else usage


def count_request(request: InferenceRequest) -> int:
    """Return about how many tokens a request's text is."""
    return count_tokens(request.text(COUNTED_BYTES))


def count_answer(body: bytes) -> int:
    """Return about how many tokens the text of a whole answer is; 0 when it has none, as embeddings."""
    if len(body) > COUNTED_BYTES:
        return count_tokens(body[:COUNTED_BYTES])
    try:
        choices = json.loads(body).get("choices")
        return sum(count_tokens(text.encode("utf-8", "replace")) for text in map(_text_of, choices or ()) if text)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 0


def _text_of(choice: Any) -> str | None:
    text = choice.get("text") or (choice.get("message") or {}).get("content")
    return text if isinstance(text, str) else None
