"""Jobs, audit, webhooks, payouts, settings and the palette on the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.browser import DESK, PHONE, Page
from tests.dashboard import A11Y, CONTRAST, Watched, press_button, tab_to
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import chat_answer, open_gateway

PRICE = "0.5"
REQUESTS = 3


@pytest.fixture(scope="module")
def story(shared: Watched) -> dict[str, str]:
    """Requests of a model on a node with a price, and one that failed there: the ids."""

    async def live() -> dict[str, str]:
        async with open_gateway(shared.served) as gateway, FaultNode(Behaviour(answer=chat_answer())) as server:
            model = await gateway.add_model()
            node = await gateway.add_node(server.url, model, pricePer1kTokens=PRICE)
            answers = [await gateway.chat(model) for _ in range(REQUESTS)]
            await gateway.jobs(model, REQUESTS)
            return {"model": model, "node": node, "job": answers[0].headers["x-lucid-job"]}

    return asyncio.run(live())


@contextmanager
def receiver() -> Iterator[tuple[str, list[str]]]:
    """A receiver of webhooks: its address, and the kinds of events that it got."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(body.decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook", got
        finally:
            server.shutdown()
            thread.join()


def test_jobs_are_filtered_and_one_tells_its_story(shared: Watched, page: Page, story: dict[str, str]) -> None:
    """Filters stand in the address; a request's page has each attempt, and can be shared."""
    shared.log_in(page, f"/jobs?model={story['model']}")
    page.wait_for(f"document.querySelectorAll('.rows tbody tr').length === {REQUESTS}")
    page.run("""(() => {
        const field = document.querySelector('#filter-outcome');
        field.value = 'failed';
        field.dispatchEvent(new Event('change', { bubbles: true }));
    })()""")
    page.wait_for_text("No request is like that")
    assert "outcome=failed" in page.run("location.search")
    page.go(f"{shared.url}/jobs/{story['job']}")
    page.wait_for_text("completed", ".rows")
    assert story["model"] in page.text("[aria-label='What was asked']")
    nodes = page.run("[...document.querySelectorAll('.rows a')].map((one) => one.pathname.split('/').at(-1))")
    assert story["node"] in nodes
    page.go(f"{shared.url}/jobs/00000000-0000-7000-8000-000000000000")
    page.wait_for_text("No such job")
    page.go(f"{shared.url}/jobs/nonsense")
    page.wait_for_text("No such job")


def test_the_audit_trail_is_read_by_admins_alone(shared: Watched, page: Page) -> None:
    node = shared.add_node("audited")
    shared.post(f"/compute/drain/{node}")
    shared.log_in(page, f"/audit?target={node}")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 2")
    assert "drain" in page.text(".rows")
    page.run("""(() => {
        const field = document.querySelector('#filter-action');
        field.value = 'compute';
        field.dispatchEvent(new Event('change', { bubbles: true }));
    })()""")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    page.fill("#filter-by", "nobody")
    page.wait_for_text("No change is like that")
    shared.log_in_anew(page, "/audit", shared.new_key("compute"))
    page.wait_for_text("This key lacks the scope admin", "main [role=alert]")


def test_a_webhook_is_made_tested_rotated_and_deleted(shared: Watched, page: Page) -> None:
    """Its secret is shown once, and its deliveries are listed; a URL that may not be is refused at its field."""
    shared.log_in(page, "/webhooks")
    page.wait_for_text("There is no webhook yet")
    press_button(page, "Make a webhook", "main")
    page.wait_for("document.activeElement.id === 'field-url'")
    page.type("http://127.0.0.1:22/hook")
    page.press("Enter")
    page.wait_for("document.querySelector('#field-url').ariaInvalid === 'true'")
    with receiver() as (url, got):
        page.fill("#field-url", url)
        page.press("Enter")
        page.wait_for_text("shown only now", "dialog")
        secret = page.text("dialog pre")
        press_button(page, "Close", "dialog")
        press_button(page, "Test", ".rows")
        page.wait_for_text("The receiver took it", ".rows")
        assert "webhook.test" in got[0]
        page.click(".rows tbody th a")
        page.wait_for_text("webhook.test", "[aria-label=Deliveries]")
        page.wait_for_text("delivered", "[aria-label=Deliveries]")
    press_button(page, "Rotate", ".rows")
    press_button(page, "Rotate", "dialog")
    page.wait_for_text("shown only now", "dialog")
    assert page.text("dialog pre") != secret
    press_button(page, "Close", "dialog")
    press_button(page, "Delete", ".rows")
    press_button(page, "Delete", "dialog")
    page.wait_for_text("There is no webhook yet")
    assert shared.http.get("/webhooks").json()["webhooks"] == []


