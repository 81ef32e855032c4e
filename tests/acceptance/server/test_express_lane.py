"""Requests that are served without a task: what their clients see is what the ordinary lane would have shown them."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
import signal
import time
from typing import Any

import httpx
import pytest

from tests import postgres
from tests.fault_answers import chat_stream, respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import QUESTION, Gateway, chat_answer, open_gateway, within
from tests.lucid_serve import Served, folder
from tests.raw_client import Client

pytestmark = pytest.mark.asyncio(loop_scope="session")

LEFT_SECONDS = 1.0
REVOKED_SECONDS = 30.0
SILENT = Behaviour(delay_seconds=math.inf)
SLOW = Behaviour(answer=chat_answer("late"), delay_seconds=1.0)


def port_of(gateway: Gateway) -> int:
    """Return where the service listens."""
    return httpx.URL(gateway.served.url).port or 0


def request_bytes(gateway: Gateway, model: str, *headers: str, **body: Any) -> bytes:
    """Return a chat's request as it stands on the wire."""
    text = json.dumps({"model": model, "messages": QUESTION, **body})
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{port_of(gateway)}",
        f"Authorization: Bearer {gateway.key}",
        f"Content-Length: {len(text)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", text]).encode()


async def express_count(gateway: Gateway) -> int:
    """Return how many requests the lane has begun."""
    text = (await gateway.admin.get("/metrics")).text
    found = re.search(r"^lucid_inference_express_total (\S+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1]))


async def add_warm(gateway: Gateway, node: FaultNode, **metadata: Any) -> tuple[str, str]:
    """Register a model on the node and have a first chat answered, so that a connection to the node is idle."""
    model = await gateway.add_model()
    node_id = await gateway.add_node(node.url, model, **metadata)
    node.script.insert(0, Behaviour(answer=chat_answer()))
    assert (await gateway.chat(model)).status_code == 200
    return model, node_id


async def test_a_request_takes_the_lane_as_soon_as_a_connection_is_idle(gateway: Gateway) -> None:
    """It is answered with the same status, headers and body as one that does not take it; the ledger keeps both."""
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        before = await express_count(gateway)
        ordinary = await gateway.chat(model)
        assert await express_count(gateway) == before
        express = await gateway.chat(model)
        assert await express_count(gateway) == before + 1
        assert list(express.headers) == list(ordinary.headers)
        assert (express.status_code, express.json()) == (200, ordinary.json())
        assert express.headers["x-lucid-node"] == node_id
        jobs = await gateway.jobs(model, 2)
        assert {job["id"] for job in jobs} == {answer.headers["x-lucid-job"] for answer in (ordinary, express)}
        told = ("outcome", "status", "attempt", "tokensIn", "tokensOut", "passportId", "endpoint")
        assert [jobs[0][name] for name in told] == [jobs[1][name] for name in told]
        heads = [request.head.lower().replace(b"connection: ", b"") for request in node.requests]
        assert len({re.sub(rb"x-request-id: \S+", b"", head) for head in heads}) == 1


async def test_packets_are_put_together(gateway: Gateway) -> None:
    """Head and body in two packets are one request; a body that trickles in is one too, by the ordinary lane."""
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        model, _ = await add_warm(gateway, node)
        before = await express_count(gateway)
        data = request_bytes(gateway, model)
        head = data.index(b"\r\n\r\n") + 4
        client = await Client.open(port_of(gateway))
        for pieces, pause in (((data[:head], data[head:]), 0.05), ((data[:-9], data[-9:-5], data[-5:]), 0.02)):
            for piece in pieces:
                client.send(piece)
                await asyncio.sleep(pause)
            assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
        assert await express_count(gateway) == before + 2
        client.send(data[:-5])
        await asyncio.sleep(1.5)
        client.send(data[-5:])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
        assert await express_count(gateway) == before + 2
        await client.close()


async def test_what_comes_behind_a_request_is_answered_after_it(gateway: Gateway) -> None:
    """Pipelined requests of every kind come in their order, and nothing is lost between the lanes."""
    async with FaultNode(Behaviour(answer=chat_answer("second"))) as node:
        model, _ = await add_warm(gateway, node)
        node.script += [Behaviour(answer=chat_answer("first"), delay_seconds=0.3)]
        data = request_bytes(gateway, model)
        client = await Client.open(port_of(gateway))
        client.send(data)
        await asyncio.sleep(0.1)
        client.send(data)
        client.send(b"GET /healthz HTTP/1.1\r\nHost: lucid\r\n\r\n" + data)
        answers = [await client.answer() for _ in range(4)]
        for answer, said in zip(answers, (b'"first"', b'"second"', b"ok", b'"second"'), strict=True):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert said in answer
        await client.close()


@pytest.mark.parametrize(("status", "outcome"), [(500, "failed"), (429, "rejected"), (301, "failed")])
@pytest.mark.usefixtures("retries")
async def test_a_node_that_fails_is_replaced_unseen(gateway: Gateway, status: int, outcome: str) -> None:
    """The request goes on in the ordinary lane, with what was learnt; so it does if the node was busy, not failing."""
    refusal = respond(b'{"error":{}}', status=status)
    async with FaultNode(Behaviour(answer=refusal)) as bad, FaultNode(Behaviour(answer=chat_answer())) as good:
        model, bad_id = await add_warm(gateway, bad)
        good_id = await gateway.add_node(good.url, model, beat={"load": 1})
        before = await express_count(gateway)
        answer = await gateway.chat(model)
        assert (answer.status_code, answer.headers["x-lucid-attempts"]) == (200, "2"), answer.text
        assert await express_count(gateway) == before + 1
        jobs = [job for job in await gateway.jobs(model, 3) if job["id"] == answer.headers["x-lucid-job"]]
        told = {(job["attempt"], job["outcome"], job["reason"], job["passportId"]) for job in jobs}
        assert told == {(1, outcome, f"http_{status}", bad_id), (2, "completed", None, good_id)}


async def test_a_node_that_fails_alone_is_told_of_once(gateway: Gateway) -> None:
    """With the same error as ever, naming the one attempt."""
    async with FaultNode(Behaviour(cut_head_after=5, ending=Ending.RESET)) as node:
        model, node_id = await add_warm(gateway, node)
        answer = await gateway.chat(model)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "NODE_FAILED")
        assert answer.json()["error"]["details"]["attempts"] == [{"passportId": node_id, "reason": "connection_lost"}]
        assert len(await gateway.jobs(model, 2)) == 2


