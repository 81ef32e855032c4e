"""The API reference in a real Chromium: it is complete, works, and asks nobody but the service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import postgres
from tests.browser import Chromium, Page
from tests.lucid_serve import Served, folder


@pytest.fixture(scope="module", params=["", "/lucid"], ids=["at the root", "below a path"])
def served(request: pytest.FixtureRequest, postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service, below LUCID_ROOT_PATH too."""
    url = asyncio.run(postgres.clone(*postgres_and_template))
    with folder() as made, Served(made, url, ROOT_PATH=request.param) as served:
        served.url += request.param
        yield served
    asyncio.run(postgres.drop(url))


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    """A page with a context of its own."""
    with chromium.page() as page:
        yield page


def document_of(served: Served) -> dict[str, Any]:
    """Return the service's OpenAPI document."""
    answer = httpx.get(f"{served.url}/openapi.json", trust_env=False)
    document: dict[str, Any] = answer.raise_for_status().json()
    return document


def open_reference(served: Served, page: Page) -> None:
    """Open the reference, and wait until it shows an operation."""
    page.go(f"{served.url}/docs")
    page.wait_for("document.querySelectorAll('.opblock').length")


def open_operation(page: Page, tag: str, operation_id: str) -> str:
    """Open an operation; return its selector."""
    block = f"#operations-{tag}-{operation_id}"
    page.click(f"{block} .opblock-summary-control")
    page.wait_for(f"document.querySelector('{block}.is-open .opblock-body') !== null")
    return block


def test_the_reference_shows_every_operation_and_asks_the_service_alone(served: Served, page: Page) -> None:
    """Nothing comes from elsewhere, and nothing breaks its policy: neither scripts nor styles nor pictures."""
    open_reference(served, page)
    document = document_of(served)
    ids = {
        f"operations-{operation['tags'][0]}-{operation['operationId']}"
        for path in document["paths"].values()
        for operation in path.values()
    }
    assert set(page.run("[...document.querySelectorAll('.opblock')].map((found) => found.id)")) == ids
    for tag, operation_id in (("passports", "create_passport"), ("compute", "send_heartbeat")):
        open_operation(page, tag, operation_id)
    page.wait_for_text("my-gpu-node")
    hosts = {asked["url"].split("/")[2] for asked in page.requests() if not asked["url"].startswith("data:")}
    assert hosts == {served.url.split("/")[2]}
    assert page.faults() == []


def test_a_request_can_be_sent_from_the_reference(served: Served, page: Page) -> None:
    """With a key that is entered there, and is kept nowhere."""
    open_reference(served, page)
    page.click(".btn.authorize")
    page.fill(".modal-ux input", served.admin_key)
    page.click(".modal-ux .btn.authorize")
    page.click(".modal-ux .btn-done")
    block = open_operation(page, "passports", "create_passport")
    page.click(f"{block} .try-out__btn")
    page.click(f"{block} .execute")
    page.wait_for_text("201", f"{block} .live-responses-table tbody .response-col_status")
    page.wait_for_text('"name": "my-gpu-node"', f"{block} .live-responses-table")
    assert served.admin_key not in page.run("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie")
    assert page.faults() == []


def test_files_of_the_reference_may_be_kept_under_their_present_address_alone(served: Served) -> None:
    """They are as large as the rest of the service's page; another version's address gets this version's file."""
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        page = client.get("/docs").text
        script = page.split('src="')[1].split('"')[0].removeprefix("/lucid")
        packed = client.get(script, headers={"Accept-Encoding": "gzip"})
        plain = client.get(script, headers={"Accept-Encoding": "identity"})
        assert packed.content == plain.content
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
        assert "immutable" in plain.headers["cache-control"]
        digest = script.split("/")[-2]
        assert client.get(script.replace(digest, "0" * 16)).headers["cache-control"] == "no-store"
        for name in ("nothing.js", "__init__.py", "..%2fmain.py"):
            assert client.get(f"/docs/assets/{digest}/{name}").status_code == 404
        assert client.head("/docs").status_code == 200
