"""`lucid webhooks` beside a real service."""

from __future__ import annotations

from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode


async def test_a_webhook_lives_on_the_command_line(lucid: CommandLine) -> None:
    """Made with its secret alone on stdout, listed without it, tested, and deleted when one agrees."""
    async with FaultNode() as receiver:
        made = await lucid("webhooks", "create", receiver.url, "--event", "node.drained")
        assert made.status == 0
        assert made.out.startswith("whsec_")
        listed = await lucid("webhooks", "--json")
        (webhook,) = listed.json["webhooks"]
        assert webhook["events"] == ["node.drained"]
        assert made.out.strip() not in listed.out + (await lucid("webhooks")).out
        assert "No deliveries yet" in (await lucid("webhooks", "deliveries", webhook["id"])).out
        assert "The receiver took it" in (await lucid("webhooks", "test", webhook["id"])).out
        assert len(receiver.requests) == 1
        assert "webhook.test" in (await lucid("webhooks", "deliveries", webhook["id"])).out
        rotated = await lucid("webhooks", "rotate", webhook["id"])
        assert rotated.out.startswith("whsec_")
        assert rotated.out != made.out
    assert (await lucid("webhooks", "delete", webhook["id"])).status == 2
    assert (await lucid("webhooks", "delete", webhook["id"], "--yes", "--json")).json["deleted"]
    assert (await lucid("webhooks", "test", webhook["id"])).status == 5


async def test_a_test_that_fails_ends_with_1(lucid: CommandLine) -> None:
    """And says why in a word."""
    async with FaultNode(Behaviour(answer=respond(status=503)), host="127.9.9.9") as receiver:
        webhook = (await lucid("webhooks", "create", receiver.url, "--json")).json
        ended = await lucid("webhooks", "test", webhook["id"])
        assert (ended.status, ended.sentence) == (1, "It was not delivered: 5xx.")
        await lucid("webhooks", "delete", webhook["id"], "--yes")