async def test_a_connection_that_the_node_had_closed_is_nobodys_failure(gateway: Gateway) -> None:
    """The request is sent again on a new one, at its first attempt."""
    async with FaultNode(Behaviour(answer=chat_answer(), ending=Ending.KEEP, idle_seconds=0.0)) as node:
        model, _ = await add_warm(gateway, node)
        for _ in range(20):
            answer = await gateway.chat(model)
            assert (answer.status_code, answer.headers["x-lucid-attempts"]) == (200, "1")
        assert {job["outcome"] for job in await gateway.jobs(model, 21)} == {"completed"}


@pytest.mark.usefixtures("retries")
async def test_a_node_that_dies_with_a_request_is_not_taken_for_one_that_was_idle(gateway: Gateway) -> None:
    """Its attempt stands in the ledger already, and another node's work must not be credited to it."""
    dies = Behaviour(delay_seconds=1.8, cut_head_after=0, ending=Ending.RESET)
    async with FaultNode(dies) as bad, FaultNode(Behaviour(answer=chat_answer())) as good:
        model, bad_id = await add_warm(gateway, bad)
        good_id = await gateway.add_node(good.url, model, beat={"load": 1})
        chat = asyncio.ensure_future(gateway.chat(model))
        await bad.until(lambda node: len(node.requests) == 2)
        await gateway.beat(bad_id, status="unhealthy")
        answer = await chat
        assert (answer.status_code, answer.headers["x-lucid-node"]) == (200, good_id)
        jobs = [job for job in await gateway.jobs(model, 3) if job["id"] == answer.headers["x-lucid-job"]]
        told = {(job["attempt"], job["outcome"], job["reason"], job["passportId"]) for job in jobs}
        assert told == {(1, "failed", "connection_lost", bad_id), (2, "completed", None, good_id)}


async def test_a_node_that_is_silent_for_too_long_is_given_up(gateway: Gateway) -> None:
    """The absolute deadline holds here too."""
    async with FaultNode(SILENT) as node:
        model, _ = await add_warm(gateway, node)
        began = time.monotonic()
        answer = await gateway.chat(model)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "NODE_TIMEOUT")
        assert time.monotonic() - began < within(4)


async def test_a_client_that_leaves_frees_the_node_at_once(gateway: Gateway) -> None:
    """The node is hung up on, and the ledger says why."""
    async with FaultNode(SILENT) as node:
        model, node_id = await add_warm(gateway, node)
        client = await Client.open(port_of(gateway))
        client.send(request_bytes(gateway, model))
        await node.until(lambda node: len(node.requests) == 2)
        assert (await gateway.health(node_id))["inFlight"] == 1
        await client.close()
        await node.until(lambda node: not node.open_connections, within(LEFT_SECONDS))
        await gateway.becomes_idle(node_id)
        jobs = await gateway.jobs(model, 2)
        assert (jobs[0]["outcome"], jobs[0]["reason"]) == ("cancelled", "client_left")


