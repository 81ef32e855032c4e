"""What requests cost: input and output apart, once, whatever was tried, and only for what was delivered."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import httpx
import pytest

from lucid_compute.registry.domain.prices import total
from tests.fault_answers import respond, respond_in_chunks, unfinished_chat
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import Gateway, chat_answer
from tests.lucid_serve import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("retries")]
SAID = Behaviour(answer=chat_answer(tokens_in=100, tokens_out=20))


def priced(model: str, into: str, out: str) -> dict[str, Any]:
    """The metadata of a node with that price for the model, and a very high one for any other."""
    return {"pricePer1kTokens": "999", "prices": {model: {"inputPer1kTokens": into, "outputPer1kTokens": out}}}


async def charged(gateway: Gateway, model: str, attempts: int = 1) -> list[Decimal | None]:
    """What the attempts of the model's requests cost, the first one first."""
    jobs = sorted(await gateway.jobs(model, attempts), key=lambda job: job["attempt"])
    return [None if job["priceUsd"] is None else Decimal(job["priceUsd"]) for job in jobs]


async def owed(gateway: Gateway, model: str) -> list[dict[str, Any]]:
    """The lines of the payouts for the model."""
    report = (await gateway.admin.get("/payouts")).json()
    return [line for line in report["lines"] if line["model"] == model]


@pytest.mark.parametrize("named", ["{}", "{}/alias"])
async def test_a_request_costs_its_input_and_its_output_each_at_its_price(gateway: Gateway, named: str) -> None:
    """Under whichever name the price stands and the request asks; what it cost is what is paid out."""
    async with FaultNode(SAID) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(named.format(model), "0.001", "0.0025"))
        assert (await gateway.chat(f"{model}/alias")).status_code == httpx.codes.OK
        assert await charged(gateway, model) == [Decimal("0.00015")]
        lines = await owed(gateway, model)
        assert {line["role"]: line["jobs"] for line in lines} == {"provider": 1, "model_owner": 1, "protocol": 1}
        assert total(Decimal(line["amountUsd"]) for line in lines) == Decimal("0.00015")


async def test_a_request_is_never_sent_where_a_token_costs_more_than_it_allows(gateway: Gateway) -> None:
    """The dearer of the two counts, in /match and in /v1; other models' prices are no matter."""
    async with FaultNode(SAID) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(model, "0.001", "0.0025"))
        refused = await gateway.match(model, lucid={"maxPricePer1kTokens": "0.0024"})
        (reason,) = [each for node in refused["rejected"] for each in node["reasons"] if each["found"] == "0.0025"]
        assert (refused["chosen"], reason["code"]) == (None, "PRICE_TOO_HIGH")
        denied = await gateway.chat(model, lucid={"maxPricePer1kTokens": "0.0024"})
        assert denied.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert (await gateway.chat(model, lucid={"maxPricePer1kTokens": "0.0025"})).status_code == httpx.codes.OK


async def test_a_price_that_is_raised_while_a_request_runs_is_not_its_price(gateway: Gateway) -> None:
    """It was promised another one when it was sent."""
    async with FaultNode(Behaviour(answer=SAID.answer, delay_seconds=0.7)) as node:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model, **priced(model, "0.001", "0.001"))
        asked = asyncio.create_task(gateway.chat(model, lucid={"maxPricePer1kTokens": "0.001"}))
        await node.until(lambda node: bool(node.requests))
        changed = await gateway.admin.patch(f"/passports/{node_id}", json={"metadata": priced(model, "9", "9")})
        assert changed.status_code == httpx.codes.OK
        assert (await asked).status_code == httpx.codes.OK
        assert await charged(gateway, model) == [Decimal("0.00012")]


async def test_a_request_that_is_tried_again_costs_once(gateway: Gateway) -> None:
    """What failed before its first byte costs nothing, and is nobody's failed request."""
    async with FaultNode(Behaviour(answer=respond(b"{}", status=500))) as bad, FaultNode(SAID) as good:
        model = await gateway.add_model()
        await gateway.add_node(bad.url, model, **priced(model, "1", "1"))
        await gateway.add_node(good.url, model, beat={"load": 1}, **priced(model, "0.001", "0.001"))
        assert (await gateway.chat(model)).headers["x-lucid-attempts"] == "2"
        assert await charged(gateway, model, 2) == [None, Decimal("0.00012")]
        assert {line["jobs"] for line in await owed(gateway, model)} == {1}