def test_a_period_is_closed_by_its_name_and_refused_in_words(shared: Watched, page: Page) -> None:
    """Days to come can't be closed; a provider is offered nothing to close."""
    shared.log_in(page, "/payouts")
    press_button(page, "Close a period", "main")
    page.wait_for("Boolean(document.querySelector('dialog #field-to'))")
    end = page.run("document.querySelector('#field-to').value")
    change = """((value) => {
        const field = document.querySelector('#field-to');
        field.value = value;
        field.dispatchEvent(new Event('input', { bubbles: true }));
    })"""
    page.run(f"{change}('2999-01-01')")
    page.fill("#field-word", "2999-01-01")
    page.press("Enter")
    page.wait_for("Boolean(document.querySelector('dialog [role=alert]'))")
    page.run(f"{change}({end!r})")
    page.fill("#field-word", end)
    page.press("Enter")
    page.wait_for_text("Payouts / closed period")
    [period] = shared.http.get("/payouts/periods").json()["periods"]
    assert period["to"] == end
    shared.log_in_anew(page, "/payouts", shared.new_key("compute"))
    page.wait_for_text("Open: it grows")
    assert "Close a period" not in page.text("main")


def test_settings_say_who_is_logged_in_and_what_runs(shared: Watched, page: Page) -> None:
    """An admin by its key's name; any other by its scopes."""
    shared.log_in(page, "/settings")
    page.wait_for_text("admin", "[aria-label='Who you are']")
    version = shared.http.get("/openapi.json").json()["info"]["version"]
    page.wait_for_text(version, "[aria-label='The service']")
    page.wait_for_text("ready", "[aria-label='The service']")
    page.wait_for_text("responds to this page", "[aria-label=Replicas]")
    settings = "[aria-label='Settings of the service']"
    page.wait_for_text("LUCID_DATABASE_URL", settings)
    assert "(hidden)" in page.text(settings)
    assert "postgresql://" not in page.text(settings)
    assert "LUCID_HOST" not in page.text(settings)
    press_button(page, "all", settings)
    page.wait_for_text("LUCID_HOST", settings)
    key = shared.new_key("compute", "passports:read")
    shared.log_in_anew(page, "/settings", key)
    page.wait_for_text("compute, passports:read", "[aria-label='Who you are']")
    assert key not in page.text()
    assert "Replicas" not in page.texts("h2")


def test_the_palette_finds_and_does(shared: Watched, page: Page, story: dict[str, str]) -> None:
    """Nodes, models, keys, pages and jobs by name, and an action, which is confirmed where it is done."""
    node = shared.add_node("palette-node")
    shared.beat(node)
    shared.log_in(page)
    page.wait_for_text("Fleet", "h1")

    def find(text: str, expected: str) -> None:
        page.run("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'k', ctrlKey: true }))")
        page.wait_for("document.activeElement.role === 'combobox'")
        page.type(text)
        page.wait_for_text(expected, "#found [aria-selected=true]")
        page.press("Enter")

    find("audi", "Audit")
    page.wait_for_text("Audit", "h1")
    find("palette-n", "palette-node")
    page.wait_for_text("palette-node", "h1")
    find(story["model"], story["model"])
    page.wait_for_text(story["model"], "h1")
    find(story["job"], story["job"])
    page.wait_for_text("A request", "h1")
    find("drain palette", "Drain palette-node")
    page.wait_for_text("It is sent no more requests", "dialog")
    press_button(page, "Drain", "dialog")
    page.wait_for_text("Drained", ".actions")
    page.wait_for("location.search === ''")


def test_a_models_page_says_who_serves_it_at_what_price(shared: Watched, page: Page) -> None:
    shared.add_model("served-model")
    for name, price in (("cheap", "0.001"), ("dear", "0.004")):
        shared.beat(shared.add_node(name, pricePer1kTokens=price), availableModels=["served-model"])
    shared.log_in(page, "/models/served-model")
    page.wait_for("document.querySelectorAll('.serving tbody tr').length === 2")
    assert "$0.001 to $0.004 for 1,000 tokens" in page.text("[aria-label='Who serves it']")
    page.click(".answer a.button")
    page.wait_for_text("Playground", "h1")
    page.wait_for("document.querySelector('#model').value === 'served-model'")


@pytest.mark.parametrize("path", ["/jobs", "/webhooks", "/audit", "/settings", "/payouts"])
def test_every_page_is_legible_and_named(shared: Watched, page: Page, story: dict[str, str], path: str) -> None:
    """On a phone in the dark and on a desk in the light; the sections are within reach of Tab."""
    page.prefer("dark")
    page.resize(PHONE)
    shared.log_in(page, path)
    page.wait_for("!document.querySelector('.loading') && Boolean(document.querySelector('main h1'))")
    assert page.run("document.documentElement.scrollWidth") <= PHONE.width
    assert page.run(CONTRAST) >= 4.5
    assert page.run(A11Y) == []
    page.prefer("light")
    page.resize(DESK)
    page.wait_for("document.documentElement.dataset.theme === 'light'")
    assert page.run(CONTRAST) >= 4.5
    assert page.run(A11Y) == []
    tab_to(page, "Settings")
