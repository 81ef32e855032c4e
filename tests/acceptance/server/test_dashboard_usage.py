"""Usage, budgets and events on the dashboard, and the page as a consumer sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.browser import Page
from tests.dashboard import Watched, press_button, tab_to, tab_to_field, value_of, wait_for_value
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, chat_answer, open_gateway
from tests.lucid_serve import eventually

REQUESTS = 3
CHARGED = "0.0075"  # three requests of five tokens, at 0.5 dollars for 1,000
FIGURES = "[aria-label='Spent in these days']"


@pytest.fixture(scope="module")
def consumer(shared: Watched) -> dict[str, Any]:
    """A consumer's key with a budget, which was used for some requests: the new key, and the model's name."""
    limits = {"budgetUsd": "20", "budgetPeriod": "month", "models": ["model-*", "*"]}
    body = {"name": "the shop", "owner": "shop", "scopes": ["inference:run"], "limits": limits}
    key: dict[str, Any] = shared.post("/keys", body)

    async def use() -> str:
        async with open_gateway(shared.served) as gateway, FaultNode(Behaviour(answer=chat_answer())) as server:
            model = await gateway.add_model()
            await gateway.add_node(server.url, model, pricePer1kTokens="0.5")
            headers = {"Authorization": f"Bearer {key['key']}"}
            async with httpx.AsyncClient(base_url=shared.served.url, headers=headers, trust_env=False) as client:
                for _ in range(REQUESTS):
                    answer = await client.post("/v1/chat/completions", json={"model": model, "messages": QUESTION})
                    assert answer.status_code == 200, answer.text

                async def is_counted() -> bool:
                    return bool((await client.get("/usage")).json()["total"]["completed"] == REQUESTS)

                await eventually(is_counted)
            return model

    return {**key, "model": asyncio.run(use())}


def rows(page: Page, label: str) -> list[list[str]]:
    """Return the cells of a card's table."""
    return [[cell.strip() for cell in row.split("\t")] for row in page.texts(f"[aria-label={label!r}] tbody tr")]


def test_usage_is_added_up_by_day_model_and_key_with_what_is_left(
    shared: Watched, page: Page, consumer: dict[str, Any]
) -> None:
    """The figures are the API's; the groups stand in the address; a budget says when it is full again."""
    shared.log_in(page, "/usage", key=consumer["key"])
    wait_for_value(page, "requests", str(REQUESTS))
    assert value_of(page, "spent") == f"${CHARGED}"
    assert (value_of(page, "tokens in"), value_of(page, "tokens out")) == ("9", "6")
    page.wait_for_text("the shop", "[aria-label=Budgets]")
    [budget] = rows(page, "Budgets")
    assert "$20 a month" in budget
    assert "$19.99" in page.text("[aria-label=Budgets]")
    told = shared.http.get("/usage?owner=shop&groupBy=model").json()
    assert told["total"]["priceUsd"] == CHARGED
    for by, first in (("model", consumer["model"]), ("key", "the shop")):
        press_button(page, by, "[aria-label='What was used']")
        page.wait_for_text(first, "[aria-label='What was used'] tbody")
        assert page.run("new URLSearchParams(location.search).get('by')") == by
        [row] = rows(page, "What was used")
        assert row[1:] == [str(REQUESTS), "0", "0", "9", "6", f"${CHARGED}"]
    assert "owner" not in page.texts("[aria-label='What was used'] .choice button")


def test_an_admin_sees_everybodys_usage_and_an_owners_budgets(
    shared: Watched, page: Page, consumer: dict[str, Any]
) -> None:
    shared.log_in(page, "/usage?by=owner")
    page.wait_for_text("Name an owner", "[aria-label=Budgets]")
    page.wait_for_text("shop", "[aria-label='What was used'] tbody")
    page.run("[...document.querySelectorAll('tbody a')].find((one) => one.innerText === 'shop').click()")
    page.wait_for_text("the shop", "[aria-label=Budgets]")
    page.go(f"{shared.url}/keys?owner=shop")
    page.wait_for_text("$20 a month", ".rows")
    page.click("[aria-label='Usage of the shop']")
    page.wait_for_text("Usage", "h1")
    page.wait_for(f"new URLSearchParams(location.search).get('key') === {consumer['id']!r}")


