"""What a receiver of webhooks does with a delivery: checks that it is from the service, and reads it."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import ValidationError

from lucid_compute.webhook_rules import BadSignature, verify
from lucid_compute.wire.webhooks import WebhookMessage


def read_webhook(secret: str, body: bytes, signature: str, *, now: datetime | None = None) -> WebhookMessage:
    """Answer the event of a delivery: its body as the bytes that came, and its header `Lucid-Signature`.

    The same `id` may come again; keep those of a day and drop what you know. `now` is the present by default.

    Raises:
        BadSignature: it was not signed with this secret or not within five minutes, or it is no event.
    """
    verify(secret, body, signature, now or datetime.now(UTC))
    try:
        return WebhookMessage.model_validate_json(body, extra="ignore")
    except ValidationError as error:
        raise BadSignature(
            f"The delivery is signed and no event: {error.error_count()} of its fields differ."
        ) from None
