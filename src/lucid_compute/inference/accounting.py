"""What a request cost: tokens counted where the node does not say, and their exact price."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.request_body import InferenceRequest
from lucid_compute.inference.usage import count_tokens
from lucid_compute.jobs import Job

COUNTED_BYTES = 1024 * 1024  # of a request or an answer; counting what is longer would hold others up


def charge(job: Job, node: FleetNode | None) -> Decimal | None:
    """Answer the job's price in USD: its tokens, in and out, at the node's price for 1,000; None when it names none."""
    price = None if node is None else node.state.passport.price_per_1k_tokens
    if price is None:
        return None
    return ((job.tokens_in or 0) + (job.tokens_out or 0)) * price.scaleb(-3)


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
