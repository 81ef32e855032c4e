"""`lucid chat`: one reply for a script, and a conversation on a terminal, beside a real service and a node."""

from __future__ import annotations

import asyncio
import json
import subprocess
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from tests.command_line import CommandLine
from tests.fault_answers import Answer, chat_stream, respond_in_chunks, unfinished_chat
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import Gateway
from tests.lucid_serve import LUCID

pytestmark = pytest.mark.asyncio(loop_scope="session")


def reply(*texts: str) -> Answer:
    """A node's stream of these texts, with its usage."""
    choices: list[Any] = [[{"index": 0, "delta": {"content": text}, "finish_reason": None}] for text in texts]
    choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    events = [json.dumps({"object": "chat.completion.chunk", "choices": choice}) for choice in choices]
    usage = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
    events += [json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": usage}), "[DONE]"]
    return respond_in_chunks(*(f"data: {event}\n\n".encode() for event in events))


async def serve(fleet: Gateway, node: FaultNode) -> tuple[str, str]:
    """Register the node with a model of its own; return the names of both."""
    model = await fleet.add_model()
    node_id = await fleet.add_node(node.url, model, pricePer1kTokens="0.5")
    return model, (await fleet.admin.get(f"/passports/{node_id}")).json()["name"]


async def test_one_reply_and_what_it_cost(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """The text alone is on stdout; the prompt is an argument or stdin."""
    said = "Where are you, Grüße? " * 8
    async with FaultNode(Behaviour(answer=reply("I am ", "here."))) as node:
        model, name = await serve(cli_fleet, node)
        asked = await lucid("chat", model, said, "--system", "Be brief.", "--max-tokens", "20")
        assert (asked.status, asked.out) == (0, "I am here.\n")
        assert asked.err.startswith(f"[{name}, first token after ")
        assert "30 tokens in, 20 out" in asked.err
        assert "$0.025" in asked.err
        body = json.loads(node.requests[-1].body)
        assert [each["content"] for each in body["messages"]] == ["Be brief.", said]
        assert body["max_tokens"] == 20
        found = (await lucid("chat", model, "--json", stdin=said)).json
    assert (found["text"], found["node"], Decimal(found["priceUsd"])) == ("I am here.", name, Decimal("0.025"))
    assert (found["tokensIn"], found["tokensOut"], found["finishReason"]) == (30, 20, "stop")
    assert 0 < found["firstTokenSeconds"] <= found["seconds"]
    (newest, *_) = (await lucid("jobs", "--model", model)).out.splitlines()[1:]
    assert (found["jobId"] in newest, name in newest) == (True, True)


async def test_a_consumer_chats_without_seeing_nodes(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Its key may not read the node's name, so the id is shown; it may read its own jobs, so there is a price."""
    async with FaultNode(Behaviour(answer=reply("yes " * 20))) as node:
        model = await cli_fleet.add_model()
        node_id = await cli_fleet.add_node(node.url, model, pricePer1kTokens="0.5")
        asked = await lucid("chat", model, "is it so? " * 20, "--key", cli_fleet.key)
    assert (asked.status, asked.out.split()) == (0, ["yes"] * 20)
    assert asked.err.startswith(f"[{node_id}, ")
    assert "$0.025" in asked.err


async def test_a_conversation_keeps_what_was_said(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Control characters of the model are written out on a terminal; an empty line ends it."""
    async with FaultNode(Behaviour(answer=reply("one\n", "\x1b[2Jtwo"))) as node:
        model, name = await serve(cli_fleet, node)
        with lucid.on_terminal("chat", model, columns=200) as terminal:
            await terminal.shows("> ")
            terminal.press("hello\n")
            await terminal.shows("one\n\\x1b[2Jtwo")
            await terminal.shows(f"[{name}, ")
            await terminal.shows("> ")
            terminal.press("and?\n")
            await terminal.shows("[2Jtwo")
            await terminal.shows("> ")
            terminal.press("\n")
            assert await terminal.ends() == 0
        said = [each["content"] for each in json.loads(node.requests[-1].body)["messages"]]
    assert said == ["hello", "one\n\x1b[2Jtwo", "and?"]


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        (Behaviour(answer=unfinished_chat("a part"), ending=Ending.CLOSE), "The reply broke off: "),
        (Behaviour(answer=respond_in_chunks(b'data: {"error": {"message": "no memory"}}\n\n')), ""),
        (Behaviour(answer=chat_stream("a part", done=False)), ""),
    ],
)
async def test_a_reply_that_breaks_is_a_sentence_and_no_success(
    behaviour: Behaviour, sentence: str, cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """The part that came stays on stdout."""
    async with FaultNode(behaviour) as node:
        model, _ = await serve(cli_fleet, node)
        asked = await lucid("chat", model, "hello")
    assert asked.status in {1, 3}
    assert asked.err.startswith("lucid: ")
    assert sentence in asked.err
    assert asked.out in {"a part\n", ""}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"data: what?\n\n", "not JSON"),
        (b"data: [1]\n\n", "not JSON"),
        (b'data: {"choices": 7, "usage": 8}\n\n' * 3, "before the reply was complete"),
        (b'data: {"choices": [3, {"delta": 4}, {"delta": {"content": 5}}]}\n\n', "before the reply was complete"),
        (b"data: " + b"x" * (5 << 20), "Is it the address of lucid serve?"),
        (b"\xff\xfe\x00" * 1000, "before the reply was complete"),
        (b"", "before the reply was complete"),
    ],
)
async def test_a_stream_of_another_service_is_a_sentence(content: bytes, sentence: str, lucid: CommandLine) -> None:
    """No traceback, whatever stands in it."""
    async with FaultNode(Behaviour(answer=respond_in_chunks(content) if content else respond_in_chunks())) as other:
        asked = await lucid("chat", "m", "hello", "--api", other.url)
    assert asked.status == 3
    assert sentence in asked.sentence


async def test_what_cannot_be_sent_is_status_2_and_what_is_refused_a_sentence(
    cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """An empty prompt, text that is none, a model that is none, a key that is none."""
    model = await cli_fleet.add_model()
    assert (await lucid("chat", model)).status == 2
    assert (await lucid("chat", model, " ")).status == 2
    assert (await lucid("chat", model, "x", "--temperature", "3")).status == 2
    assert (await lucid("chat", uuid4().hex, "x")).status == 5
    assert (await lucid("chat", model, "x", "--key", "lk_live_wrong")).status == 4
    refused = await lucid("chat", model, "x")
    assert refused.status == 3
    assert model in refused.sentence
    with lucid.on_terminal("chat", model, "--json", columns=200) as terminal:
        await terminal.shows("--json is for one reply")
        assert await terminal.ends() == 2
    for command in (f"printf '\\xff' | {LUCID} chat {model}", f"{LUCID} chat {model} $'\\xff'"):
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", command,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=lucid.folder, env=lucid.environment,
        )  # fmt: skip
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert b"is not text in UTF-8." in errors
        assert errors.count(b"\n") == 1


async def test_ctrl_c_ends_a_chat_quietly_and_a_closed_pipe_too(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """With 130 and 141."""
    slow = Behaviour(answer=reply(*(["more "] * 3000)), drip_body_seconds=0.02, drip_bytes=150)
    async with FaultNode(slow) as node:
        model, _ = await serve(cli_fleet, node)
        with lucid.on_terminal("chat", model, "hello") as terminal:
            await terminal.shows("more")
            terminal.interrupt()
            assert await terminal.ends() == 130
        assert "lucid:" not in terminal.text
        command = f"{LUCID} chat {model} hello 2>errors | head -c 5; echo ${{PIPESTATUS[0]}}"
        done = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", command],
            cwd=lucid.folder, env=lucid.environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout == "more 141\n"
    assert not (lucid.folder / "errors").read_text()
