"""What was earned and who gets what of it, on the dashboard, from real requests that were priced."""

from __future__ import annotations

import asyncio

from tests.browser import Page
from tests.dashboard import Watched, wait_for_value
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import chat_answer, open_gateway
from tests.lucid_serve import eventually

PRICE = "0.5"  # for 1,000 tokens, of which a request has five
REQUESTS = 5
REFUSALS = 2
REFUSED_SECONDS = 20.0  # what is refused is written every five seconds


async def earn(watched: Watched) -> None:
    """Have a node with a price serve requests, and wait until they are billed."""
    async with open_gateway(watched.served) as gateway, FaultNode(Behaviour(answer=chat_answer())) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, pricePer1kTokens=PRICE)
        for _ in range(REQUESTS):
            await gateway.chat(model)


async def be_refused(watched: Watched) -> None:
    """Ask for a model that no node serves, and wait until that is told of."""
    async with open_gateway(watched.served) as gateway:
        model = await gateway.add_model()
        for _ in range(REFUSALS):
            await gateway.chat(model)

        async def is_told() -> bool:
            losses = (await gateway.admin.get("/payouts/losses")).json()["losses"]
            return sum(int(loss["refused"]) for loss in losses) == REFUSALS

        await eventually(is_told, REFUSED_SECONDS)


def test_what_was_earned_is_shown_to_the_last_digit(watched: Watched, page: Page) -> None:
    """And who gets what of it, in all and by node and model, and that nothing was lost."""
    asyncio.run(earn(watched))
    watched.log_in(page, "/payouts")
    wait_for_value(page, "requests completed", str(REQUESTS))
    wait_for_value(page, "earned", "$0.0087")  # what the provider gets; what was charged is the note
    assert page.run("""[...document.querySelectorAll('.figure .value')][0].title""") == "$0.0125 charged"
    page.wait_for_text("70 % of $0.012 charged", ".figure")
    page.wait_for_text("Payouts / open month")
    page.wait_for_text("the protocol", ".rows")
    text = page.text("main")
    for amount in ("$0.0125", "$0.00875", "$0.0025", "$0.00125"):
        assert amount in text
    assert "70 % provider, 20 % model owner, 10 % protocol" in text
    page.wait_for_text("Nothing was lost.")
    lines = watched.http.get("/payouts").json()["lines"]
    [node] = {line["passportId"] for line in lines if line["role"] == "provider"}
    page.go(f"{watched.url}/nodes/{node}")
    page.wait_for_text("$0.0087 of $0.012 charged", "[aria-label='What it is']")


def test_what_was_refused_is_shown_as_lost(watched: Watched, page: Page) -> None:
    asyncio.run(be_refused(watched))
    watched.log_in(page, "/payouts")
    page.wait_for_text("no node", ".rows")
    assert "Refused" in page.run("[...document.querySelectorAll('main table')].at(-1).tHead.innerText")
    cells = page.run("""(() => {
        const row = [...[...document.querySelectorAll('main table')].at(-1).rows].at(-1);
        return [...row.cells].map((cell) => cell.innerText.trim());
    })()""")
    assert cells[:4] == ["no node", "the provider", "0 requests", "2"]