async def test_a_revoked_key_ends_what_it_runs(gateway: Gateway) -> None:
    """The client is told so, well within the half minute that streams have."""
    key = await gateway.new_key()
    async with FaultNode(SILENT) as node, gateway.served.client(key["key"], timeout_seconds=60) as client:
        model, _ = await add_warm(gateway, node)
        body = {"model": model, "messages": QUESTION}
        # The lane's own answer deadline is three seconds in these tests, so the key is looked at within that time.
        asked = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
        await node.until(lambda node: len(node.requests) == 2)
        await gateway.admin.delete(f"/keys/{key['id']}")
        answer = await asyncio.wait_for(asked, within(REVOKED_SECONDS))
        assert answer.status_code in {401, 504}
        again = await client.post("/v1/chat/completions", json=body)
        assert again.status_code == 401


async def test_a_refusal_that_is_no_json_is_told_in_our_words(gateway: Gateway) -> None:
    """As the ordinary lane tells it, with the job's id: it is a page of something before the node, which failed."""
    async with FaultNode(Behaviour(answer=respond(b"<p>no", status=400, content_type="text/html"))) as node:
        model, node_id = await add_warm(gateway, node)
        answer = await gateway.chat(model)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "NODE_FAILED")
        assert error["details"]["attempts"] == [{"passportId": node_id, "reason": "http_400"}]
        assert "<p>" not in answer.text
        assert answer.headers["x-lucid-attempts"] == "1"
        told = {(job["id"], job["outcome"], job["reason"]) for job in await gateway.jobs(model, 2)}
        assert (answer.headers["x-lucid-job"], "failed", "http_400") in told


async def test_a_service_that_stops_answers_what_runs(postgres_and_template: tuple[str, str]) -> None:
    """Then it closes the connection, and says so."""
    url = await postgres.clone(*postgres_and_template)
    with folder() as made, Served(made, url) as served:
        async with open_gateway(served) as gateway, FaultNode(SLOW) as node:
            model, _ = await add_warm(gateway, node)
            client = await Client.open(port_of(gateway))
            client.send(request_bytes(gateway, model))
            await node.until(lambda node: len(node.requests) == 2)
            assert await express_count(gateway) == 1
            assert served.process is not None
            served.process.send_signal(signal.SIGTERM)
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close\r\n" in answer
            assert answer.endswith(b"}")
            assert await asyncio.to_thread(served.process.wait, 30) == 0
    await postgres.drop(url)


@pytest.mark.parametrize("second", ["Authorization: {}", "authorization: {}", "AUTHORIZATION: {}"])
@pytest.mark.parametrize("which", ["good last", "bad last", "both good"])
@pytest.mark.parametrize("stream", [False, True])
async def test_two_keys_are_none_in_either_lane(gateway: Gateway, second: str, which: str, *, stream: bool) -> None:
    """In whatever case the header is written: no two readers may hold a request to be of different owners."""
    good, bad = f"Bearer {gateway.key}", "Bearer nobody"
    first, last = {"good last": (bad, good), "bad last": (good, bad), "both good": (good, good)}[which]
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        model, _ = await add_warm(gateway, node)
        whole = request_bytes(gateway, model, second.format(last), stream=stream)
        client = await Client.open(port_of(gateway))
        client.send(whole.replace(good.encode(), first.encode(), 1))
        assert b"HTTP/1.1 401 " in await client.answer()
        await client.close()
        assert len(node.requests) == 1
    async with httpx.AsyncClient(base_url=gateway.served.url, trust_env=False) as plain:
        for path in ("/passports", "/keys", "/compute"):
            answer = await plain.get(path, headers=[("Authorization", first), (second.split(":", maxsplit=1)[0], last)])
            assert answer.status_code == 401


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_resets_gets_a_request_twice_at_most(gateway: Gateway, *, stream: bool) -> None:
    """Once on a connection that was idle, which may have been closed, and once on a new one; then another."""
    await gateway.earn_retries()
    resets = Behaviour(cut_head_after=0, ending=Ending.RESET)
    served = Behaviour(answer=chat_stream("said") if stream else chat_answer())
    async with FaultNode(Behaviour(answer=chat_answer())) as bad, FaultNode(served) as good:
        model, _ = await add_warm(gateway, bad)
        bad.behaviour = Behaviour(answer=chat_answer(), delay_seconds=0.2)
        answers = await asyncio.gather(*(gateway.chat(model) for _ in range(5)))  # so many connections are idle now
        assert {answer.status_code for answer in answers} == {200}
        bad.behaviour, before = resets, len(bad.requests)
        assert (await gateway.chat(model, stream=stream)).status_code == 502
        assert len(bad.requests) - before == 2
        await gateway.add_node(good.url, model, beat={"load": 1})
        await asyncio.sleep(1.1)  # it is shunned for a second
        before = len(bad.requests)
        assert (await gateway.chat(model, stream=stream)).status_code == 200
        assert len(bad.requests) - before <= 2


