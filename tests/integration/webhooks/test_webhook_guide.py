"""docs/webhooks.md tells the truth: its check of a signature works, its events are those there are."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lucid_compute.registry.domain.event_types import WebhookEvent
from lucid_compute.webhooks.rules import LIMITS, sign
from tests import ROOT

PAGE = (ROOT / "docs" / "webhooks.md").read_text()


def pasted() -> dict[str, Any]:
    """What a receiver has that copied the page's Python."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/webhooks.md", "exec"), names)  # noqa: S102 - the page is ours
    return names


def test_the_pages_check_of_a_signature_believes_ours_and_no_other() -> None:
    """As a receiver copies it."""
    is_from_lucid, now = pasted()["is_from_lucid"], datetime.now(UTC)
    assert is_from_lucid("whsec_x", b"body", sign(["whsec_x"], b"body", now))
    assert not is_from_lucid("whsec_x", b"another body", sign(["whsec_x"], b"body", now))
    assert not is_from_lucid("whsec_y", b"body", sign(["whsec_x"], b"body", now))
    assert not is_from_lucid("whsec_x", b"body", sign(["whsec_x"], b"body", now - timedelta(minutes=6)))


def test_the_pages_check_believes_a_secret_that_is_being_changed() -> None:
    """The new one and the former one alike."""
    is_from_lucid, signature = pasted()["is_from_lucid"], sign(["new", "old"], b"body", datetime.now(UTC))
    assert is_from_lucid("new", b"body", signature)
    assert is_from_lucid("old", b"body", signature)
    assert not is_from_lucid("neither", b"body", signature)


def test_the_pages_check_in_a_shell_believes_ours_and_no_other(tmp_path: Path) -> None:
    """With the shell that everyone has, and a body that is no text."""
    (code,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    body = bytes(range(256))
    (tmp_path / "body.json").write_bytes(body)
    signature = sign(["whsec_new", "whsec_x"], body, datetime.now(UTC))
    for secret, says in (("whsec_new", "from lucid, "), ("whsec_x", "from lucid, "), ("whsec_y", "not from lucid")):
        environment = {"PATH": os.defpath, "SECRET": secret, "SIGNATURE": signature}
        ran = subprocess.run(["sh", "-euc", code], env=environment, cwd=tmp_path, capture_output=True, check=True)
        assert ran.stdout.decode().startswith(says)
        assert not ran.stderr


def test_the_page_names_every_event_and_no_other() -> None:
    table = PAGE.split("| event | when |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`((?:node|model)\.\w+)`", table)) == set(WebhookEvent)
    assert f"An owner has {LIMITS.per_owner} at most" in PAGE
