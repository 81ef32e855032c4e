"""docs/webhooks.md tells the truth: its check of a signature works, its events are those there are."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lucid_compute.storage.webhook_store import MAX_WEBHOOKS
from lucid_compute.webhook_rules import WebhookEvent, sign

PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()


def test_the_pages_check_of_a_signature_believes_ours_and_no_other() -> None:
    """As a receiver copies it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    pasted: dict[str, Any] = {}
    exec(compile(code, "docs/webhooks.md", "exec"), pasted)  # noqa: S102 - the page is ours
    is_from_lucid, now = pasted["is_from_lucid"], datetime.now(UTC)
    assert is_from_lucid("whsec_x", b"body", sign("whsec_x", b"body", now))
    assert not is_from_lucid("whsec_x", b"another body", sign("whsec_x", b"body", now))
    assert not is_from_lucid("whsec_y", b"body", sign("whsec_x", b"body", now))
    assert not is_from_lucid("whsec_x", b"body", sign("whsec_x", b"body", now - timedelta(minutes=6)))


def test_the_page_names_every_event_and_no_other() -> None:
    table = PAGE.split("| event | when |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`((?:node|model)\.\w+)`", table)) == set(WebhookEvent)
    assert f"An owner has {MAX_WEBHOOKS} at most" in PAGE