async def test_a_response_says_its_price(gateway: Gateway) -> None:
    """A whole one in a header, and none that has no price: what is told is what the ledger has."""
    async with FaultNode(SAID) as node, FaultNode(SAID) as free:
        model, unpriced = await gateway.add_model(), await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(model, "0.001", "0.0025"))
        await gateway.add_node(free.url, unpriced)
        assert Decimal((await gateway.chat(model)).headers["x-lucid-price-usd"]) == Decimal("0.00015")
        assert await charged(gateway, model) == [Decimal("0.00015")]
        assert "x-lucid-price-usd" not in (await gateway.chat(unpriced)).headers
        node.behaviour = Behaviour(answer=respond(b'{"error": {"message": "no"}}', status=400))
        assert "x-lucid-price-usd" not in (await gateway.chat(model)).headers


@pytest.mark.parametrize(
    ("usage", "ends"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 2}, True),
        ({"prompt_tokens": 10, "completion_tokens": 10**7, "cost": 5}, True),
        ({"prompt_tokens": 10, "completion_tokens": 2}, False),
    ],
)
async def test_a_stream_whose_usage_is_asked_for_says_its_price(
    gateway: Gateway, usage: dict[str, Any], ends: bool
) -> None:
    """It is what the ledger has, also of a usage that can't be, and of a stream that breaks off afterwards."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": "said"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop" if ends else None}]},
        {"choices": [], "usage": usage},
    ]
    sent = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"] * ends
    answer = respond_in_chunks(*sent, ends=ends)
    async with FaultNode(Behaviour(answer=answer, ending=Ending.CLOSE)) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(model, "0.001", "0.0025"))
        asked = await gateway.chat(model, stream=True, stream_options={"include_usage": True})
        (told,) = [json.loads(line[6:], parse_float=Decimal) for line in asked.text.splitlines() if '"cost"' in line]
        assert told["usage"] == {**usage, "cost": told["usage"]["cost"]}
        assert await charged(gateway, model) == [told["usage"]["cost"]]
        assert "x-lucid-price-usd" not in asked.headers
        assert "cost" not in (await gateway.chat(model, stream=True)).text


@pytest.mark.parametrize(("texts", "delivered"), [(("one", " two", " three"), 3), (("",), None)])
async def test_a_stream_that_breaks_off_costs_what_was_delivered_and_nothing_when_nothing_was(
    gateway: Gateway, texts: tuple[str, ...], delivered: int | None
) -> None:
    """A first event without content is none: it is held back, and nothing is billed."""
    ending = {"ending": Ending.RESET, "surplus_after_seconds": 0.2}
    async with FaultNode(Behaviour(answer=unfinished_chat(*texts), **ending)) as node:  # type: ignore[arg-type]
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(model, "0", "1"))
        await gateway.chat(model, stream=True)
        (job,) = await gateway.jobs(model)
        assert (job["outcome"], job["tokensOut"]) == ("failed", delivered)
        assert await charged(gateway, model) == [Decimal(delivered) / 1000 if delivered else None]

        async def is_blamed() -> bool:
            report = (await gateway.admin.get("/payouts/losses")).json()
            lost = sum(each["requests"] + each["retried"] for each in report["losses"])
            assert report["attempts"] == report["completed"] + report["running"] + lost
            return any(each["cause"] == "connection_lost" for each in report["losses"])

        await eventually(is_blamed)


@pytest.mark.parametrize(
    ("usage", "is_believed"),
    [
        ({"prompt_tokens": 100, "completion_tokens": 20}, True),
        ({"prompt_tokens": 100, "completion_tokens": 21}, False),
        ({"prompt_tokens": -100, "completion_tokens": 20}, False),
        ({"prompt_tokens": 10**15, "completion_tokens": 20}, False),
        ({"prompt_tokens": "100", "completion_tokens": 20}, False),
        ({}, False),
    ],
)
async def test_a_usage_that_cannot_be_is_not_billed(gateway: Gateway, usage: dict[str, Any], is_believed: bool) -> None:
    """What was delivered is counted instead: here one word."""
    said = {"id": "1", "choices": [{"index": 0, "message": {"content": "yes"}}], "usage": usage}
    async with FaultNode(Behaviour(answer=respond(json.dumps(said).encode()))) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model, **priced(model, "0", "1"))
        await gateway.chat(model, max_tokens=20)
        (job,) = await gateway.jobs(model)
        assert (job["outcome"], job["tokensCounted"]) == ("completed", not is_believed)
        assert await charged(gateway, model) == [Decimal("0.02") if is_believed else Decimal("0.001")]