def test_usage_is_refused_to_a_key_that_may_not_run_requests(shared: Watched, page: Page) -> None:
    shared.log_in(page, "/usage", key=shared.new_key("compute"))
    page.wait_for_text("This key lacks the scope", "main [role=alert]")
    assert "Usage" not in page.texts(".sections a")


def test_a_consumer_is_shown_what_its_key_may_read(shared: Watched, page: Page, consumer: dict[str, Any]) -> None:
    """It begins with the models, and sees its own requests; nothing that it would be refused is in the navigation."""
    shared.log_in(page, key=consumer["key"])
    page.wait_for_text("Models", "h1")
    page.wait_for_text(consumer["model"], ".rows")
    assert page.texts(".sections a") == ["Models", "Playground", "Jobs", "Usage", "Settings"]
    page.wait_for_text("shop · the shop", ".who")
    page.go(f"{shared.url}/models/{consumer['model']}")
    page.wait_for_text("You can get it now", ".answer")
    assert not page.run("Boolean(document.querySelector('main [role=alert]'))")
    page.go(f"{shared.url}/jobs")
    page.wait_for(f"document.querySelectorAll('.rows tbody tr').length === {REQUESTS}")
    page.go(f"{shared.url}/settings")
    page.wait_for_text("$20 a month", "[aria-label='Who you are']")
    page.wait_for_text("inference:run", "[aria-label='Who you are']")
    refused = [text for text in page.faults() if "403" in text]
    assert refused == []


def test_events_of_all_nodes_are_filtered_and_a_providers_are_its_own(shared: Watched, page: Page) -> None:
    """By event, node and owner; each leads to its node."""
    mine, other = shared.add_node("mine", owner="acme"), shared.add_node("other", owner="globex")
    shared.post(f"/compute/drain/{mine}")
    shared.log_in(page, "/events")
    page.wait_for_text("drain began", ".rows")
    page.run("""(() => {
        const field = document.querySelector('#filter-type');
        field.value = 'draining';
        field.dispatchEvent(new Event('change', { bubbles: true }));
    })()""")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    assert "type=draining" in page.run("location.search")
    page.click(".rows tbody a")
    page.wait_for_text("mine", "h1")
    page.go(f"{shared.url}/events?node={other}")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    assert "registered" in page.text(".rows tbody")
    page.go(f"{shared.url}/events?owner=nobody")
    page.wait_for_text("Nothing like that happened")
    shared.log_in_anew(page, "/events", shared.new_key("passports:read"))
    page.wait_for_text("drain began", ".rows")
    assert "mine" in page.text(".rows tbody")
    assert "other" not in page.text(".rows tbody")
    shared.log_in_anew(page, "/events", shared.new_key("inference:run"))
    page.wait_for_text("This key lacks the scope", "main [role=alert]")


def test_events_and_usage_are_used_by_keyboard_alone(shared: Watched, page: Page) -> None:
    """Filters, groups and links, with the focus in sight at every step."""
    node = shared.add_node("by-keys", owner="keyboard")
    shared.post(f"/compute/drain/{node}")
    shared.log_in(page, "/events?owner=keyboard")
    page.wait_for_text("drain began", ".rows")
    page.wait_for_text("registered", ".rows")
    page.run("document.activeElement.blur()")
    tab_to_field(page, "filter-type")
    for _ in range(20):
        if page.run("document.activeElement.value") == "draining":
            break
        page.press("ArrowDown")
    page.wait_for("document.querySelectorAll('.rows tbody tr').length === 1")
    assert "type=draining" in page.run("location.search")
    tab_to(page, "by-keys")
    page.press("Enter")
    page.wait_for_text("by-keys", "h1")
    page.wait_for("document.activeElement.tagName === 'H1'")
    page.go(f"{shared.url}/usage")
    page.wait_for_text("What was used", "main")
    page.run("document.activeElement.blur()")
    tab_to_field(page, "filter-model")
    page.type("no-such-model")
    page.wait_for("location.search.includes('model=no-such-model')")
    page.wait_for_text("Nothing was used in these days", "[aria-label='What was used']")
    tab_to(page, "owner")
    page.press(" ")
    page.wait_for("location.search.includes('by=owner')")
    assert page.run("document.activeElement.ariaPressed") == "true"
    tab_to(page, "Save as CSV")