async def test_a_node_that_was_slow_once_is_tried_again_also_when_it_closed_its_connections(gateway: Gateway) -> None:
    """A choice that looks whether it still is slow is not lost because the express lane has no connection there."""
    answers = Behaviour(answer=chat_answer(), idle_seconds=0.1)
    async with FaultNode(answers) as slow, FaultNode(Behaviour(answer=chat_answer())) as other:
        model, _ = await add_warm(gateway, slow)
        slow.script.append(Behaviour(answer=chat_answer(), delay_seconds=1.5, idle_seconds=0.1))
        assert (await gateway.chat(model)).status_code == 200
        await gateway.add_node(other.url, model)
        await slow.until(lambda node: not node.open_connections)
        for _ in range(100):
            assert (await gateway.chat(model)).status_code == 200
        await slow.until(lambda node: not node.open_connections)
        before = len(slow.requests)
        for _ in range(400):
            assert (await gateway.chat(model)).status_code == 200
        assert len(slow.requests) > before


def unusual_forms(gateway: Gateway, model: str, *, stream: bool) -> dict[str, bytes]:
    """Return a chat's request in forms that the fast path leaves to uvicorn; each ends its connection."""
    close = "Connection: close"
    usual = request_bytes(gateway, model, close, stream=stream)
    head, body = usual.split(b"\r\n\r\n")
    unsized = re.sub(rb"(?i)content-length: \d+\r\n", b"", head + b"\r\n")
    packed = gzip.compress(body)
    return {
        "close": usual,
        "http/1.0": usual.replace(b"HTTP/1.1", b"HTTP/1.0"),
        "expect": request_bytes(gateway, model, close, "Expect: 100-continue", stream=stream),
        "origin": request_bytes(gateway, model, close, "Origin: http://page.example", stream=stream),
        "large": request_bytes(gateway, model, close, stream=stream, padding="x" * 200_000),
        "chunked": unsized + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "gzip": unsized + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(packed), packed),
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_of_any_form_is_served_in_the_same_way(gateway: Gateway, *, stream: bool) -> None:
    """Its response has the same headers, except those that say where it ends, and the ledger keeps it."""
    texts = ("one", " two")
    async with FaultNode(Behaviour(answer=chat_stream(*texts) if stream else chat_answer())) as node:
        model = await gateway.add_model()
        await gateway.add_node(node.url, model)
        usual = {name.lower() for name in (await gateway.chat(model, stream=stream)).headers}
        forms = unusual_forms(gateway, model, stream=stream)
        for form, data in forms.items():
            client = await Client.open(port_of(gateway))
            client.send(data)
            answer = (await client.rest()).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), (form, answer)
            names = {line.split(b":")[0].decode() for line in head.split(b"\r\n")[1:]}
            assert names - {"connection"} == usual - ({"transfer-encoding"} if form == "http/1.0" else set()), form
            said = [b'"one"', b'" two"', b"data: [DONE]"] if stream else [b'"said"']
            assert all(part in body for part in said), (form, answer)
        jobs = await gateway.jobs(model, len(forms) + 1)
        assert [job["outcome"] for job in jobs] == ["completed"] * (len(forms) + 1)
        assert len({job["tokensOut"] for job in jobs}) == 1


async def test_a_large_body_of_a_client_that_leaves_is_given_up(gateway: Gateway) -> None:
    """Before it is complete no node gets it, and nothing of it stays."""
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        model, _ = await add_warm(gateway, node)
        data = request_bytes(gateway, model, padding="x" * 300_000)
        for _ in range(20):
            client = await Client.open(port_of(gateway))
            client.send(data[:200_000])
            await asyncio.sleep(0.02)
            await client.close()
        assert (await gateway.chat(model)).status_code == 200
        text = (await gateway.admin.get("/metrics")).text
        assert re.search(r"^lucid_inference_running(?:\{.*\})? 0\.0$", text, re.MULTILINE), text
        assert len(node.requests) == 2
