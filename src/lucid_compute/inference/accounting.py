"""What a request cost: tokens counted where the node does not say, and their exact price."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from lucid_compute.inference.request_body import InferenceRequest
from lucid_compute.inference.usage import Usage, count_tokens
from lucid_compute.jobs import Job
from lucid_compute.prices import TokenPrice
from lucid_compute.revenue import is_billable

COUNTED_BYTES = 1024 * 1024  # of a request or an answer; counting what is longer would hold others up

UNSEEN_TOKENS = 1_000_000  # of a request, beyond its bytes: what stands behind the URLs of pictures


def charge(job: Job, price: TokenPrice | None) -> Decimal | None:
    """Answer the job's price in USD: its tokens, in and out, exactly; None without a price or anything to bill."""
    tokens_out = job.tokens_out or 0
    if price is None or not is_billable(job.outcome, tokens_out):
        return None
    return price.of(job.tokens_in or 0, tokens_out)


def believe(usage: Usage | None, request: InferenceRequest) -> Usage | None:
    """Answer what a node says of the tokens, and None when it can't be so: they are counted then.

    No token in is shorter than a byte, but for pictures and a template; none out is beyond what was asked for.
    """
    if usage is None or (usage.tokens_in or 0) > request.size + UNSEEN_TOKENS:
        return None
    most_out = request.max_tokens_out
    return None if most_out is not None and (usage.tokens_out or 0) > most_out else usage


def count_request(request: InferenceRequest) -> int:
    """Answer about how many tokens a request's text is."""
    return count_tokens(request.text(COUNTED_BYTES))


def count_answer(body: bytes) -> int:
    """Answer about how many tokens the text of a whole answer is; 0 when it has none, as embeddings."""
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
