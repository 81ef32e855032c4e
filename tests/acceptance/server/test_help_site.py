"""The built documentation at `/help`: served from the folder of LUCID_HELP_DIR, and nothing beside it."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import httpx

from tests import postgres
from tests.lucid_serve import Served, folder

SCRIPT = 'document.body.dataset.theme = "auto";'


def test_help_is_the_built_site_or_says_where_the_docs_are(
    postgres_and_template: tuple[str, str], tmp_path: Path, gateway_service: Served
) -> None:
    """Below LUCID_ROOT_PATH, too. A page's own scripts may run, and no other; what is outside is not there."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text(f"<script>{SCRIPT}</script><p>Welcome")
    (tmp_path / "secret.txt").write_text("secret")
    (site / "link.txt").symlink_to(tmp_path / "secret.txt")
    url = asyncio.run(postgres.clone(*postgres_and_template))
    with (
        folder() as made,
        Served(made, url, ROOT_PATH="/lucid", HELP_DIR=str(site)) as served,
        httpx.Client(base_url=served.url, trust_env=False) as client,
    ):
        led = client.get("/lucid/help")
        assert (led.status_code, led.headers["location"]) == (307, "/lucid/help/")
        page = client.get("/lucid/help/")
        assert "Welcome" in page.text
        policy = page.headers["content-security-policy"]
        script_policy = next(part for part in policy.split("; ") if part.startswith("script-src"))
        assert script_policy == f"script-src 'self' 'sha256-{b64encode(sha256(SCRIPT.encode()).digest()).decode()}'"
        assert page.headers["x-content-type-options"] == "nosniff"
        for path in ("nothing", "%2e%2e/secret.txt", "link.txt", "..%2fsecret.txt"):
            missing = client.get(f"/lucid/help/{path}")
            assert (missing.status_code, "secret\n" in missing.text) == (404, False), path
    asyncio.run(postgres.drop(url))
    with httpx.Client(base_url=gateway_service.url, trust_env=False) as client:
        said = client.get("/help")
        assert "make docs" in said.text
        assert client.get("/help/").status_code == 404
